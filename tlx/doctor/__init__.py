"""`tlx doctor`: whether this machine, this job and these ranks are fit to train, and what to do where not.

On a laptop or a login node one process looks; under a launcher every rank does, and rank 0 tells for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

from tlx.base.launcher import environment
from tlx.doctor.findings import Section

if TYPE_CHECKING:
    from tlx.plan.config import Config

WAIT_S = 60.0
"""For other ranks, at the rendezvous and in collectives."""


def examine(
    config: Config | None, *, quick: bool = False, wait_s: float = WAIT_S, give_up: Callable[[Section], None]
) -> Iterator[Section]:
    """All findings, section by section, as they come; on ranks other than 0 of several, only the verdict.

    Args:
        config: of a training, whose folders, shards, weights and needs are looked at; without one the machine is.
        quick: no two processes meet on the loopback.
        give_up: is called from another thread, with a last section, where ranks hang; it must end the process.
    """
    from tlx.doctor.accelerates import stand_in
    from tlx.doctor.loopback import Pair
    from tlx.doctor.place import of_environment

    here = environment()
    place = of_environment(here.variables, here.accelerate)
    with ExitStack() as at_end:
        pair = None
        if place.alone and place.speaks and not quick:
            pair = Pair.start(here)  # they take a while; meanwhile other things are looked at
            at_end.callback(pair.end)
        from tlx.doctor.checks import DoctorChecks, is_on_cpu, section

        look = DoctorChecks(config, config or stand_in(here.variables), place)
        from tlx.doctor import computing, facts, meeting

        if place.alone:
            checks = [("start", lambda: computing.compute(look.config, place, wait_s))]
            for one in look.sections():
                if any(map(meeting.blocks, one.findings)):
                    checks = []
                yield one
            if pair is not None:
                checks.append(("loopback", pair.findings))
            yield section("ranks", checks, limit_s=wait_s)
            return
        own = list(look.sections())
        mine = facts.of_rank(place, workers=look.config.data.workers, on_cpu=is_on_cpu(look.config))
        yield from meeting.together(look, own, mine, wait_s=wait_s, give_up=give_up)
