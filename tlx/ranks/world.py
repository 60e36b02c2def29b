"""Ranks, device, precision and collectives. The only module that computes with accelerate.

accelerate gives device, autocast, gradient scaler and backward. It never sees the model, the loader or a scheduler:
those are ours, wrapped anew for each phase. What its environment or a launch config asks for is compared with the
configuration, and a conflict is an error instead of a silent override.
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from tlx.base.addresses import addresses, loopback
from tlx.base.errors import ConfigError, TlxError, UserError
from tlx.base.launcher import Environment, environment, export
from tlx.base.terminal import escaped
from tlx.plan.config import Config
from tlx.ranks.accelerate_settings import Source, conflicts, promised
from tlx.ranks.heartbeat import gather_by_store
from tlx.ranks.same_inputs import check_start
from tlx.ranks.store_prefix import of_this_attempt
from tlx.ranks.watch import Watch

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store


@dataclass(frozen=True)
class World:
    """The ranks of one training.

    Attributes:
        rank, size: of all processes.
        device: of this rank.
        launched: a launcher (torchrun, accelerate launch) watches over this process.
        watch: names ranks that die or hang; outside of `tlx train` it does nothing.
        first: nobody had asked accelerate for a precision and a device in this process before.
    """

    rank: int
    size: int
    device: torch.device
    launched: bool
    accelerator: Any
    watch: Watch = field(default_factory=Watch)
    first: bool = False

    @property
    def distributed(self) -> bool:
        """Whether there is a process group; a launcher makes one even for a single rank."""
        return dist.is_initialized()

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def local_main(self) -> bool:
        """The first rank of its machine."""
        return environment().local_rank == 0

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """fp16's gradient scaler, else None."""
        scaler: torch.amp.GradScaler | None = self.accelerator.scaler
        return scaler

    def autocast(self) -> AbstractContextManager[None]:
        context: AbstractContextManager[None] = self.accelerator.autocast()
        return context

    def backward(self, loss: torch.Tensor) -> None:
        self.accelerator.backward(loss)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor summed over all ranks, in place."""
        if self.distributed:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensors: Sequence[torch.Tensor]) -> None:
        """Rank 0's values on every rank, in place."""
        if self.distributed:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    def from_main(self, value: Any) -> Any:
        """Rank 0's object on every rank."""
        if not self.distributed:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device if dist.get_backend() == "nccl" else None)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's object, by rank."""
        if not self.distributed:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.distributed:
            dist.barrier()

    def leave(self) -> None:
        """A lone training is over: the next one in this process, as in a notebook, may have another precision or
        device, which accelerate would refuse as long as it remembers these."""
        from accelerate.state import AcceleratorState

        if self.first and not self.distributed:
            AcceleratorState._reset_state(reset_partial_state=True)  # there is no public way

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def enter(config: Config, watch: Watch | None = None) -> World:
    """Joins the world that the launcher has made.

    Args:
        watch: begins as soon as ranks can hear of each other; whoever gives one closes it.

    Raises:
        ConfigError: accelerate's environment or config file conflicts with the configuration.
        UserError: the number of ranks is not what was asked for; ranks with different configurations or code.
    """
    here = environment()
    if problems := conflicts(config, here.variables, Source.of(here)):
        raise ConfigError(problems)
    size, local = here.size, here.local_rank
    watch = watch or Watch()
    # before anything depends on the configuration: ranks with different ones would wait for each other
    meets = here.meets and not dist.is_initialized()
    if meets and math.isfinite(watch.patience_s):
        watch.begin(here.rank, size)
    store = meet(config, watch) if meets else None
    if store is None and math.isfinite(watch.patience_s):
        watch.start(None, 0, 1)
    _check_size(config, here)
    cpu = _on_cpu(config, here)
    if not cpu:
        # two ranks may share a GPU over gloo
        export("ACCELERATE_TORCH_DEVICE", f"cuda:{local % torch.cuda.device_count()}")
        torch.cuda.set_device(local % torch.cuda.device_count())
    if store is not None:
        backend = config.world.backend or ("gloo" if cpu else "nccl")
        # asked alike on every rank of a machine
        if backend == "nccl" and (cpu or here.local_size > torch.cuda.device_count()):
            raise UserError(
                f"nccl needs a GPU for each rank; this machine has {torch.cuda.device_count()} for {here.local_size}",
                where="world.backend",
                todo=f"start at most {torch.cuda.device_count()} processes here, or set world.backend=gloo",
            )
        rank, limit = here.number("RANK", 0), _limit(config)
        try:
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
        except RuntimeError as error:
            why = _own_name(error, several=here.local_size < size)
            if why is None:
                raise
            raise TlxError(
                f"ranks cannot connect to each other: {str(error).splitlines()[0][:300]}\n  -> {why}"
            ) from error
    return _world(config, watch, cpu=cpu, size=size)


def meet(config: Config, watch: Watch) -> Store:
    """Where ranks find each other before they can compute together; there they compare their configurations.

    Raises:
        UserError: they differ, or their code does; nothing says where to meet.
        TlxError: a rank has not come.
    """
    store, rank, size = rendezvous_store(_limit(config))
    if math.isfinite(watch.patience_s):
        watch.start(store, rank, size, serves=rank == 0 and not environment().agent_serves)
    if size > 1:
        ask = partial(gather_by_store, store, rank, size, timeout=_limit(config))
        check_start(config, ask)
    return store


def rendezvous_store(limit: timedelta) -> tuple[Store, int, int]:
    """The store where ranks meet, this rank and their number.

    Raises:
        UserError: nothing says where to meet.
        TlxError: a rank has not come in time.
    """
    _find_first(limit)
    try:
        found: tuple[Store, int, int] = next(rendezvous("env://", timeout=limit))
    except dist.DistError as error:
        here = environment()
        where = f"{here.get('MASTER_ADDR')}:{here.get('MASTER_PORT')}"
        raise TlxError(
            f"not all {here.get('WORLD_SIZE')} ranks have met at {where} within {limit}: "
            f"{str(error).splitlines()[0]}\n  -> look at the output of the others: "
            f"MASTER_ADDR must lead them to this machine ({socket.gethostname()}), MASTER_PORT to this port"
        ) from error
    store, rank, size = found
    store.set_timeout(limit)
    if size > 1:
        store = of_this_attempt(store, rank, size, timeout=limit)
    return store, rank, size


def _find_first(limit: timedelta) -> None:
    """Waits until rank 0 can be reached where this rank is told that it is.

    torch would wait for three times as long, and then leave a trace of C++ functions.

    Raises:
        UserError: the environment does not say where, or what cannot be an address.
        TlxError: nobody is there in time.
    """
    here = environment()
    address, port, rank = map(here.get, ("MASTER_ADDR", "MASTER_PORT", "RANK"))
    if not address or not port:
        raise UserError(
            f"this is rank {rank} of {here.get('WORLD_SIZE')}, and nothing says where ranks meet",
            where="MASTER_ADDR, MASTER_PORT",
            todo="export the address of rank 0's machine and a free port there, the same for every rank",
        )
    if not _is_port(port, here.get("WORLD_SIZE")):
        todo = "export a free port of rank 0's machine, 1 to 65535, the same for every rank"
        raise UserError(f"{port!a} is no port", where="MASTER_PORT", todo=todo)
    if rank == "0" and not here.agent_serves:
        return
    end, pause = time.monotonic() + limit.total_seconds(), 0.05
    while True:
        left = end - time.monotonic()
        try:
            socket.create_connection((address, int(port)), timeout=max(min(left, 10.0), 1.0)).close()
            return
        except OSError as error:
            if left <= 0:
                raise TlxError(_nobody(address, port, rank, limit, error)) from error
        except UnicodeError as error:
            raise UserError("no machine can have this name", where="MASTER_ADDR", todo=_no_name(address)) from error
        time.sleep(max(min(pause, end - time.monotonic()), 0.0))
        pause = min(1.5 * pause, 1.0)


def _is_port(text: str, size: str) -> bool:
    """One rank alone may have 0, any that is free; several would not find each other."""
    least = 1 if size != "1" else 0
    return text.isascii() and text.isdigit() and len(text) < 6 and least <= int(text) < 65536


def _no_name(address: str) -> str:
    here = socket.gethostname()
    return f"{escaped(address)} is no name that {here} knows: give rank 0's machine as an address, or see /etc/hosts"


def _nobody(address: str, port: str, rank: str, limit: timedelta, error: OSError) -> str:
    here = socket.gethostname()
    if isinstance(error, socket.gaierror):
        todo = _no_name(address)
    elif loopback(addresses(address)):
        todo = f"{address} is {here} itself: if rank 0 runs elsewhere, give its address as the other machines see it"
    elif isinstance(error, TimeoutError):
        todo = (
            "no packet comes back: see that this is an address in a network that both machines are in, and the firewall"
        )
    else:
        todo = "see that rank 0 was started, on that machine, with that port, and what it says"
    return (
        f"rank {rank} ({here}) has found nobody at MASTER_ADDR:MASTER_PORT = {address}:{port} within {limit}: "
        f"{error.strerror or error}\n  -> {todo}; more in launch/README.md"
    )


def _own_name(error: RuntimeError, *, several: bool) -> str | None:
    """Whether gloo has told the other machines an address of this one that leads them to themselves."""
    host = socket.gethostname()
    named = bool(environment().get("GLOO_SOCKET_IFNAME"))
    if "connectFullMesh" not in str(error) or named or not several or not loopback(addresses(host)):
        return None
    return (
        f"the name of this machine, {host}, resolves to a loopback address here, which gloo gives to the others: "
        "on each machine export GLOO_SOCKET_IFNAME=NAME, the interface (`ip addr`) that leads to the others; "
        "more in launch/README.md"
    )


def _limit(config: Config) -> timedelta:
    """Of collectives: longer than the watch's patience, which knows who is at fault."""
    return timedelta(minutes=config.world.timeout_minutes) + timedelta(seconds=30)


def _world(config: Config, watch: Watch, *, cpu: bool, size: int) -> World:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # fp16 on a CPU has no scaler in accelerate and computes in fp32 without a word
    if cpu and config.loop.precision == "fp16":
        raise UserError("fp16 needs a GPU", where="loop.precision", todo="set bf16 or fp32")
    precision = {"fp32": "no"}.get(config.loop.precision, config.loop.precision)
    first = not AcceleratorState._shared_state
    accelerator = Accelerator(mixed_precision=precision, cpu=cpu)
    rank = dist.get_rank() if dist.is_initialized() else 0
    if accelerator.num_processes != size or accelerator.process_index != rank:
        raise TlxError(
            f"accelerate believes in rank {accelerator.process_index} of {accelerator.num_processes}, "
            f"the launcher set rank {rank} of {size}"
        )
    return World(rank, size, accelerator.device, environment().launched, accelerator, watch, first)


def _on_cpu(config: Config, here: Environment) -> bool:
    asked: Literal["auto", "cpu", "cuda"] = config.world.device
    if asked == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no GPU that torch can use", where="world.device=cuda", todo="set auto or cpu")
    return asked == "cpu" or (asked == "auto" and (here.on_cpu or not torch.cuda.is_available()))


def _check_size(config: Config, here: Environment) -> None:
    size = here.size
    if config.world.size is not None and config.world.size != size:
        raise UserError(
            f"the configuration expects {config.world.size} ranks, the launcher has started {size}",
            where="world.size",
            todo="see launch/README.md for launch commands that give the number they name",
        )
    if not here.ranked and here.step_tasks > 1:
        raise UserError(
            f"srun has started {here.step_tasks} tasks, and nothing tells them that they are ranks of one training: "
            "each would train alone, in the same folder",
            where="WORLD_SIZE",
            todo="use slurm/train.sbatch; or, in the task, export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS "
            "LOCAL_RANK=$SLURM_LOCALID and the same MASTER_ADDR and MASTER_PORT everywhere; or, where each task is "
            "a training with a folder of its own, export WORLD_SIZE=1",
        )
    asked = promised(Source.of(here)) if size == 1 else None
    if asked is not None and asked[0] != size:
        raise UserError(
            f"the launcher was asked for {asked[0]} processes and has started {size}",
            where=asked[1],
            todo="on CPU: ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N, or torchrun; "
            "see launch/README.md",
        )
