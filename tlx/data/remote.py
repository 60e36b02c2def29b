"""Files of a folder elsewhere: opened, copied, asked for again when they do not come whole.

==================  ============================================================================================
``http(s)://``      requests: proxies and ``~/.netrc`` as everywhere; goes on where a connection broke (Range)
``pipe:COMMAND``    the user's own command in a shell, as webdataset has it; only a checked file name is put into it
a path              a folder here, on a disk that is shared; sendfile would be no faster than reading in parts
any other ``x://``  fsspec: s3 needs the package s3fs, gs gcsfs (both in tlx's extra `remote`), hf none
==================  ============================================================================================

webdataset's own opener runs curl, gsutil and the like, prints whole commands when they fail, and takes a body that ends
early for whole. When and how often to ask again is decided by urllib3's `Retry`: exponential, with jitter.
"""

from __future__ import annotations

import io
import os
import select
import signal
import subprocess
import time
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tlx.data.location import PIPE, address, is_remote, scrubbed, shown
from tlx.data.tars import open_regular
from tlx.errors import TlxError, UserError, did_you_mean
from tlx.files import sha256_of
from tlx.terminal import say

TRIES = 8
"""How often a shard is asked for: over about two minutes, where the server answers at once and badly."""
PAUSE_S = 0.5
"""The third attempt waits twice as long, every further one twice as long as the one before, and at most `LONGEST_S`."""
LONGEST_S = 60.0
CONNECT_S, SILENT_S = 10.0, 60.0
"""Seconds to wait for a connection, and for the next byte (of a command: for its first one, too)."""

_HTTP = ("http://", "https://")
_PART = 256 << 10  # what is lost of a connection that breaks
_FOR_GOOD = {400, 401, 403, 404, 405, 410, 451}


class TransferError(TlxError):
    """A file of a remote folder did not come.

    Attributes:
        reason: in words, without the file's name.
        refused: somebody answered that there is no such file, or not for us.
    """

    def __init__(self, where: str, reason: str, *, refused: bool) -> None:
        self.reason, self.refused = reason, refused
        super().__init__(f"{where}: {reason}")


class ShardUnavailable(TlxError):
    """A shard cannot be fetched: no matter of single bad samples."""


class IndexUnavailable(UserError):
    """There is no index to be had, neither from afar nor from the cache."""


class _Failed(Exception):
    """One attempt.

    Attributes:
        refused: no sense in another one.
        definite: another one will hardly bring anything else.
        pause: seconds that the server asks for.
    """

    def __init__(
        self, reason: str, *, refused: bool = False, definite: bool = False, pause: float | None = None
    ) -> None:
        super().__init__(reason)
        self.refused, self.definite, self.pause = refused, definite, pause


@dataclass
class _Begun:
    """How far a file of `size` is, and what the server called this version of it (empty: nothing to go on by)."""

    size: int | None
    bytes: int = 0
    version: str = ""


def download(
    location: str,
    name: str,
    file: IO[bytes],
    *,
    size: int | None = None,
    limit: int | None = None,
    sha256: str | None = None,
    tries: int = TRIES,
) -> int:
    """Writes a file of a folder elsewhere into `file`, from its start; its length in bytes.

    Attempts that bring the file further than any before them do not count.

    Args:
        size: what the length must be.
        limit: what it must not exceed; a server may send without end.
        sha256: what the hash must be, in hexadecimal digits.

    Raises:
        TransferError: it did not come, or not as it must be, `tries` times; or twice the server said at once that it
            has another length.
        UserError: a protocol that is unknown, or whose package is not installed; an unfit name.
        OSError: `file` cannot be written.
    """
    from urllib3.exceptions import MaxRetryError
    from urllib3.util import Retry

    fresh = retry = Retry(tries - 1, backoff_factor=PAUSE_S, backoff_max=LONGEST_S, backoff_jitter=PAUSE_S)
    begun, furthest, definite = _Begun(size), 0, 0
    while True:
        try:
            return _attempt(location, name, file, begun, size, limit, sha256)
        except _Failed as failed:
            last = failed
        definite += last.definite
        if begun.version and begun.bytes > furthest:
            retry, furthest = fresh, begun.bytes
        try:
            if last.refused:
                raise TransferError(shown(location, name), str(last), refused=True)
            if definite == 2:
                raise TransferError(shown(location, name), f"{last} (asked twice)", refused=False)
            retry = retry.increment(error=last)
        except MaxRetryError:
            times = f" ({tries} attempts)" if tries > 1 else ""
            # from None: the errors of HTTP clients hold URLs with all that is in them
            raise TransferError(shown(location, name), f"{last}{times}", refused=False) from None
        pause = min(last.pause, LONGEST_S) if last.pause is not None else retry.get_backoff_time()
        if len(retry.history) == 2:  # once, so that nobody wonders about the silence
            say(f"{shown(location, name)}: {last}; asking again in {pause:.0f} s", error=True)
        time.sleep(pause)


def read(location: str, name: str, *, limit: int, tries: int = TRIES) -> bytes:
    """A small file of a remote folder; raises as :func:`download` does."""
    buffer = io.BytesIO()
    download(location, name, buffer, limit=limit, tries=tries)
    return buffer.getvalue()


def _attempt(
    location: str,
    name: str,
    file: IO[bytes],
    begun: _Begun,
    size: int | None,
    limit: int | None,
    sha256: str | None,
) -> int:
    with closing(_parts(location, name, begun)) as parts:
        if not begun.version:
            begun.bytes = 0
        for start, part in parts:
            if size is not None and start + len(part) > size:
                begun.version = ""
                raise _Failed(f"more came than the {size} bytes that the index says")
            if limit is not None and start + len(part) > limit:
                raise _Failed(f"more than {limit:,} bytes came", refused=True)
            file.seek(start)
            file.write(part)
            begun.bytes = start + len(part)
    if size is not None and begun.bytes != size:
        raise _Failed(f"{begun.bytes} of {size} bytes came")
    file.truncate(begun.bytes)
    if sha256 is not None and sha256_of(file) != sha256:
        begun.version = ""
        raise _Failed("what came has another hash than the index says")
    return begun.bytes


def _parts(location: str, name: str, begun: _Begun) -> Generator[tuple[int, bytes], None, None]:
    """(place in the file, bytes) in order; whatever goes wrong afar is _Failed."""
    where = address(location, name) if is_remote(location) else os.path.join(location, name)
    try:
        if not is_remote(location):
            yield from _of_folder(Path(where), begun)
        elif location.startswith(PIPE):
            yield from _of_command(where)
        elif location.lower().startswith(_HTTP):
            yield from _of_http(where, begun)
        else:
            yield from _of_fsspec(where, location)
    except (_Failed, UserError):
        raise
    except Exception as error:  # clients of storages raise their own kinds, which change from release to release
        refused = isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError))
        refused |= isinstance(error, ValueError) and where.lower().startswith(_HTTP)  # it is no URL
        raise _Failed(_said(error, location), refused=refused) from None


def _of_folder(path: Path, begun: _Begun) -> Iterator[tuple[int, bytes]]:
    with open_regular(path) as file:
        length = os.fstat(file.fileno()).st_size
        if begun.size is not None and length != begun.size:
            raise _Failed(f"it has {length} bytes there, and {begun.size} in the index", definite=True)
        start = 0
        while part := file.read(_PART):
            yield start, part
            start += len(part)


def _of_http(url: str, begun: _Begun) -> Iterator[tuple[int, bytes]]:
    import requests

    headers = {"Accept-Encoding": "identity"}  # the length that counts is that of the file itself
    if begun.bytes and begun.version:
        headers |= {"Range": f"bytes={begun.bytes}-", "If-Range": begun.version}
    with requests.get(url, headers=headers, stream=True, timeout=(CONNECT_S, SILENT_S)) as answer:
        if answer.status_code == 416:
            begun.version = ""
        if answer.status_code not in (200, 206):
            pause = answer.headers.get("Retry-After", "")
            raise _Failed(
                f"the server says {answer.status_code} {answer.reason}",
                refused=answer.status_code in _FOR_GOOD,
                pause=float(pause) if pause.isdecimal() else None,
            )
        start = _start(answer.headers.get("Content-Range", "")) if answer.status_code == 206 else 0
        if start != 0 and start != begun.bytes:
            raise _Failed("the server sent another part than it was asked for")
        tag = answer.headers.get("ETag", "")
        version = tag if tag.startswith('"') else answer.headers.get("Last-Modified", "")
        if start and version != begun.version:  # a server may know Range and not If-Range
            begun.version = ""
            raise _Failed("the file was changed there meanwhile")
        begun.bytes, begun.version = start, version
        length = answer.headers.get("Content-Length", "")
        if answer.status_code == 200 and begun.size is not None and length.isdecimal() and int(length) != begun.size:
            begun.version = ""
            raise _Failed(f"it has {length} bytes there, and {begun.size} in the index", definite=True)
        for part in answer.raw.stream(_PART, decode_content=False):
            yield start, part
            start += len(part)


def _start(content_range: str) -> int:
    """Of ``bytes 100-199/200``."""
    first = content_range.removeprefix("bytes ").partition("-")[0]
    return int(first) if first.isdecimal() else -1


def _of_fsspec(url: str, location: str) -> Iterator[tuple[int, bytes]]:
    import fsspec
    from fsspec.registry import known_implementations

    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(
            f"a package is missing: {_said(error, location)}",
            where=shown(location),
            todo='for s3 and gs: pip install "tlx[remote]"',
        ) from None
    except ValueError as error:
        protocol = location.partition("://")[0]
        if protocol in known_implementations:
            raise
        near = did_you_mean(protocol, ["http", "https", "pipe", *known_implementations])
        raise UserError(f'there is no protocol "{protocol}"{near}', where=shown(location)) from error
    with system.open(path, "rb") as file:
        start = 0
        while part := file.read(_PART):
            yield start, part
            start += len(part)


def _of_command(command: str) -> Iterator[tuple[int, bytes]]:
    # a session of its own, so that all of a pipeline can be ended; no input, so that it cannot take the terminal's
    process = subprocess.Popen(
        command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    output, start, ended = process.stdout.fileno(), 0, False
    ready = select.poll()  # select.select fails where more than 1,024 files are open
    ready.register(output, select.POLLIN)
    try:
        while ready.poll(SILENT_S * 1000):
            part = os.read(output, _PART)
            if not part:
                ended = True
                break
            yield start, part
            start += len(part)
        if not ended:
            raise _Failed(f"the command was silent for {SILENT_S:g} s")
        with suppress(subprocess.TimeoutExpired):  # its text would be the command
            process.wait(SILENT_S)
        if process.returncode != 0:
            raise _Failed(f"the command ended with code {process.returncode}; what it says is on stderr")
    finally:
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        process.wait()


def _said(error: Exception, location: str) -> str:
    """The innermost reason; clients wrap it in several layers of their own."""
    inner: BaseException = error
    while isinstance(below := getattr(inner, "reason", None) or next(iter(inner.args), None), Exception):
        inner = below
    text = inner.strerror if isinstance(inner, OSError) and inner.strerror else str(inner)
    return scrubbed(str(text), location).rpartition(">: ")[2][:300] or type(error).__name__
