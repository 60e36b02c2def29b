"""Ranks join the world as training does, and add up numbers; what happens where one hangs."""

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
from tlx.doctor.findings import Finding, fault, merged, of_error, ok, unchecked, warning
from tlx.doctor.network import INTERFACES
from tlx.doctor.place import Place
from tlx.doctor.shown import gib
from tlx.doctor.wire import Wire

if TYPE_CHECKING:
    from tlx.doctor.needs import Needs
    from tlx.plan.config import Config

_GRACE_S = 5.0  # that other ranks leave rank 0 to speak
_SLOW = 1.25e9  # bytes per second, 10 Gb/s


def compute(config: Config, place: Place, needs: Needs | None, wait_s: float) -> Iterator[Finding]:
    """Joins the world as training does, and adds up."""
    import torch

    from tlx.doctor import traffic
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
        yield believes(world, place)
        if world.distributed:
            found = traffic.measure(world.device)
            if place.rank == 0:
                yield judge_traffic(found, needs, nodes=place.nodes)
    except traffic.WrongSum as error:
        yield fault("all_reduce", f"gave a wrong sum: {error}", "a faulty GPU or link? NCCL_P2P_DISABLE=1 to compare")
    except RuntimeError as error:
        yield fault("all_reduce", f"failed: {first_line(error)}", remedy(error))
    finally:
        with suppress(RuntimeError, ValueError, OSError):  # of a process group that has failed; the finding says how
            world.close()


def remedy(error: Exception) -> str:
    """Of errors of gloo, of nccl, of the store, and of a GPU that has failed, which are all RuntimeErrors."""
    import torch.distributed as dist

    text = str(error)
    if isinstance(error, (dist.DistError, TlxError, OSError)) or "gloo" in text or "connect" in text:
        return f"NCCL_DEBUG=INFO tells more; {INTERFACES}"
    return hardware.SICK if "CUDA error" in text else "look at the output of all ranks, and at nvidia-smi"


def believes(world: Any, place: Place) -> Finding:
    """What accelerate makes of it; :func:`tlx.ranks.rendezvous.join_ranks` has compared ranks already."""
    import torch.distributed as dist

    accelerator = world.accelerator
    backend = f" over {dist.get_backend()}" if world.distributed else ""
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    count = accelerator.num_processes
    ranks = "1 rank" if count == 1 else f"{count} ranks"
    said = f"{ranks} ({'not distributed' if kind == 'NO' else kind}) on {world.device.type}{backend}"
    if accelerator.num_processes != place.size:
        return fault("accelerate believes in", f"{said}, the launcher set {place.size}", "see launch/README.md")
    return ok("accelerate believes in", said)


def judge_traffic(found: Any, needs: Needs | None, *, nodes: int) -> Finding:
    said = str(found)
    if needs is not None and found.ranks > 1:
        size = gib(needs.gradients)
        said += f"; gradients of {size} take about {found.takes(needs.gradients) * 1e3:.3g} ms an update"
    if found.backend == "nccl" and nodes > 1 and found.bus < _SLOW:
        return warning(
            "all_reduce",
            f"{said}; slower than 10 Gb/s",
            "NCCL_DEBUG=INFO tells which network it takes: NET/IB or NET/Socket; NCCL_SOCKET_IFNAME, NCCL_IB_HCA",
        )
    return ok("all_reduce", said)


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
        give_up(_hanging(wire, hosts, wait_s))

    timer = threading.Timer(wait_s + (_GRACE_S if wire.rank else 0), expired)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _hanging(wire: Wire, hosts: Mapping[int, str], wait_s: float) -> list[Finding]:
    done = threading.Event()
    found: list[Finding] = []

    def ask() -> None:
        try:
            found.extend(_computed(wire, hosts))
        except Exception as error:  # the store may hang as well
            found.append(unchecked("all_reduce", error))
        done.set()

    threading.Thread(target=ask, daemon=True).start()
    done.wait(_GRACE_S / 2)
    said = f"ranks have met, and could not add up numbers within {wait_s:.0f} s"
    return [*found, fault("all_reduce", said, f"NCCL_DEBUG=INFO tells more; {INTERFACES}")]


def first_line(error: Exception) -> str:
    """Of its message, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
