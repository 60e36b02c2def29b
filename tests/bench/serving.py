"""Latency of `tlx serve` beside the network alone, and beside `model.predict` of a file, in one run.

``python tests/bench/serving.py RUN PICTURES [--clients 1,32] [--requests 100] [--rounds 3] [-- OPTIONS OF tlx serve]``
starts a server of its own, asks it, and computes the same pictures here, by turns, so that a machine with other work is
as slow for one as for the other. Threads: OMP_NUM_THREADS, the same for both. It prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import requests
import torch

import tlx
from tlx.data.stream.file_list import FileList
from tlx.use.inputs import pictures_of


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def timed(work: Callable[[int], object], numbers: Sequence[int]) -> list[float]:
    """Milliseconds of each."""
    found = []
    for number in numbers:
        began = time.perf_counter()
        work(number)
        found.append(1000 * (time.perf_counter() - began))
    return found


def asked(url: str, files: Sequence[Path], clients: int, count: int) -> list[float]:
    """Of `count` requests in all, by so many clients that each wait for their answer before they ask again."""
    found: list[float] = []

    def client(first: int) -> None:
        session = requests.Session()

        def post(number: int) -> None:
            answer = session.post(
                f"{url}/predict", files={"file": files[number % len(files)].read_bytes()}, timeout=120
            )
            assert answer.status_code == 200, answer.text

        found.extend(timed(post, range(first, count, clients)))

    threads = [threading.Thread(target=client, args=(first,)) for first in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def row(name: str, times: Sequence[float], alone: float, pictures_per_s: float | None = None) -> str:
    ordered = sorted(times)
    middle, last = statistics.median(ordered), ordered[min(int(0.99 * len(ordered)), len(ordered) - 1)]
    rate = 1000 / statistics.mean(times) if pictures_per_s is None else pictures_per_s
    return f"| {name} | {middle:.1f} | {last:.1f} | {middle / alone:.2f} | {rate:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--clients", default="1,32")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("options", nargs="*")
    given = parser.parse_args()
    files = [Path(name) for name in pictures_of(given.pictures)][:64]
    clients = [int(word) for word in given.clients.split(",")]

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or torch.get_num_threads()))
    model = tlx.load(given.run, device="cpu")
    _, pixels = model.forward.pixels(FileList([str(file) for file in files], "files"), torch.arange(len(files)))
    port = free_port()
    words = [sys.executable, "-m", "tlx", "serve", str(given.run), "--port", str(port), "--device", "cpu"]
    server = subprocess.Popen([*words, *given.options])
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                requests.get(f"{url}/readyz", timeout=120).raise_for_status()
                break
            except requests.ConnectionError:
                time.sleep(0.2)
        times: dict[str, list[float]] = {}
        seconds: dict[str, float] = {}
        for _ in range(given.rounds):
            numbers = range(min(given.requests, 50))
            network = timed(lambda n: model.forward.outputs(pixels[n % len(files)][None], batch=1), numbers)
            times.setdefault("the network alone", []).extend(network)
            predicted = timed(lambda n: model.predict(files[n % len(files)], batch=1), numbers)
            times.setdefault("model.predict of a file", []).extend(predicted)
            for many in clients:
                name, began = f"tlx serve, {many} client{'s' * (many > 1)}", time.perf_counter()
                times.setdefault(name, []).extend(asked(url, files, many, given.requests))
                seconds[name] = seconds.get(name, 0) + time.perf_counter() - began
        alone = statistics.median(times["the network alone"])
        print("| | ms, median | ms, 99th | median to the network's | pictures/s |\n|---|---|---|---|---|")
        for name, found in times.items():
            print(row(name, found, alone, len(found) / seconds[name] if name in seconds else None))
    finally:
        server.terminate()
        server.wait(30)


if __name__ == "__main__":
    main()
