"""Where shards are: a folder of this machine, or one elsewhere. Text only; nothing is opened here.

Elsewhere is a URL, ``https://host/train`` or ``s3://bucket/train``, or a command that prints a file,
``pipe:ssh host cat /data/train/{}``, in which ``{}`` stands for the file's name.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tlx.base.errors import UserError
from tlx.base.paths import expanded

PIPE = "pipe:"
_LONGEST = 200  # characters of a file name; file systems have 255, and the cache puts some before it
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_URL = re.compile(r"(?P<scheme>://)(?P<user>[^\s'\"/?#]*@)?(?P<path>[^\s'\"?#]*)(?P<query>[?#][^\s'\"]*)?")


def is_remote(location: str | os.PathLike[str]) -> bool:
    """Whether it is a URL or a command, and not a path."""
    return isinstance(location, str) and ("://" in location or location.startswith(PIPE))


def place(value: object) -> object:
    """A path as text, ``~`` and variables filled in, in its shortest spelling; a URL or a command as it is; other
    values untouched.

    Raises:
        UserError: see :func:`tlx.base.paths.expanded`.
    """
    if not isinstance(value, (str, os.PathLike)) or is_remote(value):
        return value
    return str(Path(expanded(os.fspath(value))))


def address(location: str, name: str) -> str:
    """The URL of a file of a remote folder, or the command that prints it.

    A query (``?token=...``) stays behind the file's name. The name may come from a stranger's index and may end up in
    a shell, so it has to be plain.

    Raises:
        UserError: a command without ``{}``, a URL that is none, or a name that is very long or of other characters
            than letters, digits, ``.``, ``_``, ``-`` (the index's arrays may lie in ``targets/``).
    """
    if not _PLAIN.fullmatch(name.removeprefix("targets/")) or len(name) > _LONGEST:
        why = "has characters that are not" if len(name) <= _LONGEST else "is longer than those that are"
        raise UserError(
            f"the file name {name[:_LONGEST]!r} {why} taken from afar",
            where=shown(location),
            todo="rename the tars with letters, digits, dots, dashes and underscores, and index them again",
        )
    if location.startswith(PIPE):
        if "{}" not in location:
            raise UserError(
                "a command needs {} where the file's name goes",
                where=shown(location),
                todo="for instance pipe:ssh host cat /data/train/{}",
            )
        return location.removeprefix(PIPE).replace("{}", name)
    if not _is_url(location):
        raise UserError("this is not a URL", where=shown(location), todo="write it as https://host/folder")
    head, mark, query = location.partition("?") if _is_http(location) else (location, "", "")
    return f"{head.rstrip('/')}/{name}{mark}{query}"


def without_credentials(location: str) -> str:
    """Without ``user:password@`` and ``?query`` of URLs: what may be written down."""
    if not is_remote(location):
        return location
    return _URL.sub(lambda m: f"{m['scheme']}{m['path']}", location)


def shown(location: str, name: str | None = None) -> str:
    """What people are shown of a location, or of a file in it.

    Of a command only its program and where the name goes, since any other word of it may be a secret.
    """
    text = without_credentials(location)
    if text.startswith(PIPE):
        words = text.removeprefix(PIPE).split()
        program = next((w for w in words if "=" not in w), "")
        telling = [w for w in words if "{}" in w]
        text = PIPE + " ... ".join(dict.fromkeys([program, *telling]))
        return text.replace("{}", name) if name else text
    return f"{text.rstrip('/')}/{name}" if name else text


def command_line(words: Sequence[str]) -> str:
    """A command as it may be written down, quoted for a shell: of the locations in it only what people are shown."""
    return shlex.join(_word(word) for word in words)


def _word(word: str) -> str:
    before, pipe, command = word.partition(PIPE)
    return without_credentials(before) + (shown(pipe + command) if pipe else "")


def scrubbed(text: str, location: str) -> str:
    """Somebody else's message about a location, on one line, without the credentials in it."""
    line = " ".join(text.split())
    for secret in _secrets(location):
        line = line.replace(secret, "***")
    line = _URL.sub(lambda m: f"{m['scheme']}{m['path']}", line)
    return re.sub(r"\?\S+", "", line) if _is_http(location) else line


def folder_name(location: str) -> str:
    """A name for a local folder: readable, and the same only for the same location.

    Credentials do not count, so that a link that is signed anew every day keeps its folder.
    """
    same = without_credentials(location).rstrip("/")
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", shown(location).partition(":")[2]).strip("-.")[-40:]
    return f"{readable.strip('-.') or 'shards'}-{hashlib.sha256(same.encode()).hexdigest()[:12]}"


def _is_http(location: str) -> bool:
    return location.lower().startswith(("http://", "https://"))


def _is_url(location: str) -> bool:
    try:
        parts = urlsplit(location)
        return bool(parts.hostname) if _is_http(location) else bool((parts.netloc + parts.path).strip("/"))
    except ValueError:
        return False


def _secrets(location: str) -> list[str]:
    """Parts of a URL that may be secret, the longest first, as written and as decoded."""
    try:
        parts = urlsplit(location)
        found = [parts.query, *re.split("[&=]", parts.query)[1::2], parts.username or "", parts.password or ""]
    except ValueError:
        return []
    return sorted({s for f in found for s in (f, unquote(f)) if len(s) > 3}, key=len, reverse=True)
