"""Which target of an index a task is about."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tlx.base.errors import UserError, did_you_mean
from tlx.data.shards.targets import LABEL, Kind
from tlx.tasks import TargetSummary, TaskData

NO_TARGETS = "build shards with labels; or learn without: a task such as simclr, vicreg, rotation (configs/METHODS.md)"
"""What to do where an index holds pictures alone."""


def choose(data: TaskData, kind: Kind, given: str | None) -> TargetSummary:
    """The target that a task reads.

    Args:
        given: by the user; None for `label` if it is of this kind, else for the only target of this kind.

    Raises:
        UserError: there is none, there are several, or what the user names is missing or of another kind.
    """
    fitting = [name for name, summary in data.targets.items() if summary.target.kind == kind]
    if given is not None and given not in data.targets:
        raise UserError(f'the index has no target "{given}"{did_you_mean(given, fitting)}', where="task.target")
    if given is not None and given not in fitting:
        found = data.targets[given].target.kind
        what = f'target "{given}" is of kind {found}; this task needs one of kind {kind}'
        raise UserError(f"{what}{did_you_mean('', fitting)}", where="task.target")
    if given is None and not fitting:
        raise UserError(
            f"the index has no target of kind {kind}, which this task needs; it has "
            + (", ".join(f"{name} ({s.target.kind})" for name, s in data.targets.items()) or "none"),
            where="task",
            todo=None if data.targets else NO_TARGETS,
        )
    if given is None and LABEL not in fitting and len(fitting) > 1:
        raise UserError(
            f"the index has {len(fitting)} targets of kind {kind}: {', '.join(fitting)}",
            where="task",
            todo="say which one in task.target",
        )
    return data.targets[given or (LABEL if LABEL in fitting else fitting[0])]


def places_of(names: Iterable[str | int | float], classes: Sequence[str], *, where: str) -> tuple[int, ...]:
    """Places of classes among those of the index, ascending.

    Raises:
        UserError: one of them is none.
    """
    given = list(map(str, names))
    odd = next((name for name in given if name not in classes), None)
    if odd is not None:
        raise UserError(f'there is no class "{odd}"{did_you_mean(odd, classes)}', where=where)
    return tuple(sorted({list(classes).index(name) for name in given}))
