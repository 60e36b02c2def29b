"""The configuration: typed, closed, and wrong in one report.

A YAML file plus ``key=value`` overrides becomes a :class:`Config`. Everything that can be known without data or
weights is checked here: unknown keys (with a suggestion), types, names of parts and their arguments.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    PlainSerializer,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_serializer,
    model_validator,
)

from tlx.base import plug
from tlx.base.durations import Duration, Length, TimeSpan
from tlx.base.errors import ConfigError, Problems, UserError, below, did_you_mean
from tlx.base.inputs import EVALUATION_BATCH, InputSpec, Interpolation
from tlx.base.key_aliases import USUAL, right_key
from tlx.base.launcher import environment
from tlx.base.layers import Granularity
from tlx.base.layers import Kind as ParameterKind
from tlx.base.location import is_remote, place, without_credentials
from tlx.base.metrics import LOSS, Metric
from tlx.base.norms import POLICIES, NormPolicy, written_out
from tlx.base.parsing import from_yaml_file, to_yaml
from tlx.base.paths import expanded, written
from tlx.base.plug import Group
from tlx.base.sweep import with_trial
from tlx.base.validation import mistakes, refuse_truth
from tlx.data.shards.targets import Kind
from tlx.data.stream.episodes import Episodes
from tlx.data.stream.sampling import Sampling
from tlx.plan import defaults
from tlx.plan.later_keys import completed, is_written
from tlx.plan.overrides import Names, Short, changed, keys_at

T = TypeVar("T")

WITHOUT_LIBRARIES = "without libraries"
"""The context of a validation that leaves names of networks and of most parts alone: none of them need be installed."""
WITHOUT_IMPORTS = "without imports"
"""That of one that looks up what can be without importing torch or a library of networks, and leaves the rest."""


class Model(BaseModel):
    """Closed and frozen: an unknown key is an error, and so is a number that is not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        return refuse_truth(value, cls.model_fields[str(info.field_name)].annotation)


def _of_value(act: Callable[[], T]) -> T:
    """What `act` gives, for a validator: pydantic knows the key, and the user's mistake goes on whole as the cause.

    Raises:
        ValueError: the mistake.
    """
    try:
        return act()
    except UserError as error:
        _refused(error)


def _refused(error: UserError) -> NoReturn:
    """
    Raises:
        ValueError: of a mistake, for a validator.
    """
    raise ValueError(error.what) from error


def _expanded(value: Any) -> Any:
    return _of_value(lambda: expanded(str(value))) if isinstance(value, str | Path) else value


def _is_file(weights: str) -> bool:
    """Whether it may be a path; tags of a library are no different from names of files."""
    return not weights.startswith("hf-hub:") and not is_remote(weights)


def _weights(value: Any) -> Any:
    return _expanded(value) if _is_file(str(value)) else value


FilePath = Annotated[Path, BeforeValidator(_expanded), PlainSerializer(written, return_type=str, when_used="json")]
"""A path of this machine, in which ``~`` and variables may stand. It is written down without them."""


class Part(Model):
    """A pluggable part: in YAML its name, or a mapping with `name` and the user's arguments beside it."""

    name: str
    args: dict[str, Any] = {}

    @staticmethod
    def opened(value: Any) -> Any:
        """Its long form, the arguments beside the name."""
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, Mapping) and set(value) == {"name", "args"} and isinstance(value["args"], Mapping):
            return {"name": value["name"], **value["args"]}
        return value

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if not isinstance(value, Mapping | Part):
            raise ValueError("input should be a name, or a mapping of name and arguments")
        if isinstance(value, Mapping) and "name" in value and set(value) != {"name", "args"}:
            return {"name": value["name"], "args": {k: v for k, v in value.items() if k != "name"}}
        return value

    @model_serializer
    def _write(self) -> Any:
        return {"name": self.name, **self.args} if self.args else self.name


def _part_of(group: str) -> Any:
    def check(part: Part, info: ValidationInfo) -> Part:
        if not _looks_up(group, part.name, info.context):
            return part
        return _of_value(lambda: known_part(group, part, info.context))

    return Annotated[Part, Group(group), AfterValidator(check)]


def _looks_up(group: str, name: str, context: str | None) -> bool:
    """Whether a validation looks up a part."""
    if context == WITHOUT_LIBRARIES:
        return plug.is_pure(group, name)
    return context != WITHOUT_IMPORTS or plug.is_light(group, name)


def known_part(group: str, part: Part, context: str | None = None) -> Part:
    """A part that there is, with its arguments as they are written down and its defaults; so are parts among them.

    Args:
        context: of the validation.

    Raises:
        UserError: no such part, or arguments that it does not take.
    """
    function = plug.find(group, part.name)
    if group == "head" and (own := _of_every_head(part)):
        said = plug.arguments(_every_head, own, label=f"head {part.name}")
        known = known_part(group, Part(name=part.name, args=_without(part.args, own)), context)
        unusual = {name: value for name, value in said.items() if value not in (False, "random")}
        return Part(name=known.name, args={**known.args, **unusual})
    args, label, found = dict(part.args), f"{group} {part.name}", Problems()
    for name, (of, is_mapping) in plug.inner_groups(function).items():
        if args.get(name) is not None:
            read = functools.partial(_inner_parts if is_mapping else _inner_part, of, args[name], context, name)
            args[name] = found.of(read) or args[name]
    checked = found.of(lambda: plug.arguments(function, args, label=label))
    if found.errors or checked is None:
        raise ConfigError(found.errors, where=label)
    said = {name: plug.as_written(value, value) for name, value in plug.defaults(function).items()}
    own = {name: plug.as_written(value, checked[name]) for name, value in args.items()}
    return Part(name=part.name, args={**said, **own})


def _inner_part(group: str, value: Any, context: str | None, key: str) -> Any:
    """A part among the arguments of another one, as it is written down.

    Raises:
        ConfigError: its mistakes, below `key`.
    """
    try:
        part = Part.model_validate(value)
        known = known_part(group, part, context) if _looks_up(group, part.name, context) else part
    except ValidationError as error:
        raise ConfigError(below(ConfigError(mistakes(error, value)), key)) from error
    except UserError as error:
        raise ConfigError(below(error, key)) from error
    return {"name": known.name, **known.args}


def _inner_parts(group: str, values: Any, context: str | None, key: str) -> Any:
    """The same of a mapping of them; what is none is left to the check of its type."""
    if not isinstance(values, Mapping):
        return values
    found = Problems()
    made = {
        name: found.of(functools.partial(_inner_part, group, value, context, f"{key}.{name}"))
        for name, value in values.items()
    }
    if found.errors:
        raise ConfigError(found.errors)
    return made


def chosen_by(task: str) -> str:
    """The metric, without ``val/``, that chooses the best checkpoint of a task, as its function says: a plan knows it
    before there is data to make the task with.

    Raises:
        UserError: no such task.
    """
    return str(getattr(plug.find("task", task), "metric", "loss"))


KEEP = "keep"
"""``head: {name: ..., keep: true}``: the head is not new, but that of the checkpoint that `backbone.weights` names, of
a run of tlx with the same classes in the same order. A head from elsewhere with an argument of that name gets it."""


PROBED = "val/knn"
"""The metric of `evaluate.probe`."""

INIT = "init"
"""``head: {name: linear, init: solved}``: the head begins as the solution on stored features of the training pictures
(`cache`), in place of random numbers: the logistic regression, of `semantic` the closed form of ESZSL. ``init:
projection``, of `semantic` alone: its map begins as the projection of a CLIP tower, from `backbone.weights`."""


def _every_head(*, keep: bool = False, init: Literal["random", "solved", "projection"] = "random") -> None:
    """What is checked as arguments of every head."""


def _of_every_head(part: Part) -> dict[str, Any]:
    """Of a head's arguments, those that its own function does not take."""
    function = plug.find("head", part.name)
    return {name: part.args[name] for name in (KEEP, INIT) if name in part.args and not plug.takes(function, name)}


def _without(args: Mapping[str, Any], names: Container[str]) -> dict[str, Any]:
    return {name: value for name, value in args.items() if name not in names}


def _policy(value: str | NormPolicy) -> str | NormPolicy:
    if isinstance(value, str) and value not in POLICIES:
        raise ValueError(f'there is no norm policy "{value}"{did_you_mean(value, POLICIES)}')
    return value


def _agreeing(mode: str | None, info: ValidationInfo) -> str | None:
    """A metric knows its direction. Older files state it once more, as `mode`: what agrees is read and forgotten; that
    of the task's own metric is looked at once that is known."""
    if (odd := _disagreeing(mode, info.data.get("metric"))) is not None:
        raise ValueError(odd)
    return mode if info.data.get("metric") is None else None


def _disagreeing(mode: str | None, name: str | None) -> str | None:
    """What is wrong with a direction of a metric."""
    metric = Metric.of(name) if name is not None else None
    if mode is None or metric is None or not metric.judges or mode == metric.mode:
        return None
    direction = "higher" if metric.higher_is_better else "lower"
    return f"{metric.name} is better when it is {direction}, which need not be said; remove mode"


Direction = Annotated[Literal["min", "max"] | None, AfterValidator(_agreeing)]


class Plateau(Model):
    """The phase ends when a validation metric has stopped improving."""

    max: Length
    """The longest that the phase lasts; its curve runs over that."""
    metric: str = LOSS
    """The metric that is watched; whether higher is better follows from its name."""
    mode: Direction = Field(default=None, exclude=True)
    patience: PositiveInt = 3
    """The phase ends after this many evaluations without progress."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """A change of the metric counts as progress where it is larger than this."""


class EarlierRates(Model):
    """How a phase's learning rate ran until the run was extended: the settings of then."""

    duration: Length
    lr: Annotated[float, Field(gt=0)]
    curve: _part_of("curve") = Part(name="constant")  # type: ignore[valid-type]
    warmup: Length = Duration(0, "steps")
    layer_decay: _part_of("layer_decay") = Part(name="none")  # type: ignore[valid-type]


class PhaseSettings(Model):
    """What may be said of a phase. ``phases: {each: ...}`` says it of all, a phase's own name overrides it."""

    duration: Length | Plateau | None = None
    """How long it trains, or until a plateau. Percent is of the configuration's `duration`."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """The learning rate, of which `curve` and `layer_decay` make that of each layer at each step."""
    curve: _part_of("curve") = Part(name="constant")  # type: ignore[valid-type]
    """The rate's course over the phase, as a factor of `lr`. Percent is of the phase."""
    warmup: Length = Duration(0, "steps")
    """The rate rises to its value for so long. Percent is of the phase."""
    layer_decay: _part_of("layer_decay") = Part(name="none")  # type: ignore[valid-type]
    """The factor of each layer's rate, by its depth."""
    norm: Annotated[str | NormPolicy, Short(written_out), AfterValidator(_policy)] = "frozen_is_frozen"
    """What norm layers do in frozen and in trained layers: a policy's name, or written out."""
    stochastic: Literal["off_in_frozen", "on"] = "off_in_frozen"
    """Whether dropout and drop-path act in frozen layers."""
    optimizer_state: Literal["keep", "reset", "reset_thawed"] = "keep"
    """At the phase's first step the optimizer's state (momentum, moments) is kept, dropped (`reset`), or dropped for
    what was frozen in the phase before and trains now (`reset_thawed`)."""
    start_from: Literal["last", "best"] = "last"
    """The weights that the phase begins with: those of the step before, or the best so far."""
    before: dict[PositiveInt, EarlierRates] = {}
    """Until so many steps of the phase, its rates were these: `tlx train --extend --rest` writes it."""

    def over(self, base: PhaseSettings) -> PhaseSettings:
        """These settings where they were said, `base` elsewhere."""
        return base.model_copy(update={name: getattr(self, name) for name in self.model_fields_set})


Place = Annotated[str, BeforeValidator(lambda value: _of_value(lambda: place(value)))]


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
        _of_value(self.made)
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


Pixels = Annotated[int, Field(ge=1, le=8192)]


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


class Allow(Model):
    """Where weights and network may differ, as shell patterns of names. A pattern that matches nothing is an error."""

    new: list[Annotated[str, Field(min_length=1)]] = []
    """Parameters of the network that the file need not have, or has in another shape, and that keep their initial
    values."""
    unused: list[Annotated[str, Field(min_length=1)]] = []
    """Tensors of the file that the network does not have, and that are left out."""


class BackboneConfig(Model):
    """The network and its weights."""

    name: str
    """timm/NAME, torchvision/NAME, an entry point of the group tlx.backbone, or ``package.module:function``."""
    weights: Annotated[str, BeforeValidator(_weights)] = "default"
    """`default`, a tag of the library, a file, the folder of a run, a folder that `tlx weights fetch` filled,
    hf-hub:OWNER/REPO[@REVISION], or `none`."""
    weights_key: Annotated[str, Field(min_length=1)] | None = None
    """In a file with several state dicts: the key of the one to read, or the prefix of its names."""
    weights_size: Pixels | tuple[Pixels, Pixels] | None = None
    """The image size that a file's weights were trained at (a side, or height and width), for its position embeddings,
    where the file does not say it."""
    allow: Allow = Allow()
    args: dict[str, Any] = {}
    """Arguments of the network's constructor: drop_path_rate, img_size ..."""
    layers: Granularity = "block"
    """How finely the network is cut into layers."""

    @model_validator(mode="before")
    @classmethod
    def opened(cls, value: Any) -> Any:
        """Its long form."""
        return {"name": value} if isinstance(value, str) else value

    @field_validator("name")
    @classmethod
    def _named(cls, name: str, info: ValidationInfo) -> str:
        from tlx import models

        if info.context != WITHOUT_LIBRARIES:
            owner = _of_value(lambda: models.owner(name, libraries=info.context != WITHOUT_IMPORTS))
            if owner is None and info.context != WITHOUT_IMPORTS:
                _of_value(lambda: models.source(name))
        return name

    @field_validator("args")
    @classmethod
    def _known(cls, args: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        from tlx import models

        if (odd := plug.not_finite(args)) is not None:
            raise ValueError(f"{odd} is not a finite number")
        if "name" not in info.data or info.context is not None:  # the former is told
            return args
        checked = _of_value(lambda: models.check_args(info.data["name"], args))
        return {name: plug.as_written(value, checked.get(name, value)) for name, value in args.items()}

    @property
    def trained_size(self) -> tuple[int, int] | None:
        """`weights_size` as height and width."""
        return (self.weights_size, self.weights_size) if isinstance(self.weights_size, int) else self.weights_size

    @field_serializer("weights")
    def _as_a_path(self, weights: str) -> str:
        return written(weights) if _is_file(weights) else weights


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


def _positive(interval: Duration) -> Duration:
    if not interval.value:
        raise ValueError("an interval must be longer than 0; write 1 for every step")
    return interval


Interval = Annotated[Length, AfterValidator(_positive)]
"""How often something is done. Percent is of all phases as they were planned; see :meth:`Plan.interval`."""


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
    trackers: list[_part_of("tracker")] = []  # type: ignore[valid-type]
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


class Config(Model):
    """One training."""

    run: FilePath = Field(default_factory=lambda: Path("runs"))
    """The run's folder, by default ``runs/DATA-BACKBONE``; ``{trial}`` in it is the id of a sweep's trial, see
    :func:`tlx.base.sweep.with_trial`."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of everything random: order, transforms, mixing, dropout, initial values of the head."""
    duration: Length | None = None
    """The length of the whole training, which percentages in the phases' durations refer to."""
    stop_after: TimeSpan | None = None
    """The training saves a checkpoint and stops this long after the command was started (``3h55m``)."""
    data: Data
    """Shards and how they are dealt to ranks."""
    input: Input = Input()
    """How pictures are read: size, channels, normalisation."""
    transforms: list[_part_of("transform")] | None = None  # type: ignore[valid-type]
    """Transforms of training pictures, in this order; by default random_resized_crop and horizontal_flip."""
    mix: Mixing | None = None
    """Mixup and CutMix; off by default."""
    backbone: BackboneConfig
    """The network and its weights; a name alone is `name`."""
    head: _part_of("head") = Part(name="linear")  # type: ignore[valid-type]
    """What takes the place of the classifier; `keep: true` goes on with that of a checkpoint of tlx."""
    unfreeze: _part_of("unfreeze") = Part(name="two_phase")  # type: ignore[valid-type]
    """The unfreeze schedule: which phases there are, and which layers train in each."""
    phases: Annotated[dict[str, PhaseSettings], Names("each")] = {}
    """Settings of phases by name; `each` is of all. Durations and rates that are not said: :mod:`tlx.plan.defaults`."""
    further: Annotated[dict[str, PhaseSettings], Names(None)] = {}
    """Phases after those that `unfreeze` makes, by name and in this order. Each trains what the last of those does,
    with its settings but for what is said here, from the last weights; `duration` must be said."""
    task: _part_of("task") = Part(name="classification")  # type: ignore[valid-type]
    """What is learned: which targets of the shards, with which outputs, losses and metrics."""
    objective: _part_of("objective") = Part(name="cross_entropy")  # type: ignore[valid-type]
    """What classification minimises; other tasks have a loss of their own."""
    optimizer: _part_of("optimizer") = Part(name="adamw")  # type: ignore[valid-type]
    """What updates the weights; rates are the plan's."""
    no_decay: list[ParameterKind] = ["bias", "norm", "embedding", "scale"]
    """Kinds of parameters without weight decay."""
    cache: FeatureCacheConfig = FeatureCacheConfig()
    loop: Loop = Loop()
    evaluate: Evaluate = Evaluate()
    checkpoint: Checkpoint = Checkpoint()
    track: Track = Track()
    world: WorldConfig = WorldConfig()

    @model_validator(mode="before")
    @classmethod
    def _named(cls, raw: Any) -> Any:
        if not isinstance(raw, Mapping) or "run" in raw:
            return raw
        data, backbone = raw.get("data"), raw.get("backbone")
        train = data.get("train") if isinstance(data, Mapping) else None
        name = backbone.get("name") if isinstance(backbone, Mapping) else backbone
        return {**raw, "run": defaults.run_of(str(train), str(name))}

    @field_validator("run", mode="before")
    @classmethod
    def _of_a_trial(cls, value: Any) -> Any:
        try:
            return with_trial(value, environment().variables) if isinstance(value, str) else value
        except UserError as error:
            raise ValueError(error.what) from error

    @model_validator(mode="after")
    def _head_of_the_task(self, info: ValidationInfo) -> Config:
        """A task may have a head of its own, which need not be said."""
        if "head" in self.model_fields_set or not _looks_up("task", self.task.name, info.context):
            return self
        own = getattr(plug.find("task", self.task.name), "head", None)
        return (
            self if own is None else self.model_copy(update={"head": known_part("head", Part(name=own), info.context)})
        )

    @model_validator(mode="after")
    def _best_by_the_task(self, info: ValidationInfo) -> Config:
        if self.evaluate.metric is not None or not _looks_up("task", self.task.name, info.context):
            return self
        probed = self.evaluate.probe is not None and self.draws_targets
        metric = PROBED if probed else f"val/{chosen_by(self.task.name)}"
        if (odd := _disagreeing(self.evaluate.mode, metric)) is not None:
            _refused(UserError(odd, where="evaluate.mode"))
        return self.model_copy(update={"evaluate": self.evaluate.model_copy(update={"metric": metric, "mode": None})})

    @property
    def draws_targets(self) -> bool:
        """Whether the task draws its own targets, and learns without labels."""
        return bool(getattr(plug.find("task", self.task.name), "draws", False))

    @property
    def composes_batches(self) -> Callable[[Mapping[str, Any], tuple[str, ...]], Episodes] | None:
        """What says which episodes a batch consists of, from the task's arguments and the names of classes; None where
        batches are plain samples."""
        return getattr(plug.find("task", self.task.name), "episodes", None)

    @property
    def keeps_head(self) -> bool:
        """Whether the head is that of `backbone.weights`."""
        return KEEP in _of_every_head(self.head)

    @property
    def solves_head(self) -> bool:
        """Whether the head begins as what stored features say: what fits them best, or their means."""
        return _of_every_head(self.head).get(INIT) == "solved" or self.begins_with_means

    @property
    def keeps_projection(self) -> bool:
        """Whether the head's map is the projection of `backbone.weights`, a CLIP tower."""
        return _of_every_head(self.head).get(INIT) == "projection"

    @property
    def begins_with_means(self) -> bool:
        """Whether the head is of prototypes, which begin as class means, unless a checkpoint has them already."""
        return getattr(plug.find("head", self.head.name), "starts", "") == "means" and not self.keeps_head

    @property
    def head_args(self) -> dict[str, Any]:
        """The arguments of the head's own function."""
        return _without(self.head.args, _of_every_head(self.head))

    def untrained(self) -> Config:
        """The same without weights: to measure, not to train."""
        head = Part(name=self.head.name, args=self.head_args)
        of_weights = {"weights_key": None, "weights_size": None, "allow": Allow()}
        backbone = self.backbone.model_copy(update={"weights": "none", **of_weights})
        return self.model_copy(update={"backbone": backbone, "head": head})

    def settings(self, phase: str) -> PhaseSettings:
        """Of one phase: its own over those of `each` over the defaults."""
        return self._said(phase).model_copy(update=self.unsaid(phase))

    def unsaid(self, phase: str) -> dict[str, Any]:
        """What :mod:`tlx.plan.defaults` says of a phase, where the configuration does not: its duration, unless the
        schedule gives one; its rate and, with that, the rate's curve, warm-up and layer decay."""
        roles, said = defaults.roles_of(self.unfreeze.name, self.unfreeze.args), self._said(phase)
        role = roles.get(phase) or (None if phase in self.further else roles.get("each"))
        if role is None:
            return {}
        row = PhaseSettings(**defaults.phase_of(role, defaults.kind_of(self.backbone.name)))
        filled: dict[str, Any] = {}
        if said.duration is None and "each" not in roles:
            filled["duration"] = (
                row.duration if self.duration is None else Duration(defaults.share_of(role, roles), "%")
            )
        if said.lr is None and self.optimizer.name in defaults.OPTIMIZERS:
            of_rates = [key for key in row.model_fields_set if key not in ("duration", *said.model_fields_set)]
            filled |= {"lr": row.lr, **{key: getattr(row, key) for key in of_rates}}
        return filled

    @property
    def phase_names(self) -> list[str]:
        """Of all phases that something is said of, here or by default."""
        roles = defaults.roles_of(self.unfreeze.name, self.unfreeze.args)
        return list(dict.fromkeys((*roles, *self.phases)))

    def _said(self, phase: str) -> PhaseSettings:
        base = self.phases.get("each", PhaseSettings())
        return self.phases[phase].over(base) if phase in self.phases and phase != "each" else base


def load(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    libraries: bool = True,
    before_imports: Callable[[Config], None] | None = None,
) -> Config:
    """Reads a configuration file. One that an earlier tlx wrote, such as a run's config.yaml, means what it meant then.

    Args:
        path: a YAML file.
        overrides: ``key.sub=value``, in this order over what the file says and, where it says nothing, the defaults;
            see :mod:`tlx.plan.overrides`.
        libraries: whether parts and networks are looked up: those whose names are known without an import first, then,
            once all else is right, arguments of a network and parts of other packages, for which these are imported.
            Without that, a Config is to be looked at, not trained from.
        before_imports: called in between, with what is known to be right so far.

    Raises:
        UserError: no such file, or not YAML.
        ConfigError: everything that is wrong with the content and the overrides, together.
    """
    raw = _of_file(Path(path))
    if not libraries:
        return _checked(raw, path, overrides, WITHOUT_LIBRARIES)
    config = _checked(raw, path, overrides, WITHOUT_IMPORTS)
    if before_imports is not None:
        before_imports(config)
    return _checked(raw, path, overrides, None)


def _checked(raw: dict[str, Any], path: str | Path, overrides: Sequence[str], context: str | None) -> Config:
    problems = Problems()
    raw = _overridden(raw, overrides, problems, libraries=context is None)
    config = problems.of(lambda: _parsed(raw, str(path), context))
    if len(problems.errors) > 1:
        raise ConfigError(problems.errors, where=str(path))
    problems.refuse()
    assert config is not None
    return config


def read(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A configuration file as plain data, with overrides; not looked at any further.

    Raises:
        UserError: no such file, or not YAML; a word that is no override.
    """
    problems = Problems()
    raw = _overridden(_of_file(Path(path)), overrides, problems)
    problems.refuse()
    return raw


def _of_file(path: Path) -> dict[str, Any]:
    try:
        raw = from_yaml_file(path)
    except IsADirectoryError as error:
        own = path / "config.yaml"
        todo = f"its configuration: {own}" if own.is_file() else f"of pictures: tlx init {path} makes one"
        raise UserError("is a folder, not a configuration", where=str(path), todo=todo) from error
    except OSError as error:
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else ""
        raise UserError(f"cannot be read: {error.strerror or error}{near}", where=str(path)) from error
    except ValueError as error:
        raise UserError(f"is not YAML: {error}", where=str(path)) from error
    if not isinstance(raw, dict):
        raise UserError("is not a mapping of keys to values", where=str(path), todo="see configs/ for examples")
    return completed(raw) if is_written(raw) else raw


def _overridden(
    raw: dict[str, Any], overrides: Sequence[str], problems: Problems, *, libraries: bool = True
) -> dict[str, Any]:
    """With the overrides that can be made; the others become problems."""
    for word in overrides:
        raw = problems.of(functools.partial(changed, raw, word, Config, libraries=libraries)) or raw
    return raw


def parse(raw: Mapping[str, Any], *, where: str | None = None, libraries: bool = True) -> Config:
    """A Config from plain data; see :func:`load`."""
    return _parsed(raw, where, None if libraries else WITHOUT_LIBRARIES)


def _parsed(raw: Mapping[str, Any], where: str | None, context: str | None) -> Config:
    try:
        return Config.model_validate(raw, context=context)
    except ValidationError as error:
        raise ConfigError(mistakes(error, raw, suggest=_meant), where=where) from error


def plain(config: Config) -> dict[str, Any]:
    """A configuration as plain data that :func:`parse` reads back to the same, with every default said.

    Defaults of phases are said in `each`; said again in a phase they would override it.
    """
    raw = config.model_dump(mode="json")
    own = {name: config.phases.get(name, PhaseSettings()) for name in config.phase_names if name != "each"}
    raw["phases"] = {"each": config.settings("each").model_dump(mode="json")} | {
        name: settings.model_copy(update=config.unsaid(name)).model_dump(mode="json", exclude_unset=True)
        for name, settings in own.items()
    }
    raw["further"] = {
        name: settings.model_dump(mode="json", exclude_unset=True) for name, settings in config.further.items()
    }
    return raw


def dump(config: Config) -> str:
    """The same as YAML, that :func:`load` reads back to the same configuration."""
    return to_yaml(plain(config))


def _meant(steps: Sequence[str | int]) -> str:
    """A clause of what an unknown key was meant to be."""
    *above, word = steps
    own = _elsewhere().get(str(word).lower().replace("-", "_"), "").partition("=")[0].rpartition(".")[2]
    if above and own in keys_at(Config, above):  # the same word beside it
        return f'; did you mean "{".".join(map(str, (*above, own)))}"?'
    return right_key(str(word), keys=_elsewhere()) or did_you_mean(str(word), keys_at(Config, above))


@functools.cache
def _elsewhere() -> Mapping[str, str]:
    """Names that are no keys at the top: what people call them, or keys have further down -> the key."""
    places: dict[str, list[str]] = {}
    top = Config.model_fields
    for name in top:
        for key in keys_at(Config, [name]):
            places.setdefault(key, []).append(f"{name}.{key}")
    for key in PhaseSettings.model_fields:
        places.setdefault(key, []).append(f"phases.each.{key}")
    few = {key: '" or "'.join(found) for key, found in places.items() if len(found) <= 4 and key not in top}
    return {**few, **USUAL}
