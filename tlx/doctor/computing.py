"""Ranks join as training does, and add up numbers; what happens where one hangs. nccl-tests measures how fast."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from tlx.base.errors import ConfigError, TlxError, UserError
from tlx.base.terminal import say
from tlx.doctor import hardware
from tlx.doctor.findings import Finding, fault, first_line, guarded, merged, of_error, ok
from tlx.doctor.network import INTERFACES
from tlx.doctor.place import Place
from tlx.doctor.wire import Wire

if TYPE_CHECKING:
    from tlx.plan.config import Config

_GRACE_S = 5.0  # that other ranks leave rank 0 to speak
_NUMBERS = 1 << 20  # of a sum: so many that nccl and gloo take the way of gradients


def compute(config: Config, place: Place, wait_s: float) -> Iterator[Finding]:
    """Joins the ranks as training does, and adds up."""
    import torch

    from tlx.ranks.rendezvous import join_ranks

    if place.alone and config.world.device == "cuda" and not torch.cuda.is_available():
        return  # "torch and driver" has told
    update: dict[str, Any] = {"timeout_minutes": wait_s / 60}
    if place.alone:
        update["size"] = None  # of the training, which is to be elsewhere
    limited = config.model_copy(update={"world": config.world.model_copy(update=update)})
    try:
        world = join_ranks(limited)
    except ConfigError as error:
        yield fault("start", "; ".join(error.problems), "make accelerate's settings and the configuration agree")
        return
    except UserError as error:
        yield of_error("start", error, "see launch/README.md")
        return
    except Exception as error:  # of gloo, of nccl, of the store
        yield fault("start", f"the process group could not be made: {first_line(error)}", remedy(error))
        return
    try:
        # that accelerate, the launcher and the configuration agree on it was compared
        yield ok("start", f"joined as training does: ranks {world.accelerator.num_processes}, on {world.device.type}")
        if world.distributed:
            yield add_up(world.device)
    except RuntimeError as error:
        yield fault("all_reduce", f"failed: {first_line(error)}", remedy(error))
    finally:
        with suppress(RuntimeError, ValueError, OSError):  # of a process group that has failed; the finding says how
            world.close()


def add_up(device: Any) -> Finding:
    """Every rank at once, in a process group: whether the sum of the ranks' numbers is right."""
    import torch
    import torch.distributed as dist

    backend, ranks = dist.get_backend(), dist.get_world_size()
    numbers = torch.full((_NUMBERS,), dist.get_rank() + 1.0, device=device if backend == "nccl" else "cpu")
    dist.all_reduce(numbers)
    low, high = (float(end) for end in torch.aminmax(numbers))
    if low != high or low != ranks * (ranks + 1) / 2:
        said = f"1 + ... + {ranks} is not {low:g} to {high:g}"
        return fault("all_reduce", said, "a faulty GPU or link? NCCL_P2P_DISABLE=1 to compare")
    return ok("all_reduce", f"{ranks} ranks add up over {backend}")


def remedy(error: Exception) -> str:
    """Of errors of gloo, of nccl, of the store, and of a GPU that has failed, which are all RuntimeErrors."""
    import torch.distributed as dist

    text = str(error)
    if isinstance(error, (dist.DistError, TlxError, OSError)) or "gloo" in text or "connect" in text:
        return f"NCCL_DEBUG=INFO tells more; {INTERFACES}"
    return hardware.SICK if "CUDA error" in text else "look at the output of all ranks, and at nvidia-smi"


def gathered(wire: Wire, hosts: Mapping[int, str], found: Sequence[Finding]) -> list[Finding]:
    """What all ranks have found together, on rank 0; where some hang, what the others have."""
    late = []
    try:
        wire.to_main("computed", [dataclasses.asdict(f) for f in found])
    except TlxError as error:
        late = [fault("all_reduce", str(error), f"look at the output of the others; {INTERFACES}")]
    return [*_computed(wire, hosts), *late] if wire.rank == 0 else []


def _computed(wire: Wire, hosts: Mapping[int, str]) -> list[Finding]:
    said = wire.said("computed")
    return merged({rank: [Finding(**f) for f in one] for rank, one in said.items()}, hosts)


@contextmanager
def alarm(
    wire: Wire, hosts: Mapping[int, str], wait_s: float, give_up: Callable[[list[Finding]], None]
) -> Iterator[None]:
    """A rank that hangs hangs all; the others leave rank 0 a while to tell.

    Args:
        give_up: is told on rank 0 what is known then; it must end the process.
    """

    def expired() -> None:
        if wire.rank:
            say(f"tlx doctor: rank {wire.rank} ({hosts[wire.rank]}) has waited {wait_s:.0f} s", error=True)
            os._exit(1)
        said = f"the ranks could not add up numbers within {wait_s:.0f} s"
        # the store may hang as well
        known = guarded("all_reduce", lambda: _computed(wire, hosts), limit_s=_GRACE_S / 2)
        give_up([*known, fault("all_reduce", said, f"NCCL_DEBUG=INFO tells more; {INTERFACES}")])

    timer = threading.Timer(wait_s + (_GRACE_S if wire.rank else 0), expired)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
