"""`tlx models show`: one backbone in full, drawn for a person."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.table import Table

from tlx import models
from tlx.base.layers import Granularity, Layer
from tlx.base.terminal import drawn
from tlx.models import Description

_BAR = 24
"""Columns of the longest bar."""


def portrait(name: str, *, width: int | None = None) -> str:
    """Head, input, norms, weights and arguments of a backbone, and its layers at every granularity with 1000 classes.

    Args:
        width: columns; those of the terminal by default.

    Raises:
        UserError: there is no such backbone.
    """
    found = models.describe(name)
    return drawn(found.row.name, _facts(found), *(_drawn(found, g) for g in found.layers), columns=width)


def _facts(found: Description) -> Table:
    row = found.row
    table = Table(box=None, show_header=False, padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    flops = sum(found.flops["block"].values())
    facts = {
        "parameters": f"{row.parameters:,}" if row.parameters else "?",
        "compute": f"{flops / 1e9:.3g} GFLOP an image (a multiply-add counts two)",
        "head": f"{row.head or '?'}, takes {row.features} features",
        "auxiliary": ", ".join(row.auxiliary),
        "norms": ", ".join(f"{count} {kind}" for kind, count in found.norms.items()) or "none",
        "blocks": f"{len(found.blocks)}" if found.blocks else "none: a plain network",
        "idle": ", ".join(p.name for y in found.layers["block"] for p in y.parameters if p.idle),
        "weights": ", ".join(row.weights) or "none",
        "arguments": ", ".join(found.args),
    }
    if row.input:
        size = " x ".join(map(str, row.input.size))
        facts["input"] = f"{size}, {row.input.interpolation}, crop {row.input.crop_pct:.4g}"
        facts["mean, std"] = f"{_numbers(row.input.mean)}; {_numbers(row.input.std)}"
    for key, value in facts.items():
        if value:
            table.add_row(key, value)
    return table


def _drawn(found: Description, granularity: Granularity) -> Table:
    """A row per layer, its share of the network's compute as a bar."""
    layers, flops = found.layers[granularity], found.flops[granularity]
    title = f"{len(layers)} layers by {granularity}, {layers.depths} depths"
    table = Table(box=box.SIMPLE, title=title, title_justify="left")
    table.add_column("depth", justify="right")
    table.add_column("layer", overflow="fold")
    table.add_column("parameters", justify="right")
    table.add_column("output of one image", justify="right")
    table.add_column("compute", justify="right")
    table.add_column("share of compute", no_wrap=True)
    whole = sum(flops.values()) or 1
    most = max(flops.values()) or 1
    for layer in layers:
        share = flops[layer.name] / whole
        table.add_row(
            str(layer.depth),
            _named(layer),
            f"{layer.size:,}" if layer.size else "-",
            " x ".join(map(str, found.shapes[granularity][layer.name])) or "-",
            f"{share:.1%}" if share else "-",
            "\u2588" * max(round(_BAR * flops[layer.name] / most), share >= 0.005),
        )
    return table


def _named(layer: Layer) -> str:
    return layer.name if layer.role == "backbone" else f"{layer.name} ({layer.role})"


def _numbers(values: Iterable[float]) -> str:
    return " ".join(f"{v:.4g}" for v in values)
