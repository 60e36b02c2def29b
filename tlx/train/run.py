"""One training, composed: its parts, and where it stands."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from tlx.base.durations import Duration
from tlx.data.stream.stream import Batch, ShardStream
from tlx.plan.config import Config
from tlx.plan.plan import Plan
from tlx.ranks.collectives import World
from tlx.runs.checkpoint import Checkpoints
from tlx.runs.progress import Progress
from tlx.runs.saver import Saver
from tlx.runs.stop import StopRequest
from tlx.tracking.journal import Journal
from tlx.train.averaging import MovingAverage
from tlx.train.exchange import Exchange
from tlx.train.objectives import Objective
from tlx.train.step import Normalise, Updater
from tlx.train.step_timer import StepTimer


@dataclass
class Run:
    """What the loop works on.

    Attributes:
        remake_plan: the plan, for phases that ended early (name -> step); pure.
        evaluation: starts a pass over this rank's share of the validation shards; None without validation.
        identity: what a checkpoint must agree with: classes, shards, order of samples, preprocessing.
        stop: set by who composes.
        files: what the run folder holds about how this start was composed, by name.
        saved: the step of the newest checkpoint that was handed to `saver`.
    """

    config: Config
    world: World
    net: nn.Module
    remake_plan: Callable[[Mapping[str, int]], Plan]
    optimizer: Optimizer
    objective: Objective
    normalise: Normalise
    stream: ShardStream
    evaluation: Callable[[], Iterable[Batch]] | None
    classes: int
    identity: Mapping[str, Any]
    saver: Saver
    journal: Journal
    stop: StopRequest = field(init=False)
    ema: MovingAverage | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)
    saved: int = -1

    def __post_init__(self) -> None:
        self.plan = self.remake_plan({})
        self.exchange = Exchange(self.world)
        self.timer = StepTimer()
        loop = self.config.loop
        self.updater = Updater(
            self.optimizer,
            self.objective,
            self.normalise,
            self.world,
            self.config.seed,
            clip=loop.clip,
            ema=self.ema,
            skips=loop.nonfinite.policy == "skip",
        )

    @property
    def checkpoints(self) -> Checkpoints:
        return self.saver.checkpoints

    @property
    def folder(self) -> Path:
        return self.config.run

    def due_to_save(self) -> bool:
        """Whether an interval of checkpoints ends at this step."""
        wanted = self.config.checkpoint
        return self.due(wanted.every, *([wanted.keep.every] if wanted.keep.every else []))

    def due(self, *intervals: Duration) -> bool:
        """Whether any of these intervals ends at this step."""
        return any(self.progress.step % self.plan.interval(every) == 0 for every in intervals)
