"""One trial: its training, as `tlx train` would do it, which hears of the pruner at each evaluation.

Without a launcher each trial is a process (``tlx sweep-trial``): one that runs out of memory, or leaves threads, memory
of a GPU or a library's state behind, costs the sweep nothing but itself; each pays for an import of torch. Under a
launcher the ranks are there already, and a process of rank 0 could not start the others: they train one trial after
the other, in a process group that is made anew for each.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from tlx.base.errors import TlxError, UserError
from tlx.base.launcher import export, rank
from tlx.sweep.ended import Ended, ended
from tlx.sweep.spec import LOGS, Spec
from tlx.sweep.study import Study

GROUP = "WANDB_RUN_GROUP"
"""Trials are a group at W&B, unless the environment names another one."""


def start_trial(spec: Spec, number: int, *, until: float | None, command: bool) -> Mapping[str, Any] | None:
    """Trains, or goes on with, a trial of a sweep in this process.

    Args:
        until: when it is to stop and save, in seconds since the epoch; None for no limit.
        command: as of :func:`tlx.train.command.train`, whose result and errors this gives.
    """
    from tlx.train.command import train

    export(GROUP, spec.name, replace=False)
    study = Study(spec)
    config = spec.config(study.point(number), number)
    if until is not None:
        left = max(1, round(until - time.time()))
        config = config.model_copy(update={"stop_after": min(left, config.stop_after or left)})
    return train(config, command=command, judge=study.judge(number) if rank() == 0 else None)


def train_trial(spec: Spec, number: int, *, until: float | None) -> Ended:
    """The same in a process that goes on afterwards; how it ended, on every rank."""
    run = spec.run_of(number)
    try:
        result = start_trial(spec, number, until=until, command=False)
    except UserError as error:
        return ended(run, "user-error", str(error))
    except TlxError as error:
        return ended(run, "fault", str(error))
    if result is None:
        return ended(run, "resumable")
    return ended(run, "pruned" if result.get("pruned") else "done", str(result.get("pruned") or ""))


def log_of(spec: Spec, number: int) -> Path:
    """What the training of a trial has shown."""
    return spec.folder / LOGS / f"{number:04d}.txt"


@contextlib.contextmanager
def shown_in(file: Path) -> Iterator[IO[str]]:
    """What is shown inside goes into a file, after what is there already."""
    with (
        file.open("a", encoding="utf-8", errors="backslashreplace", buffering=1) as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        yield log
