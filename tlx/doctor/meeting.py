"""Ranks meet as training does, tell rank 0 what each has found, and add up numbers together."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import secrets
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlx.doctor import hardware, slurm
from tlx.doctor.findings import Finding, Section, fault, merged, numbers, of_error, ok, unchecked, warning, worst
from tlx.doctor.limits import cores, cpu_quota
from tlx.doctor.network import INTERFACES
from tlx.doctor.place import Place, in_step
from tlx.doctor.storage import nearest
from tlx.errors import ConfigError, TlxError, UserError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

    from tlx.config import Config
    from tlx.doctor.needs import Needs

_TITLE = "between ranks"
_GRACE_S = 5.0  # that other ranks leave rank 0 to speak
_SLOW = 1.25e9  # bytes per second, 10 Gb/s
_BLOCKING = ("accelerate", "interface", "GPU", "GPU of each rank", "ranks and GPUs", "torch and driver", "versions")
_NOWHERE = ("MASTER_ADDR", "MASTER_PORT")


def blocks(finding: Finding) -> bool:
    """Whether ranks need not try to compute together: it would only fail for the same reason."""
    return finding.verdict == "fault" and finding.name in _BLOCKING


@dataclass(frozen=True)
class Facts:
    """Of one rank, for what only all of them together tell.

    Attributes:
        gpu: which one it computes on, by an identity that all processes of a node agree on.
    """

    host: str
    cores: list[int]
    quota: float | None
    threads: int
    workers: int
    gpu: str | None


def facts(place: Place, *, workers: int, on_cpu: bool) -> Facts:
    import torch

    gpu = None
    with suppress(RuntimeError):  # of a GPU that has failed; the finding on it says so
        if not on_cpu and torch.cuda.is_available():
            about = torch.cuda.get_device_properties(place.local % torch.cuda.device_count())
            gpu = str(getattr(about, "uuid", "")) or None
    return Facts(place.host, cores(), cpu_quota(), torch.get_num_threads(), workers, gpu)


@dataclass(frozen=True)
class Wire:
    """The store where ranks meet, and how long to wait there."""

    store: Store
    rank: int
    size: int
    limit: timedelta

    @classmethod
    def join(cls, wait_s: float) -> Wire:
        """As :func:`tlx.world.meet` does, without comparing what the ranks were given: what they found comes first.

        Raises:
            TlxError: not all ranks have come in time.
        """
        from tlx.world import rendezvous_store

        limit = timedelta(seconds=wait_s)
        return cls(*rendezvous_store(limit), limit)

    def to_main(self, topic: str, value: Any) -> list[Any] | None:
        """Every rank's value by rank, on rank 0; None elsewhere.

        Raises:
            TlxError: a rank has not come so far.
        """
        import torch.distributed as dist

        self.store.set(f"{topic}/{self.rank}", json.dumps(value))
        if self.rank:
            return None
        keys = [f"{topic}/{rank}" for rank in range(self.size)]
        try:
            self.store.wait(keys, self.limit)
        except dist.DistError as error:
            raise TlxError(f"{_ranks(self.missing(topic))} said nothing within {self.limit.seconds} s") from error
        return [json.loads(text) for text in self.store.multi_get(keys)]

    def from_main(self, topic: str, value: Any = None) -> Any:
        """Rank 0's value, everywhere."""
        if self.rank == 0:
            self.store.set(topic, json.dumps(value))
            return value
        return json.loads(self.store.get(topic))

    def missing(self, topic: str) -> list[int]:
        """Ranks that have said nothing on a topic."""
        return [rank for rank in range(self.size) if not self.store.check([f"{topic}/{rank}"])]

    def said(self, topic: str) -> dict[int, Any]:
        """What ranks have said on a topic so far."""
        absent = set(self.missing(topic))
        return {r: json.loads(self.store.get(f"{topic}/{r}")) for r in range(self.size) if r not in absent}

    def part(self) -> None:
        """Nobody needs rank 0's store any more."""
        self.store.set(f"bye/{self.rank}", "")
        if self.rank == 0:
            with suppress(Exception):  # a rank that has died needs it no more
                self.store.wait([f"bye/{rank}" for rank in range(self.size)], timedelta(seconds=10))


def _ranks(which: Sequence[int]) -> str:
    return f"{'rank' if len(which) == 1 else 'ranks'} {numbers(which)}"


def together(
    config: Config,
    place: Place,
    own: Sequence[Section],
    mine: Facts,
    *,
    run: Path | None,
    needs: Needs | None,
    wait_s: float,
    give_up: Callable[[Section], None],
) -> Iterator[Section]:
    """Everybody's findings, by rank 0; other ranks yield the verdict only.

    Args:
        config: to join the world with.
        own: what this rank has found.
        run: the run folder, which all nodes must see.
        give_up: shows a last section and ends the process: of a collective that hangs there is no other way out.
    """
    lost = [f for section in own for f in section.findings if f.verdict == "fault" and f.name in _NOWHERE]
    if lost:
        if place.rank == 0:
            yield from own
        else:  # nobody else can tell
            print(f"tlx doctor: rank {place.rank} ({place.host}): {lost[0].name}: {lost[0].said}", file=sys.stderr)
        yield Section(_TITLE, (fault("rendezvous", f"not tried, because of {lost[0].name}", lost[0].todo or ""),))
        return
    try:
        wire = Wire.join(wait_s)
    except TlxError as error:
        if place.rank == 0:
            yield from own
        met = _not_met(error)
        if place.rank:  # nobody else can tell
            print(f"tlx doctor: rank {place.rank} ({place.host}): {met.said}\n  -> {met.todo}", file=sys.stderr)
        yield Section(_TITLE, (met,))
        return
    begun = False
    try:
        for section in _together(config, place, wire, own, mine, run, needs, wait_s, give_up):
            begun = True
            yield section
    except Exception as error:  # a rank has gone, or does not come so far
        if place.rank == 0 and not begun:
            yield from own
        yield Section(_TITLE, (fault("ranks", _first_line(error), "look at the output of the others"),))


def _not_met(error: TlxError) -> Finding:
    said, _, todo = str(error).partition("\n  -> ")
    return fault("rendezvous", said[:500], f"{todo}; {INTERFACES}" if todo else INTERFACES)


def _together(
    config: Config,
    place: Place,
    wire: Wire,
    own: Sequence[Section],
    mine: Facts,
    run: Path | None,
    needs: Needs | None,
    wait_s: float,
    give_up: Callable[[Section], None],
) -> Iterator[Section]:
    shared = []
    with _shared_folder(wire, place, run) as seen:
        payload = {"facts": dataclasses.asdict(mine), "own": [dataclasses.asdict(s) for s in own], "seen": seen()}
        everybody = wire.to_main("found", payload)
        go, hosts = True, {}
        if everybody is not None:
            all_facts = [Facts(**one["facts"]) for one in everybody]
            hosts = {rank: f.host for rank, f in enumerate(all_facts)}
            shown = merge_sections([[_section(s) for s in one["own"]] for one in everybody], hosts)
            shared = [
                *joint(all_facts, backend=config.world.backend, on_cpu=mine.gpu is None),
                *_seen(everybody, hosts),
            ]
            go = not any(map(blocks, [*(f for s in shown for f in s.findings), *shared]))
            yield from shown
    hosts = wire.from_main("hosts", {str(rank): host for rank, host in hosts.items()})
    names = {int(rank): host for rank, host in hosts.items()}
    if wire.from_main("go", go):
        with _alarm(wire, names, shared, wait_s, give_up):
            found = list(compute(config, place, needs, wait_s))
        shared += _gathered(wire, names, found)
    elif place.rank == 0:
        shared.append(warning("all_reduce", "not tried, because of the faults above", "mend those first"))
    # what was shown already counts, too
    if place.rank == 0:
        section = Section(_TITLE, tuple(shared))
        verdict = worst(f.verdict for s in [*shown, section] for f in s.findings)
        wire.from_main("verdict", verdict)
        yield section
    else:
        verdict = wire.from_main("verdict")
        yield Section(_TITLE, (Finding("all ranks", verdict, "as rank 0 says"),))
    wire.part()


def _gathered(wire: Wire, hosts: Mapping[int, str], found: Sequence[Finding]) -> list[Finding]:
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


def _section(raw: Mapping[str, Any]) -> Section:
    return Section(raw["title"], tuple(Finding(**f) for f in raw["findings"]))


def merge_sections(by_rank: Sequence[Sequence[Section]], hosts: Mapping[int, str]) -> list[Section]:
    """Sections of all ranks, in the order of rank 0's; others have no titles that it lacks."""
    titles = dict.fromkeys(section.title for own in by_rank for section in own)
    found = []
    for title in titles:
        ranked = {r: [f for s in own if s.title == title for f in s.findings] for r, own in enumerate(by_rank)}
        found.append(Section(title, tuple(merged(ranked, hosts))))
    return found


def joint(all_facts: Sequence[Facts], *, backend: str | None, on_cpu: bool) -> Iterator[Finding]:
    """What only all ranks together tell: cores and GPUs of each node, nodes of the job."""
    hosts: dict[str, list[int]] = {}
    for rank, one in enumerate(all_facts):
        hosts.setdefault(one.host, []).append(rank)
    spread = sorted({len(ranks) for ranks in hosts.values()})
    each = f"{spread[0]}" if len(spread) == 1 else f"{spread[0]} to {spread[-1]}"
    first = ", ".join(list(hosts)[:4]) + (" ..." if len(hosts) > 4 else "")
    nodes = "1 node" if len(hosts) == 1 else f"{len(hosts)} nodes, {each} on each"
    yield ok("ranks", f"all {len(all_facts)} have met, on {nodes}: {first}")
    yield from slurm.judge_nodes(slurm.nodes_of(os.environ), list(hosts))
    by_node: dict[int, list[Finding]] = {}
    for ranks in hosts.values():
        of_node = [all_facts[rank] for rank in ranks]
        by_node[ranks[0]] = list(_of_node(of_node, ranks, backend=backend, on_cpu=on_cpu))
    yield from merged(by_node, {rank: all_facts[rank].host for rank in by_node} | _others(all_facts, by_node))


def _others(all_facts: Sequence[Facts], by_node: Mapping[int, Any]) -> dict[int, str]:
    return {rank: one.host for rank, one in enumerate(all_facts) if rank not in by_node}


def _of_node(of_node: Sequence[Facts], ranks: Sequence[int], *, backend: str | None, on_cpu: bool) -> Iterator[Finding]:
    usable = {core for one in of_node for core in one.cores}
    yield from hardware.judge_cores(
        len(usable), of_node[0].quota, ranks=len(of_node), workers=of_node[0].workers,
        threads=max(one.threads for one in of_node), on_cpu=on_cpu, in_step=in_step(os.environ),
    )  # fmt: skip
    gpus: dict[str, list[int]] = {}
    for rank, one in zip(ranks, of_node, strict=True):
        if one.gpu is not None:
            gpus.setdefault(one.gpu, []).append(rank)
    shared = [who for who in gpus.values() if len(who) > 1]
    if shared and backend != "gloo":
        said = f"{_ranks(shared[0])} compute on the same GPU, which nccl refuses"
        yield fault("GPU of each rank", said, "start one process per GPU; LOCAL_RANK counts the processes of a node")
    elif shared:
        yield warning("GPU of each rank", f"{_ranks(shared[0])} share a GPU", "start one process per GPU")
    elif gpus:
        yield ok("GPU of each rank", "each has its own")


# The run folder, which all nodes must see


@contextmanager
def _shared_folder(wire: Wire, place: Place, run: Path | None) -> Iterator[Callable[[], str]]:
    """Rank 0 leaves a locked file where the run folder is, or would be made; whoever calls looks for it: ``same``,
    ``absent``, or ``unlocked`` where the lock does not hold here; ``""`` where nobody needs to look."""
    if run is None:
        yield lambda: ""
        return
    probe, token, handle = None, secrets.token_hex(8), -1
    if place.rank == 0:
        probe = nearest(run) / f".doctor-{token}.tmp"
        try:
            handle = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.write(handle, token.encode())
            os.fsync(handle)
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            probe = None  # the finding on the run folder says why
    try:
        told = wire.from_main("probe", [str(probe) if probe else None, token, place.host])
        yield lambda: _look(place, *told)
    finally:
        if handle >= 0:
            os.close(handle)
        if probe is not None:
            with suppress(OSError):
                probe.unlink()


def _look(place: Place, probe: str | None, token: str, host: str) -> str:
    if probe is None or place.host == host or place.local != 0:
        return ""
    try:
        handle = os.open(probe, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return "absent"
    try:
        if os.read(handle, 64).decode(errors="replace") != token:
            return "absent"
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return "unlocked"
    except OSError:
        return "same"
    finally:
        os.close(handle)


def _seen(everybody: Sequence[Mapping[str, Any]], hosts: Mapping[int, str]) -> Iterator[Finding]:
    name, by = "run folder of all", {rank: one["seen"] for rank, one in enumerate(everybody) if one["seen"]}
    absent = [hosts[rank] for rank, seen in by.items() if seen == "absent"]
    unlocked = [hosts[rank] for rank, seen in by.items() if seen == "unlocked"]
    if absent:
        said = f"what rank 0 ({hosts[0]}) writes there is not seen on {', '.join(absent[:8])}"
        yield fault(name, said, "set run to a folder that all nodes share")
    elif unlocked:
        yield warning(
            name,
            f"all nodes see it, and a lock of {hosts[0]} does not hold on {', '.join(unlocked[:8])}",
            "mount it with locks (NFS 4; Lustre with -o flock): else a second job is noticed only at a checkpoint",
        )
    elif by:
        yield ok(name, f"{len(by) + 1} nodes see the same, and its locks")


# Computing together


def compute(config: Config, place: Place, needs: Needs | None, wait_s: float) -> Iterator[Finding]:
    """Joins the world as training does, and adds up."""
    import torch

    from tlx import world as worlds
    from tlx.doctor import traffic

    if place.alone and config.world.device == "cuda" and not torch.cuda.is_available():
        return  # "torch and driver" has told
    update: dict[str, Any] = {"timeout_minutes": wait_s / 60}
    if place.alone:
        update["size"] = None  # of the training, which is to be elsewhere
    limited = config.model_copy(update={"world": config.world.model_copy(update=update)})
    try:
        world = worlds.enter(limited)
    except ConfigError as error:
        yield fault("start", "; ".join(error.problems), "make accelerate's settings and the configuration agree")
        return
    except UserError as error:
        yield of_error("start", error, "see launch/README.md")
        return
    except Exception as error:  # of gloo, of nccl, of the store
        yield fault("start", f"the process group could not be made: {_first_line(error)}", _remedy(error))
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
        yield fault("all_reduce", f"failed: {_first_line(error)}", _remedy(error))
    finally:
        with suppress(Exception):
            world.close()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


def _remedy(error: Exception) -> str:
    """Of errors of gloo, of nccl, of the store, and of a GPU that has failed, which are all RuntimeErrors."""
    import torch.distributed as dist

    text = str(error)
    if isinstance(error, (dist.DistError, TlxError, OSError)) or "gloo" in text or "connect" in text:
        return f"NCCL_DEBUG=INFO tells more; {INTERFACES}"
    return hardware.SICK if "CUDA error" in text else "look at the output of all ranks, and at nvidia-smi"


def believes(world: Any, place: Place) -> Finding:
    """What accelerate makes of it; :func:`tlx.world.enter` has compared ranks already."""
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
        size = hardware.gib(needs.gradients)
        said += f"; gradients of {size} take about {found.takes(needs.gradients) * 1e3:.3g} ms an update"
    if found.backend == "nccl" and nodes > 1 and found.bus < _SLOW:
        return warning(
            "all_reduce",
            f"{said}; slower than 10 Gb/s",
            "NCCL_DEBUG=INFO tells which network it takes: NET/IB or NET/Socket; NCCL_SOCKET_IFNAME, NCCL_IB_HCA",
        )
    return ok("all_reduce", said)


@contextmanager
def _alarm(
    wire: Wire, hosts: Mapping[int, str], shared: Sequence[Finding], wait_s: float, give_up: Callable[[Section], None]
) -> Iterator[None]:
    """A rank that hangs hangs all; the others leave rank 0 a while to tell."""

    def expired() -> None:
        if wire.rank:
            print(f"tlx doctor: rank {wire.rank} ({hosts[wire.rank]}) has waited {wait_s:.0f} s", file=sys.stderr)
            os._exit(1)
        give_up(Section(_TITLE, (*shared, *_hanging(wire, hosts, wait_s))))

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
