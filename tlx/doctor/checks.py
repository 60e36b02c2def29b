"""What one process finds out by itself: which checks there are, and which of several ranks makes which."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from tlx.base import limits
from tlx.base.launcher import environment
from tlx.base.slurm import present
from tlx.doctor import accelerates, hardware, network, place, services, slurm, software, storage
from tlx.doctor.findings import PATIENCE_S, Finding, Section, guarded
from tlx.doctor.place import Place
from tlx.plan.config import Config

Check = tuple[str, Callable[[], Iterable[Finding]]]

_LONG_S = 120.0  # torch's import from a cold network file system, weights of a large network


def section(title: str, checks: Sequence[Check], *, limit_s: float = PATIENCE_S) -> Section:
    """Runs checks one after the other, each guarded."""
    return Section(title, tuple(f for name, check in checks for f in guarded(name, check, limit_s=limit_s)))


def is_on_cpu(config: Config) -> bool:
    """Whether the CPU is asked for, by the configuration or by accelerate's environment."""
    return config.world.device == "cpu" or (environment().on_cpu and config.world.device == "auto")


@dataclass
class DoctorChecks:
    """
    Attributes:
        given: the user's configuration, if there is one; `config` is that, or a stand-in.
    """

    given: Config | None
    config: Config
    place: Place

    def sections(self) -> Iterator[Section]:
        yield section("software", self._software(), limit_s=_LONG_S)
        yield section("launcher and network", self._network())
        yield section("this node", self._node())
        yield section("data and run folder", self._folders(), limit_s=_LONG_S)
        if self.place.local == 0:
            yield section("weights", [("weights", lambda: services.weights(self.given))], limit_s=_LONG_S)
        if self.place.rank == 0:
            yield section("Slurm", self._slurm())

    def _software(self) -> list[Check]:
        on_cpu, wanted = is_on_cpu(self.config), self.config.world.device == "cuda"
        here = environment()
        in_job = not self.place.alone or here.job is not None

        def torch_and_driver() -> Iterator[Finding]:
            return software.torch_and_driver(here.variables, on_cpu=on_cpu, wanted=wanted, in_job=in_job)

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
        if self.place.local == 0:
            there = [name for _, name in socket.if_nameindex()]
            checks.append(("host name", lambda: network.host_name(self.place, env)))
            checks.append(("interface", lambda: network.interfaces(env, there, nodes=self.place.nodes)))
        return checks

    def _node(self) -> list[Check]:
        workers = self.config.data.workers
        checks: list[Check] = [("GPU", self._gpus)]
        if self.place.alone:  # of several ranks, facts.joint tells
            cores, quota = len(limits.cores()), limits.cpu_quota()
            checks.append(("cores", lambda: hardware.judge_cores(cores, quota, ranks=1, workers=workers)))
        if self.place.local == 0:
            checks.append(("/dev/shm", lambda: hardware.shm(self.place, gpus=bool(self._gpu_count()))))
            checks.append(("limits", lambda: hardware.system_limits(self.place, workers=workers)))
        return checks

    def _gpu_count(self) -> int:
        """Those that the training may take."""
        import torch

        return 0 if is_on_cpu(self.config) or not torch.cuda.is_available() else torch.cuda.device_count()

    def _gpus(self) -> Iterator[Finding]:
        count = self._gpu_count()
        if count:
            yield from hardware.gpus(self.place)
            yield from hardware.ranks_and_gpus(self.place, count, backend=self.config.world.backend)

    def _folders(self) -> list[Check]:
        config = self.given
        if config is None:
            return []
        checks: list[Check] = [("shards", lambda: storage.shards(config))]
        if self.place.local == 0:
            checks.append(("run folder", lambda: storage.run_folder(config.run)))
        return checks

    def _slurm(self) -> list[Check]:
        if not present("scontrol"):
            return []
        checks: list[Check] = [("Slurm", slurm.cluster)]
        if environment().job:
            checks.append(("job", lambda: slurm.job(environment().variables, self.place)))
        return checks
