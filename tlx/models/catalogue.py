"""Networks in full: a row of the catalogue, a description."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import get_args

from tlx.base.errors import UserError
from tlx.base.layers import Granularity, LayerMap
from tlx.models import Backbone, Description, Outputs, Row, surgery
from tlx.models.assemble import BuildOptions, TracedModel, examine
from tlx.models.layers.trace import Shape, Trace, build_empty, trace
from tlx.models.libraries.sources import Source

CLASSES = 1000


def row(source: Source) -> Row:
    """One line with everything in it, or with the name alone where the network cannot be used."""
    try:
        plain = _plain(source)
    except Exception:  # one network that cannot be built must not hide the others
        return Row(source.name, source.tags())
    return _row(source, plain)


def description(source: Source, *, measured: bool) -> Description:
    """See :func:`tlx.models.describe`."""
    plain = _plain(source)
    anatomy = plain.anatomy(measured=measured)
    layers = {granularity: anatomy.layers(granularity) for granularity in get_args(Granularity)}
    found = Description(
        row=_row(source, plain),
        args=source.arguments(),
        blocks=anatomy.blocks,
        layers=layers,
        norms=Counter(type(plain.net.get_submodule(n)).__name__ for layer in layers["block"] for n in layer.norms),
    )
    if not measured:
        return found
    seen = trace(plain.net, plain.spec.size, plain.spec.channels, count=True)
    return replace(
        found,
        shapes={granularity: _shapes(cut, seen) for granularity, cut in layers.items()},
        flops={granularity: _flops(cut, seen) for granularity, cut in layers.items()},
    )


def _shapes(layers: LayerMap, seen: Trace) -> dict[str, Shape]:
    """Of one image, as it leaves each layer.

    A pooling in front of the head may belong to the last layer; what that layer itself returns is a map.
    """
    found, after = {}, float("inf")
    for layer in reversed(list(layers)):
        own = {path: seen.outputs[path] for path in layer.modules if seen.ended.get(path, after) < after}
        maps = {path: shape for path, shape in own.items() if any(n > 1 for n in shape[2:])}
        last = max(maps or own, key=lambda path: seen.ended[path], default="")
        found[layer.name] = seen.outputs.get(last, ())[1:]
        after = min([after, *(seen.order[path] for path in layer.modules if path in seen.order)])
    return found


def _flops(layers: LayerMap, seen: Trace) -> dict[str, int]:
    """Operations at the level of a module that spans layers are those of the layer that ran last before its end."""
    owner = {path: layer.name for layer in layers for path in layer.modules}
    found = dict.fromkeys(layers.names, 0)
    for path, flops in seen.flops.items():
        before = (p for p in owner if seen.ended.get(p, 0) < seen.ended.get(path, float("inf")))
        last = max(before, key=lambda p: seen.ended.get(p, 0), default="")
        found[owner.get(path) or owner.get(last, layers.head.name)] += flops
    return found


def _plain(source: Source) -> TracedModel:
    args, tags = source.check({}), source.tags()
    tag = tags[0] if tags else None
    net = build_empty(lambda: source.build(CLASSES, args, tag))
    if isinstance(net, Backbone):
        raise UserError(f"{source.name} describes itself: load it")
    return examine(source, net, BuildOptions(Outputs({"": CLASSES}), "none", args, "linear", {}, True), tag)


def _row(source: Source, plain: TracedModel) -> Row:
    return Row(
        name=source.name,
        weights=source.tags(),
        parameters=sum(p.numel() for p in plain.net.parameters()),
        head=plain.running[0],
        auxiliary=plain.heads[1:],
        features=surgery.features(plain.net, plain.running[0], plain.seen),
        input=plain.spec,
    )
