"""Files whose name only ever stands for all of their content."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

_SCRATCH = re.compile(r"(?P<name_and_host>.+)-(?P<process>[0-9]{1,9})\.tmp")  # see scratch
_OLD_S = 3600.0  # whoever is at a file writes to it more often than this


def why_not_writable(folder: Path) -> str | None:
    """Why no file can be written in a folder; None where one can. Nothing is left there."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"tlx")
            file.flush()
    except OSError as error:
        return str(error.strerror or error) if folder.is_dir() else "Not a directory"
    return None


def write_whole(path: Path, content: bytes | str) -> None:
    """Writes beside, flushes to the disk, renames: a reader, or a power cut, meets the old file or the new one."""
    with scratch(path) as beside:
        _write(beside, content)
        os.replace(beside, path)


@contextmanager
def written_beside(folder: Path, texts: Mapping[str, str]) -> Iterator[Callable[..., None]]:
    """Writes several files of a folder beside and flushes them; what is yielded gives those that are named to it their
    names, in order. Where one of them cannot be written, none has changed.

    Raises:
        OSError: naming the file that cannot be written; or as the body raises it.
    """
    with ExitStack() as stack:
        made: dict[str, Path] = {}
        for name, text in texts.items():
            beside = stack.enter_context(scratch(folder / name))
            _write(beside, text)
            made[name] = beside

        def place(*names: str) -> None:
            for name in names:
                os.replace(made[name], folder / name)

        yield place


def _write(path: Path, content: bytes | str) -> None:
    with path.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """The name beside `path` for what will be renamed to it; nothing is left there after a failure.

    Raises:
        OSError: as the body raises it; a full disk's, which names no file, names `path`.
    """
    # with the machine's name, since others may write to the same folder with the same number
    beside = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        yield beside
    except BaseException as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def is_left(path: Path) -> bool:
    """Whether nobody is at writing what :func:`scratch` named so; of other machines' processes, whether it is old."""
    named = _SCRATCH.fullmatch(path.name)
    if named is None:  # no process of this version of tlx writes so
        return True
    if named["name_and_host"].endswith(f".{socket.gethostname()}") and not _others_at_work(int(named["process"])):
        return True
    try:
        return time.time() - path.stat().st_mtime > _OLD_S
    except FileNotFoundError:  # renamed meanwhile
        return False


def _others_at_work(number: int) -> bool:
    """Whether another process than this one has this number, and runs."""
    import psutil

    if number == os.getpid() or not psutil.pid_exists(number):
        return False
    try:
        return bool(psutil.Process(number).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


def sha256_of(file: IO[bytes]) -> str:
    """In hexadecimal digits, of a whole open file."""
    found = hashlib.sha256()
    file.seek(0)
    while part := file.read(1 << 20):
        found.update(part)
    return found.hexdigest()


class HashedFile:
    """A file that is written from its start to its end, and the SHA-256 of what was written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        return self._file.write(data)

    @property
    def sha256(self) -> str:
        """In hexadecimal digits."""
        return self._hash.hexdigest()


def json_text(content: Any) -> str:
    """Strict JSON: a number that is not finite becomes null."""
    return json.dumps(plain(content), indent=1, allow_nan=False)


def plain(value: Any) -> Any:
    """What JSON can say: mappings, lists, finite numbers; arrays of numpy and torch as lists."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
