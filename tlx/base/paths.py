"""Paths as people write them: ``~``, ``$NAME`` and ``${NAME}`` stand for what they do in a shell, wherever tlx takes a
path; ``$$`` is a dollar."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tlx.base.errors import UserError
from tlx.base.launcher import environment
from tlx.base.terminal import escaped

_VARIABLE = re.compile(r"\$(?:(?P<dollar>\$)|(?P<name>[A-Za-z_][A-Za-z0-9_]*)|\{(?P<braced>[^}]*)\})")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_USER = re.compile(r"~[^/]*")


def expanded(text: str, *, where: str | None = None) -> str:
    """A path with the user's home and the variables in it filled in.

    Args:
        where: what names the path, for errors.

    Raises:
        UserError: a variable that is not set, or empty; no home of this name; an empty path; control characters.
    """
    if not text.strip():
        raise UserError("an empty path", where=where, todo='for the folder tlx was started in, write "."')
    if (odd := _CONTROL.search(text)) is not None:
        raise UserError(f"a path with the control character U+{ord(odd[0]):04X}", where=where, todo="leave it out")
    home = _USER.match(text)
    rest = text[home.end() :] if home else text
    return (_home(home[0], where) if home else "") + _VARIABLE.sub(lambda match: _value(match, where), rest)


def expanded_path(text: str, *, where: str | None = None) -> Path:
    """The same as a path."""
    return Path(expanded(text, where=where))


def written(path: str | os.PathLike[str]) -> str:
    """The text that :func:`expanded` takes for exactly this path."""
    text = os.fspath(path).replace("$", "$$")
    return f"./{text}" if text.startswith("~") else text


def _home(word: str, where: str | None) -> str:
    found = os.path.expanduser(word)
    if found.startswith("~"):
        shown = escaped(word[:100])
        raise UserError(f"{shown} is nobody's home folder here", where=where, todo=f"write ./{shown} for this name")
    return found


def _value(match: re.Match[str], where: str | None) -> str:
    if match["dollar"]:
        return "$"
    name = match["name"] or match["braced"] or ""
    shown = escaped(match[0][:100])
    if not _NAME.fullmatch(name):
        raise UserError(f"{shown} is no variable", where=where, todo="only a name may stand in the braces: ${NAME}")
    value = environment().variables.get(name)
    if not value:
        raise UserError(
            f"the variable {shown} is {'not set' if value is None else 'empty'}",
            where=where,
            todo=f"export {name[:100]}=..., or write $$ for a dollar sign",
        )
    return value
