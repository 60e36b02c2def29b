"""What one rank does for all, or all do at once: a mistake of one is everybody's, so that none waits for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from tlx.base.errors import TlxError, UserError

if TYPE_CHECKING:
    from tlx.ranks.collectives import World

T = TypeVar("T")


def together(world: World, act: Callable[[], T], *, faults: bool = False) -> T:
    """Does something on every rank; what this rank's `act` gives.

    Args:
        faults: whatever it raises is told as a mistake, because the process has something left to do.

    Raises:
        UserError: on all ranks, where any has raised one.
    """
    mistake: UserError | None = None
    try:
        value = act()
    except UserError as error:
        mistake = error
    except Exception as error:
        if not faults:
            raise
        mistake = _as_mistake(error)
    first = next((m for m in world.gather(str(mistake) if mistake else None) if m), None)
    if first is not None:
        raise mistake or UserError(first)
    return value


def by_main(world: World, act: Callable[[], T], *, faults: bool = False) -> T:
    """Does something on rank 0 alone; what it gives, on every rank.

    Args:
        faults: see :func:`together`.

    Raises:
        UserError, TlxError: on all ranks, as rank 0 has raised it.
    """
    value: T | None = None
    error: TlxError | None = None
    if world.main:
        try:
            value = act()
        except Exception as fault:
            if faults:
                error = _as_mistake(fault)
            elif isinstance(fault, TlxError):
                error = fault
            else:
                raise
    found, said, is_mistake = world.from_main((value, str(error) if error else None, isinstance(error, UserError)))
    if said is not None:
        raise error or (UserError if is_mistake else TlxError)(said)
    result: T = found
    return result


def _as_mistake(error: Exception) -> UserError:
    if isinstance(error, UserError):
        return error
    mistake = UserError(f"{type(error).__name__}: {error}"[:1000])
    mistake.__cause__ = error
    return mistake
