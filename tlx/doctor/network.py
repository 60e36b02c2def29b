"""Names, addresses and ports that ranks meet by."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing

from tlx.base.addresses import addresses, loopback
from tlx.doctor.findings import Finding, fault, ok, warning
from tlx.doctor.place import Place

INTERFACES = (
    "a firewall between the nodes, or the wrong network interface? `ip -br addr` lists them; set GLOO_SOCKET_IFNAME "
    "and NCCL_SOCKET_IFNAME to the one that the nodes share"
)


def host_name(place: Place, env: Mapping[str, str]) -> Iterator[Finding]:
    """gloo tells other ranks the address that this machine's own name resolves to."""
    yield judge_host(place.host, addresses(place.host), many=place.nodes > 1, named=bool(env.get("GLOO_SOCKET_IFNAME")))


def judge_host(name: str, found: list[str], *, many: bool, named: bool) -> Finding:
    """
    Args:
        many: there are several nodes, which have to reach this one.
        named: GLOO_SOCKET_IFNAME says which interface is meant.
    """
    todo = "correct /etc/hosts (Debian writes 127.0.1.1 there), or set GLOO_SOCKET_IFNAME to the interface to use"
    said = f"{name} resolves to {', '.join(found[:3]) or 'nothing'}"
    if named or (found and not loopback(found)):
        return ok("host name", said)
    if many:
        return warning("host name", f"{said}: gloo would tell other nodes to find this one there", todo)
    return ok("host name", f"{said}: fine on one node; for several, {todo}")


def meeting_point(place: Place, env: Mapping[str, str], *, served: bool) -> Iterator[Finding]:
    """MASTER_ADDR and MASTER_PORT.

    Args:
        served: the launcher's agent holds the port already.
    """
    name, port = env.get("MASTER_ADDR"), env.get("MASTER_PORT")
    if name is None and port is None:
        if not place.alone:
            yield fault("MASTER_ADDR", "is not set, and RANK and WORLD_SIZE are", "set it to the first node's name")
        return
    found = addresses(name) if name else []
    if name:
        yield judge_address(name, found, nodes=place.nodes)
    else:
        yield fault("MASTER_ADDR", "is not set, and MASTER_PORT is", "set it to the first node's name")
    if port is None or not port.isdigit() or not 0 < int(port) < 65536:
        said = "is not set, and MASTER_ADDR is" if port is None else f"{port!r} is no port"
        yield fault("MASTER_PORT", said, "set it to a free port, for instance 29500")
        return
    # whoever is to listen on it, before it does
    mine = place.rank == 0 and (not place.alone or loopback(found) or found == addresses(place.host))
    if mine and not served and taken(int(port)):
        yield fault("MASTER_PORT", f"{port} is taken by another process on this node", "choose another one")
    else:
        yield ok("MASTER_PORT", f"{port}{', held by the launcher' if served else ''}")


def judge_address(name: str, found: list[str], *, nodes: int) -> Finding:
    if not found:
        return fault("MASTER_ADDR", f"{name} does not resolve here", "the first node's name or address as all know it")
    shown = name if name in found else f"{name}, {found[0]}"
    if nodes > 1 and loopback(found):
        return fault(
            "MASTER_ADDR",
            f"{shown} is the loopback, and there are {nodes} nodes: each would wait for the others at itself",
            "set it to the first node's name: scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1",
        )
    return ok("MASTER_ADDR", shown)


def taken(port: int) -> bool:
    """Whether somebody listens on a port of this machine."""
    with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("", port))
            sock.listen(1)
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


def free_port() -> int:
    with closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def interfaces(env: Mapping[str, str], there: Sequence[str], *, nodes: int) -> Iterator[Finding]:
    """Whether NCCL's and gloo's variables name interfaces that reach other nodes.

    Args:
        there: the interfaces of this node.
    """
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        said = env.get(variable)
        if not said or said.startswith("^"):
            continue
        exact, names = said.startswith("="), said.lstrip("=").split(",")
        prefixes = variable.startswith("NCCL") and not exact  # NCCL takes the beginning of a name
        absent = [n for n in names if not any(t == n or (prefixes and t.startswith(n)) for t in there)]
        if absent:
            todo = f"choose from {', '.join(there[:12])}"
            yield fault("interface", f"{variable}={said}, and this node has no {', '.join(absent)}", todo)
        elif nodes > 1 and names == ["lo"]:
            said = f"{variable}={said} is the loopback, and there are {nodes} nodes"
            yield fault("interface", said, f"choose from {', '.join(t for t in there[:12] if t != 'lo')}")
        else:
            yield ok("interface", f"{variable}={said}")
