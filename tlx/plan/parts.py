"""What a configuration is made of: closed models, paths, metrics, and pluggable parts, which are looked up by name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from tlx.base import plug
from tlx.base.durations import Duration, Length
from tlx.base.errors import ConfigError, Problems, UserError, below
from tlx.base.location import is_remote, place
from tlx.base.metrics import Metric
from tlx.base.paths import expanded, written
from tlx.base.plug import Group
from tlx.base.validation import mistakes, refuse_truth

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


def of_value(act: Callable[[], T]) -> T:
    """What `act` gives, for a validator: pydantic knows the key, and the user's mistake goes on whole as the cause.

    Raises:
        ValueError: the mistake.
    """
    try:
        return act()
    except UserError as error:
        refused(error)


def refused(error: UserError) -> NoReturn:
    """
    Raises:
        ValueError: of a mistake, for a validator.
    """
    raise ValueError(error.what) from error


def expanded_path(value: Any) -> Any:
    return of_value(lambda: expanded(str(value))) if isinstance(value, str | Path) else value


def is_file(weights: str) -> bool:
    """Whether it may be a path; tags of a library are no different from names of files."""
    return not weights.startswith("hf-hub:") and not is_remote(weights)


FilePath = Annotated[Path, BeforeValidator(expanded_path), PlainSerializer(written, return_type=str, when_used="json")]
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


def part_of(group: str) -> Any:
    def check(part: Part, info: ValidationInfo) -> Part:
        if not looks_up(group, part.name, info.context):
            return part
        return of_value(lambda: known_part(group, part, info.context))

    return Annotated[Part, Group(group), AfterValidator(check)]


def looks_up(group: str, name: str, context: str | None) -> bool:
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
    if group == "head" and (own := of_every_head(part)):
        said = plug.arguments(_every_head, own, label=f"head {part.name}")
        known = known_part(group, Part(name=part.name, args=without(part.args, own)), context)
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
        known = known_part(group, part, context) if looks_up(group, part.name, context) else part
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


INIT = "init"
"""``head: {name: linear, init: solved}``: the head begins as the solution on stored features of the training pictures
(`cache`), in place of random numbers: the logistic regression, of `semantic` the closed form of ESZSL. ``init:
projection``, of `semantic` alone: its map begins as the projection of a CLIP tower, from `backbone.weights`."""


def _every_head(*, keep: bool = False, init: Literal["random", "solved", "projection"] = "random") -> None:
    """What is checked as arguments of every head."""


def of_every_head(part: Part) -> dict[str, Any]:
    """Of a head's arguments, those that its own function does not take."""
    function = plug.find("head", part.name)
    return {name: part.args[name] for name in (KEEP, INIT) if name in part.args and not plug.takes(function, name)}


def without(args: Mapping[str, Any], names: Container[str]) -> dict[str, Any]:
    return {name: value for name, value in args.items() if name not in names}


def _agreeing(mode: str | None, info: ValidationInfo) -> str | None:
    """A metric knows its direction. Older files state it once more, as `mode`: what agrees is read and forgotten; that
    of the task's own metric is looked at once that is known."""
    if (odd := disagreeing(mode, info.data.get("metric"))) is not None:
        raise ValueError(odd)
    return mode if info.data.get("metric") is None else None


def disagreeing(mode: str | None, name: str | None) -> str | None:
    """What is wrong with a direction of a metric."""
    metric = Metric.of(name) if name is not None else None
    if mode is None or metric is None or not metric.judges or mode == metric.mode:
        return None
    direction = "higher" if metric.higher_is_better else "lower"
    return f"{metric.name} is better when it is {direction}, which need not be said; remove mode"


Direction = Annotated[Literal["min", "max"] | None, AfterValidator(_agreeing)]


Place = Annotated[str, BeforeValidator(lambda value: of_value(lambda: place(value)))]


Pixels = Annotated[int, Field(ge=1, le=8192)]


def _positive(interval: Duration) -> Duration:
    if not interval.value:
        raise ValueError("an interval must be longer than 0; write 1 for every step")
    return interval


Interval = Annotated[Length, AfterValidator(_positive)]
"""How often something is done. Percent is of all phases as they were planned; see :meth:`Plan.interval`."""
