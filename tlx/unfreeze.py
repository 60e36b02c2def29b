"""Unfreeze schedules: which layers train in which phase. Pure functions of the layers.

An own schedule is a function ``(layers, *, ...) -> list[Assignment]``, named in the configuration by
``package.module:function`` or registered as an entry point of the group ``tlx.unfreeze``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from tlx.durations import Duration, Length
from tlx.errors import UserError
from tlx.layers import Layer, LayerMap

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
    """The head and the `n` depths of the backbone next to it train."""
    depths = _unfreezing_order(layers)
    if n >= len(depths):
        raise UserError(f"last_n: n={n}, but the backbone has {len(depths) - 1} depths; use all")
    return [Assignment(f"last_{n}", _modes(_from_depth(layers, depths[n])))]


def gradual(
    layers: LayerMap, *, every: Length, last: Length | None = None, step: Annotated[int, Field(ge=1)] = 1
) -> list[Assignment]:
    """One layer more every so often, from the head down to the input (Howard and Ruder 2018, ULMFiT).

    Args:
        every: how long each phase lasts.
        last: how long the last one, with everything trained, lasts; `every` when left out.
        step: how many depths thaw at a time.
    """
    depths = _unfreezing_order(layers)
    stops = sorted({*range(0, len(depths), step), len(depths) - 1})
    assignments = []
    for stop in stops:
        trained = _from_depth(layers, depths[stop])
        duration = last or every if stop == stops[-1] else every
        name = "head" if stop == 0 else f"from_{next(y.name for y in trained if y.parameters)}"
        assignments.append(Assignment(name, _modes(trained), duration))
    return assignments


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


def _unfreezing_order(layers: LayerMap) -> list[int]:
    """Depths that hold parameters, the head's first."""
    return sorted({layer.depth for layer in layers if layer.parameters}, reverse=True)


def _from_depth(layers: LayerMap, depth: int) -> list[Layer]:
    return [layer for layer in layers if layer.depth >= depth]
