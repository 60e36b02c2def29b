"""Before a training's first step: whether its shards are those that it was trained on until it stopped.

``shards.json`` in the run's folder says how each shard was found at the last start: its length, when it was written,
its hash. A resumed run compares; a shard that was written meanwhile (`data.verify: changed`), or every one (`all`), is
read and hashed, by all ranks of a machine together: about a second of a core per GB, at the disk's speed.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from tlx.base.errors import UserError
from tlx.base.files import json_text
from tlx.base.parsing import from_json
from tlx.base.terminal import say
from tlx.data.build.progress import cores
from tlx.data.shards.manifest import Manifest
from tlx.data.shards.verify import Compared, Seen, Suspect, compare, look_at, read_and_compare
from tlx.data.stream.threads import in_threads

if TYPE_CHECKING:
    from tlx.ranks.collectives import World

Verify: TypeAlias = Literal["lengths", "changed", "all"]
Manifests: TypeAlias = Mapping[str, Manifest]
"""By key: data.train, data.val, data.test."""

FILE, FORMAT = "shards.json", 1
ROUND_S = 60.0
"""Ranks hear of each other so often while they read, so that none seems to hang."""
_NAMED = 10


@dataclass(frozen=True)
class Verified:
    """What a start has found.

    Attributes:
        seen: key -> name -> shard; on rank 0.
        notes: what could not be told.
    """

    seen: Mapping[str, Mapping[str, Seen]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def verify(how: Verify, run: Path | None, world: World, manifests: Manifests) -> Verified:
    """Compares the shards with what the run has seen of them, and with the index; all ranks at once.

    Args:
        how: see `tlx.plan.config.Data`.
        run: its folder; None where what it holds is another training's.

    Raises:
        UserError: on every rank alike: shards were changed; with what is expected and what was found.
    """
    seen: dict[str, dict[str, Seen]] = {}
    compared: Mapping[str, Compared] = {}
    former: Mapping[str, Mapping[str, Seen]] = {}
    if world.main:
        seen = {key: look_at(manifest) for key, manifest in manifests.items()}
        former = _read(run) if run is not None and _has_checkpoint(run) else {}
        former.pop("data.test", None)  # nothing was trained on it, so that it may be another one by now
        compared = {key: compare(m, former.get(key, {}), seen[key]) for key, m in manifests.items()}
    compared, resumed = world.from_main((compared, bool(former)))
    _refuse([p for one in compared.values() for p in one.problems], resumed=resumed)
    wanted = [(key, s) for key, one in compared.items() for s in one.suspects if how == "changed"]
    if how == "all":
        wanted = [(k, Suspect(i, s.sha256)) for k, m in manifests.items() for i, s in enumerate(m.shards) if s.sha256]
    _refuse(_read_together(world, manifests, wanted, everywhere=how == "all"), resumed=resumed)
    unknown = [name for one in compared.values() for name in one.unknown] if how == "changed" else []
    if how == "all":
        unknown = [m.describe_shard(i) for m in manifests.values() for i, s in enumerate(m.shards) if not s.sha256]
    merged = {
        key: {
            name: _with_hash(one, former.get(key, {}).get(name), unread=how == "lengths")
            for name, one in shards.items()
        }
        for key, shards in seen.items()
    }
    return Verified(merged, _notes(unknown, how))


def record_of(verified: Verified) -> str:
    """What a start has found, for the next one: the text of `FILE` in the run's folder."""
    sets = {key: {name: asdict(seen) for name, seen in shards.items()} for key, shards in verified.seen.items()}
    return json_text({"format": FORMAT, "shards": sets})


def _read(run: Path) -> dict[str, dict[str, Seen]]:
    """What the last start has found; nothing of a run of an earlier tlx, or where that cannot be read."""
    try:
        said = from_json((run / FILE).read_bytes())
        if said["format"] != FORMAT:
            raise ValueError(f"its format is {str(said['format'])[:40]}")
        return {key: {name: Seen(**one) for name, one in shards.items()} for key, shards in said["shards"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        say(f"warning: {run / FILE} cannot be read ({error}): shards are not compared with it", error=True)
        return {}


def _has_checkpoint(run: Path) -> bool:
    """Whether anything was trained that depends on the shards."""
    return any((run / "checkpoints").glob("step-*"))


def _with_hash(now: Seen, before: Seen | None, *, unread: bool) -> Seen:
    known = now.sha256 or (before.sha256 if before is not None else None)
    is_owed = unread and before is not None and before.bytes == now.bytes  # a later start is to read it
    return Seen(now.bytes, before.modified if before is not None and is_owed else now.modified, known)


def _read_together(
    world: World, manifests: Manifests, wanted: Sequence[tuple[str, Suspect]], *, everywhere: bool
) -> list[str]:
    """Reads shards, on each machine or on rank 0's, each rank of it its part; every rank gets what all have found."""
    if not any(world.gather(bool(wanted))):  # machines may have indexes of their own, with hashes and without
        return []
    hosts = world.gather(socket.gethostname())
    if world.main:
        size = sum(manifests[key].shards[s.shard].bytes for key, s in wanted)
        count, less = len(wanted), "changed" if everywhere else "lengths"
        say(
            f"note: reading {count} shard{'' if count == 1 else 's'}, {size / 1e9:.2f} GB, to compare hashes "
            f"(data.verify={less} reads less)",
            error=True,
        )
    own = hosts[world.rank]
    beside = [rank for rank, host in enumerate(hosts) if host == own]
    part = wanted[beside.index(world.rank) :: len(beside)] if everywhere or own == hosts[0] else []
    results = in_threads(
        lambda task: read_and_compare(manifests[task[0]], task[1]), part, max(cores() // len(beside), 1)
    )
    found: list[str] = []
    while not all(world.gather(_for_a_while(results, found))):
        world.watch.beat("verifying")
    return list(dict.fromkeys(p for problems in world.gather(found) for p in problems))


def _for_a_while(results: Iterator[str | None], found: list[str]) -> bool:
    """Takes results as they come; whether these were all."""
    end = time.monotonic() + ROUND_S
    for problem in results:
        if problem is not None:
            found.append(problem)
        if time.monotonic() > end:
            return False
    return True


def _refuse(problems: Sequence[str], *, resumed: bool) -> None:
    if not problems:
        return
    listed = "".join(f"\n    {p}" for p in problems[:_NAMED])
    more = f"\n    ... and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
    count = "a shard is" if len(problems) == 1 else f"{len(problems)} shards are"
    if resumed:
        raise UserError(
            f"{count} not what this run was trained on so far:{listed}{more}",
            todo="bring the former files back, or begin anew: another run folder, or --fresh",
        )
    raise UserError(
        f"{count} not what was indexed:{listed}{more}",
        todo="bring the former files back, or index them as they are: tlx shards index FOLDER",
    )


def _notes(unknown: Sequence[str], how: Verify) -> tuple[str, ...]:
    if not unknown:
        return ()
    count = "1 shard has" if len(unknown) == 1 else f"{len(unknown)} shards have"
    since = " and was written since this run last started" if how == "changed" else ""
    return (
        f"WARNING: {count} no hash in the index{since}, so that changed bytes go unseen: {', '.join(unknown[:3])}"
        f"{' ...' if len(unknown) > 3 else ''}; tlx shards index adds them",
    )
