"""Networks of their own for processes: none, one that answers nothing, or one of several machines.

As a program: ``python networks.py LOG COMMAND ...`` in a network namespace of its own gives that a route and a name
server which take every packet and answer none, and writes into LOG what was sent there, a line of JSON per packet.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil
import pytest

GATEWAY, NAME_SERVER = "10.97.0.1", "10.97.0.53"


def _unshare(*more: str) -> list[str]:
    return ["unshare", *([] if os.getuid() == 0 else ["--map-root-user"]), "--net", *more]


@cache
def _why_not(*more: str) -> str | None:
    """Why there can be no network of its own here."""
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return "needs unshare and ip (util-linux, iproute2)"
    words = [*_unshare(*more), "sh", "-c", "ip link set lo up && ip link add v0 type veth peer name v1"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return f"no network namespaces here: {done.stderr.strip()}" if done.returncode else None


def without_route(*words: object, loopback: bool = True) -> list[str]:
    """The command, where no address can be reached but those of this machine, if `loopback`."""
    if why := _why_not():
        pytest.skip(why)
    return [*_unshare(), *(["sh", "-c", 'ip link set lo up; exec "$@"', "sh"] if loopback else []), *map(str, words)]


def into_nothing(log: Path, *words: object) -> list[str]:
    """The command, where every packet vanishes; :func:`sent` reads which ones there were."""
    if why := _why_not("--mount"):
        pytest.skip(why)
    return [*_unshare("--mount"), sys.executable, __file__, str(log), *map(str, words)]


def sent(log: Path) -> list[str]:
    """Where packets went, ``tcp 192.0.2.1:443`` or ``dns api.wandb.ai``, each as often as it was sent."""
    return [json.loads(line) for line in log.read_text().splitlines()]


@dataclass
class Machine:
    """Its own network, host name, shared memory and process numbers; the same files and clock."""

    name: str
    address: str
    holder: subprocess.Popen[bytes]
    init: int
    unplug: Sequence[str] = ()

    def words(self, *words: object) -> list[str]:
        """The command, there."""
        spaces = ["--net", "--uts", "--mount", "--ipc", "--pid"]
        return ["nsenter", f"--target={self.init}", *spaces, f"--wd={os.getcwd()}", "--", *map(str, words)]

    def cut_power(self) -> None:
        """SIGKILL for every process on it; not even the end of its connections is heard."""
        if self.unplug:
            subprocess.run(self.unplug, capture_output=True, check=False)  # or it is off already
        self.holder.kill()
        self.holder.wait()


INTERFACE = "lan0"


@contextmanager
def two_machines(folder: Path, *, named_on_loopback: bool = False) -> Iterator[tuple[Machine, Machine]]:
    """Two machines, ``one`` and ``two``, in a network that both call :data:`INTERFACE`.

    Args:
        named_on_loopback: each resolves its own name to 127.0.1.1, as Debian's installer writes it.
    """
    if os.getuid() != 0:
        pytest.skip("machines of their own need root")
    if why := _why_not("--uts", "--mount", "--ipc", "--pid", "--fork"):
        pytest.skip(why)
    addresses = {"one": "10.97.0.1", "two": "10.97.0.2"}
    with ExitStack() as stack:
        # a switch between them, as a cable alone would take the address of the one when the other is switched off
        switch = subprocess.Popen([*_unshare(), "sh", "-c", "echo on && exec sleep inf"], stdout=subprocess.PIPE)
        stack.callback(lambda: (switch.kill(), switch.wait()))
        assert switch.stdout is not None
        assert switch.stdout.readline() == b"on\n"
        inside = ["nsenter", f"--target={switch.pid}", "--net", "ip", "link"]
        subprocess.run([*inside, "add", "lan", "up", "type", "bridge", "forward_delay", "0"], check=True)
        machines = []
        for name, address in addresses.items():
            own = addresses | ({name: "127.0.1.1"} if named_on_loopback else {})
            hosts = folder / f"{name}.hosts"
            hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for n, a in own.items()))
            machines.append(_switched_on(name, address, hosts))
            stack.callback(machines[-1].cut_power)
        for machine in machines:
            end = ["type", "veth", "peer", "name", INTERFACE, "netns", str(machine.init)]
            subprocess.run([*inside, "add", machine.name, "master", "lan", "up", *end], check=True)
            machine.unplug = [*inside, "set", machine.name, "down"]
            up = f"ip link set lo up && ip addr add {machine.address}/24 dev {INTERFACE} && ip link set {INTERFACE} up"
            subprocess.run(machine.words("sh", "-c", up), check=True)
        one, two = machines
        yield one, two


def _switched_on(name: str, address: str, hosts: Path) -> Machine:
    setup = (
        'hostname "$1" && mount --bind "$2" /etc/hosts && mount -t tmpfs tmpfs /dev/shm && echo on && exec sleep inf'
    )
    spaces = ["--uts", "--mount", "--ipc", "--pid", "--fork", "--mount-proc", "--kill-child=KILL"]
    words = [*_unshare(*spaces), "sh", "-c", setup, "sh", name, str(hosts)]
    holder = subprocess.Popen(words, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"on\n", f"{name} did not come up"
    (init,) = psutil.Process(holder.pid).children()
    return Machine(name, address, holder, init.pid)


def _run(log: Path, words: Sequence[str]) -> int:
    server = log.with_name("resolv.conf")
    server.write_text(f"nameserver {NAME_SERVER}\n")
    lines = [
        "ip link set lo up",
        "ip link add v0 type veth peer name v1",
        "sysctl -q -w net.ipv6.conf.v0.disable_ipv6=1 net.ipv6.conf.v1.disable_ipv6=1",  # it would announce itself
        "ip addr add 10.97.0.2/16 dev v0",
        "ip link set v0 up",
        "ip link set v1 up",
        f"ip neigh add {GATEWAY} lladdr 02:00:00:00:00:01 dev v0",
        f"ip neigh add {NAME_SERVER} lladdr 02:00:00:00:00:02 dev v0",
        f"ip route add default via {GATEWAY}",
        f"mount --bind {server} /etc/resolv.conf",
    ]
    for line in lines:
        subprocess.run(line.split(), check=True)
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3)) as ear, log.open("w") as out:
        ear.bind(("v1", 0))
        _hears(ear)
        ear.settimeout(0.1)
        process = subprocess.Popen(words)
        ended = False
        while not ended:
            ended = process.poll() is not None  # and once more, for what came until then
            with contextlib.suppress(TimeoutError):
                while True:
                    out.write(json.dumps(_said(*_received(ear))) + "\n")
                    out.flush()
    return process.returncode


def _hears(ear: socket.socket) -> None:
    """Whether packets come here, or silence would prove nothing."""
    ear.settimeout(10)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mouth:
        mouth.sendto(b"", ("192.0.2.2", 9))
    assert _said(*_received(ear)) == "udp 192.0.2.2:9"


def _received(ear: socket.socket) -> tuple[bytes, int]:
    packet, (_, kind, *_rest) = ear.recvfrom(65536)
    return packet, kind


def _said(packet: bytes, kind: int) -> str:
    if kind != 0x0800:
        return f"frame of type {kind:#06x}"
    rest, target = packet[4 * (packet[0] & 15) :], socket.inet_ntoa(packet[16:20])
    protocol = {6: "tcp", 17: "udp"}.get(packet[9])
    if protocol is None:
        return f"protocol {packet[9]} {target}"
    port = struct.unpack("!H", rest[2:4])[0]
    return f"dns {_name(rest[20:])}" if port == 53 else f"{protocol} {target}:{port}"


def _name(question: bytes) -> str:
    """RFC 1035, 4.1.2: labels with their lengths, up to an empty one."""
    words = []
    while question and question[0]:
        words.append(question[1 : 1 + question[0]].decode(errors="replace"))
        question = question[1 + question[0] :]
    return ".".join(words)


if __name__ == "__main__":
    sys.exit(_run(Path(sys.argv[1]).resolve(), sys.argv[2:]))
