"""The trackers that come with tlx; each library is imported when its tracker is used."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tlx.base.invocation import command
from tlx.base.launcher import environment
from tlx.base.plug import needs
from tlx.base.terminal import say
from tlx.runs.metrics_file import read_rows
from tlx.tracking import wandb_run
from tlx.tracking.tracker import RunInfo, Tracker, TrackingError, of_test, warn
from tlx.tracking.wandb_run import Mode
from tlx.tracking.wandb_target import Asked, Record, choose


@needs("wandb", install="pip install wandb")
def wandb(
    run: RunInfo,
    *,
    project: str | None = None,
    entity: str | None = None,
    tags: Sequence[str] = (),
    mode: Mode | None = None,
) -> Tracker:
    """Weights & Biases: one run per training, however often it was resumed, and each step in it once.

    What is not said here, W&B's variables say: WANDB_PROJECT, WANDB_ENTITY, WANDB_TAGS, WANDB_NAME, WANDB_RUN_ID,
    WANDB_DIR, WANDB_MODE. A note tells which of them won and which did not. Without any, the project is "tlx", and the
    run is online where credentials are configured, offline, with a warning, where not, where nothing answers at the
    server's address within two seconds, and where W&B has not begun within 30.
    ``tlx track sync RUN`` sends later what W&B lacks.

    Raises:
        TrackingError: W&B cannot begin.
    """
    rows = read_rows(run.folder / "metrics.jsonl")
    wandb_run.forget_empty_variables()
    asked, record = Asked(project, entity, tags, mode), Record.read(run.folder)
    choice = choose(asked, record, environment().variables, run_id=run.run_id, name=run.name, here=Path.cwd())
    if choice.note is not None:
        say(f"note: {choice.note}", error=True)
    target = wandb_run.Target(run.folder, choice, run.config, command(run.folder))
    if choice.mode is not None:
        return wandb_run.begin(target, choice.mode, rows)  # type: ignore[arg-type]
    why: str | None = "there is no key for Weights & Biases"
    if wandb_run.has_key() and (why := wandb_run.unreachable()) is None:
        try:
            return wandb_run.begin(target, "online", rows)
        except TrackingError as error:
            why = str(error)
    tracker = wandb_run.begin(target, "offline", rows)
    warn(f"{why}; this start is logged offline\n  -> {target.later}")
    return tracker


@needs("tensorboard", install="pip install 'tlx[tensorboard]'")
def tensorboard(run: RunInfo, *, folder: Path = Path("tensorboard")) -> Tracker:
    """TensorBoard event files in `folder` of the run folder; after a resume, later points are taken back.

    Raises:
        TrackingError: TensorBoard cannot be imported.
    """
    rows = read_rows(run.folder / "metrics.jsonl") if run.resumed else []
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise TrackingError(f"TensorBoard cannot be imported: {error}") from error
    first = max((row["step"] for row in rows), default=-1) + 1
    return _TensorBoard(SummaryWriter(run.folder / folder, purge_step=first))  # type: ignore[no-untyped-call]


class _TensorBoard:
    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def log(self, row: Mapping[str, Any]) -> None:
        for key, value in row.items():
            if key != "step" and isinstance(value, (int, float)) and not math.isnan(value):
                self.writer.add_scalar(key, value, row["step"])
        self.writer.flush()

    def finish(self, result: Mapping[str, Any]) -> None:
        if test := of_test(result):
            self.log({"step": result["step"], **test})
        self.writer.close()
