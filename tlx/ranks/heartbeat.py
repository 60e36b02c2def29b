"""Heartbeats: what ranks tell each other beside the collectives, through the store of the rendezvous.

Every rank writes its own once a second and reads those of rank 0 and of its successor, so that the traffic of a large
world stays small while each rank is watched by another one; it reads all of them only where something looks wrong.
The first failure that a rank writes there counts for all.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import threading
from dataclasses import asdict, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from tlx.base.terminal import flush
from tlx.ranks.state import INTERVAL_S, Failure, Heartbeat, SharedState, Snapshot

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_NOTHING = "-"
_RECONNECTIONS = 2  # to a store that has cut one


class HeartbeatChannel:
    """Sends and receives heartbeats in a thread of its own, since a store that does not answer would hold up the watch.

    Args:
        state: what to send, and where to put what comes.
    """

    def __init__(self, store: Store, state: SharedState, size: int) -> None:
        self._state, self.size = state, size
        self._connect(store)  # its own: the main thread may wait in the other one
        self._store.compare_set("failure", "", _NOTHING)
        self._heard_once = {state.read().own.rank}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="tlx-heartbeat", daemon=True)
        self._thread.start()

    def close(self, *, timeout_s: float) -> None:
        """Sends the last heartbeat and ends the thread, unless the store keeps it waiting."""
        self._closing.set()
        self._state.change(lambda known: known)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            atexit.register(self._leave)

    def _leave(self) -> None:
        """A thread inside of a store that does not answer would abort the process at the interpreter's end."""
        if self._thread.is_alive():
            flush()
            os._exit(0 if self._state.read().own.state == "left" else 1)

    def _serve(self) -> None:
        broken = 0
        while True:
            closing, sent = self._closing.is_set(), self._state.read()
            try:
                if broken:
                    self._reconnect()
                self._exchange(sent)
                broken = 0
            except dist.DistStoreError:  # no answer in time: it may be slow
                pass
            except Exception as error:
                broken += 1
                refused = broken > 1 and isinstance(error, ConnectionRefusedError)
                if broken > _RECONNECTIONS or closing or refused:
                    self._lost(error, refused)
                    return
            if closing:
                return
            self._wait(sent)

    def _lost(self, error: Exception, refused: bool) -> None:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        self._state.change(lambda known: replace(known, store_error=why, store_refused=refused))

    def _wait(self, sent: Snapshot) -> None:
        """For news of this rank, at most for the interval."""

        def has_news(known: Snapshot) -> bool:
            news = known.own.count != sent.own.count or known.proposal is not sent.proposal
            return news or self._closing.is_set()

        self._state.wait_for(has_news, INTERVAL_S)

    def _connect(self, store: Store) -> None:
        self._connection = store.clone()
        self._connection.set_timeout(timedelta(seconds=10))
        self._store = dist.PrefixStore("heartbeats", self._connection)  # type: ignore[attr-defined]

    def _reconnect(self) -> None:
        """A connection may be cut while the store lives on.

        Raises:
            ConnectionRefusedError: nobody listens there.
        """
        server: Any = self._connection
        while hasattr(server, "underlying_store"):
            server = server.underlying_store
        if hasattr(server, "host"):  # a new client would try for long, and fill the output with traces
            socket.create_connection((server.host, server.port), timeout=3).close()
        self._connect(self._connection)

    def _exchange(self, known: Snapshot) -> None:
        own = known.own
        self._store.set(str(own.rank), json.dumps(asdict(own)))
        wanted = range(self.size) if known.read_all_s is not None else sorted({0, (own.rank + 1) % self.size})
        new = [r for r in wanted if r not in self._heard_once]
        if new and not self._store.check([str(r) for r in new]):  # one question, where all are there
            new = [r for r in new if self._store.check([str(r)])]
        self._heard_once |= set(new)
        ranks = [r for r in wanted if r in self._heard_once and r != own.rank]
        texts = self._store.multi_get([str(r) for r in ranks]) if ranks else []
        heard = {rank: Heartbeat(**json.loads(text)) for rank, text in zip(ranks, texts, strict=True)}
        proposal = json.dumps(asdict(known.proposal)) if known.proposal else _NOTHING
        written = self._store.compare_set("failure", _NOTHING, proposal).decode()
        failure = Failure(**json.loads(written)) if written != _NOTHING else None
        self._state.change(lambda now: now.answered(heard, failure))
