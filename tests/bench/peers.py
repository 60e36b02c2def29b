"""tlx's data path beside others': the same pictures, the same machine, one run.

``python tests/bench/peers.py --work DIR [--photos FOLDER] [--minutes 11]`` makes the pictures under DIR, once, or takes
real ones from a folder per class; measures every path in a process of its own, in rounds that go through all of them;
and writes tests/bench/PEERS.md. ``pip install tlx[bench]`` brings what can be installed by pip alone; what cannot be
imported is named in the table with the reason. ``--quick`` prints a short run instead.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import sets
from peer_paths import PEERS

HERE = Path(__file__).parent
RESULT = HERE / "PEERS.md"
FLOORS = ("floor-c", "floor")
MANY = ("tlx", "tlx-wheels", "torchvision-v2", "webdataset-v2", "dali")
FEW = ["small:train:0", "small:eval:0", "large:train:0", "photos:train:0", "small:train:2"]
MORE = ["large:eval:0", "photos:eval:0", "small:train:1", "small:eval:2", "large:train:2", "photos:train:2"]
Found = dict[tuple[str, str], list[dict[str, Any]]]


def cells_of(peer: str, names: Sequence[str]) -> list[str]:
    """What is measured of a peer; less of most, to keep the whole short (FFCV compiles for seconds, each time)."""
    cells = [cell for cell in (FEW + MORE if peer in (*MANY, *FLOORS) else FEW) if cell.split(":")[0] in names]
    if peer in FLOORS:
        return [cell for cell in cells if cell.endswith(":0")]
    return [cell for cell in cells if cell == "large:train:0"] if peer == "tlx-full" else cells


def run(peer: str, work: Path, cells: Sequence[str], *words: str) -> list[dict[str, Any]]:
    """One process; the lines that it prints."""
    command = [sys.executable, str(HERE / "peer_paths.py"), peer, str(work), *cells, *words]
    paths = os.pathsep.join([str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900, check=False)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        told = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
    except subprocess.TimeoutExpired:
        lines, told = [], ["it does not come to an end"]
    missing = set(cells) - {line["cell"] for line in lines}
    return [*lines, *({"peer": peer, "cell": cell, "error": told[0][:200]} for cell in sorted(missing))]


def measure(
    peers: Sequence[str], work: Path, names: Sequence[str], *, rounds: int, seconds: float, until: float
) -> Found:
    """Rounds over all peers, each in the opposite order of the one before; as many as asked for, and as time allows."""
    found: Found = {}
    longest = 0.0
    for number in range(rounds):
        began = time.monotonic()
        if number and began + longest > until:
            break
        for peer in peers if number % 2 == 0 else peers[::-1]:
            started = time.monotonic()
            for line in run(peer, work, cells_of(peer, names), "--seconds", str(seconds)):
                found.setdefault((peer, line["cell"]), []).append(line)
            print(f"  {peer}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        longest = max(longest, time.monotonic() - began)
        print(f"round {number + 1}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return found


def median(found: Found, peer: str, cell: str, key: str) -> float | None:
    values = [line[key] for line in found.get((peer, cell), ()) if key in line]
    return statistics.median(values) if values else None


def tables(
    found: Found, peers: Sequence[str], names: Sequence[str], quality: dict[tuple[str, str], str]
) -> Iterable[str]:
    for name in names:
        for about, said in (("train:0", "training's view"), ("eval:0", "evaluation's view")):
            yield f"\n## {name}, {said}, one process\n"
            yield "| path | output | CPU ms | images/s/core | images/s | tlx is faster | x floor | first batch | PSNR |"
            yield "|---|---|--:|--:|--:|--:|--:|--:|--:|"
            yield from rows(found, peers, f"{name}:{about}", quality)
    several = sorted({cell for _, cell in found if not cell.endswith(":0")})
    yield "\n## With workers: CPU ms per image (images/s)\n"
    yield f"| path | {' | '.join(several)} |"
    yield f"|---|{'--:|' * len(several)}"
    for peer in peers:
        cells = [(median(found, peer, c, "cpu_ms"), median(found, peer, c, "images_per_s")) for c in several]
        if any(cpu for cpu, _ in cells):
            shown = (f"{cpu:.3f} ({rate:,.0f})" if cpu and rate else "" for cpu, rate in cells)
            yield f"| {PEERS[peer].label} | {' | '.join(shown)} |"


def rows(found: Found, peers: Sequence[str], cell: str, quality: dict[tuple[str, str], str]) -> Iterable[str]:
    costs = {peer: median(found, peer, cell, "cpu_ms") for peer in peers}
    ours = costs.get("tlx")
    floor = min((cost for cost in (costs.get(name) for name in FLOORS) if cost), default=None)
    for peer in sorted((p for p in peers if costs[p]), key=lambda p: costs[p] or 0.0):
        cost, rate = costs[peer] or 0.0, median(found, peer, cell, "images_per_s") or 0.0
        faster = f"{cost / ours:.2f}" if ours and peer not in FLOORS else ""
        beside = f"{cost / floor:.2f}" if floor else ""
        first = f"{median(found, peer, cell, 'first_s') or 0.0:.2f} s" if peer not in FLOORS else ""
        yield (
            f"| {PEERS[peer].label} | {PEERS[peer].output} | {cost:.3f} | {1e3 / cost:,.0f} | {rate:,.0f} | {faster} | "
            f"{beside} | {first} | {quality.get((peer, cell), '')} |"
        )
    for peer in peers:
        errors = [line["error"] for line in found.get((peer, cell), ()) if "error" in line]
        if errors and not costs[peer]:
            yield f"| {PEERS[peer].label} | not measured: {errors[0].replace('|', '/')} | | | | | | | |"


def qualities(work: Path, names: Sequence[str], peers: Sequence[str]) -> dict[tuple[str, str], str]:
    said = {}
    for peer in (p for p in ("tlx", "tlx-full", "tlx-wheels") if p in peers):
        for line in run(peer, work, [c for c in cells_of(peer, names) if c.endswith(":0")], "--quality"):
            if "psnr_mean" in line:
                said[peer, line["cell"]] = f"{line['psnr_mean']:.1f} dB, least {line['psnr_least']:.1f}"
    return said


def about(work: Path, names: Sequence[str], rounds: int, seconds: float, minutes: float) -> Iterable[str]:
    yield "# The data path beside others'\n"
    yield (
        f"{datetime.date.today():%d %B %Y}; {processor()}, {len(os.sched_getaffinity(0))} cores, {platform.system()} "
        f"{platform.release()}, Python {platform.python_version()}; `{shlex.join(['python', *sys.argv])}`; "
        f"{rounds} rounds of {seconds} s a measurement and process, medians, {minutes:.0f} minutes in all.\n"
    )
    yield ", ".join(f"{name} {found}" for name, found in versions().items()) + "\n"
    for name in names:
        files = list((work / f"folder_{name}").glob("*/*"))
        size = statistics.fmean(file.stat().st_size for file in files) / 1024
        made = "made, 4:2:0, quality 90" if name in sets.SIZES else "photographs"
        yield f"- {name}: {len(files):,} JPEGs ({made}), {size:.0f} KB on average"
    yield (
        "\nCPU ms: of all processes of a path, per image, from the same bytes (FFCV, litdata and mosaicml-streaming "
        "hold them in files of their own, FFCV coded anew at quality 90) to a batch of 64. images/s: by the "
        "clock. Floor: the faster of `floor.c`, which has nothing of tlx, and tlx's extension, both in one thread over "
        "bytes in memory. DALI and FFCV work in one thread beside the process where it says one process. PSNR: tlx's "
        "pictures against Pillow's full decode and antialiased resize."
    )


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    from tlx.data.pixels.jpeg_region import decoder

    found = {"tlx's decoder": decoder()}
    packages = ["tlx", "torch", "torchvision", "pillow", "numpy", *(peer.package for peer in PEERS.values())]
    for package in dict.fromkeys(packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="pictures and the peers' own files; kept")
    parser.add_argument("--photos", type=Path, help="real pictures too: a folder per class")
    parser.add_argument("--small", type=int, default=1000)
    parser.add_argument("--large", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=5, help="at most")
    parser.add_argument("--seconds", type=float, default=0.5, help="of a measurement")
    parser.add_argument("--minutes", type=float, default=11, help="for all rounds")
    parser.add_argument("--only", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--quick", action="store_true", help="a few pictures, one round, printed")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    small, large = (200, 24) if asked.quick else (asked.small, asked.large)
    for name, count in (("small", small), ("large", large)):
        sets.make(asked.work, name, count, jobs=os.cpu_count() or 1)
    names = [*sets.SIZES]
    if asked.photos is not None:
        sets.adopt(asked.work, "photos", asked.photos)
        names.append("photos")
    for peer in asked.only:
        if PEERS[peer].prepare is not None:
            run(peer, asked.work, [f"{name}:train:0" for name in names], "--prepare")
    began = time.monotonic()
    quality = qualities(asked.work, names, asked.only)
    rounds = 1 if asked.quick else asked.rounds
    until = began + 60 * asked.minutes
    found = measure(asked.only, asked.work, names, rounds=rounds, seconds=asked.seconds, until=until)
    done = max((len(lines) for lines in found.values()), default=0)
    minutes = (time.monotonic() - began) / 60
    lines = [*about(asked.work, names, done, asked.seconds, minutes), *tables(found, asked.only, names, quality)]
    text = "\n".join(lines) + "\n"
    if asked.quick:
        print(text)
    else:
        RESULT.write_text(text)
        print(RESULT)


if __name__ == "__main__":
    main()
