"""Trainings as `tlx train` composes them, in this process, on a few made pictures."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from images import make_shards
from rows import Setting

from tlx.plan.config import Config, parse
from tlx.ranks.rendezvous import join_ranks
from tlx.runs.run_folder import RunFolder
from tlx.train.command import compose
from tlx.train.loop import begin, steps_of
from tlx.train.run import Run
from tlx.train.step import PhaseModel, prepare_phase, set_rates

SIDE = 64


def shards(setting: Setting) -> Path:
    """Four classes of small pictures; made once."""
    place = setting.work / "small"
    return place if (place / "train").exists() else make_shards(place, 4, {"train": 16, "val": 4}, SIDE)


def config_of(setting: Setting, **over: Any) -> Config:
    """Feature extraction, then fine-tuning, of a small network from random weights; two epochs of four steps each."""
    place = shards(setting)
    raw: dict[str, Any] = {
        "run": str(setting.work / "unused"),
        "seed": 3,
        "data": {"train": str(place / "train"), "val": str(place / "val"), "batch": 16, "workers": 0},
        "input": {"size": 32 if setting.dry else SIDE},
        "backbone": {"name": "toys:small" if setting.dry else "timm/resnet18", "weights": "none"},
        "phases": {"each": {"lr": 1e-4, "duration": "2ep", "norm": "statistics_move"}},
        "world": {"device": setting.device.type},
    }
    return parse({**raw, **over})


@contextmanager
def composed(config: Config) -> Iterator[Run]:
    """A run in a folder that goes afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        alone = config.model_copy(update={"run": Path(folder) / "run"})
        here = join_ranks(alone)
        alone.run.mkdir()
        run = compose(alone, here, RunFolder(alone.run), silent=True)
        run.stop.close()
        run.journal.start(0, resumed=False)
        try:
            yield run
        finally:
            run.journal.finish({})
            run.saver.close()
            here.leave()
            del run
            free(here.device)


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def losses(run: Run) -> list[float]:
    """Trains the whole plan; the mean loss of each step."""
    found = []
    for phase in run.plan.phases:
        begin(run, phase)
        phase_model = prepare_phase(run.net, phase, run.plan, world=run.world, compiled=run.config.loop.compile)
        for step, batches in steps_of(run.stream, phase, run.progress.step, run.world.device):
            found.append(one_step(run, phase_model, step, batches))
    return found


def one_step(run: Run, phase_model: PhaseModel, step: int, batches: Any) -> float:
    set_rates(run.optimizer, run.plan.phase(step), step)
    tally, _, total = run.updater.update(phase_model, step, batches)
    run.progress.step = step + 1
    return float(tally[0]) / total
