"""Commands whose processes are forked from one that has imported everything, since imports take longer than most of
what is tested; torchrun's real agent, real ranks, real signals. Nothing that libraries read from the environment while
they are imported (``HF_HOME``, say) may be set for them.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from places import SUPPORT

IMPORTED = [
    *(
        "torch.distributed.run",
        "torch.nn.parallel",
        "accelerate",
        "timm",
        "torchvision",
        "torchmetrics",
        "rich.progress",
    ),
    *(
        "tlx.cli.main",
        "tlx.train.build",
        "tlx.train.command",
        "tlx.train.loop",
        "tlx.models",
        "tlx.ranks.rendezvous",
        "tlx.train.evaluation",
        "tlx.tracking.journal",
    ),
    *("torch._dynamo", "torch.optim.swa_utils", "torchvision.transforms.v2", "toys", "kill_at"),
]


def agent(
    entry: str,
    words: Sequence[str],
    torchrun: Sequence[str],
    ranks: int,
    env: Mapping[str, str],
    logs: tuple[str, str],
) -> None:
    """torchrun, in this process; its ranks are forked from here before it starts threads, and wait for their turn.

    Args:
        entry: ``module:function`` that each rank calls with `words`.
        logs: files for standard output and standard error, which may be the same.
    """
    _become(env, logs)
    waiting: list[tuple[int, int]] = []
    for _ in range(ranks):
        inlet, outlet = os.pipe()
        if (pid := os.fork()) == 0:
            os.close(outlet)
            for _, other in waiting:
                os.close(other)
            _rank(inlet, entry, words)
        os.close(inlet)
        waiting.append((pid, outlet))

    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

    def handed(handler: Any, command: Any, wanted: Mapping[str, str]) -> Forked:
        pid, outlet = waiting.pop(0)
        with open(outlet, "w") as file:
            json.dump(dict(wanted), file)
        return Forked(pid)

    SubprocessHandler._popen = handed  # type: ignore[method-assign, assignment]
    run.main([*torchrun, str(SUPPORT / "kill_at.py")])


def alone(entry: str, words: Sequence[str], env: Mapping[str, str], logs: tuple[str, str]) -> None:
    """A command without a launcher."""
    _become(env, logs)
    _call(entry, words)


def _become(env: Mapping[str, str], logs: tuple[str, str]) -> None:
    """A process group, output and environment of its own."""
    os.setsid()
    for number, log in enumerate(logs, start=1):
        how = os.O_RDWR if log.startswith("/dev/pts/") else os.O_WRONLY  # to be read as well, it becomes the session's
        os.dup2(os.open(log, how | os.O_CREAT | os.O_APPEND, 0o644), number)
    faulthandler.enable(2)
    os.environ.clear()
    os.environ.update(env)


def _rank(inlet: int, entry: str, words: Sequence[str]) -> None:
    """A rank: waits for its environment, then is what a new process would be."""
    os.setsid()
    with open(inlet) as file:
        env = file.read()
    if not env:  # the agent is gone, or has not needed it
        os._exit(0)
    os.environ.clear()
    os.environ.update(json.loads(env))
    _call(entry, words)


def command_line(words: Sequence[str]) -> None:
    """What `python -m tlx WORDS` runs."""
    from tlx.cli.main import main

    sys.argv = ["tlx", *words]
    main()


def _call(entry: str, words: Sequence[str]) -> None:
    multiprocessing.set_start_method(None, force=True)  # as in a process that nobody has forked
    module, _, name = entry.partition(":")
    code = 1
    try:
        getattr(importlib.import_module(module), name)(words)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end_with_stacks(pid: int) -> None:
    """Ends a process and all that come from it; on standard error each writes where its threads are."""
    for process in reversed([psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]):
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGABRT)
            process.wait(3)  # one after the other writes
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


@dataclass
class Forked:
    """As much of subprocess.Popen as torchrun's agent asks for."""

    pid: int
    returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float = math.inf) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("rank", timeout)
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode


def context() -> Any:
    """Forks from a process that has everything imported, on one thread as under torchrun."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(IMPORTED)
    before = dict(os.environ)
    os.environ.update(OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true", PYTHONPATH=str(SUPPORT))
    try:
        from multiprocessing import forkserver

        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return made


def run(
    words: Sequence[str], env: Mapping[str, str], *, ranks: int, entry: str = "forked:command_line"
) -> subprocess.CompletedProcess[str]:
    """`tlx WORDS`, or torchrun with so many ranks of it, to its end.

    Args:
        entry: ``module:function``, in place of tlx.
    """
    with tempfile.TemporaryDirectory() as folder:
        logs = (f"{folder}/out", f"{folder}/err")
        if ranks == 1:
            target, given = alone, (entry, words, env, logs)
        else:
            torchrun = ["--standalone", f"--nproc-per-node={ranks}"]
            target, given = agent, (entry, words, torchrun, ranks, env, logs)
        process = context().Process(target=target, args=given)
        process.start()
        process.join(240)
        hangs = process.exitcode is None
        if hangs:
            _end_with_stacks(process.pid)
        out, err = (Path(log).read_text(errors="replace") if Path(log).exists() else "" for log in logs)
        if hangs:
            print(out, err, sep="\n")
            raise subprocess.TimeoutExpired(["tlx", *words], 240)
        return subprocess.CompletedProcess(["tlx", *words], process.exitcode, out, err)
