"""A file server on this machine that can be slow, fail, cut off, and that remembers what it was asked for."""

from __future__ import annotations

import base64
import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class ShardServer:
    """Files below a folder.

    Attributes:
        asked: (path with its query, the Range that was asked for or "") of every GET.
        failing: so many answers to come are 503.
        cut: so many answers to come promise the whole file and end after half of what is asked for.
        short: answers promise and send so many bytes less than there are (less than none: more).
        ranges: whether parts can be asked for.
        if_range: whether a part is asked for in vain once the file is another one.
        after_cut: called when a body was cut off.
        pause: seconds between the `pieces` in which a body is sent.
        password: asked for, where it is set, of any user.
        coding: claimed of every body (Content-Encoding), which stays as it is.
        page: sent in place of files, as HTML.
        login: where questions for files are redirected to, and answered with `page`.
        unasked: answers are the first half as a part (206) that nobody asked for.
        known: so many questions were answered by 304, since the asking side had that version.
        only: knobs but the password concern paths with this in them.
    """

    folder: Path
    url: str = ""
    asked: list[tuple[str, str]] = field(default_factory=list)
    failing: int = 0
    cut: int = 0
    short: int = 0
    ranges: bool = True
    if_range: bool = True
    after_cut: Callable[[], object] | None = None
    pause: float = 0.0
    pieces: int = 10
    password: str | None = None
    coding: str = ""
    page: bytes = b""
    login: str = ""
    unasked: bool = False
    known: int = 0
    only: str = ".tar"
    lock: threading.Lock = field(default_factory=threading.Lock)

    def counts(self) -> Counter[str]:
        """How often each file was asked for."""
        return Counter(path.partition("?")[0].rpartition("/")[2] for path, _ in self.asked)

    def due(self, knob: str) -> bool:
        with self.lock:
            left = getattr(self, knob)
            setattr(self, knob, max(left - 1, 0))
            return left > 0


@contextmanager
def serve(folder: Path) -> Iterator[ShardServer]:
    files = ShardServer(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range", "")
            files.asked.append((self.path, wanted))
            concerned = files.only in self.path
            word = self.headers.get("Authorization", "").removeprefix("Basic ")
            if files.password and base64.b64decode(word).decode().partition(":")[2] != files.password:
                self._refuse(401)
                return
            if concerned and files.due("failing"):
                self._refuse(503)
                return
            if concerned and files.login and files.login != self.path:
                self.send_response(302)
                self.send_header("Location", files.login)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if files.page and (concerned or files.login == self.path):
                self._send_page(files.page)
                return
            path = files.folder / self.path.partition("?")[0].lstrip("/")
            if not path.is_file():
                self._refuse(404)
                return
            self._send(path.read_bytes(), wanted, concerned)

        def _send(self, content: bytes, wanted: str, concerned: bool) -> None:
            tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
            if self.headers.get("If-None-Match") == tag:
                files.known += 1
                self.send_response(304)
                self.end_headers()
                return
            if concerned and files.short:
                content = content[: -files.short] if files.short > 0 else content + b"\0" * -files.short
            start = 0
            same = self.headers.get("If-Range", tag) == tag or not files.if_range
            if files.ranges and wanted and same:
                start = int(wanted.removeprefix("bytes=").rstrip("-"))
            half = concerned and files.unasked
            whole, content = len(content), content[: len(content) // 2] if half else content
            self.send_response(206 if start or half else 200)
            self.send_header("ETag", tag)
            self.send_header("Content-Length", str(len(content) - start))
            if concerned and files.coding:
                self.send_header("Content-Encoding", files.coding)
            if start or half:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{whole}")
            self.end_headers()
            body = content[start:]
            if concerned and files.due("cut"):
                body = body[: len(body) // 2]
                if files.after_cut is not None:
                    files.after_cut()
            step = -(-len(body) // (files.pieces if concerned and files.pause else 1)) or 1
            try:
                for at in range(0, len(body), step):
                    self.wfile.write(body[at : at + step])
                    if concerned and files.pause:
                        time.sleep(files.pause)
            except OSError:  # who asked was killed
                pass

        def _send_page(self, page: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

        def _refuse(self, code: int) -> None:
            self.send_response(code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    files.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield files
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
