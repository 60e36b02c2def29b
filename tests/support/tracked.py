"""What a training does to its tracker, and what W&B's own reader finds of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tlx.runs.metrics_file import MetricsFile
from tlx.tracking import RunInfo, guarded, wandb

ID = "fixed-id"


def train(folder: Path, steps: range, *, finished: bool = False, middle: Callable[[], object] = lambda: None) -> None:
    """What a training does to its tracker; every third step has an evaluation. `middle`: in the middle of it."""
    metrics = MetricsFile(folder / "metrics.jsonl")
    logger = guarded("wandb", lambda: wandb(RunInfo(folder, "a name", ID, {"seed": 3}, steps.start > 1), project="p"))
    for step in steps:
        for row in rows_of(step):
            metrics.append(row)
            logger.log(row)
        if step == steps[len(steps) // 2]:
            middle()
    result = {"finished": finished, "step": steps[-1], "best": {"value": 0.5}}
    logger.finish(result)
    if finished:
        (folder / "result.json").write_text(json.dumps(result))


def rows_of(step: int) -> list[dict[str, Any]]:
    about = {"step": step, "phase": "a"}
    return [about | {"train/loss": 1 / step}] + ([about | {"val/top1": step / 100}] if step % 3 == 0 else [])


def records(folder: Path) -> list[dict[str, Any]]:
    """All records of the newest offline run, read back with wandb's own reader."""
    reader = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder / "wandb" / "latest-run")],
        env={k: v for k, v in os.environ.items() if k != "WANDB_MODE"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [json.loads(line) for line in reader.stdout.splitlines()]


def history(folder: Path) -> tuple[dict[str, object], list[dict[str, object]]]:
    """The header and the rows of the newest offline run, read back with wandb's own reader."""
    found = records(folder)
    header = next(r["run"] for r in found if r["type"] == "run")
    return header, [r["history"]["item"] for r in found if r["type"] == "history"]
