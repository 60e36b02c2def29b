"""The configuration: typed, closed, and wrong in one report.

A YAML file plus ``key=value`` overrides becomes a :class:`Config`. Everything that can be known without data or
weights is checked here: unknown keys (with a suggestion), types, names of parts and their arguments.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from tlx.base import plug
from tlx.base.durations import Duration, Length, TimeSpan
from tlx.base.errors import ConfigError, Problems, UserError, did_you_mean
from tlx.base.key_aliases import USUAL, right_key
from tlx.base.launcher import environment
from tlx.base.layers import Kind as ParameterKind
from tlx.base.parsing import from_yaml_file, to_yaml
from tlx.base.sweep import with_trial
from tlx.base.validation import mistakes
from tlx.data.stream.episodes import Episodes
from tlx.plan import defaults
from tlx.plan.backbone_config import Allow, BackboneConfig
from tlx.plan.data_config import Data, FeatureCacheConfig, Input, Mixing
from tlx.plan.later_keys import completed, is_written
from tlx.plan.loop_config import PROBED, Checkpoint, Evaluate, Loop, Track, WorldConfig
from tlx.plan.overrides import Names, changed, keys_at
from tlx.plan.parts import (
    INIT,
    KEEP,
    WITHOUT_IMPORTS,
    WITHOUT_LIBRARIES,
    FilePath,
    Model,
    Part,
    chosen_by,
    disagreeing,
    known_part,
    looks_up,
    of_every_head,
    part_of,
    refused,
    without,
)
from tlx.plan.phase_settings import PhaseSettings


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
    transforms: list[part_of("transform")] | None = None  # type: ignore[valid-type]
    """Transforms of training pictures, in this order; by default random_resized_crop and horizontal_flip."""
    mix: Mixing | None = None
    """Mixup and CutMix; off by default."""
    backbone: BackboneConfig
    """The network and its weights; a name alone is `name`."""
    head: part_of("head") = Part(name="linear")  # type: ignore[valid-type]
    """What takes the place of the classifier; `keep: true` goes on with that of a checkpoint of tlx."""
    unfreeze: part_of("unfreeze") = Part(name="two_phase")  # type: ignore[valid-type]
    """The unfreeze schedule: which phases there are, and which layers train in each."""
    phases: Annotated[dict[str, PhaseSettings], Names("each")] = {}
    """Settings of phases by name; `each` is of all. Durations and rates that are not said: :mod:`tlx.plan.defaults`."""
    further: Annotated[dict[str, PhaseSettings], Names(None)] = {}
    """Phases after those that `unfreeze` makes, by name and in this order. Each trains what the last of those does,
    with its settings but for what is said here, from the last weights; `duration` must be said."""
    task: part_of("task") = Part(name="classification")  # type: ignore[valid-type]
    """What is learned: which targets of the shards, with which outputs, losses and metrics."""
    objective: part_of("objective") = Part(name="cross_entropy")  # type: ignore[valid-type]
    """What classification minimises; other tasks have a loss of their own."""
    optimizer: part_of("optimizer") = Part(name="adamw")  # type: ignore[valid-type]
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
        if "head" in self.model_fields_set or not looks_up("task", self.task.name, info.context):
            return self
        own = getattr(plug.find("task", self.task.name), "head", None)
        return (
            self if own is None else self.model_copy(update={"head": known_part("head", Part(name=own), info.context)})
        )

    @model_validator(mode="after")
    def _best_by_the_task(self, info: ValidationInfo) -> Config:
        if self.evaluate.metric is not None or not looks_up("task", self.task.name, info.context):
            return self
        probed = self.evaluate.probe is not None and self.draws_targets
        metric = PROBED if probed else f"val/{chosen_by(self.task.name)}"
        if (odd := disagreeing(self.evaluate.mode, metric)) is not None:
            refused(UserError(odd, where="evaluate.mode"))
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
        return KEEP in of_every_head(self.head)

    @property
    def solves_head(self) -> bool:
        """Whether the head begins as what stored features say: what fits them best, or their means."""
        return of_every_head(self.head).get(INIT) == "solved" or self.begins_with_means

    @property
    def keeps_projection(self) -> bool:
        """Whether the head's map is the projection of `backbone.weights`, a CLIP tower."""
        return of_every_head(self.head).get(INIT) == "projection"

    @property
    def begins_with_means(self) -> bool:
        """Whether the head is of prototypes, which begin as class means, unless a checkpoint has them already."""
        return getattr(plug.find("head", self.head.name), "starts", "") == "means" and not self.keeps_head

    @property
    def head_args(self) -> dict[str, Any]:
        """The arguments of the head's own function."""
        return without(self.head.args, of_every_head(self.head))

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
