"""Build, fill, cut off the old head, put on the new one, and divide into layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from tlx import plug
from tlx.errors import UserError, did_you_mean
from tlx.inputs import InputSpec
from tlx.layers import Granularity
from tlx.models import Backbone, surgery
from tlx.models import weights as files
from tlx.models.sources import Source
from tlx.models.structure import Anatomy
from tlx.models.trace import BATCH, Trace, build_empty, trace
from tlx.models.units import Labels, cut


@dataclass(frozen=True)
class Wish:
    """What the user asked for; see :func:`tlx.models.load`."""

    classes: int
    weights: str
    args: Mapping[str, Any]
    head: str
    head_args: Mapping[str, Any]
    empty: bool


@dataclass(frozen=True)
class Plain:
    """A network as its library builds it for these classes, traced.

    Attributes:
        running: paths of the modules that make the classes, in the order in which they run.
        auxiliary: those that run in training mode only.
    """

    net: nn.Module
    spec: InputSpec
    seen: Trace
    labels: Labels | None
    running: tuple[str, ...]
    auxiliary: tuple[str, ...]

    @property
    def heads(self) -> tuple[str, ...]:
        return self.running + self.auxiliary

    def anatomy(self) -> Anatomy:
        return Anatomy(self.net, self.seen, self.heads, self.labels)


def assemble(source: Source, wish: Wish, granularity: Granularity) -> Backbone:
    """See :func:`tlx.models.load`."""
    wish = _checked(source, wish)
    tag = _tag(source, wish)
    state = None if wish.empty else _state(source, wish, tag)  # first, so that missing weights are noticed at once
    net = _build(source, wish, tag)
    if isinstance(net, Backbone):
        return _as_given(net, source, wish)
    plain = examine(source, net, wish, tag)
    if state is not None:
        where = f"{source.name} {tag}" if tag else wish.weights
        skipped = plain.heads + _dropped_units(plain, wish.head)
        files.fill(net, state, heads=skipped, where=where, convert=source.convert(wish.args))
    finished, features = _with_head(source, plain, wish)
    anatomy = finished.anatomy()
    return Backbone(
        name=source.name,
        module=net,
        layers=anatomy.layers(granularity),
        input=plain.spec,
        features=features,
        blocks=anatomy.blocks,
        auxiliary=plain.auxiliary,
    )


def adopt(net: nn.Module, heads: tuple[str, ...], *, name: str, spec: InputSpec, granularity: Granularity) -> Backbone:
    """See :func:`tlx.models.adopt`."""
    seen = _trace(net, spec, name)
    missing = [path for path in heads if path not in dict(net.named_modules())]
    if missing or not heads:
        raise UserError(f"there is no module {missing or 'named as the head'}", where=name)
    auxiliary = tuple(path for path in heads if path not in seen.order)
    anatomy = Anatomy(net, seen, heads, None)
    return Backbone(
        name=name,
        module=net,
        layers=anatomy.layers(granularity),
        input=spec,
        features=surgery.features(net, heads[0]),
        blocks=anatomy.blocks,
        auxiliary=auxiliary,
    )


def examine(source: Source, net: nn.Module, wish: Wish, tag: str | None) -> Plain:
    """Traces `net` and finds what makes the classes: the parameters whose shape depends on their number."""
    other = build_empty(lambda: source.build(wish.classes + 1, wish.args, tag))
    shapes = {name: p.shape for name, p in other.named_parameters()}
    grown = [name for name, p in net.named_parameters() if shapes.get(name) != p.shape]
    paths = tuple(dict.fromkeys(name.split(".parametrizations.")[0].rpartition(".")[0] for name in grown))
    if not paths or "" in paths:
        raise UserError(
            "nothing in this network is a classifier: no layer depends on the number of classes",
            where=source.name,
            todo="choose a network for classification; a function of your own must use the `classes` it is given",
        )
    spec = source.input(net, wish.args, tag)
    seen = _trace(net, spec, source.name)
    running = tuple(sorted((p for p in paths if p in seen.order), key=lambda p: seen.order[p]))
    auxiliary = tuple(p for p in paths if p not in seen.order)
    return Plain(net, spec, seen, source.labels(net), running, auxiliary)


def _checked(source: Source, wish: Wish) -> Wish:
    if wish.classes < 1:
        raise UserError(f"a network needs at least one class, not {wish.classes}")
    part = plug.find("head", wish.head)
    head_args = plug.arguments(part, wish.head_args, label=f"head {wish.head}")
    return replace(wish, args=source.check(wish.args), head_args=head_args)


def _tag(source: Source, wish: Wish) -> str | None:
    """The library's weights that are meant, None for a file or none."""
    tags = source.tags()
    if wish.weights == "none" or files.is_file(wish.weights):
        return None
    if wish.weights == "default":
        if tags or not source.ships_weights or wish.empty:
            return tags[0] if tags else None
        raise UserError(f"{source.name} has no pretrained weights", todo="set backbone.weights to a file, or to none")
    tag = wish.weights.removeprefix(f"{source.name.partition('/')[2]}.").rpartition("_Weights.")[2]
    if tag not in tags:
        raise UserError(
            f'{source.name} has no weights "{wish.weights}"{did_you_mean(tag, tags)}',
            todo="backbone.weights is default, one of the library's tags, a file, or none",
        )
    return tag


def _build(source: Source, wish: Wish, tag: str | None) -> nn.Module:
    def build() -> nn.Module:
        return source.build(wish.classes, wish.args, tag)

    try:
        return build_empty(build) if wish.empty else build()
    except UserError:
        raise
    except Exception as error:
        if not wish.args:
            raise
        raise UserError(f"cannot be built with {dict(wish.args)}: {error}", where=source.name) from error


def _as_given(backbone: Backbone, source: Source, wish: Wish) -> Backbone:
    """A function that returns a Backbone answers for all of it."""
    if wish.head != "linear" or wish.weights not in ("default", "none"):
        raise UserError(
            f"{source.name} brings its own head and weights",
            todo="leave out `head` and `weights`, or let the function return a plain torch.nn.Module",
        )
    backbone.layers.verify(name for name, _ in backbone.module.named_parameters())
    return backbone


def _trace(net: nn.Module, spec: InputSpec, name: str) -> Trace:
    try:
        return trace(net, spec.size)
    except Exception as error:
        size = "x".join(str(n) for n in spec.size)
        raise UserError(
            f"a forward pass on images of {size} pixels fails: {str(error).splitlines()[0] if str(error) else error!r}",
            where=name,
            todo="check backbone.args; a network of your own says its input size in an attribute `input` (InputSpec)",
        ) from error


def _state(source: Source, wish: Wish, tag: str | None) -> files.State | None:
    """The tensors that the network is to get; None where it keeps what it was built with."""
    if tag is not None:
        return source.pretrained(wish.args, tag)
    return files.read(wish.weights) if files.is_file(wish.weights) else None


def _dropped_units(plain: Plain, head: str) -> tuple[str, ...]:
    """Units that a head which pools by itself makes superfluous (VGG's two linear layers)."""
    source = _map(plain) if _pools(head) else None
    return source.after if source else ()


def _pools(head: str) -> bool:
    return bool(getattr(plug.find("head", head), "pools", False))


def _map(plain: Plain) -> surgery.Map | None:
    return surgery.find_map(cut(plain.net, plain.seen, plain.heads, None).units, plain.seen, plain.heads)


def _with_head(source: Source, plain: Plain, wish: Wish) -> tuple[Plain, int]:
    """The network with the new head, and how many features that takes."""
    if not wish.empty:
        surgery.renew(plain.net, plain.heads)
    if wish.head == "linear":
        if wish.head_args.get("dropout"):
            surgery.drop_before(plain.net, plain.heads, wish.head_args["dropout"])
        return plain, surgery.features(plain.net, plain.running[0])
    source_map = _map(plain) if _pools(wish.head) else None
    if _pools(wish.head) and source_map is None:
        raise UserError(
            f"head {wish.head} pools the last feature map, and {source.name} ends in tokens or vectors",
            todo="use linear or mlp, or a convolutional backbone",
        )
    features = source_map.channels if source_map else surgery.features(plain.net, plain.running[0])
    head = _new_head(wish, features)
    path = surgery.place(plain.net, head, plain.running, source_map)
    seen = _trace(plain.net, plain.spec, f"{source.name} with head {wish.head}")
    if seen.output != (BATCH, wish.classes):
        raise UserError(
            f"head {wish.head} gives {seen.output[1:]} instead of {wish.classes} classes on {source.name}",
            todo="use linear" if len(plain.running) > 1 else None,
        )
    known = {name for name, _ in plain.net.named_parameters()}
    labels = {n: i for n, i in plain.labels.items() if n in known} if plain.labels else None
    return replace(plain, seen=seen, running=(path,), labels=labels), features


def _new_head(wish: Wish, features: int) -> nn.Module:
    part = plug.find("head", wish.head)

    def build() -> nn.Module:
        made = part(features, wish.classes, **wish.head_args)
        if not isinstance(made, nn.Module):
            raise UserError(f"head {wish.head} returned {type(made).__name__}, not a torch.nn.Module")
        return made

    return build_empty(build) if wish.empty else build()
