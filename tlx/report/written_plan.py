"""A plan as plan.json tells it: enough to draw it."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tlx.base.layers import ROLES, Kind, Layer, Parameter, Role
from tlx.runs.run_files import items, mapping, number, whole, within


@dataclass(frozen=True, eq=False)
class WrittenPhase:
    """See :class:`tlx.plan.plan.Phase`, of which it has what a picture needs.

    Attributes:
        shape: (steps from its start, rates over the highest one), ascending.
        tops: of each layer, its rate where the shape is 1; 0 where nothing of it trains.
        learns: parameters of each layer.
    """

    name: str
    start: int
    stop: int
    lr: float
    plateau: bool
    layers: Sequence[Layer]
    shape: tuple[Sequence[int], Sequence[float]]
    tops: Mapping[str, float]
    learns: Mapping[str, tuple[Parameter, ...]]

    @property
    def factors(self) -> dict[str, float]:
        return {name: top / self.lr if self.lr else 0.0 for name, top in self.tops.items()}

    def trained(self, layer: Layer) -> tuple[Parameter, ...]:
        return self.learns[layer.name]

    def rates(self, step: int) -> dict[str, float]:
        """Between the steps that were written down, on a line."""
        steps, values = self.shape
        at = min(max(step - self.start, steps[0]), steps[-1])
        after = bisect.bisect_left(steps, at)
        if steps[after] == at:
            value = values[after]
        else:
            share = (at - steps[after - 1]) / (steps[after] - steps[after - 1])
            value = values[after - 1] + share * (values[after] - values[after - 1])
        return {name: top * value for name, top in self.tops.items()}

    def parts(self, most: int) -> Iterator[tuple[int, int]]:
        steps = self.stop - self.start
        count = min(steps, most)
        return itertools.pairwise(self.start + steps * i // count for i in range(count + 1))


@dataclass(frozen=True)
class WrittenPlan:
    """See :class:`tlx.plan.plan.Plan`."""

    phases: tuple[WrittenPhase, ...]
    layers: tuple[Layer, ...]
    steps: int
    steps_per_epoch: int
    samples: int
    batch: int
    epochs: float = field(default=0.0)

    @staticmethod
    def of(data: Mapping[str, Any]) -> WrittenPlan | None:
        """None of what is no whole plan, or of an earlier tlx, which wrote no curves."""
        layers = tuple(_layer(said) for said in within(data, "layers"))
        counts = [whole(data.get(name)) for name in ("steps", "steps_per_epoch", "samples", "batch")]
        phases = [_phase(said, layers) for said in within(data, "phases")] if layers else []
        if not phases or None in counts or None in phases:
            return None
        known, numbers = [p for p in phases if p is not None], [n for n in counts if n is not None]
        if not all(any(p.learns.values()) and p.stop > p.start for p in known) or min(numbers) < 1:
            return None
        steps, per_epoch, samples, batch = numbers
        return WrittenPlan(tuple(known), layers, steps, per_epoch, samples, batch, steps / per_epoch)


def _layer(said: Mapping[str, Any]) -> Layer:
    """With two parameters, so that a picture can tell whether all of it trains."""
    name, size = str(said.get("name")), whole(said.get("parameters")) or 0
    parameters = (Parameter(f"{name}.weight", (size,), "weight"), Parameter(f"{name}.bias", (0,), "bias"))
    role: Role = next((role for role in ROLES if role == said.get("role")), "backbone")
    return Layer(name, whole(said.get("depth")) or 0, role, parameters if size else (), modules=(), norms=())


def _phase(said: Mapping[str, Any], layers: Sequence[Layer]) -> WrittenPhase | None:
    own, curve = mapping(said.get("layers")), mapping(said.get("curve"))
    start, stop = whole(said.get("start")), whole(said.get("stop"))
    tops = {y.name: max(number(mapping(own.get(y.name)).get("lr")), 0.0) for y in layers}
    shape = _shape(curve, tops, [y.name for y in layers])
    if start is None or stop is None or shape is None:
        return None
    learns = {y.name: _learns(y, mapping(own.get(y.name))) for y in layers}
    plateau = isinstance(mapping(said.get("settings")).get("duration"), dict)
    return WrittenPhase(
        str(said.get("name")), start, stop, max(tops.values()), plateau, layers, shape, tops, learns
    )  # fmt: skip


def _shape(
    curve: Mapping[str, Any], tops: Mapping[str, float], names: Sequence[str]
) -> tuple[list[int], list[float]] | None:
    """The curve of the head, else that of the lowest layer that trains, over its layer's highest rate."""
    lowest = next((name for name in names if tops[name] > 0), names[-1])
    steps = [whole(step) for step in items(curve.get("steps"))]
    for key, name in (("head", names[-1]), ("lowest", lowest)):
        values = [number(rate) for rate in items(curve.get(key))]
        if tops[name] > 0 and values and len(values) == len(steps) and None not in steps:
            return [s for s in steps if s is not None], [max(v, 0.0) / tops[name] for v in values]
    return None


def _learns(layer: Layer, said: Mapping[str, Any]) -> tuple[Parameter, ...]:
    trained, mode = whole(said.get("trained")) or 0, said.get("trains")
    if not trained:
        return ()
    if mode == "all" or trained == sum(p.size for p in layer.parameters):
        return layer.parameters
    kind: Kind = "bias" if mode == "biases" else "norm"
    return (Parameter(f"{layer.name}.{kind}", (trained,), kind),)
