"""Whether a server can be reached from here, known in a bounded time: libraries would try for minutes."""

from __future__ import annotations

import socket
import threading
import urllib.request
from typing import Any
from urllib.parse import urlparse

KNOCK_S = 1.0


def reachable(url: str, *, within_s: float = KNOCK_S) -> bool:
    """Whether something answers at the address of `url`, or of the proxy on the way to it, within so many seconds.

    A name may have several addresses. All are asked at once, so that a dead one does not hide one that answers.
    Nothing answers at what is not a URL.
    """
    try:
        host, port = _address(url)
    except ValueError:
        return False
    over, answered = threading.Event(), threading.Event()

    def knock(family: int, kind: int, protocol: int, address: Any) -> None:
        try:
            with socket.socket(family, kind, protocol) as door:
                door.settimeout(within_s)
                door.connect(address)
        except OSError:
            return
        answered.set()
        over.set()

    def knock_at_all() -> None:
        threads = [_started(knock, *found[:3], found[4]) for found in _look_up(host, port)]
        for thread in threads:
            thread.join()
        over.set()

    _started(knock_at_all)  # looking up a name has no timeout of its own
    over.wait(within_s)
    return answered.is_set()


def _address(url: str) -> tuple[str, int]:
    target = urlparse(url)
    proxy = urllib.request.getproxies().get(target.scheme or "https")
    if proxy and not urllib.request.proxy_bypass(target.hostname or ""):
        target = urlparse(proxy if "://" in proxy else f"http://{proxy}")
    return target.hostname or "", target.port or (80 if target.scheme == "http" else 443)


def _look_up(host: str, port: int) -> list[tuple[Any, ...]]:
    try:
        return list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    except (OSError, ValueError):  # ValueError: a name that cannot be one, as a..b
        return []


def _started(target: Any, *words: Any) -> threading.Thread:
    thread = threading.Thread(target=target, args=words, daemon=True)
    thread.start()
    return thread
