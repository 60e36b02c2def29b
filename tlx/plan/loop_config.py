"""What may be said of the loop: steps, evaluations, checkpoints, trackers, ranks."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    PositiveInt,
    field_serializer,
    model_validator,
)

from tlx.base.durations import Duration
from tlx.base.inputs import EVALUATION_BATCH
from tlx.base.location import is_remote, without_credentials
from tlx.base.metrics import LOSS
from tlx.base.paths import written
from tlx.plan.parts import Direction, Interval, Model, Place, part_of

PROBED = "val/knn"
"""The metric of `evaluate.probe`."""


class EMA(Model):
    """Exponential moving average of the weights and norm statistics, updated after every step."""

    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """The weight of the average so far at each update."""
    ramp: bool = True
    """The decay rises to `decay`, so that the average is of recent weights early on too; without it, the decay is
    `decay` from the second update on."""

    def at(self, updates: int) -> float:
        """The decay of an update: with the ramp min(decay, (1 + n) / (10 + n)), as TensorFlow's
        ExponentialMovingAverage has it (tf.train.ExponentialMovingAverage, num_updates).

        Args:
            updates: n, those before it. The first (n = 0) copies the weights, whatever the decay.
        """
        return min(self.decay, (1 + updates) / (10 + updates)) if self.ramp else self.decay


class NonFinite(Model):
    """What happens at a loss or gradient that is not finite. The step never updates anything."""

    policy: Literal["stop", "skip"] = "stop"
    """`stop` ends the training; `skip` goes on, for up to `limit` such steps of a run."""
    limit: PositiveInt = 10
    """Steps that may be skipped."""
    overflows: PositiveInt = 20
    """fp16's gradient scaler handles its overflows, until this many come in a row."""

    @model_validator(mode="before")
    @classmethod
    def opened(cls, value: Any) -> Any:
        """Its long form."""
        return {"policy": value} if isinstance(value, str) else value


class Loop(Model):
    """How a step is computed."""

    micro_batch: PositiveInt | None = None
    """The most samples that a rank takes through the network at once; gradients accumulate over micro-batches."""
    fit_micro_batch: Literal["auto", "always", "never"] = "auto"
    """The memory of every phase is tried before the first step, and a smaller micro-batch taken where it does not fit.
    `auto` does so on a GPU, and refuses instead where moving BatchNorm makes the numbers depend on the micro-batch;
    `always` takes it there too, and tries on a CPU as well."""
    nonfinite: NonFinite = NonFinite()
    """What happens at a loss or gradient that is not finite; `stop` or `skip` is `policy`."""
    clip: Annotated[float, Field(gt=0)] | None = None
    """Gradients whose norm is larger are scaled to this norm."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the forward and backward pass; weights stay fp32."""
    channels_last: bool = False
    """Memory format of pictures and maps: faster for convolutions on GPUs."""
    compile: bool = False
    """Use torch.compile. Gives the losses of eager code to rounding where nothing is drawn. Compiled dropout and
    drop-path draw other numbers than eager ones, unless `deterministic` is on."""
    gradient_checkpointing: bool = False
    """Blocks are computed again in the backward pass: less memory, more time."""
    deterministic: bool = False
    """Only kernels that give the same bits every time."""
    sync_batchnorm: bool = False
    """BatchNorm statistics over the samples of all ranks, on GPUs."""
    ema: EMA | None = None
    """A moving average of the weights, evaluated and saved beside them."""


class FeatureProbeConfig(Model):
    """At each evaluation, nearest neighbours by the features that the head is given, on pictures with a class: val/knn,
    how often the neighbours tell the class. What chooses the best checkpoint of a task that draws its own targets."""

    train: Place
    """Labelled shards: the neighbours."""
    val: Place | None = None
    """Labelled shards: pictures that are judged; by default those of `train`, each by the others."""
    k: PositiveInt = 20
    """Neighbours that vote."""
    samples: PositiveInt = 5000
    """Of each about so many are looked at, the same each time, evenly over the index."""

    @model_validator(mode="before")
    @classmethod
    def opened(cls, value: Any) -> Any:
        """Its long form."""
        return {"train": value} if isinstance(value, str) else value

    @field_serializer("train", "val")
    def _without_credentials(self, value: str | None) -> str | None:
        return value and (without_credentials(value) if is_remote(value) else written(value))


class Evaluate(Model):
    """When to evaluate and what is best."""

    every: Interval = Duration(1, "ep")
    """How often. Percent is of all phases as they were planned."""
    metric: str | None = None
    """The metric that chooses the best checkpoint; by default the task's own: val/top1 of classification. Ties go to
    the lower val/loss."""
    mode: Direction = Field(default=None, exclude=True)
    top_k: PositiveInt = 5
    """K of val/topK: the label is among the K highest logits."""
    patience: PositiveInt | None = None
    """Early stopping: the phase ends after this many evaluations without progress of the metric."""
    batch: PositiveInt | None = None
    """Samples that a rank evaluates at once; by default 64. Batches are cut by place in the index and always full, so
    that a sample's logits do not depend on ranks or on its neighbours; another size changes their rounding only. Where
    64 do not fit the memory, what does is taken; see `loop.fit_micro_batch`."""

    probe: FeatureProbeConfig | None = None
    """Nearest neighbours on labelled shards; a place alone is `probe.train`."""

    @property
    def chooses(self) -> str:
        """The metric that chooses the best checkpoint."""
        return self.metric or LOSS

    @property
    def samples(self) -> int:
        """Of a batch."""
        return self.batch or EVALUATION_BATCH


class Keep(Model):
    """Which checkpoints stay."""

    last: PositiveInt = 2
    """How many of the newest checkpoints stay."""
    best: PositiveInt = 1
    """How many of the best by `evaluate.metric` stay."""
    every: Interval | None = None
    """One checkpoint at each such interval stays for good."""

    @model_validator(mode="before")
    @classmethod
    def opened(cls, value: Any) -> Any:
        """Its long form."""
        return {"last": value} if isinstance(value, int) and not isinstance(value, bool) else value


class Checkpoint(Model):
    """When to save."""

    every: Interval = Duration(1, "ep")
    """How often. Percent is of all phases as they were planned."""
    keep: Keep = Keep()
    """Which checkpoints stay; a number is `last`."""
    background: bool = True
    """A thread writes them, from a copy in memory, while training goes on."""


class Track(Model):
    """`metrics.jsonl` is always written; trackers come on top."""

    every: Interval = Duration(10, "steps")
    """How often a row of the training curve is written. Percent is of all phases as they were planned."""
    report: bool = True
    """report.html, report.md and figures/ at the end."""
    trackers: list[part_of("tracker")] = []  # type: ignore[valid-type]
    """Where the rows go, beside the file."""


class WorldConfig(Model):
    """Ranks and devices."""

    size: PositiveInt | None = None
    """The number of ranks that this training expects; another number is an error."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: a GPU where there is one."""
    backend: Literal["nccl", "gloo"] | None = None
    """Backend of the collectives; by default nccl on GPUs, gloo on CPUs."""
    timeout_minutes: Annotated[float, Field(gt=0, le=525_600)] = 30.0
    """A rank that has finished no step and no batch of an evaluation for this long is considered hung."""
