"""Trainings that are killed again and again, and compared with one that nobody has touched.

Processes are real and so is the launcher, torchrun's agent. To start often in little time, most launches are forked
from a process that has imported everything (`agent`); the others are the command as a user gives it.
"""

from __future__ import annotations

import collections
import contextlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kill_at
import psutil
import torch
from commands import environment, rows
from forked import agent, context
from places import SUPPORT
from safetensors.torch import load_file

SPOILT = ("terminate called", "SIGABRT", "Signal 6", "exitcode: -6", "Traceback", "Fatal Python error")


@dataclass
class Launch:
    """A started command: its launcher, and what it has said."""

    process: Any
    log: Path
    pids: Path

    @property
    def pid(self) -> int:
        return int(self.process.pid)

    def code(self, timeout: float = 120) -> int:
        """Waits for the end."""
        if isinstance(self.process, subprocess.Popen):
            try:
                return self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill(None)
                raise
        self.process.join(timeout)
        if self.process.exitcode is None:
            said = self.said()
            self.kill(None)  # or nobody ever would
            raise AssertionError(f"it has not ended after {timeout} s:\n{said[-3000:]}")
        return int(self.process.exitcode)

    def running(self) -> bool:
        return (self.process.poll() if isinstance(self.process, subprocess.Popen) else self.process.exitcode) is None

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def ranks(self) -> dict[int, int]:
        """The process of each rank, as last started."""
        lines = self.pids.read_text().splitlines() if self.pids.exists() else []
        return {who["rank"]: who["pid"] for who in map(json.loads, lines)}

    def kill(self, rank: int | None) -> bool:
        """SIGKILL for one rank; for launcher and all ranks where it is None. Whether there was anyone."""
        if rank is not None:
            return _kill(self.ranks().get(rank))
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            launcher = psutil.Process(self.pid)
            launcher.suspend()  # it starts nobody meanwhile
            for child in launcher.children():
                _kill(child.pid)
        return _kill(self.pid)

    def left(self) -> list[int]:
        """Processes of its ranks' sessions that still live: ranks, their workers."""
        lines = self.pids.read_text().splitlines() if self.pids.exists() else []
        sessions = {json.loads(line)["pid"] for line in lines}
        return [p for p in psutil.pids() if _session(p) in sessions]


def _kill(pid: int | None) -> bool:
    try:
        if pid is None or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return False
        os.kill(pid, signal.SIGKILL)
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False
    return True


def _session(pid: int) -> int:
    try:
        alive = psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        return os.getsid(pid) if alive else 0
    except (ProcessLookupError, PermissionError, psutil.NoSuchProcess):
        return 0


@dataclass
class Stage:
    """Where trainings of one configuration are started.

    Attributes:
        folder: for logs and what accidents tell.
        endings: of every launch that must end well: its log, where it did not.
        deaths: of every kill, what kind it was.
    """

    folder: Path
    config: Path
    endings: list[str | None] = field(default_factory=list)
    deaths: collections.Counter[str] = field(default_factory=collections.Counter)
    by_command: int = 0
    _number: int = 0

    def start(
        self, run: Path, *words: str, ranks: int = 2, restarts: int = 0, forked: bool = True, **env: str
    ) -> Launch:
        """`torchrun ... tlx train CONFIG run=RUN`, in the background."""
        self._number += 1
        self.folder.mkdir(parents=True, exist_ok=True)
        log, pids = (self.folder / f"{self._number:03d}.{kind}" for kind in ("log", "pids"))
        env = environment(PIDS_IN=str(pids), DEATHS_IN=str(self.folder / "deaths"), RUN=str(run), **env)
        torchrun = ["--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"]
        words = ("train", str(self.config), f"run={run}", *words)
        if forked:
            given = ("kill_at:main", words, torchrun, ranks * (1 + restarts), env, (str(log), str(log)))
            process = context().Process(target=agent, args=given)
            process.start()
            return Launch(process, log, pids)
        self.by_command += 1
        command = [sys.executable, "-m", "torch.distributed.run", *torchrun, str(SUPPORT / "kill_at.py"), *words]
        with log.open("ab") as file:
            process = subprocess.Popen(command, env=env, stdout=file, stderr=file, start_new_session=True)
        return Launch(process, log, pids)

    def whole(self, run: Path, *words: str, ranks: int = 2, **more: Any) -> Launch:
        """Runs to an end that must be a good one."""
        launch = self.start(run, *words, ranks=ranks, **more)
        self.ended_well(launch)
        return launch

    def ended_well(self, launch: Launch, *, restarted: bool = False) -> None:
        """Counts an ending; it was good if it exits with 0, says nothing of a fault, and leaves no process behind."""
        code = launch.code()
        spoilt = [word for word in SPOILT if word in launch.said() and not (restarted and word == "Traceback")]
        left = wait_until_gone(launch)
        fault = f"exit code {code}, {spoilt}, left {left}" if code or spoilt or left else None
        self.endings.append(fault and f"{launch.log}: {fault}\n{launch.said()[-3000:]}")

    def died(self, before: int) -> bool:
        """Counts deaths that have been told since there were `before` of them."""
        deaths = self.told()[before:]
        for death in deaths:
            self.deaths[kind_of(death)] += 1
        return bool(deaths)

    def told(self) -> list[dict[str, Any]]:
        file = self.folder / "deaths"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def figures(self) -> str:
        kinds = ", ".join(f"{number} {kind}" for kind, number in self.deaths.most_common())
        bad = sum(ending is not None for ending in self.endings)
        return (
            f"survival: {self.deaths.total()} kills ({kinds}); "
            f"{len(self.endings) - bad} clean endings of {len(self.endings)}; "
            f"{self.by_command} launches by the command line"
        )


def wait_until_gone(launch: Launch, timeout: float = 20) -> list[int]:
    """Processes that a launch has left, and that do not go."""
    end = time.monotonic() + timeout
    while (left := launch.left()) and time.monotonic() < end:
        time.sleep(0.05)
    return left


def kind_of(death: Mapping[str, Any]) -> str:
    """In words, from the call stack at the end."""
    stack = death.get("stack") or []
    modules = {step.partition(".")[0] for step in stack}
    if death["place"] in kill_at.ROWS:
        return "in a row of metrics"
    if modules & {"checkpoint", "saver"}:
        return "in a save"
    if "evaluation" in modules:
        return "in an evaluation"
    if death["place"].endswith("loop.begin") or "loop.begin" in stack:
        return "at a phase change or start"
    if death["place"].startswith("tlx.train.step"):
        return "in a step"
    return "at a random moment" if death["place"] == "time" else "in other files of the run folder"


@dataclass(frozen=True)
class Accident:
    """What befalls one launch: a kill at a place, at a time, or a request to stop."""

    kill: str = ""
    after_s: float | None = None
    rank: int | None = None
    stop: str = ""


@dataclass(frozen=True)
class Whole:
    """An uninterrupted training: its folder, how long it took, and how often each rank came to each place."""

    run: Path
    seconds: float
    counts: Sequence[Mapping[str, int]]

    @classmethod
    def of(cls, stage: Stage, run: Path) -> Whole:
        folder = stage.folder / "counts"
        folder.mkdir(parents=True)
        ready = context().Process(target=int)  # imports take longer than a training
        ready.start()
        ready.join()
        started = time.monotonic()
        stage.whole(run, COUNT_IN=str(folder))
        assert stage.endings == [None], stage.endings
        counts = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
        return cls(run, time.monotonic() - started, [collections.Counter(c) for c in counts])


def drawn(rng: random.Random, whole: Whole, span: float) -> Accident:
    """An accident; `span` is the part of an uninterrupted run from which its place is drawn."""
    draw = rng.random()
    group = rng.random() < 0.6
    if draw < 0.2:
        return Accident(after_s=rng.uniform(0.3, whole.seconds * span), rank=None if group else rng.randrange(2))
    rank = 0
    if draw < 0.65:
        place = rng.choice(kill_at.FILES + kill_at.SAVES)
    elif draw < 0.75:
        place = kill_at.ROWS[0]
    else:
        rank, place = rng.randrange(2), rng.choice(kill_at.STEPS)
    how = "torn" if place in kill_at.TORN and rng.random() < 0.5 else "group" if group else "rank"
    number = rng.randint(1, max(1, math.ceil(whole.counts[rank][place] * span)))
    return Accident(kill=f"{rank}:{place}:{number}:{how}")


def befall(stage: Stage, run: Path, accident: Accident, *, forked: bool = True) -> str:
    """One launch with an accident: `killed`, `stopped`, or `done` where it was over before."""
    before = len(stage.told())
    if accident.after_s is not None:
        launch = stage.start(run, forked=forked)
        time.sleep(accident.after_s)
        hit = launch.kill(accident.rank) if launch.running() else False
        if hit:
            kill_at.add_line(stage.folder / "deaths", {"place": "time", "rank": accident.rank})
    elif accident.stop:
        launch = stage.start(run, forked=forked, STOP_AT=accident.stop)
    else:
        launch = stage.start(run, forked=forked, KILL_AT=accident.kill)
    code = launch.code()
    assert not wait_until_gone(launch), f"{accident}: processes are left\n{launch.said()[-2000:]}"
    if stage.died(before):
        # a rank that dies when all work is done, or before the launcher looks, may go unnoticed; nobody else's end may
        assert code != 0 or status_of(run) == "done", f"{accident}: exit code 0\n{launch.said()[-2000:]}"
        return "killed"
    stage.ended_well(launch)
    return "stopped" if status_of(run) == "resumable" else "done"


def status_of(run: Path) -> str | None:
    try:
        return json.loads((run / "status.json").read_text())["status"]
    except (OSError, ValueError):
        return None


def chain(stage: Stage, run: Path, seed: int, whole: Whole, kills: int, *, by_command: float = 0.0) -> list[str]:
    """Starts a training, with accidents by seed until about its end, and then without to the end.

    Returns:
        What is not as in the uninterrupted one, with what happened.
    """
    rng = random.Random(seed)
    happened = []
    for turn in range(kills):
        accident = drawn(rng, whole, min(1.0, 1.6 / (kills - turn + 1)))
        forked = rng.random() > by_command
        if rng.random() < 0.2:
            stop = f"{rng.randrange(2)}:{rng.randrange(65)}:{rng.choice(['SIGTERM', 'SIGINT'])}"
            accident = Accident(stop=stop if rng.random() < 0.7 else f"0:{rng.randrange(65)}:file")
        end = befall(stage, run, accident, forked=forked)
        happened.append(f"{accident} {end}")
        if end == "done":
            break
    stage.whole(run)
    again = stage.whole(run)
    assert f"run {run.name}: " in again.said(), f"the result is not shown again:\n{again.said()}"
    found = differences(run, whole.run, stops=any(h.endswith("stopped") for h in happened))
    return [f"seed {seed}: {found}\n  " + "\n  ".join(happened)] if found else []


def differences(run: Path, whole: Path, *, stops: bool = False) -> list[str]:
    """What is not the same in two finished runs: every tensor's bits, every row, the result, what is kept.

    Args:
        stops: requests to stop make further checkpoints: only the newest are compared.
    """
    found = []
    if rows(run) != rows(whole):  # all but the speed
        steps = [json.loads(line).get("step") for line in (run / "metrics.jsonl").read_text().splitlines()]
        found.append(f"metrics.jsonl; steps {steps}")
    results = [json.loads((r / "result.json").read_text()) for r in (run, whole)]
    own = {"name", "wall_time_s", "command"}
    found += [f"result.json: {k}" for k in results[1] if k not in own and results[0].get(k) != results[1][k]]
    for link in ("latest", "best"):
        one, other = ((r / "checkpoints" / link).resolve() for r in (run, whole))
        found += [f"{link}: {one.name}, not {other.name}"] if one.name != other.name else unlike(one, other)
    listings = [sorted(str(p.relative_to(r)) for p in r.rglob("*")) for r in (run, whole)]
    left = [name for name in listings[0] if ".tmp" in name or ".writing" in name]
    found += [f"left behind: {left}"] if left else []
    found += (
        [f"files: {sorted(set(listings[0]) ^ set(listings[1]))}"] if listings[0] != listings[1] and not stops else []
    )
    return found


def unlike(one: Path, other: Path) -> list[str]:
    """Differences of two checkpoints."""
    found = []
    for name in ("model.safetensors", "ema.safetensors"):
        found += [f"{one.name}/{name}: {k}" for k in differing(load_file(one / name), load_file(other / name))]
    states = [torch.load(p / "optimizer.pt", weights_only=True) for p in (one, other)]
    flat = [{f"{n}.{k}": torch.as_tensor(v) for n, s in state.items() for k, v in s.items()} for state in states]
    found += [f"{one.name}/optimizer.pt: {k}" for k in differing(*flat)]
    notes = [json.loads((p / "state.json").read_text()) for p in (one, other)]
    for note in notes:
        note["progress"].pop("wall_time_s")
        note.pop("metrics_bytes")  # the speed is written with more or fewer digits
        note.pop("files")
        note.pop("sha256", None)  # of the rest, with times
    found += [f"{one.name}/state.json: {k}" for k in notes[1] if notes[0].get(k) != notes[1][k]]
    return found


def differing(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> list[str]:
    """Names that only one of them has, or whose bits are not the same."""

    def bits(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous().flatten().view(torch.uint8)

    both = one.keys() & other.keys()
    return sorted((one.keys() ^ other.keys()) | {k for k in both if not torch.equal(bits(one[k]), bits(other[k]))})
