"""Shards that will be wanted, fetched in the background: in order, a few at a time, and not too far.

Nobody would gain from shards that push out of the cache what is wanted before them. So no more than half of what the
cache holds is filled with shards that nobody has used yet.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

THREADS = 4
LOOK_S = 0.2
"""Between looks at what others do."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A remote shard.

    Attributes:
        bytes: its length.
        layout: 12 hexadecimal digits, of its hash; in an index without hashes, of where its pictures lie: by these a
            tar that was made anew is told from the old one.
        sha256: of its bytes, where the index says it.
    """

    name: str
    bytes: int
    layout: str
    sha256: str | None = None


class Ahead:
    """Downloads in the background of one process.

    Args:
        fetch: brings a shard, and says where it is.
        limit: how many bytes of shards there may be.
    """

    def __init__(self, fetch: Callable[[Wanted], Path], limit: Callable[[], int]) -> None:
        self._fetch, self._limit = fetch, limit
        self._lock = threading.Lock()
        self._pending: deque[Wanted] = deque()
        self._fetched: dict[Wanted, tuple[Path, int] | None] = {}  # where, and its atime, once it is there
        self._threads = 0
        self._most = 0

    def go_on_with(self, shards: Sequence[Wanted]) -> None:
        """These, in this order, in place of what is left of an earlier call."""
        with self._lock:
            self._pending = deque(shards)
            self._fetched.clear()
            self._most = 0
            more = min(THREADS, len(shards)) - self._threads
            self._threads += max(more, 0)
        for _ in range(more):
            threading.Thread(target=self._run, name="tlx-shards-ahead", daemon=True).start()

    def _run(self) -> None:
        while (found := self._next()) is not None:
            pending, shard = found
            try:
                self._bring(shard)
            except Exception:  # whoever needs the shard meets the same error, and says it
                with self._lock:
                    pending.clear()  # of that call; a later one has its own
                    self._fetched.pop(shard, None)

    def _next(self) -> tuple[deque[Wanted], Wanted] | None:
        """The next one to fetch, once there is room for it besides those that nobody has used yet."""
        while True:
            with self._lock:
                if not self._pending:
                    self._threads -= 1
                    return None
                shard = self._pending[0]
                try:
                    room = self._room_for(shard)
                except OSError:  # the cache's folder may be gone; whoever needs a shard makes it anew, or says so
                    self._pending.clear()
                    continue
                if room:
                    self._fetched[shard] = None
                    return self._pending, self._pending.popleft()
            time.sleep(LOOK_S)

    def _room_for(self, shard: Wanted) -> bool:
        self._most = self._most or self._limit() // 2
        self._fetched = {s: known for s, known in self._fetched.items() if _unused(known)}
        return not self._fetched or sum(s.bytes for s in [*self._fetched, shard]) <= self._most

    def _bring(self, shard: Wanted) -> None:
        path = self._fetch(shard)
        with suppress(FileNotFoundError):
            used = path.stat().st_atime_ns
            os.utime(path, ns=(used, time.time_ns()))  # no use yet, but no time to leave either
            with self._lock:
                if shard in self._fetched:
                    self._fetched[shard] = (path, used)


def _unused(known: tuple[Path, int] | None) -> bool:
    try:
        return known is None or known[0].stat().st_atime_ns == known[1]
    except FileNotFoundError:
        return False
