"""Unfreeze schedules: which layers train in which phase. Pure functions of the layers.

An own schedule is a function ``(layers, *, ...) -> list[Assignment]``, named in the configuration by
``package.module:function`` or registered as an entry point of the group ``tlx.unfreeze``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from tlx.base.durations import Duration, Length
from tlx.base.errors import UserError
from tlx.base.layers import Layer, LayerMap

__all__ = ["all", "biases_only", "classifier", "explicit", "gradual", "head_only", "last_n", "norms_only", "two_phase"]

Mode = Literal["frozen", "norms", "biases", "all"]
"""What trains of a layer: nothing, its norms' affine parameters, its additive terms (norms' too), or everything."""


@dataclass(frozen=True)
class Assignment:
    """A phase as a schedule sees it.

    Attributes:
        name: unique in the schedule; settings in the configuration's `phases` refer to it.
        trains: mode of each layer by name; layers that are not named are frozen.
        duration: where the schedule itself says how long; the configuration may override it.
    """

    name: str
    trains: Mapping[str, Mode]
    duration: Duration | None = None


def head_only(layers: LayerMap) -> list[Assignment]:
    """Feature extraction: only the new head trains."""
    return [Assignment("feature_extraction", _modes([layers.head]))]


def classifier(layers: LayerMap) -> list[Assignment]:
    """The whole classifier block trains (VGG's two pretrained linear layers and the new one)."""
    return [Assignment("classifier", _modes(_classifier_block(layers)))]


def all(layers: LayerMap) -> list[Assignment]:
    """Everything trains from the first step."""
    return [Assignment("fine_tuning", _modes(layers))]


def two_phase(layers: LayerMap, *, first: Literal["head", "classifier"] = "head") -> list[Assignment]:
    """Feature extraction, then everything: so that a random head does not shock pretrained weights."""
    start = [layers.head] if first == "head" else _classifier_block(layers)
    return [Assignment("feature_extraction", _modes(start)), Assignment("fine_tuning", _modes(layers))]


def last_n(layers: LayerMap, *, n: Annotated[int, Field(ge=0)]) -> list[Assignment]:
    """The head and the `n` depths of the backbone next to it train.

    With n = 0 the head, as in the first phase of `gradual`; from 1 on also the rest of the classifier block. Without
    such a block, what shares the head's depth trains with it: a vision transformer's last norm.
    """
    bodies = _backbone_order(layers)
    if n > len(bodies):
        raise UserError(f"last_n: n={n}, but the backbone has {len(bodies)} depths; use all")
    return [Assignment(f"last_{n}", _modes(bodies[n - 1] if n else _head(layers)))]


def gradual(
    layers: LayerMap,
    *,
    every: Length,
    last: Length | None = None,
    step: Annotated[int, Field(ge=1)] = 1,
    first: Literal["head", "classifier"] = "head",
) -> list[Assignment]:
    """One layer more every so often, from the head down to the input (Howard and Ruder 2018, ULMFiT).

    The order is that of thawing, not of rates: the head; the rest of the classifier block, where there is one (VGG's
    two linear layers); then the backbone's depths from the top. Where there is none, what shares the head's depth thaws
    with it, a vision transformer's last norm; in `two_phase` and `head_only` that stays frozen with the backbone. The
    phases are called ``head``, ``classifier``, and ``from_NAME`` after the lowest layer that trains.

    Args:
        every: how long each phase lasts.
        last: how long the last one, with everything trained, lasts; `every` when left out.
        step: how many thaw at a time.
        first: what the first phase trains, as in `two_phase`; it is called ``head`` in both cases.
    """
    order = _thawing_order(layers, first)
    stops = sorted({*range(0, len(order), step), len(order) - 1})
    return [
        Assignment(order[stop][0], _modes(order[stop][1]), last or every if stop == stops[-1] else every)
        for stop in stops
    ]


def norms_only(layers: LayerMap) -> list[Assignment]:
    """The head and every norm's affine parameters train (Frankle et al. 2021 for BatchNorm)."""
    return [Assignment("norms_only", {**_modes(layers, "norms"), layers.head.name: "all"})]


def biases_only(layers: LayerMap) -> list[Assignment]:
    """The head and every additive term train (Ben Zaken et al. 2022, BitFit)."""
    return [Assignment("biases_only", {**_modes(layers, "biases"), layers.head.name: "all"})]


class ExplicitPhase(BaseModel):
    """One phase written out: layers by name, shell pattern or role; later patterns win; the rest is frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    layers: dict[str, Mode]
    duration: Length | None = None


def explicit(layers: LayerMap, *, phases: Annotated[list[ExplicitPhase], Field(min_length=1)]) -> list[Assignment]:
    """A list of phases, each with the layers it trains."""
    return [
        Assignment(
            phase.name,
            {layer.name: mode for pattern, mode in phase.layers.items() for layer in layers.match(pattern)},
            phase.duration,
        )
        for phase in phases
    ]


def _modes(layers: Sequence[Layer] | LayerMap, mode: Mode = "all") -> dict[str, Mode]:
    return {layer.name: mode for layer in layers}


def _classifier_block(layers: LayerMap) -> list[Layer]:
    return [layer for layer in layers if layer.role in ("classifier", "head")]


def _top(layers: LayerMap) -> list[Layer]:
    """What shares the head's depth: the rest of the classifier block, a vision transformer's last norm."""
    return [y for y in layers if y.role != "backbone" or y.depth >= layers.head.depth]


def _head(layers: LayerMap) -> list[Layer]:
    """The head alone where there is a classifier block below it, else with all that shares its depth."""
    block = any(y.role == "classifier" and y.parameters for y in layers)
    return [layers.head] if block else _top(layers)


def _backbone_order(layers: LayerMap) -> list[list[Layer]]:
    """All that trains when the backbone has thawed down to each of its depths that hold parameters, from the top."""
    own = {y.depth for y in layers if y.role == "backbone" and y.parameters and y.depth < layers.head.depth}
    return [[y for y in layers if y.role != "backbone" or y.depth >= depth] for depth in sorted(own, reverse=True)]


def _thawing_order(layers: LayerMap, first: Literal["head", "classifier"]) -> list[tuple[str, list[Layer]]]:
    """Stage by stage, all that has thawed by then, under a name that no other stage has."""
    head, top = _head(layers), _top(layers)
    stages = [("head", head if first == "head" else top)]
    if first == "head" and len(head) < len(top):
        stages.append(("classifier", top))
    for body in _backbone_order(layers):
        lowest = next(y.name for y in body if y.role == "backbone" and y.parameters)
        stages.append((f"from_{lowest}", body))
    return stages
