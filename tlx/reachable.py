"""Whether a server can be reached from here, known in a bounded time: libraries would try for minutes."""

from __future__ import annotations

import socket
import threading
import urllib.request
from urllib.parse import urlparse

KNOCK_S = 1.0


def reachable(url: str, *, within_s: float = KNOCK_S) -> bool:
    """Whether something answers at the address of `url`, or of the proxy on the way to it, within so many seconds."""
    target = urlparse(url)
    proxy = urllib.request.getproxies().get(target.scheme or "https")
    if proxy and not urllib.request.proxy_bypass(target.hostname or ""):
        target = urlparse(proxy if "://" in proxy else f"http://{proxy}")
    address = (target.hostname or "", target.port or (80 if target.scheme == "http" else 443))
    answered: list[bool] = []

    def knock() -> None:
        try:
            socket.create_connection(address, timeout=within_s).close()
            answered.append(True)
        except OSError:
            pass

    thread = threading.Thread(target=knock, daemon=True)  # looking up a name has no timeout of its own
    thread.start()
    thread.join(within_s)
    return bool(answered)
