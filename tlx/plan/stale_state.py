"""A warning of the plan: layers that thaw again with the optimizer's state of before their pause."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tlx.plan.parts import Part
    from tlx.plan.plan import Plan


def warnings(plan: Plan, optimizer: Part) -> list[str]:
    """Layers that train again after a pause, with the optimizer's state of before it."""
    if optimizer.name == "sgd" and optimizer.args.get("momentum") == 0:  # it has none
        return []
    said, stateful = [], frozenset[str]()
    for before, phase in zip((None, *plan.phases), plan.phases, strict=False):
        stateful -= plan.forgotten(phase)
        stale = stateful & phase.learning - before.learning if before is not None else frozenset()
        names = [y.name for y in plan.layers if any(p.name in stale for p in y.parameters)]
        if names:
            listed = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            train = "trains" if len(names) == 1 else "train"
            said.append(
                f"{listed} {train} again in {phase.name} after a pause, with the optimizer's state from before it, "
                f"which the first updates follow; phases.{phase.name}.optimizer_state: reset_thawed drops it"
            )
        stateful |= phase.learning
    return said
