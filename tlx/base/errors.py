"""What can go wrong, in words a user can act on: what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from tlx.base.terminal import escaped

T = TypeVar("T")


class TlxError(Exception):
    """A fault that tlx noticed: not the user's mistake, exit code 1."""


class UserError(TlxError):
    """The user's mistake: shown without a traceback, exit code 2.

    Args:
        what: what is wrong, in one sentence.
        where: the file, key, shard or sample it is about.
        todo: what the user can do about it.
    """

    def __init__(self, what: str, *, where: str | None = None, todo: str | None = None) -> None:
        self.what, self.where, self.todo = what, where, todo
        said = f"{escaped(where)}: {what}" if where else what
        super().__init__("\n".join([said, *([f"  -> {todo}"] if todo else [])]))


class ConfigError(UserError):
    """Every mistake of a configuration, reported together.

    Args:
        problems: sentences, or errors whose `where` is a key below `where`; those of a ConfigError among them count one
            by one.

    Attributes:
        mistakes: each with its key, what is wrong, and what to do.
        problems: the same, a line each.
    """

    def __init__(self, problems: Iterable[str | UserError], *, where: str | None = None) -> None:
        self.mistakes = tuple(
            mistake
            for problem in problems
            for mistake in ([UserError(problem)] if isinstance(problem, str) else below(problem))
        )
        self.problems = tuple(dict.fromkeys(map(_line, self.mistakes)))
        count = "1 mistake" if len(self.problems) == 1 else f"{len(self.problems)} mistakes"
        super().__init__(f"{count} in the configuration\n" + "\n".join(f"  - {p}" for p in self.problems), where=where)


def below(error: UserError, key: str = "") -> list[UserError]:
    """The mistakes in an error as mistakes of a key, or of keys below it; nothing of what they say is lost."""
    if isinstance(error, ConfigError):
        keys = [".".join(filter(None, (key, mistake.where))) for mistake in error.mistakes]
        return [UserError(m.what, where=k or None, todo=m.todo) for k, m in zip(keys, error.mistakes, strict=True)]
    if not key:
        return [error]
    what = f"{escaped(error.where)}: {error.what}" if error.where else error.what
    return [UserError(what, where=key, todo=error.todo)]


@dataclass
class Problems:
    """Mistakes gathered, so that all of them are told together."""

    errors: list[UserError] = field(default_factory=list)

    def add(self, error: UserError) -> None:
        self.errors.append(error)

    def of(self, act: Callable[[], T]) -> T | None:
        """What `act` gives; None where it raised a user's mistake, which is kept."""
        try:
            return act()
        except UserError as error:
            self.add(error)
            return None

    def refuse(self) -> None:
        """
        Raises:
            UserError: the only one, as it was; a ConfigError with every one of several.
        """
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            raise ConfigError(line for error in self.errors for line in lines(error))


def lines(error: UserError) -> list[str]:
    """Each mistake in it on a line of its own."""
    if isinstance(error, ConfigError):
        return [f"{error.where}: {p}" if error.where else p for p in error.problems]
    return [_line(error)]


def _line(error: UserError) -> str:
    return str(error).replace("\n  ->", ";")


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A clause such as ``; did you mean "resnet50"?``, or the choices when they are few, or nothing."""
    choices = list(choices)
    close = difflib.get_close_matches(word, choices, n=3, cutoff=0.6)
    if close:
        return "; did you mean " + " or ".join(f'"{c}"' for c in close) + "?"
    return f"; choose from {', '.join(choices)}" if 0 < len(choices) <= 20 else ""
