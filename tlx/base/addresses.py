"""What names of machines resolve to."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence


def addresses(name: str) -> list[str]:
    """What a name resolves to; nothing where it does not."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return list(dict.fromkeys(str(one[4][0]) for one in found))


def loopback(found: Sequence[str]) -> bool:
    """Whether addresses lead every machine to itself."""
    return bool(found) and all(ipaddress.ip_address(a.partition("%")[0]).is_loopback for a in found)
