"""The trackers that come with tlx; each library is imported when its tracker is used."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from tlx.errors import UserError
from tlx.tracking.metrics import read_rows
from tlx.tracking.tracker import RunInfo, Tracker

Mode = Literal["online", "offline", "disabled"]


def wandb(
    run: RunInfo,
    *,
    project: str = "tlx",
    entity: str | None = None,
    tags: Sequence[str] = (),
    mode: Mode | None = None,
) -> Tracker:
    """Weights & Biases: one run per training, however often it was resumed.

    Without `mode`, WANDB_MODE decides; without that, online where credentials are configured, offline otherwise and
    where the server does not answer. ``wandb sync RUN/wandb/latest-run`` uploads an offline run later: the newest
    offline folder always holds all rows, because W&B opens a new one at every start.
    """
    # a batch script's `export WANDB_MODE=` is an error to wandb, and means "not set" to its author
    for name in [n for n, value in os.environ.items() if n.startswith("WANDB_") and not value]:
        del os.environ[name]
    import wandb as library

    chosen = (
        mode or os.environ.get("WANDB_MODE") or ("online" if library.login(prompt=False, verify=False) else "offline")
    )
    settings: Any = library.Settings(console="off", silent=True, init_timeout=30)
    about: dict[str, Any] = {
        "mode": chosen, "project": project, "entity": entity, "tags": list(tags), "id": run.run_id, "name": run.name,
        "config": dict(run.config), "dir": run.folder, "resume": "allow", "settings": settings,
    }  # fmt: skip
    try:
        handle = library.init(**about)
    except library.errors.CommError as error:
        if chosen != "online" or mode == "online":
            raise
        print(f"Weights & Biases does not answer ({str(error).splitlines()[0][:80]}); this start is logged offline")
        library.teardown()  # the service still holds the run's id
        chosen, handle = "offline", library.init(**{**about, "mode": "offline"})
    handle.define_metric("step")
    handle.define_metric("*", step_metric="step")  # its own step may not go back, as ours does on resume
    if run.resumed and chosen == "offline":
        for row in read_rows(run.folder / "metrics.jsonl"):
            handle.log(row)
    return _WandbRun(handle)


class _WandbRun:
    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def log(self, row: Mapping[str, Any]) -> None:
        self.handle.log(dict(row))

    def finish(self, result: Mapping[str, Any]) -> None:
        self.handle.summary.update({key: value for key, value in result.items() if key not in ("classes", "versions")})
        self.handle.finish()


def tensorboard(run: RunInfo, *, folder: str = "tensorboard") -> Tracker:
    """TensorBoard event files in `folder` of the run folder; after a resume, later points are taken back.

    Raises:
        UserError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("TensorBoard is not installed", todo="pip install 'tlx[tensorboard]'") from error
    rows = read_rows(run.folder / "metrics.jsonl") if run.resumed else []
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
        self.writer.close()
