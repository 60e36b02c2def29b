"""Where a backbone comes from, and what every library has to answer about its networks."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from tlx.base.errors import ConfigError, UserError, below, did_you_mean
from tlx.base.inputs import InputSpec
from tlx.base.validation import mistakes

if TYPE_CHECKING:
    from torch import nn

    from tlx.models.layers.units import Labels
    from tlx.models.weights.files import Convert, State

RESERVED = {
    "num_classes": "the number of classes comes from the data",
    "classes": "the number of classes comes from the data",
    "in_chans": "set input.channels",
    **dict.fromkeys(("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"), 'use "weights"'),
    **dict.fromkeys(("weights", "weights_backbone", "pretrained_strict"), 'use "weights"'),
    **dict.fromkeys(
        ("features_only", "out_indices", "feature_cfg", "scriptable", "exportable", "no_jit"), "unused here"
    ),
    **dict.fromkeys(("cache_dir", "progress", "device", "dtype"), "set by tlx or by the library's environment"),
}
"""Arguments of the libraries' builders that a configuration may not set, with the reason."""


class Source(Protocol):
    """One network of one library."""

    @property
    def name(self) -> str:
        """The full name, ``timm/resnet50``."""

    @property
    def ships_weights(self) -> bool:
        """Whether the library publishes weights, so that `default` without any is a mistake."""

    def arguments(self) -> tuple[str, ...]:
        """Names of the arguments that a configuration may set."""

    def check(self, args: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments, converted; without building anything. Raises UserError."""

    def build(self, classes: int, args: Mapping[str, Any], tag: str | None, channels: int = 3) -> nn.Module:
        """The network with random values, for images of `channels`; `tag` where its shape depends on its weights."""

    def input(self, net: nn.Module, args: Mapping[str, Any], tag: str | None) -> InputSpec:
        """What the network wants to see; for three channels, unless it says of itself that it takes others."""

    def labels(self, net: nn.Module) -> Labels | None:
        """Groups of parameters that the library defines."""

    def tags(self) -> tuple[str, ...]:
        """Pretrained weights by name, the default first."""

    def pretrained(self, args: Mapping[str, Any], tag: str) -> State:
        """The state dict of pretrained weights, in the network's names. Raises UserError."""

    def trained_size(self, tag: str) -> tuple[int, int] | None:
        """Height and width of the pictures that pretrained weights were trained on, where the library says so."""

    def convert(self, args: Mapping[str, Any]) -> Convert | None:
        """The library's way to read other layouts and image sizes."""


def check_arguments(
    given: Mapping[str, Any], settable: Mapping[str, Any], *, label: str, fixed: Iterable[str] = ()
) -> dict[str, Any]:
    """Arguments that the libraries pass on through ``**kwargs``, checked before anything is built.

    Args:
        settable: name -> type annotation, as far as it is known.
        fixed: names that the variant itself sets.

    Raises:
        ConfigError: unknown, reserved or ill-typed arguments, all together, each with its name as key.
    """
    problems, checked = list[UserError](), {}

    def refuse(key: str, what: str) -> None:
        problems.append(UserError(f"{label}{what}", where=key))

    for key, value in given.items():
        if key in RESERVED:
            refuse(key, f': "{key}" cannot be set in args ({RESERVED[key]})')
        elif key in fixed:
            refuse(key, f' sets "{key}" itself')
        elif key not in settable:
            refuse(key, f' has no argument "{key}"{did_you_mean(key, settable)}')
        else:
            try:
                checked[key] = _converted(value, settable[key])
            except ValidationError as error:
                problems += below(ConfigError(mistakes(error, value)), key)
    if problems:
        raise ConfigError(problems, where=label)
    return checked


def signature(network: type) -> dict[str, Any]:
    """The arguments of a class with their annotations, those of its bases too where ``**kwargs`` pass them on."""
    found: dict[str, Any] = {}
    for base in network.__mro__:
        if "__init__" not in vars(base):
            continue
        init = base.__init__  # type: ignore[misc]
        parameters = inspect.signature(init).parameters.values()
        hints = _hints(init)
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "self"]
        for parameter in named:
            found.setdefault(parameter.name, hints.get(parameter.name, Any))
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return {name: hint for name, hint in found.items() if name not in RESERVED}


def required(network: type) -> set[str]:
    """The arguments of a class that have no default: a builder function passes them."""
    parameters = inspect.signature(network).parameters.values()
    return {p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}


def _hints(function: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except (NameError, AttributeError, TypeError, ValueError, SyntaxError):  # annotations need not evaluate
        return {}


def _converted(value: Any, hint: Any) -> Any:
    """Checked where the annotation is made of plain types; other values (names of layers) are the library's affair."""
    if not _plain(hint):
        return value
    try:
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except PydanticUserError:
        return value


def _plain(hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return True
    if inner:
        return origin is not None and all(_plain(h) for h in inner if h is not ...)
    return hint in (int, float, bool, str, type(None), tuple, list)
