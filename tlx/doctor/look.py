"""What one process finds out by itself: which checks there are, and which of several ranks makes which."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import psutil

from tlx.base import limits
from tlx.base.errors import UserError
from tlx.base.launcher import environment
from tlx.base.slurm import present
from tlx.doctor import accelerates, hardware, network, place, services, slurm, software, storage
from tlx.doctor.findings import PATIENCE_S, Finding, Section, guarded, of_error, ok
from tlx.doctor.needs import Needs, needs_of
from tlx.doctor.place import Place
from tlx.doctor.shown import gib
from tlx.plan.config import Config

Check = tuple[str, Callable[[], Iterable[Finding]]]

_LONG_S = 120.0  # torch's import from a cold network file system, the trace of a large network


def section(title: str, checks: Sequence[Check], *, limit_s: float = PATIENCE_S) -> Section:
    """Runs checks one after the other, each guarded."""
    return Section(title, tuple(f for name, check in checks for f in guarded(name, check, limit_s=limit_s)))


def is_on_cpu(config: Config) -> bool:
    """Whether the CPU is asked for, by the configuration or by accelerate's environment."""
    return config.world.device == "cpu" or (environment().on_cpu and config.world.device == "auto")


@dataclass
class Look:
    """
    Attributes:
        given: the user's configuration, if there is one; `config` is that, or a stand-in.
        quick: nothing is measured and no plan is made.
        needs: of the training; known after :meth:`training`.
    """

    given: Config | None
    config: Config
    place: Place
    quick: bool
    needs: Needs | None = field(default=None, init=False)

    def sections(self) -> Iterator[Section]:
        yield section("software", self._software(), limit_s=_LONG_S)
        yield section("launcher and network", self._network())
        if self.given is not None:
            yield section("configuration", self._training(self.given), limit_s=_LONG_S)
        yield section("this node", self._node())
        if self.given is not None and self.place.rank == 0:
            yield section("run folder", self._run_folder(self.given))
        if self.place.local == 0:
            yield section("weights and tracking", self._services(), limit_s=_LONG_S)
        if self.place.rank == 0:
            yield section("Slurm", self._slurm())

    def _software(self) -> list[Check]:
        on_cpu, wanted = is_on_cpu(self.config), self.config.world.device == "cuda"
        in_job = not self.place.alone or environment().job is not None

        def torch_and_driver() -> Iterator[Finding]:
            yield from software.torch_and_driver(environment().variables, on_cpu=on_cpu, wanted=wanted, in_job=in_job)

        return [
            ("versions", software.versions),
            ("torch and driver", torch_and_driver),
            ("decoder", software.decoder),
        ]

    def _network(self) -> list[Check]:
        env = environment().variables
        checks: list[Check] = [
            ("launcher", lambda: place.launcher(self.place, env)),
            ("accelerate", lambda: accelerates.environment(self.config, environment())),
            ("MASTER_ADDR", lambda: network.meeting_point(self.place, env, served=environment().agent_serves)),
        ]
        if self.place.rank == 0:
            checks.append(("accelerate's file", lambda: accelerates.default_file(self.given)))
        if self.place.local == 0:
            there = [name for _, name in socket.if_nameindex()]
            checks.append(("host name", lambda: network.host_name(self.place, env)))
            checks.append(("interface", lambda: network.interfaces(env, there, nodes=self.place.nodes)))
        return checks

    def _training(self, config: Config) -> list[Check]:
        first = self.place.local == 0
        checks: list[Check] = [("shards", lambda: storage.shards(config, measure=first and not self.quick))]
        if first and not self.quick:
            checks.append(("plan", lambda: self._plan(config)))
        if self.place.rank:
            checks.append(("run folder", lambda: self._writable(config)))
        return checks

    def _plan(self, config: Config) -> Iterator[Finding]:
        try:
            self.needs = needs_of(config, config.world.size or self.place.size)
        except UserError as error:
            yield of_error("plan", error, "tlx plan CONFIG tells more")
            return
        device = f", about {gib(self.needs.memory)} on the device of a rank" if self.needs.memory else ""
        yield ok("plan", f"a checkpoint takes {gib(self.needs.checkpoint)}{device}")

    def _writable(self, config: Config) -> Iterator[Finding]:
        broken = storage.writable(config.run, "run folder", "run")
        if broken is not None:
            yield broken

    def _node(self) -> list[Check]:
        workers = self.config.data.workers
        checks: list[Check] = [("GPU", self._gpus), ("ranks and GPUs", self._ranks_and_gpus)]
        if self.place.alone:  # of several ranks, facts.joint tells
            checks.append(("cores", self._cores))
        if self.place.local == 0:
            checks.append(("memory", self._memory))
            checks.append(("/dev/shm", lambda: hardware.shm(self.place, gpus=bool(self._gpu_count()))))
        checks.append(("limits", lambda: hardware.system_limits(self.place, workers=workers)))
        return checks

    def _gpu_count(self) -> int:
        """Those that the training may take."""
        import torch

        return 0 if is_on_cpu(self.config) or not torch.cuda.is_available() else torch.cuda.device_count()

    def _gpus(self) -> Iterator[Finding]:
        if self._gpu_count():
            found, sick = hardware.look_at_gpus(self.place)
            precision = self.config.loop.precision if self.given is not None else None
            needed = self.needs.memory if self.needs is not None else None
            yield from hardware.gpus(found, precision=precision, needed=needed)
            yield from sick

    def _ranks_and_gpus(self) -> Iterator[Finding]:
        on_cpu, backend = is_on_cpu(self.config), self.config.world.backend
        yield from hardware.ranks_and_gpus(self.place, self._gpu_count(), on_cpu=on_cpu, backend=backend)

    def _cores(self) -> Iterator[Finding]:
        import torch

        yield from hardware.judge_cores(
            len(limits.cores()), limits.cpu_quota(), ranks=1, workers=self.config.data.workers,
            threads=torch.get_num_threads(), on_cpu=not self._gpu_count(),
            in_step=place.in_step(environment().variables),
        )  # fmt: skip

    def _memory(self) -> Iterator[Finding]:
        available = psutil.virtual_memory().available
        yield from hardware.memory(available, limits.memory_left(), ranks=self.place.here, needs=self.needs)

    def _run_folder(self, config: Config) -> list[Check]:
        measure = not self.quick
        return [("run folder", lambda: storage.run_folder(config.run, needs=self.needs, measure=measure))]

    def _services(self) -> list[Check]:
        checks: list[Check] = [
            ("weights cache", services.caches),
            ("weights", lambda: services.weights(self.given)),
        ]
        if self.place.rank == 0:
            checks.append(("W&B", lambda: services.tracking(self.given, environment().variables)))
        return checks

    def _slurm(self) -> list[Check]:
        checks: list[Check] = [("Slurm", lambda: slurm.outside(environment().variables))]
        if present("scontrol"):
            checks.append(("Slurm", slurm.cluster))
            if environment().job:
                checks.append(("job", lambda: slurm.job(environment().variables, self.place)))
        return checks
