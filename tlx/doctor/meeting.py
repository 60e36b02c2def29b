"""Ranks meet as training does, tell rank 0 what each has found, and compute together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tlx.base.errors import TlxError
from tlx.base.terminal import say
from tlx.doctor.computing import alarm, compute, gathered
from tlx.doctor.facts import Facts, joint
from tlx.doctor.findings import Finding, Section, fault, merged, warning, worst
from tlx.doctor.network import INTERFACES
from tlx.doctor.shared_folder import judge_seen, shared_folder
from tlx.doctor.wire import Wire

if TYPE_CHECKING:
    from tlx.doctor.checks import DoctorChecks

_TITLE = "between ranks"
_BLOCKING = ("accelerate", "interface", "GPU", "GPU of each rank", "ranks and GPUs", "torch and driver")
_NOWHERE = ("MASTER_ADDR", "MASTER_PORT")


def blocks(finding: Finding) -> bool:
    """Whether ranks need not try to compute together: it would only fail for the same reason."""
    return finding.verdict == "fault" and finding.name in _BLOCKING


def together(
    look: DoctorChecks,
    own: Sequence[Section],
    mine: Facts,
    *,
    wait_s: float,
    give_up: Callable[[Section], None],
) -> Iterator[Section]:
    """Everybody's findings, by rank 0; other ranks yield the verdict only.

    Args:
        own: what this rank has found; `mine`, for what only all together tell.
        give_up: shows a last section and ends the process: of a collective that hangs there is no other way out.
    """
    place, wire, begun = look.place, None, False
    nowhere = [f for section in own for f in section.findings if f.verdict == "fault" and f.name in _NOWHERE]
    try:
        if nowhere:
            raise TlxError(f"not tried, because of {nowhere[0].name}: {nowhere[0].said}\n  -> {nowhere[0].todo}")
        wire = Wire.join(wait_s)
        for section in _together(look, wire, own, mine, wait_s, give_up):
            begun = True
            yield section
    except Exception as error:  # not all ranks came, or one has gone
        if place.rank == 0 and not begun:
            yield from own
        found = not_met(error, "rendezvous" if wire is None else "ranks")
        if place.rank:  # nobody else can tell
            say(f"tlx doctor: rank {place.rank} ({place.host}): {found.said}\n  -> {found.todo}", error=True)
        yield Section(_TITLE, (found,))


def not_met(error: Exception, name: str) -> Finding:
    said, _, todo = str(error).partition("\n  -> ")
    return fault(name, said[:500], f"{todo}; {INTERFACES}" if todo else INTERFACES)


def _together(
    look: DoctorChecks,
    wire: Wire,
    own: Sequence[Section],
    mine: Facts,
    wait_s: float,
    give_up: Callable[[Section], None],
) -> Iterator[Section]:
    config, place = look.config, look.place
    shared: list[Finding] = []
    with shared_folder(wire, place, look.given.run if look.given is not None else None) as seen:
        payload = {"facts": dataclasses.asdict(mine), "own": [dataclasses.asdict(s) for s in own], "seen": seen()}
        everybody = wire.to_main("found", payload)
        go, hosts = True, {}
        if everybody is not None:
            all_facts = [Facts(**one["facts"]) for one in everybody]
            hosts = {rank: f.host for rank, f in enumerate(all_facts)}
            shown = merge_sections([[_section(s) for s in one["own"]] for one in everybody], hosts)
            shared = [*joint(all_facts, backend=config.world.backend), *judge_seen(everybody, hosts)]
            go = not any(map(blocks, [*(f for s in shown for f in s.findings), *shared]))
            yield from shown
    hosts = wire.from_main("hosts", {str(rank): host for rank, host in hosts.items()})
    names = {int(rank): host for rank, host in hosts.items()}
    if wire.from_main("go", go):
        with alarm(wire, names, wait_s, lambda found: give_up(Section(_TITLE, (*shared, *found)))):
            found = list(compute(config, place, wait_s))
        shared += gathered(wire, names, found)
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
