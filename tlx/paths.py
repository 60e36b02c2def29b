"""Paths as people write them: ``~``, ``$NAME`` and ``${NAME}`` stand for what they do in a shell, wherever tlx takes a
path; ``$$`` is a dollar."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tlx.errors import UserError
from tlx.terminal import escaped

_VARIABLE = re.compile(r"\$(?:(?P<dollar>\$)|(?P<name>[A-Za-z_][A-Za-z0-9_]*)|\{(?P<braced>[^}]*)\})")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_USER = re.compile(r"~[^/]*")


def expanded(text: str) -> str:
    """A path with the user's home and the variables in it filled in.

    Raises:
        UserError: a variable that is not set, or empty; no home of this name; an empty path; control characters.
    """
    if not text.strip():
        raise UserError("an empty path", todo='for the folder tlx was started in, write "."')
    if (odd := _CONTROL.search(text)) is not None:
        raise UserError(f"a path with the control character U+{ord(odd[0]):04X}", todo="leave it out")
    home = _USER.match(text)
    rest = text[home.end() :] if home else text
    return (_home(home[0]) if home else "") + _VARIABLE.sub(_value, rest)


def expanded_path(text: str) -> Path:
    """The same as a path."""
    return Path(expanded(text))


def written(path: str | os.PathLike[str]) -> str:
    """The text that :func:`expanded` takes for exactly this path."""
    text = os.fspath(path).replace("$", "$$")
    return f"./{text}" if text.startswith("~") else text


def _home(word: str) -> str:
    found = os.path.expanduser(word)
    if found.startswith("~"):
        raise UserError(
            f"{escaped(word[:100])} is nobody's home folder here", todo=f"write ./{escaped(word[:100])} for this name"
        )
    return found


def _value(match: re.Match[str]) -> str:
    if match["dollar"]:
        return "$"
    name = match["name"] or match["braced"] or ""
    value = os.environ.get(name, "") if "\0" not in name and "=" not in name else ""
    if not value:
        raise UserError(
            f"the variable {escaped(match[0][:100])} {'is empty' if name in os.environ else 'is not set'}",
            todo=f"export {escaped(name[:100])}=..., or write $$ for a dollar sign",
        )
    return value
