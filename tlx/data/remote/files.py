"""Files of a folder elsewhere: opened, copied, asked for again when they do not come whole.

==================  ============================================================================================
``http(s)://``      requests: proxies and ``~/.netrc`` as everywhere; goes on where a connection broke (Range)
``pipe:COMMAND``    the user's own command in a shell, as webdataset has it; only a checked file name is put into it
a path              a folder here, on a disk that is shared; sendfile would be no faster than reading in parts
any other ``x://``  fsspec: s3 needs the package s3fs, gs gcsfs (both in tlx's extra `remote`), hf none
==================  ============================================================================================

A file's hash is made while it comes. A page to sign in, or another answer that is no file, is reported as such.

webdataset's own opener runs curl, gsutil and the like, prints whole commands when they fail, and takes a body that ends
early for whole. When and how often to ask again is decided by urllib3's `Retry`: exponential, with jitter.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tlx.base.errors import TlxError, UserError, did_you_mean
from tlx.base.location import PIPE, address, is_remote, scrubbed, shown, without_credentials
from tlx.base.terminal import say
from tlx.data.shards.tars import open_regular

if TYPE_CHECKING:
    from requests import Response

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
_PLAIN = ("", "identity")  # codings that leave a body as it is
_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype\s+html|html|head|body|title|script|meta)\b", re.IGNORECASE)
_TITLE = re.compile(rb"<title[^>]*>\s*([^<]{1,80})", re.IGNORECASE)


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


@dataclass(frozen=True)
class Arrived:
    """A file that came whole.

    Attributes:
        bytes: its length.
        sha256: in hexadecimal digits.
        version: what the other side calls this version of it, an ETag for one; empty where it does not say.
    """

    bytes: int
    sha256: str
    version: str


@dataclass
class _Begun:
    """How far a file of `size` is.

    Attributes:
        version: what the server goes on by; empty: nothing to go on by.
        named: what the other side calls this version of the file.
        hash: of the bytes so far.
        moved: where it was redirected to, in words.
        ignores_range: a part was asked for, and the whole came.
    """

    size: int | None
    bytes: int = 0
    version: str = ""
    named: str = ""
    hash: Any = field(default_factory=hashlib.sha256)
    moved: str = ""
    ignores_range: bool = False


def download(
    location: str,
    name: str,
    file: IO[bytes],
    *,
    size: int | None = None,
    limit: int | None = None,
    sha256: str | None = None,
    tries: int = TRIES,
) -> Arrived:
    """Writes a file of a folder elsewhere into `file`, from its start.

    Attempts that bring the file further than any before them do not count.

    Args:
        size: what the length must be.
        limit: what it must not exceed; a server may send without end.
        sha256: what the hash must be, in hexadecimal digits.

    Raises:
        TransferError: it did not come, or not as it must be, `tries` times; or twice with another length or hash, or
            something else in its place.
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
            anew = "; the server ignores Range, so that every attempt begins anew" if begun.ignores_range else ""
            # from None: the errors of HTTP clients hold URLs with all that is in them
            raise TransferError(shown(location, name), f"{last}{times}{anew}", refused=False) from None
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
) -> Arrived:
    with closing(_parts(location, name, begun)) as parts:
        if not begun.version:
            begun.bytes, begun.hash = 0, hashlib.sha256()
        for start, part in parts:
            if start == 0:
                begun.hash = hashlib.sha256()
                _refuse_other(part, name, begun.moved)
            if size is not None and start + len(part) > size:
                begun.version = ""
                raise _Failed(f"more came than the {size} bytes that the index says")
            if limit is not None and start + len(part) > limit:
                raise _Failed(f"more than {limit:,} bytes came", refused=True)
            file.seek(start)
            file.write(part)
            begun.hash.update(part)
            begun.bytes = start + len(part)
    if size is not None and begun.bytes != size:
        raise _Failed(f"{begun.bytes} of {size} bytes came")
    file.truncate(begun.bytes)
    found = begun.hash.hexdigest()
    if sha256 is not None and found != sha256:
        begun.version = ""
        raise _Failed(
            f"what came has another hash than the index says: SHA-256 {found}, expected {sha256}", definite=True
        )
    return Arrived(begun.bytes, found, begun.named)


def _refuse_other(part: bytes, name: str, moved: str) -> None:
    """Looks at the first bytes of an answer.

    Raises:
        _Failed: they are a web page's, or those of a compressed file.
    """
    if _PAGE.match(part[:1000]):
        title = _TITLE.search(part)
        titled = f' ("{" ".join(title[1].decode(errors="replace").split())}")' if title else ""
        raise _Failed(
            f"a web page{titled} came in its place{moved}, such as one to sign in: open the address in a browser, and "
            "put what it asks for into the URL (https://user:password@host/..., ?token=...) or into ~/.netrc",
            definite=True,
        )
    if name.endswith(".tar") and part[:2] == b"\x1f\x8b":
        raise _Failed(f"what came{moved} is compressed (gzip); store the tar as it is there (gunzip)", definite=True)


def version(location: str, name: str, known: str = "") -> str:
    """What the other side calls the present version of a file, as in `Arrived`; asked once.

    Args:
        known: the version that is here, for a server to say that it is still that.

    Raises:
        TransferError: there is no answer.
        UserError: as :func:`download`.
    """
    where = _where(location, name)
    try:
        if not is_remote(location):
            return _of_file(os.stat(where))
        if location.startswith(PIPE):
            return ""
        if location.lower().startswith(_HTTP):
            return _http_version(where, known)
        system, path = _file_system(where, location)
        return str(system.ukey(path))
    except UserError:
        raise
    except Exception as error:
        failed = error if isinstance(error, _Failed) else _failed(error, where, location)
        raise TransferError(shown(location, name), str(failed), refused=failed.refused) from None


def _http_version(url: str, known: str) -> str:
    import requests

    headers = {"Accept-Encoding": "identity", **({"If-None-Match": known} if '"' in known else {})}
    # not HEAD, which signed URLs and some servers refuse; of the body only what is under way already comes
    with requests.get(url, headers=headers, stream=True, timeout=(CONNECT_S, SILENT_S)) as answer:
        if answer.status_code == 304:
            return known
        if answer.status_code != 200:
            raise _refusal(answer, "")
        if answer.headers.get("Content-Type", "").startswith("text/html"):
            raise _Failed("a web page came in its place")
        return _named(answer.headers)


def _named(headers: Mapping[str, str]) -> str:
    """A strong ETag, else when it was changed and its length, else a weak ETag."""
    tag, changed = headers.get("ETag", "").strip(), headers.get("Last-Modified", "")
    if tag.startswith('"') or not changed:
        return tag
    return f"{changed}, {headers.get('Content-Length', 'unknown')} bytes"


def _of_file(about: os.stat_result) -> str:
    return f"{about.st_size} bytes, {about.st_mtime_ns} ns"


def _where(location: str, name: str) -> str:
    return address(location, name) if is_remote(location) else os.path.join(location, name)


def _failed(error: Exception, where: str, location: str) -> _Failed:
    """What clients of storages raise: their own kinds, which change from release to release."""
    if type(error).__name__ == "TooManyRedirects":
        return _Failed("it is redirected in circles, as by a page to sign in that nobody answers", definite=True)
    refused = isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError))
    refused |= isinstance(error, ValueError) and where.lower().startswith(_HTTP)  # it is no URL
    return _Failed(_said(error, location), refused=refused)


def _parts(location: str, name: str, begun: _Begun) -> Generator[tuple[int, bytes], None, None]:
    """(place in the file, bytes) in order; whatever goes wrong afar is _Failed."""
    where = _where(location, name)
    try:
        if not is_remote(location):
            yield from _of_folder(Path(where), begun)
        elif location.startswith(PIPE):
            yield from _of_command(where)
        elif location.lower().startswith(_HTTP):
            yield from _of_http(where, begun)
        else:
            yield from _of_fsspec(where, location, begun)
    except (_Failed, UserError):
        raise
    except Exception as error:
        raise _failed(error, where, location) from None


def _of_folder(path: Path, begun: _Begun) -> Iterator[tuple[int, bytes]]:
    with open_regular(path) as file:
        about = os.fstat(file.fileno())
        length, begun.named = about.st_size, _of_file(about)
        if begun.size is not None and length != begun.size:
            raise _Failed(f"it has {length} bytes there, and {begun.size} in the index", definite=True)
        start = 0
        while part := file.read(_PART):
            yield start, part
            start += len(part)


def _of_http(url: str, begun: _Begun) -> Iterator[tuple[int, bytes]]:
    import requests

    headers = {"Accept-Encoding": "identity"}  # the length that counts is that of the file itself
    asked = begun.bytes if begun.version else 0
    if asked:
        headers |= {"Range": f"bytes={asked}-", "If-Range": begun.version}
    with requests.get(url, headers=headers, stream=True, timeout=(CONNECT_S, SILENT_S)) as answer:
        begun.moved = f", from {without_credentials(answer.url)} where it is redirected to" if answer.history else ""
        start = _begin(answer, begun, asked)
        parts = answer.raw.stream(_PART, decode_content=False)
        first = next(parts, b"")
        if start == 0:  # before lengths are compared: a page has another one
            _refuse_other(first, url.partition("?")[0], begun.moved)
        length = answer.headers.get("Content-Length", "")
        if answer.status_code == 200 and begun.size is not None and length.isdecimal() and int(length) != begun.size:
            begun.version = ""
            raise _Failed(f"it has {length} bytes there, and {begun.size} in the index", definite=True)
        for part in itertools.chain([first] if first else [], parts):
            yield start, part
            start += len(part)


def _begin(answer: Response, begun: _Begun, asked: int) -> int:
    """The place in the file of the first byte of an answer.

    Args:
        asked: the place that was asked for.

    Raises:
        _Failed: it is no answer to go on with.
    """
    if answer.status_code == 416:
        begun.version = ""
    if answer.status_code not in (200, 206):
        raise _refusal(answer, begun.moved)
    coding = answer.headers.get("Content-Encoding", "").strip().lower()
    if coding not in _PLAIN:
        begun.version = ""
        raise _Failed(
            f"it comes compressed on the way (Content-Encoding: {coding[:40]}){begun.moved}, although it was asked for "
            "as it is: switch compression off for these files at the server, or at the proxy before it",
            definite=True,
        )
    start = _start(answer.headers.get("Content-Range", "")) if answer.status_code == 206 else 0
    if answer.status_code == 206 and (start != asked or not asked):
        begun.version = ""
        told = answer.headers.get("Content-Range", "no Content-Range")[:60]
        what = f"all after byte {asked}" if asked else "the whole"
        raise _Failed(f"the server sent another part ({told}){begun.moved} than it was asked for, {what}")
    tag = answer.headers.get("ETag", "")
    version = tag if tag.startswith('"') else answer.headers.get("Last-Modified", "")
    if start and version != begun.version:  # a server may know Range and not If-Range
        begun.version = ""
        raise _Failed("the file was changed there meanwhile")
    begun.ignores_range = begun.ignores_range or (asked > 0 and start == 0 and version == begun.version)
    begun.bytes, begun.version = start, version
    if start == 0:
        begun.named = _named(answer.headers)
    return start


def _refusal(answer: Response, moved: str) -> _Failed:
    pause = answer.headers.get("Retry-After", "")
    return _Failed(
        f"the server says {answer.status_code} {answer.reason}{moved}",
        refused=answer.status_code in _FOR_GOOD,
        pause=float(pause) if pause.isdecimal() else None,
    )


def _start(content_range: str) -> int:
    """Of ``bytes 100-199/200``."""
    first = content_range.removeprefix("bytes ").partition("-")[0]
    return int(first) if first.isdecimal() else -1


def _of_fsspec(url: str, location: str, begun: _Begun) -> Iterator[tuple[int, bytes]]:
    system, path = _file_system(url, location)
    begun.named = ""
    with suppress(NotImplementedError, AttributeError, OSError, ValueError, LookupError):  # of those that do not tell
        begun.named = str(system.ukey(path))
    with system.open(path, "rb") as file:
        start = 0
        while part := file.read(_PART):
            yield start, part
            start += len(part)


def _file_system(url: str, location: str) -> tuple[Any, str]:
    """fsspec's for a URL, and the path in it."""
    import fsspec
    from fsspec.registry import known_implementations

    try:
        system, path = fsspec.core.url_to_fs(url)
        return system, path
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
