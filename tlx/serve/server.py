"""`tlx serve`: a socket, a network, and uvicorn between them, until somebody asks it to stop."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from tlx.base.errors import UserError
from tlx.base.terminal import say
from tlx.serve.app import app_of
from tlx.serve.network import Network
from tlx.serve.service import Service

_HEAD_S = 10.0  # seconds for the head of a request, and for a connection without one
_CONNECTIONS = 512
_HEAD_BYTES = 16 << 10
_STOPS = (signal.SIGTERM, signal.SIGINT)


class PatientProtocol(H11Protocol):
    """uvicorn's, which waits for ever for a head that comes byte by byte, and for the first request of a connection."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._since = time.monotonic()
        self._look()

    def on_response_complete(self) -> None:
        self._since = time.monotonic()
        super().on_response_complete()

    def _look(self) -> None:
        if self.transport.is_closing():
            return
        if self.conn.their_state is h11.IDLE and time.monotonic() - self._since > _HEAD_S:
            self.transport.close()
            return
        self.loop.call_later(_HEAD_S / 4, self._look)


def bound(host: str, port: int) -> socket.socket:
    """A socket of this address, at which nobody is heard yet.

    Raises:
        UserError: there is no such address here, or it is taken.
    """
    where = f"--host {host} --port {port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(_CONNECTIONS)
    except socket.gaierror as error:
        what = f"there is no such address: {error.strerror}"
        raise UserError(
            what, where=where, todo="127.0.0.1 for this machine alone, 0.0.0.0 for all that reach it"
        ) from error
    except (OSError, OverflowError) as error:
        what = f"nothing can be served there: {getattr(error, 'strerror', None) or error}"
        raise UserError(what, where=where, todo="another --port; 0 takes one that is free") from error
    return found


def server_of(
    service: Service, bound_to: socket.socket, *, grace_s: float = 20, begun: Callable[[str], None] = lambda url: None
) -> Server:
    """What answers until SIGTERM or Ctrl-C (or `should_exit`), then finishes what it has begun, for `grace_s` seconds.

    Args:
        begun: is told the address once it answers.
    """
    config = uvicorn.Config(
        app_of(service),
        http=PatientProtocol,
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_level="error",
        access_log=False,
        server_header=False,
        limit_concurrency=_CONNECTIONS,
        h11_max_incomplete_event_size=_HEAD_BYTES,
        timeout_keep_alive=int(_HEAD_S),
        timeout_graceful_shutdown=max(int(grace_s), 1),
    )
    return Server(config, service, lambda: begun(url_of(bound_to)))


class Server(uvicorn.Server):
    """uvicorn's, which says when it begins and that it is stopping."""

    def __init__(self, config: uvicorn.Config, service: Service, begun: Callable[[], None]) -> None:
        super().__init__(config)
        self._service, self._begun = service, begun

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._begun()

    def handle_exit(self, sig: int, frame: Any) -> None:
        self._service.is_stopping = True
        super().handle_exit(sig, frame)


@contextmanager
def _stopped_quietly() -> Iterator[None]:
    """uvicorn raises the signal once more when it is done, which would make an exit code of it."""
    before = {number: signal.signal(number, lambda *_: None) for number in _STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def url_of(bound_to: socket.socket) -> str:
    """Where a browser on this machine finds it."""
    host, port = bound_to.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def introduction(network: Network, url: str) -> str:
    said = network.description
    outputs = f"{len(said.outputs)} outputs" if len(said.outputs) > 1 else said.outputs[0]
    return "\n".join(
        (
            f"{said.backbone['name']}, {said.task['name']}, {outputs}; {network.where}",
            f"  of {network.file}",
            f"  {url}  a page to drop pictures on; Ctrl-C ends it",
            f"  curl -F file=@photo.jpg {url}/predict",
        )
    )


def run(service: Service, bound_to: socket.socket, *, grace_s: float) -> None:
    """Serves from a command line."""
    server = server_of(service, bound_to, grace_s=grace_s, begun=lambda url: say(introduction(service.network, url)))
    try:
        with _stopped_quietly():
            server.run(sockets=[bound_to])
    finally:
        service.close()
    say("stopped")
