"""What may be said of the data: shards, how they are dealt, sampled and read, and which features of them are kept."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ByteSize,
    Field,
    PositiveInt,
    field_serializer,
    model_validator,
)

from tlx.base.inputs import InputSpec, Interpolation
from tlx.base.location import is_remote, without_credentials
from tlx.base.paths import written
from tlx.data.shards.targets import Kind
from tlx.data.stream.sampling import Sampling
from tlx.plan import defaults
from tlx.plan.parts import FilePath, Model, Pixels, Place, of_value

Classes = PositiveInt | Annotated[list[str], Field(min_length=1)]
"""Of classes; or how many, whatever their names."""


class ExpectedTarget(Model):
    """What a target of the shards should be."""

    kind: Kind = "class"
    """A class, `labels` of which any number apply, or a `number`."""
    classes: Classes | None = None
    """How many classes or labels, or their names in order."""
    width: PositiveInt = 1
    """How many numbers a sample has."""

    @model_validator(mode="after")
    def _of_its_kind(self) -> ExpectedTarget:
        if self.kind != "number" and self.classes is None:
            raise ValueError(f"{self.kind} needs `classes`: how many, or their names")
        if self.kind == "number" and self.classes is not None:
            raise ValueError("a number has no classes")
        if self.kind != "number" and self.width != 1:
            raise ValueError("a width is of numbers")
        return self


class Expected(Model):
    """What the shards should hold: checked against them, and enough to plan before they are built."""

    classes: Classes | None = None
    """How many classes, or their names in order; left out where there is no class. Without targets, too, shards are of
    pictures alone, for a task that draws its own."""
    targets: dict[str, ExpectedTarget] = {}
    """The other targets, by name."""
    train: PositiveInt
    """How many training samples."""
    val: PositiveInt | None = None
    """How many validation samples."""
    test: PositiveInt | None = None
    """How many test samples."""


class CacheConfig(Model):
    """Where shards that come from elsewhere are kept."""

    folder: FilePath | None = None
    """By default TLX_CACHE, or ``~/.cache/tlx/shards``."""
    limit: Annotated[ByteSize, Field(gt=0)] | None = None
    """The most bytes that are kept, such as 200GB; by default four fifths of what is free on the disk without them."""
    stage: bool = False
    """Shards that lie in a folder here, on a slow shared disk, are copied to `folder` when they are first needed, once
    per node."""

    @model_validator(mode="after")
    def _staged_somewhere(self) -> CacheConfig:
        if self.stage and self.folder is None:
            raise ValueError("stage needs `folder`, on a disk of the machine that trains")
        return self


class FeatureCacheConfig(Model):
    """Features of what is frozen, which are computed once: `auto`, `exact`, `off`, or `{views: 4}` for short."""

    mode: Literal["auto", "off", "exact", "views"] = "auto"
    """`exact`: phases whose lower layers are frozen train from features, where every epoch shows the same pixels
    (`transforms: []`): the same training, within rounding. `auto`: where that is so and saves something. `views`: so
    many drawn views of each picture, one an epoch, then again: another training where there are more epochs."""
    views: PositiveInt | None = None
    """How many views of each picture are kept."""
    dtype: Literal["fp32", "fp16", "bf16"] | None = None
    """Of what is kept; by default as the network gives it."""
    folder: FilePath | None = None
    """By default TLX_FEATURES, or ``~/.cache/tlx/features``; several machines need one that all of them see."""
    limit: Annotated[ByteSize, Field(gt=0)] | None = None
    """The most bytes of all features there; by default four fifths of what is free on the disk without them. What was
    used least recently leaves."""

    @model_validator(mode="before")
    @classmethod
    def _opened(cls, value: Any) -> Any:
        """Its long form."""
        if isinstance(value, str):
            return {"mode": value}
        return {"mode": "views", **value} if isinstance(value, Mapping) and value.get("views") is not None else value

    @model_validator(mode="after")
    def _agreeing(self) -> FeatureCacheConfig:
        if (self.mode == "views") != (self.views is not None):
            raise ValueError("`views` says how many: cache: {views: 4}; exact, auto and off have none")
        return self

    @property
    def kept(self) -> int:
        """Views of each training picture."""
        return self.views or 1


class SamplingConfig(Model):
    """Which samples make an epoch."""

    method: Literal["all", "balanced", "sqrt", "repeat_factors"] = "all"
    """Classes as they are (`all`), equally often (`balanced`), by the square root of their size (`sqrt`), or rare ones
    repeated (`repeat_factors`)."""
    threshold: float | None = None
    """For `repeat_factors`: a class with less than this share of the samples is rare."""
    limit: int | None = None
    """At most this many samples per class: a few-shot subset, drawn by `seed`."""

    @model_validator(mode="after")
    def _possible(self) -> SamplingConfig:
        of_value(self.made)
        return self

    def made(self) -> Sampling:
        return Sampling(self.method, self.threshold, self.limit)


def _quota(value: Any) -> Any:
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if is_count or value == "error" or (isinstance(value, str) and _SHARE.fullmatch(value)):
        return value
    raise ValueError(f'{repr(value)[:100]} is no quota; write error, a number such as 10, or a share such as "1%"')


_SHARE = re.compile(r"(100|\d{1,2}(\.\d{1,9})?)%")


class Data(Model):
    """Shards and how they are dealt."""

    train: Place
    """A folder, a URL (http, s3, gs, any protocol of fsspec), or ``pipe:`` and a command with ``{}`` for the file's
    name. User names, passwords and queries of URLs are not written into the run's folder."""
    val: Place | None = None
    """The same, to evaluate on: it chooses the best weights, ends phases early, fits the temperature."""
    test: Place | None = None
    """The same, to report: a training looks at it once, at its end, with the weights that it has chosen. The look is
    recorded in the run, as those of ``tlx evaluate`` are. A run goes on when this changes."""
    cache: CacheConfig = CacheConfig()
    batch: PositiveInt = defaults.USUAL.batch
    """The GLOBAL batch, over all ranks and micro-batches."""
    window: PositiveInt | None = None
    """How many shards are shuffled together; all by default."""
    parts: PositiveInt = 1
    """Into how many parts the shards are divided: set to the number of nodes, each node needs only its part."""
    sampling: SamplingConfig = SamplingConfig()
    drop_last: bool = False
    """An epoch's last batch is left out where it is short."""
    exif_orientation: bool = True
    """Pictures are turned as the camera noted."""
    scaled_decoding: bool = True
    """In training, JPEGs are decoded at a half, a quarter or an eighth where that leaves twice the pixels that are
    shown."""
    verify: Literal["lengths", "changed", "all"] = "changed"
    """Before the first step, the `lengths` of local tars are compared with the index, always; of a run that goes on,
    tars that were written since its last start are read, and hashed (`changed`); or every tar, at every start (`all`),
    which takes about a second of a core per GB, or as long as the disk does."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Processes of each rank that read and decode; 0: the rank itself does."""
    bad_samples: Annotated[int | str, BeforeValidator(_quota)] = "error"
    """How many different unreadable samples a run may meet: `error` for none, a number, or a share of those that
    training shows, such as 1%."""
    expected: Expected | None = None
    """What the shards should hold."""

    @field_serializer("train", "val", "test")
    def _without_credentials(self, value: str | None) -> str | None:
        return value and (without_credentials(value) if is_remote(value) else written(value))

    @model_validator(mode="after")
    def _parts_of_a_batch(self) -> Data:
        if self.parts > self.batch:
            raise ValueError(f"parts: {self.parts} is more than the samples of a batch ({self.batch})")
        return self

    def quota(self, samples: int) -> int:
        """How many different unreadable samples a run may meet, in training, validation and test; a share is of
        `samples`, those that training shows: of the shards, and at most `sampling.limit` of each class."""
        if self.bad_samples == "error":
            return 0
        if isinstance(self.bad_samples, str):
            return int(float(self.bad_samples.rstrip("%")) / 100 * samples)
        return self.bad_samples


class Input(Model):
    """How pictures are read. What is not said is the backbone's own."""

    channels: Literal[1, 3, 4] = 3
    """1 is grey, 3 RGB, 4 RGBA."""
    size: Pixels | tuple[Pixels, Pixels] | None = None
    """Pixels: a side, or height and width."""
    mean: tuple[Annotated[float, Field(ge=0, le=1)], ...] | None = None
    """Of pixels scaled to [0, 1], one for each channel."""
    std: tuple[Annotated[float, Field(gt=0, le=1)], ...] | None = None
    """Standard deviations, like `mean`."""
    crop_pct: Annotated[float, Field(gt=0, le=1)] | None = None
    """The share of the resized picture's side that an evaluation shows."""
    interpolation: Interpolation | None = None
    """Interpolation of resizing."""

    @model_validator(mode="after")
    def _one_per_channel(self) -> Input:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != self.channels:
                raise ValueError(f"{name} has {len(values)} values for {self.channels} channels")
        return self

    def over(self, spec: InputSpec) -> InputSpec:
        size = (self.size, self.size) if isinstance(self.size, int) else self.size
        return InputSpec(
            size=size or spec.size,
            mean=self.mean or spec.mean,
            std=self.std or spec.std,
            interpolation=self.interpolation or spec.interpolation,
            crop_pct=self.crop_pct or spec.crop_pct,
        )


class Mixing(Model):
    """Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019)."""

    mixup: Annotated[float, Field(ge=0)] = 0.0
    """The parameter alpha of mixup's Beta(alpha, alpha); 0 switches mixup off."""
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    """The parameter alpha of CutMix's Beta(alpha, alpha); 0 switches CutMix off."""
    prob: Annotated[float, Field(ge=0, le=1)] = 1.0
    """The probability that a picture is mixed."""
    switch_prob: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Where both are on, the probability that a mixed picture gets CutMix rather than mixup."""
