"""How ranks find each other and join one process group; what is said where one of them does not come."""

from __future__ import annotations

import functools
import math
import socket
import time
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from tlx.base.addresses import addresses, loopback
from tlx.base.errors import TlxError, UserError
from tlx.base.launcher import environment
from tlx.base.terminal import escaped
from tlx.plan.config import Config
from tlx.ranks.collectives import World, gather_by_store
from tlx.ranks.environment import check_settings, check_size, choose_backend, choose_device
from tlx.ranks.same_inputs import check_start
from tlx.ranks.store_prefix import of_this_attempt
from tlx.ranks.watch import Watch

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store


def join_ranks(config: Config, watch: Watch | None = None) -> World:
    """Joins the ranks that the launcher has started.

    Args:
        watch: begins as soon as ranks can hear of each other; whoever gives one closes it.

    Raises:
        ConfigError: accelerate's environment or config file conflicts with the configuration.
        UserError: the number of ranks is not what was asked for; ranks with different configurations or code.
        TlxError: a rank did not join.
    """
    here, watch = environment(), watch or Watch()
    check_settings(config, here)
    size, watched = here.size, math.isfinite(watch.patience_s)
    joins = here.meets and not dist.is_initialized()
    if joins and watched:
        watch.begin(here.rank, size)
    # before anything depends on the configuration: ranks with different ones would wait for each other
    store = _store_of_equals(config, watch) if joins else None
    if store is None and watched:
        watch.start(None, 0, 1)
    check_size(config, here)
    device = choose_device(config, here)
    if store is not None:
        backend, rank, limit = choose_backend(config, here, device), here.number("RANK", 0), limit_of(config)
        try:
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
        except RuntimeError as error:
            why = _loopback_name(error, several=here.local_size < size)
            if why is None:
                raise
            what = f"ranks cannot connect to each other: {str(error).splitlines()[0][:300]}"
            raise TlxError(f"{what}\n  -> {why}") from error
    return World.of(config.loop.precision, device, size, watch)


def limit_of(config: Config) -> timedelta:
    """Of collectives: longer than the watch's patience, which knows who is at fault."""
    return timedelta(minutes=config.world.timeout_minutes) + timedelta(seconds=30)


def _store_of_equals(config: Config, watch: Watch) -> Store:
    """The store through which ranks have compared their configurations and code.

    Raises:
        UserError: they differ; nothing says where to meet.
        TlxError: a rank did not join.
    """
    limit = limit_of(config)
    store, rank, size = rendezvous_store(limit)
    if math.isfinite(watch.patience_s):
        watch.start(store, rank, size, serves=rank == 0 and not environment().agent_serves)
    if size > 1:
        check_start(config, partial(gather_by_store, store, rank, size, timeout=limit))
    return store


def rendezvous_store(limit: timedelta) -> tuple[Store, int, int]:
    """The store where ranks meet, this rank and their number.

    Raises:
        UserError: nothing says where to meet.
        TlxError: a rank did not join in time.
    """
    try:
        here = environment()
        store, rank, size = _store(limit, *map(here.get, ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")))
    except dist.DistError as error:
        here = environment()
        where = f"{here.get('MASTER_ADDR')}:{here.get('MASTER_PORT')}"
        raise TlxError(
            f"not all {here.get('WORLD_SIZE')} ranks joined at {where} within {limit}: "
            f"{str(error).splitlines()[0]}\n  -> look at the output of the others: "
            f"MASTER_ADDR must lead them to this machine ({socket.gethostname()}), MASTER_PORT to this port"
        ) from error
    store.set_timeout(limit)
    if size > 1:
        store = of_this_attempt(store, rank, size, timeout=limit)
    return store, rank, size


@functools.cache
def _store(limit: timedelta, *_place: str) -> tuple[Store, int, int]:
    """Made once: rank 0 may serve it itself, and a further training of these processes meets in it again."""
    _wait_for_store(limit)
    found: tuple[Store, int, int] = next(rendezvous("env://", timeout=limit))
    return found


def leave_ranks() -> None:
    """Ends the process group: ranks join anew for the next training of these processes."""
    from accelerate.state import AcceleratorState

    if dist.is_initialized():
        dist.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)  # there is no public way


def _wait_for_store(limit: timedelta) -> None:
    """Waits until rank 0 can be reached where this rank is told that it is.

    torch would wait for three times as long, and then leave a trace of C++ functions.

    Raises:
        UserError: the environment does not say where, or what cannot be an address.
        TlxError: nobody is there in time.
    """
    here = environment()
    address, port, rank = map(here.get, ("MASTER_ADDR", "MASTER_PORT", "RANK"))
    if not address or not port:
        raise UserError(
            f"this is rank {rank} of {here.get('WORLD_SIZE')}, and nothing says where ranks meet",
            where="MASTER_ADDR, MASTER_PORT",
            todo="export the address of rank 0's machine and a free port there, the same for every rank",
        )
    # one rank alone may have port 0, any that is free; several would not find each other
    least = 1 if here.get("WORLD_SIZE") != "1" else 0
    if not (port.isascii() and port.isdigit() and len(port) < 6 and least <= int(port) < 65536):
        todo = "export a free port of rank 0's machine, 1 to 65535, the same for every rank"
        raise UserError(f"{port!a} is not a port", where="MASTER_PORT", todo=todo)
    if rank == "0" and not here.agent_serves:
        return
    end, pause = time.monotonic() + limit.total_seconds(), 0.05
    while (error := _try_connect(address, int(port), end - time.monotonic())) is not None:
        if time.monotonic() >= end:
            raise TlxError(_unreachable(f"rank {rank}", address, port, limit, error)) from error
        time.sleep(max(min(pause, end - time.monotonic()), 0.0))
        pause = min(1.5 * pause, 1.0)


def _try_connect(address: str, port: int, left_s: float) -> OSError | None:
    """
    Raises:
        UserError: the address cannot be one.
    """
    try:
        socket.create_connection((address, port), timeout=max(min(left_s, 10.0), 1.0)).close()
    except OSError as error:
        return error
    except UnicodeError as error:
        raise UserError("not a valid host name", where="MASTER_ADDR", todo=_unresolved(address)) from error
    return None


def _unresolved(address: str) -> str:
    here = socket.gethostname()
    return f"{here} cannot resolve {escaped(address)}: give rank 0's machine as an address, or see /etc/hosts"


def _unreachable(rank: str, address: str, port: str, limit: timedelta, error: OSError) -> str:
    here = socket.gethostname()
    if isinstance(error, socket.gaierror):
        todo = _unresolved(address)
    elif loopback(addresses(address)):
        todo = f"{address} is {here} itself: if rank 0 runs elsewhere, give its address as the other machines see it"
    elif isinstance(error, TimeoutError):
        todo = "no answer: check that this address is in a network that both machines are in, and the firewall"
    else:
        todo = "check that rank 0 was started, on that machine, with that port, and its output"
    return (
        f"{rank} ({here}) cannot connect to MASTER_ADDR:MASTER_PORT = {address}:{port} within {limit}: "
        f"{error.strerror or error}\n  -> {todo}; more in launch/README.md"
    )


def _loopback_name(error: RuntimeError, *, several: bool) -> str | None:
    """What to do where gloo has told the other machines an address of this one that leads them to themselves."""
    host = socket.gethostname()
    named = bool(environment().get("GLOO_SOCKET_IFNAME"))
    if "connectFullMesh" not in str(error) or named or not several or not loopback(addresses(host)):
        return None
    return (
        f"the name of this machine, {host}, resolves to a loopback address here, which gloo gives to the others: "
        "on each machine export GLOO_SOCKET_IFNAME=NAME, the interface (`ip addr`) that leads to the others; "
        "more in launch/README.md"
    )
