"""`tlx` as a user starts it: real processes, one rank or several under torchrun."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import forked
import psutil
import yaml
from places import SUPPORT
from typer.testing import CliRunner

from tlx.cli.main import app
from tlx.train import memory_use, step_timer


def environment(*, path: str = "", **extra: str) -> dict[str, str]:
    """Ours, with tests/support/ and `path` importable and nothing of an outer launcher."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "WANDB_"))}
    paths = os.pathsep.join(p for p in (str(SUPPORT), path, inherited.get("PYTHONPATH", "")) if p)
    return {**inherited, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **extra}


def command(*words: object, ranks: int = 1) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    return [sys.executable, *torchrun, "-m", "tlx", *map(str, words)]


def tlx(
    *words: object, ranks: int = 1, path: str = "", is_forked: bool = False, **env: str
) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end; `is_forked`: in processes that have imported everything (see `forked`)."""
    env = environment(path=path, **env)
    if is_forked:
        return forked.run([str(word) for word in words], env, ranks=ranks)
    words = command(*words, ranks=ranks)
    return subprocess.run(words, env=env, capture_output=True, text=True, timeout=240, check=False)


def start(*words: object, ranks: int = 1) -> subprocess.Popen[str]:
    """Starts a command in a process group of its own."""
    return subprocess.Popen(
        command(*words, ranks=ranks),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    """Until metrics.jsonl has come to a step."""
    deadline = time.monotonic() + 120
    while last_step(run) < step:
        assert process.poll() is None, f"it ended before step {step}:\n{process.communicate()[0][-3000:]}"
        assert time.monotonic() < deadline, f"step {step} has not come"
        time.sleep(0.01)


def last_step(run: Path) -> int:
    lines = (run / "metrics.jsonl").read_bytes().splitlines() if (run / "metrics.jsonl").exists() else []
    try:
        return int(json.loads(lines[-1])["step"]) if lines else -1
    except ValueError:
        return -1


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The training processes below a launcher, by rank."""
    children = psutil.Process(process.pid).children()
    return sorted((c for c in children if "-m" in c.cmdline()), key=lambda c: int(c.environ().get("RANK", 0)))


def kill_all(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def write_config(path: Path, raw: dict, **over: object) -> Path:
    """A configuration of a training that draws no report, unless it says so: a second or two of each of hundreds."""
    said = {**raw, **over}
    if isinstance(track := said.get("track", {}), dict):
        said["track"] = {"report": False, **track}
    path.write_text(yaml.safe_dump(said))
    return path


def rows(run: Path) -> list[dict]:
    """Of metrics.jsonl, without what comes from the machine: two equal trainings differ in it."""
    whole = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in row.items() if not key.startswith((step_timer.PREFIX, memory_use.PREFIX))}
        for row in whole
    ]


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


def joined(lines: Sequence[str]) -> str:
    return "\n".join(lines)


def invoke(*words):
    """`tlx WORDS` in this process."""
    return CliRunner().invoke(app, [str(w) for w in words])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
