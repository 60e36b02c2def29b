"""`tlx` with an accident: it dies of SIGKILL at an exact place, or is asked to stop at an exact step.

``torchrun tests/support/kill_at.py train CONFIG ...``, or :func:`main` in a process that has imported everything. What
is to happen is said in the environment:

- ``KILL_AT=0:os.fsync:17:rank``: rank 0 dies at its 17th call of os.fsync; ``group`` takes launcher and ranks along,
  ``torn`` half writes what was to be written and dies; several, by comma: the first start's, the first restart's ...
- ``STOP_AT=1:20:SIGTERM``: rank 1 sends itself a signal, or makes the file ``stop`` (``0:20:file``), in the update of
  step 20; ``twice`` sends SIGTERM, and again after tlx's patience.
- ``COUNT_IN=FOLDER``: how often each place was come to, by rank. ``IDS_IN=FOLDER``: the samples of every step, by rank.
- ``SLOW_S=0.1``: every step takes so much longer. ``PIDS_IN=FILE``: who was started. ``DEATHS_IN=FILE``: who died.
"""

from __future__ import annotations

import atexit
import builtins
import collections
import contextlib
import io
import itertools
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

FILES = ("os.fsync", "os.replace", "os.rename", "os.symlink", "os.unlink", "os.rmdir", "os.mkdir", "open for writing")
SAVES = ("tlx.runs.checkpoint.save_file", "torch.save")
STEPS = (
    "tlx.train.step.Updater.update",
    "tlx.train.step.Exchange.post",
    "tlx.train.evaluation.evaluate",
    "tlx.train.loop.begin",
)
ROWS = ("tlx.runs.metrics_file.MetricsFile.append",)
PLACES = FILES + SAVES + STEPS + ROWS
"""What every training comes to."""
TESTS = ("tlx.use.evaluate.scored",)
"""What one with data.test comes to, at its end."""
CACHED = ("tlx.features.store.FeatureStore.write",)
"""What one with features to store comes to."""
TORN = SAVES + ROWS


def main(words: Sequence[str]) -> None:
    """Arms what the environment asks for, then runs `tlx` with these words."""
    rank = int(os.environ.get("RANK", 0))
    start = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    _tell("PIDS_IN", {"pid": os.getpid(), "rank": rank, "start": start})
    wanted = (os.environ.get("KILL_AT") or "").split(",")
    at, place, number, how = (wanted[start] if start < len(wanted) and wanted[start] else "-1:::").split(":")
    if int(at) == rank or "COUNT_IN" in os.environ:
        watch(rank, place, int(number or 0) if int(at) == rank else 0, how)
    if {"STOP_AT", "IDS_IN", "SLOW_S"} & os.environ.keys():
        accompany(rank)
    sys.argv = ["tlx", *words]
    from tlx.cli.main import main as tlx

    tlx()


def watch(rank: int, place: str, number: int, how: str) -> None:
    """Counts the calls of every place in this process, from any thread; at the wanted one it dies."""
    numbers = {name: itertools.count(1) for name in PLACES + TESTS + CACHED}
    made: collections.Counter[str] = collections.Counter()

    def counted(name: str, act: Callable[..., Any], tear: Callable[..., Any] | None = None) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            if os.getpid() != process:  # a data worker, which has forked from here
                return act(*given, **named)
            made[name] = now = next(numbers[name])
            if name == place and now == number:
                if how == "torn" and tear is not None:
                    tear(act, *given, **named)
                die(rank, name, now, how)
            return act(*given, **named)

        return call

    process = os.getpid()
    for name in FILES[:-1]:
        short = name.partition(".")[2]
        setattr(os, short, counted(name, getattr(os, short)))
    plain = builtins.open
    writing = counted("open for writing", plain)

    def opened(file: Any, mode: str = "r", *given: Any, **named: Any) -> Any:
        inside = isinstance(file, (str, os.PathLike)) and not str(file).startswith("/dev/")
        return (writing if inside and set(mode) & set("wxa+") else plain)(file, mode, *given, **named)

    builtins.open = io.open = opened  # type: ignore[assignment]
    for name in SAVES + STEPS + ROWS + TESTS + CACHED:
        owner, short = _owner(name)
        setattr(owner, short, counted(name, getattr(owner, short), half_row if name in ROWS else half_file))
    if "COUNT_IN" in os.environ:
        leave = os._exit

        def tell() -> None:
            if os.getpid() == process:  # not a worker, which has forked from here
                (Path(os.environ["COUNT_IN"]) / f"{rank}.json").write_text(json.dumps(made))

        def leaving(code: int) -> None:
            tell()
            leave(code)

        os._exit = leaving  # type: ignore[assignment]
        atexit.register(tell)


def _owner(name: str) -> tuple[Any, str]:
    """The module or class in which a dotted name is, and its last word."""
    import importlib

    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        with contextlib.suppress(ImportError):
            owner: Any = importlib.import_module(".".join(parts[:cut]))
            for part in parts[cut:-1]:
                owner = getattr(owner, part)
            return owner, parts[-1]
    raise ImportError(name)


def half_row(append: Callable[..., Any], metrics: Any, row: Any) -> None:
    """Half of a line arrives at the end of the file."""
    half = json.dumps({"step": row["step"], "torn": True}).encode()[:-6]
    with metrics.path.open("r+b") as file:
        file.seek(metrics.position())
        file.write(half)


def half_file(save: Callable[..., Any], content: Any, file: Any, **named: Any) -> None:
    """Half of what is written to `file` arrives there."""
    save(content, file, **named)
    if isinstance(file, (str, os.PathLike)):
        os.truncate(file, os.path.getsize(file) // 2)


def die(rank: int, place: str, number: int, how: str) -> None:
    """SIGKILL for this process; before, where it goes for the group, for the launcher and the other ranks."""
    frames = [frame for frame in traceback.extract_stack() if "/tlx/" in frame.filename]
    stack = [f"{Path(f.filename).stem}.{f.name}" for f in frames]
    _tell("DEATHS_IN", {"rank": rank, "place": place, "number": number, "how": how, "stack": stack})
    if how == "group":
        import psutil

        launcher = psutil.Process(os.getppid())
        others = [p for p in launcher.children() if p.pid != os.getpid()]
        for process in (launcher, *others):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    os.kill(os.getpid(), signal.SIGKILL)


def accompany(rank: int) -> None:
    """Asks for a stop, notes sample ids, or slows down, at the beginning of every update."""
    from tlx.runs.stop import PATIENCE_S
    from tlx.train.step import Updater

    plain = Updater.update
    at, wanted, what = (os.environ.get("STOP_AT") or "-1:-1:").split(":")
    slow = float(os.environ.get("SLOW_S", 0))

    def update(self: Updater, phase_model: Any, step: int, batches: Any, *, size: Any) -> Any:
        held = list(batches)
        if "IDS_IN" in os.environ:
            ids = [int(i) for batch in held if not batch.idle for i in batch.ids]
            with (Path(os.environ["IDS_IN"]) / f"{self.world.size}-{rank}-{os.getpid()}.jsonl").open("a") as file:
                file.write(json.dumps([step, rank, self.world.size, ids]) + "\n")
        time.sleep(slow)
        if int(at) == rank and int(wanted) == step:
            if what == "file":
                (Path(os.environ["RUN"]) / "stop").touch()
            else:
                os.kill(os.getpid(), signal.SIGTERM if what == "twice" else signal.Signals[what])
            if what == "twice":
                end = time.monotonic() + PATIENCE_S + 0.5
                while time.monotonic() < end:
                    time.sleep(0.05)
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)  # it must not come to this
        return plain(self, phase_model, step, held, size=size)

    Updater.update = update  # type: ignore[method-assign]


def _tell(variable: str, what: dict[str, Any]) -> None:
    if variable in os.environ:
        add_line(os.environ[variable], what)


def add_line(path: str | Path, what: dict[str, Any]) -> None:
    """A line at the end of a file that several processes write, in one call."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(handle, json.dumps(what).encode() + b"\n")
    os.close(handle)


if __name__ == "__main__":
    main(sys.argv[1:])
