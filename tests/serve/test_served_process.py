"""`tlx serve` as a process: asked to stop, killed, started again, under many clients at once."""

from __future__ import annotations

import collections
import contextlib
import functools
import io
import signal
import socket
import threading
import time

import psutil
import pytest
import requests
from commands import free_port
from composed import finished, raw_of
from images import encoded, make_shards, picture
from PIL import Image
from served import process

import tlx

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("r")
    shards = make_shards(place / "s", classes=3, per_class={"train": 8, "val": 4}, size=48)
    backbone = {"name": "timm/test_resnet", "weights": "none"}
    return finished(raw_of(shards, place / "run", backbone=backbone, input={"size": 64}))


GOOD = encoded(picture(1, size=(300, 401)))


def half_of_a_request(url):
    """A connection that has sent the head and half of a picture."""
    connection = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=30)
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(GOOD)}\r\n\r\n"
    connection.sendall(head.encode() + GOOD[:1000])
    time.sleep(0.3)
    return connection


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_finishes_what_it_has_begun(run, number):
    with process(run) as (url, server):
        connection = half_of_a_request(url)
        server.send_signal(number)
        time.sleep(0.5)
        with pytest.raises(requests.ConnectionError):
            requests.get(f"{url}/healthz", timeout=20)
        assert server.poll() is None
        connection.sendall(GOOD[1000:])
        answer = b""
        while not answer.endswith(b"}\n"):
            answer += connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 200")
        assert b'"label": "class' in answer
        assert server.wait(20) == 0
        said = server.stdout.read()
        assert said.splitlines()[-1] == "stopped"
        assert "curl -F file=@photo.jpg " + url in said
        assert "Traceback" not in said


def test_a_client_that_never_ends_delays_it_no_longer_than_grace(run):
    with process(run, "--grace", 1) as (url, server):
        connection = half_of_a_request(url)
        began = time.monotonic()
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0
        assert 0.5 < time.monotonic() - began < 8
        said = server.stdout.read()
        assert "Traceback" not in said, said
        assert connection.recv(65536).startswith(b"HTTP/1.1 503")
        connection.close()


def test_killed_and_started_again_it_answers_at_the_same_place(run):
    port = free_port()
    for _ in range(2):
        with process(run, port=port) as (url, server):
            half_of_a_request(url)
            first = requests.post(f"{url}/predict", files={"file": GOOD}, timeout=30).json()
            assert first["predictions"][0]["label"].startswith("class")
            server.kill()
            assert server.wait(20) == -signal.SIGKILL


@functools.cache
def kinds():
    """What clients send by name, and the status of the answer."""
    large = io.BytesIO()
    Image.new("L", (9000, 9000)).save(large, "PNG")
    return {
        "good": (GOOD, 200),
        "cut": (GOOD[: len(GOOD) // 2], 422),
        "text": (b"no picture at all", 422),
        "empty": (b"", 400),
        "bomb": (large.getvalue(), 413),
        "huge": (GOOD + b"\0" * 25_000_000, 413),
    }


TURNS = 8


class Client(threading.Thread):
    """Sends pictures of all kinds, one after the other; a 503 comes again."""

    def __init__(self, number, url, statuses, labels, times):
        super().__init__()
        self.number, self.url, self.statuses, self.labels, self.times = number, url, statuses, labels, times

    def run(self):
        names = list(kinds())
        for turn in range(TURNS):
            name = "good" if turn % 2 else names[(turn // 2 + self.number) % len(names)]
            self.statuses[name, self._send(kinds()[name][0])] += 1

    def _send(self, content):
        while True:
            began = time.monotonic()
            try:
                answer = requests.post(f"{self.url}/predict", files={"file": content}, timeout=60)
            except requests.ConnectionError:
                return "reset"
            if answer.status_code == 503:
                time.sleep(0.2)
                continue
            said = answer.json()
            if answer.status_code == 200:
                self.times.append(time.monotonic() - began)
                self.labels.add((said["predictions"][0]["label"], round(said["predictions"][0]["probability"], 4)))
            return answer.status_code


def test_32_clients_with_broken_huge_and_empty_uploads(run, record_property):
    statuses, labels, times = collections.Counter(), set(), []
    with process(run, "--queue", 16) as (url, server):
        memory = psutil.Process(server.pid)
        before = memory.memory_info().rss
        clients = [Client(number, url, statuses, labels, times) for number in range(32)]
        for client in clients:
            client.start()
        most = before
        while any(client.is_alive() for client in clients):
            with contextlib.suppress(psutil.Error):
                most = max(most, memory.memory_info().rss)
            time.sleep(0.05)
        assert server.poll() is None
        assert requests.get(f"{url}/readyz", timeout=20).status_code == 200
        held = [
            line
            for line in requests.get(f"{url}/metrics", timeout=20).text.splitlines()
            if line.startswith("tlx_pictures_held")
        ]
    (row,) = tlx.load(run, device="cpu").predict([Image.open(io.BytesIO(GOOD))])
    assert labels == {(row["label"], round(row["probability"], 4))}
    wanted = {name: status for name, (_, status) in kinds().items()}
    assert {key: count for key, count in statuses.items() if key[1] != wanted[key[0]]} == {}
    assert sum(statuses.values()) == 32 * TURNS
    assert held == ["tlx_pictures_held 0.0"]
    assert most - before < 400 << 20
    middle, last = (1000 * sorted(times)[int(len(times) * share)] for share in (0.5, 0.99))
    grown = (most - before) >> 20
    record_property(
        "figures",
        f"32 clients: {len(times)} answers, {middle:.0f} ms at the median, {last:.0f} ms at the 99th, {grown} MB",
    )
