"""Layer-decay rules: the factor of the phase's learning rate that each layer gets. The head's is 1.

An own rule is a function ``(layers, *, ...) -> {layer name: factor}``, by ``package.module:function`` or an entry
point of the group ``tlx.layer_decay``.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tlx.base.durations import Ratio
from tlx.base.layers import LayerMap

__all__ = ["exponential", "groups", "linear", "none", "table"]

NotNegative = Annotated[Ratio, Field(ge=0)]


def none(layers: LayerMap) -> dict[str, float]:
    """Every layer at the full rate."""
    return dict.fromkeys(layers.names, 1.0)


def exponential(layers: LayerMap, *, factor: Annotated[Ratio, Field(gt=0, le=1)] = 0.75) -> dict[str, float]:
    """``factor ** (depths above)``: one factor per step away from the head.

    With 0.75 over a ViT's blocks it is the rule of BEiT and MAE (embedding: factor ** (blocks + 1), head: 1);
    with 1/3 over ResNet's conv1, bn1, layer1-4, fc the one of the Flowers-102 article.
    """
    return {layer.name: float(factor ** (layers.depths - 1 - layer.depth)) for layer in layers}


def linear(layers: LayerMap, *, ratio: Annotated[Ratio, Field(ge=0, le=1)] = 0.001) -> dict[str, float]:
    """A straight line over depth, from 1 at the head to `ratio` at the input.

    With 0.001 over VGG16-BN's 44 feature modules it is the Flowers-102 article's 1e-4 to 1e-7.
    """
    top = max(layers.depths - 1, 1)
    return {layer.name: float(1 + (ratio - 1) * (top - layer.depth) / top) for layer in layers}


def groups(layers: LayerMap, *, body: NotNegative = 0.01) -> dict[str, float]:
    """Two groups: the head (and what shares its depth) at the full rate, the body at `body` times it."""
    return {layer.name: 1.0 if layer.depth == layers.head.depth else float(body) for layer in layers}


def table(layers: LayerMap, *, rates: dict[str, NotNegative], rest: NotNegative = 1.0) -> dict[str, float]:
    """Factors, 0 or more, by layer name, shell pattern or role; later patterns win; `rest` for the others."""
    factors = dict.fromkeys(layers.names, float(rest))
    for pattern, factor in rates.items():
        factors.update({layer.name: float(factor) for layer in layers.match(pattern)})
    return factors
