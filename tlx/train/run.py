"""One training: the parts that it is composed of, where it stands, and saving that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from tlx.base.durations import Duration
from tlx.base.errors import UserError
from tlx.base.files import json_text
from tlx.base.live import Position
from tlx.base.metrics import Weights, metrics_of
from tlx.data.pixels.jpeg_region import decoder
from tlx.data.pixels.normalise import Normalise, NormaliseViews
from tlx.data.stream.stream import ShardStream
from tlx.plan.config import Config
from tlx.plan.plan import Plan
from tlx.ranks.collectives import World
from tlx.runs.checkpoint import Checkpoints, Saver, Snapshot, optimizer_state, weights_of
from tlx.runs.progress import Progress
from tlx.runs.run_folder import threads
from tlx.runs.stop import StopRequest
from tlx.tasks import Task
from tlx.tracking.journal import Journal
from tlx.train.averaging import MovingAverage
from tlx.train.data import Datasets
from tlx.train.evaluation import Validation
from tlx.train.step import Exchange, Updater
from tlx.train.step_timer import StepTimer
from tlx.train.update_size import UpdateSize
from tlx.use.description import ModelDescription


@dataclass
class Run:
    """What the loop works on.

    Attributes:
        remake_plan: the plan, for phases that ended early (name -> step); pure.
        validation: None without validation shards.
        identity: what a checkpoint must agree with: classes, shards, order of samples, preprocessing.
        description: what is trained, for whoever uses its weights.
        files: what the run folder holds about how this start was composed, by name.
        sets: the shards as they were opened.
        tested: what data.test gave, once the training is done; see :mod:`tlx.train.test_set`.
        size: of the newest step, on the rank that logs it, where it is logged.
        saved: the step of the newest checkpoint that was handed to `saver`.
    """

    config: Config
    world: World
    net: nn.Module
    remake_plan: Callable[[Mapping[str, int]], Plan]
    updater: Updater
    stream: ShardStream
    validation: Validation | None
    identity: Mapping[str, Any]
    saver: Saver
    journal: Journal
    stop: StopRequest
    description: ModelDescription
    files: Mapping[str, str] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)
    size: UpdateSize | None = None
    saved: int = -1
    sets: Datasets | None = None
    tested: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self.plan = self.remake_plan({})
        self.progress.logged.shown = self.progress.evaluated.shown = self.task.shown
        self.exchange = Exchange(self.world)
        self.timer = StepTimer()
        self.journal.console.position = self.position

    @property
    def optimizer(self) -> Optimizer:
        return self.updater.optimizer

    @property
    def task(self) -> Task:
        return self.updater.task

    @property
    def normalise(self) -> Normalise | NormaliseViews:
        return self.updater.normalise

    @property
    def ema(self) -> MovingAverage | None:
        return self.updater.ema

    @property
    def checkpoints(self) -> Checkpoints:
        return self.saver.checkpoints

    @property
    def validation_batch(self) -> int:
        """Samples that go through the network at once outside of training."""
        return self.config.evaluate.samples

    @property
    def folder(self) -> Path:
        return self.config.run

    def position(self) -> Position:
        """Where the training stands; any thread may ask."""
        plan, progress = self.plan, self.progress
        stage = self.world.watch.state.stage
        return Position(progress.step, plan.phases, plan.steps_per_epoch, stage, progress.best)

    def quota(self) -> int:
        """How many different samples may be unreadable."""
        return self.config.data.quota(self.stream.distinct_samples)

    def dealt(self) -> dict[str, Any]:
        """How a global batch is divided."""
        return {"world": self.world.size, "micro_batch": self.config.loop.micro_batch}

    def due_to_save(self) -> bool:
        """Whether an interval of checkpoints ends at this step."""
        wanted = self.config.checkpoint
        return self.due(wanted.every, *([wanted.keep.every] if wanted.keep.every else []))

    def due(self, *intervals: Duration) -> bool:
        """Whether any of these intervals ends at this step."""
        return any(self.progress.step % self.plan.interval(every) == 0 for every in intervals)


def save(run: Run) -> None:
    """Hands a snapshot of this step to the saver, unless it has one."""
    if run.progress.step == run.saved:
        return
    run.saved = run.progress.step
    if run.world.main:
        run.world.watch.beat("saving")
        run.saver.settle()  # before there is a second copy in memory
        run.saver.save(run.saved, snapshot(run))
        run.world.watch.beat("batch")


def settle(run: Run) -> None:
    """Waits until the last checkpoint is on the disk; where it went with a folder that was removed since, writes it
    again.

    Raises:
        UserError: it could not be written.
    """
    if run.world.main:
        run.saver.settle()
        run.saver.follow()
        if run.saved >= 0 and not run.checkpoints.path(run.saved).is_dir():
            run.saver.save(run.saved, snapshot(run))
            run.saver.settle()
    written = run.world.from_main(run.saver.written)
    if written < run.saved:
        raise UserError(
            f"training has come to step {run.progress.step}, and the checkpoint of it could not be written",
            where=str(run.checkpoints.folder),
            todo=f"make room; the same command goes on from step {written}",
        )


def described(run: Run) -> dict[str, str]:
    """What each file of weights says of itself, with the evaluation of these weights, where there is one."""
    kinds: dict[str, Weights] = {"model": "raw", **({"ema": "ema"} if run.ema is not None else {})}
    step = run.progress.step
    row, description = run.progress.last if run.progress.last.get("step") == step else {}, run.description.at(step)
    return {name: json_text(description.judged(metrics_of(row, weights)).data()) for name, weights in kinds.items()}


def snapshot(run: Run) -> Snapshot:
    """Everything needed to go on from here; :func:`tlx.train.resume.load_checkpoint` reads it."""
    scaler = run.world.scaler
    return Snapshot(
        model=weights_of(run.net),
        optimizer=optimizer_state(run.optimizer),
        ema=weights_of(run.ema.module) if run.ema else None,
        described=described(run),
        state={
            "step": run.progress.step,
            "best": run.progress.best,
            "progress": run.progress.data(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "ema_updates": run.ema.updates if run.ema else None,
            "metrics_bytes": run.journal.position(),
            "identity": dict(run.identity),
            "dealt": run.dealt(),
            "lists": {name: list(of) for name, of in run.task.lists.items()},
            "decoder": decoder(),
            "threads": threads(),
        },
    )
