"""Build, fill, cut off the old head, put on the new one, and divide into layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

from torch import nn

from tlx.base import plug
from tlx.base.errors import UserError, did_you_mean
from tlx.base.inputs import InputSpec
from tlx.base.layers import Granularity
from tlx.models import Backbone, Loaded, Outputs, WeightsOptions, surgery
from tlx.models.auxiliary import Auxiliary, auxiliary, branch_units, is_auxiliary, leave_out_frozen
from tlx.models.channels import RGB, adapted, adapting, image_weights
from tlx.models.head_modules import JoinedViews, Semantic, TaskHeads
from tlx.models.heads import Takes
from tlx.models.layers.gradients import idle_parameters
from tlx.models.layers.structure import Anatomy
from tlx.models.layers.trace import BATCH, Trace, build_empty, trace
from tlx.models.layers.units import Labels, cut
from tlx.models.libraries.sources import Source
from tlx.models.view_hooks import take_views
from tlx.models.weights import pretrained
from tlx.models.weights.files import Given, in_fp32
from tlx.models.weights.filling import Filled, fill, refuse_unknown, take_head, take_projection
from tlx.models.weights.positions import KEY as SIZE_KEY
from tlx.models.weights.positions import Positions


@dataclass(frozen=True)
class BuildOptions:
    """What the user asked for; see :func:`tlx.models.load`."""

    outputs: Outputs
    weights: str
    args: Mapping[str, Any]
    head: str
    head_args: Mapping[str, Any]
    empty: bool
    channels: int = 3
    options: WeightsOptions = WeightsOptions()  # noqa: RUF009  # frozen

    @property
    def classes(self) -> int:
        """Columns of the logits."""
        return self.outputs.count


@dataclass(frozen=True)
class TracedModel:
    """A network as its library builds it for these classes, traced.

    Attributes:
        running: paths of the modules that make the logits, in the order in which they run.
        auxiliary: classifiers that the logits are not made of.
    """

    net: nn.Module
    spec: InputSpec
    seen: Trace
    labels: Labels | None
    running: tuple[str, ...]
    auxiliary: Auxiliary

    @property
    def heads(self) -> tuple[str, ...]:
        return self.running + self.auxiliary.heads

    def anatomy(self, *, measured: bool = True) -> Anatomy:
        """The network divided; where it is `measured`, with the parameters that no gradient reaches marked."""
        idle = idle_parameters(self.net, self.spec.size, self.spec.channels) if measured else ()
        return Anatomy(self.net, self.seen, self.running, self.labels, idle, self.auxiliary.branches)


def assemble(source: Source, wish: BuildOptions, granularity: Granularity) -> Backbone:
    """See :func:`tlx.models.load`."""
    wish = _checked(source, wish)
    origin = pretrained.choose(source, wish.weights, there=not wish.empty)
    tag = origin.tag
    key = wish.options.key
    if not origin.name:
        _refuse_idle(wish)
    given = None if wish.empty else origin.state(source, wish.args, key)  # first: missing weights are noticed at once
    net = _build(source, wish, tag)
    if isinstance(net, Backbone):
        return _as_given(net, source, wish)
    plain = examine(source, net, wish, tag)
    if origin.name:
        refuse_unknown(net, wish.options, name=source.name)
        _refuse_size(plain, wish.options, name=source.name)
    _refuse_split_answers(source.name, plain.auxiliary, wish.outputs)
    filled = _filled(source, plain, wish, tag, given) if given else None
    finished, features = _with_head(source, plain, wish)
    if given and filled and wish.options.keep_head:
        kept = take_head(net, given, finished.heads, name=source.name)
        filled = replace(filled, taken=filled.taken | kept, left=tuple(n for n in filled.left if n not in kept))
    if given and filled and wish.options.projection:
        map_ = next(f"{path}.map" for path, module in net.named_modules() if isinstance(module, Semantic))
        filled = take_projection(net, map_, filled, plain.running, given)
    anatomy = finished.anatomy()
    leave_out_frozen(net, plain.auxiliary)
    take_views(net, finished.running, wish.outputs)
    return Backbone(
        name=source.name,
        module=net,
        layers=anatomy.layers(granularity),
        input=plain.spec,
        features=features,
        blocks=anatomy.blocks,
        auxiliary=plain.auxiliary.heads,
        heads=finished.running,
        loaded=_loaded(net, given.where, filled) if given and filled else None,
    )


def _refuse_idle(wish: BuildOptions) -> None:
    """Settings about weights where no weights are read are a mistake (UserError)."""
    options = wish.options
    said = {
        "backbone.weights_key": options.key,
        SIZE_KEY: options.size,
        "backbone.allow": options.patterns,
        "head.keep": options.keep_head,
        "head.init: projection": options.projection,
    }
    idle = [key for key, value in said.items() if value]
    if idle:
        raise UserError(
            f"{' and '.join(idle)} say{'s' * (len(idle) == 1)} how weights are read, and none are "
            f"(backbone.weights: {wish.weights})",
            where=idle[0],
            todo="set backbone.weights to the file that is meant, or leave it out",
        )


def _refuse_size(plain: TracedModel, options: WeightsOptions, *, name: str) -> None:
    """
    Raises:
        UserError: the size that weights were trained at is said, and the network has nothing that depends on it.
    """
    if options.size is not None and not Positions.of(plain.net, name, plain.spec.size).tables:
        what = f"{name} has no position embeddings: at which size its weights were trained does not matter"
        raise UserError(what, where=SIZE_KEY, todo="leave it out")


def _filled(source: Source, plain: TracedModel, wish: BuildOptions, tag: str | None, given: Given) -> Filled:
    """Fills the network but for its classifiers; made for RGB images, weights are adapted to other ones."""
    net, options = plain.net, wish.options
    skipped = plain.heads + _dropped_units(plain, wish.head)
    convert = source.convert(wish.args)
    positions = Positions.of(net, source.name, plain.spec.size)
    positions = replace(positions, said=options.size, sizes=given.sizes, same=given.same, alone=convert is None)
    if wish.channels != RGB:
        shapes = image_weights(net, build_empty(lambda: source.build(wish.classes, wish.args, tag)))
        try:
            given = replace(
                given,
                state=adapted({n: in_fp32(t) for n, t in given.state.items()}, shapes, wish.channels),
                precision={n: t.dtype for n, t in given.state.items()},
            )
        except UserError as error:
            raise UserError(error.what, where=source.name, todo=error.todo) from error
        convert = adapting(convert, shapes, wish.channels)
    return fill(net, given, name=source.name, heads=skipped, convert=convert, positions=positions, options=options)


def adopt(net: nn.Module, heads: tuple[str, ...], *, name: str, spec: InputSpec, granularity: Granularity) -> Backbone:
    """See :func:`tlx.models.adopt`."""
    if isinstance(heads, str):
        raise UserError(f'heads is "{heads}"', where=name, todo=f'give a tuple of paths: ("{heads}",)')
    modules = dict(net.named_modules())
    missing = [p for p in heads if not p or p not in modules or not any(True for _ in modules[p].parameters())]
    if missing or not heads:
        raise UserError(
            f"no such modules, or none with parameters: {', '.join(map(repr, missing)) or 'no head is named'}",
            where=name,
        )
    seen = _trace(net, spec, name)
    beside = tuple(path for path in heads if not _starts(path, net, seen) or is_auxiliary(path, seen))
    running = tuple(path for path in heads if path not in beside)
    if not running:
        raise UserError(f"{', '.join(heads)} does not contribute to the network's output", where=name)
    found = _auxiliary(net, beside, spec, name)
    idle = idle_parameters(net, spec.size, spec.channels)
    anatomy = Anatomy(net, seen, running, None, idle, found.branches)
    leave_out_frozen(net, found)
    return Backbone(
        name=name,
        module=net,
        layers=anatomy.layers(granularity),
        input=spec,
        features=surgery.features(net, running[0], seen),
        blocks=anatomy.blocks,
        auxiliary=beside,
        heads=running,
    )


def examine(source: Source, net: nn.Module, wish: BuildOptions, tag: str | None) -> TracedModel:
    """Traces `net` and finds what makes the classes: the parameters whose shape depends on their number."""
    other = build_empty(lambda: source.build(wish.classes + 1, wish.args, tag, wish.channels))
    shapes = {name: p.shape for name, p in other.named_parameters()}
    grown = [name for name, p in net.named_parameters() if shapes.get(name) != p.shape]
    paths = tuple(dict.fromkeys(_owner(name) for name in grown))
    if not paths or "" in paths:
        raise UserError(
            "a parameter of the network itself depends on the number of classes: it has to be in a module of its own"
            if paths
            else "nothing in this network is a classifier: no layer depends on the number of classes",
            where=source.name,
            todo="choose a network for classification; a function of your own must use the `classes` it is given",
        )
    spec = _spec(source, source.input(net, wish.args, tag), wish.channels)
    seen = _trace(net, spec, source.name)
    first = {path: min(_starts(path, net, seen), default=None) for path in paths}
    beside = tuple(p for p in paths if first[p] is None or is_auxiliary(p, seen))
    running = tuple(sorted((p for p in paths if p not in beside), key=lambda p: first[p] or 0))
    if not running:
        raise UserError(f"no logits are made by {', '.join(paths)} in evaluation mode", where=source.name)
    found = _auxiliary(net, beside, spec, source.name)
    return TracedModel(net, spec, seen, source.labels(net), running, found)


def _owner(parameter: str) -> str:
    """The path of the module that a parameter belongs to, behind torch's parametrizations."""
    module, parametrized, _ = parameter.partition(".parametrizations.")
    return module if parametrized else parameter.rpartition(".")[0]


def _starts(path: str, net: nn.Module, seen: Trace) -> list[int]:
    """When a module was called, or its parameters used without it."""
    used = [seen.used.get(f"{path}.{name}") for name, _ in net.get_submodule(path).named_parameters()]
    return [time for time in (seen.order.get(path), *used) if time is not None]


def _checked(source: Source, wish: BuildOptions) -> BuildOptions:
    if wish.classes < 1:
        raise UserError(f"a network needs at least one class, not {wish.classes}")
    if wish.channels < 1:
        raise UserError(f"an image has at least one channel, not {wish.channels}")
    part = plug.find("head", wish.head)
    _refuse_other_head(wish, getattr(part, "starts", "") == "vectors")
    head_args = plug.arguments(part, wish.head_args, label=f"head {wish.head}")
    return replace(wish, args=source.check(wish.args), head_args=head_args)


def _refuse_other_head(wish: BuildOptions, takes_vectors: bool) -> None:
    """
    Raises:
        UserError: a head of class vectors and a task without any, or the other way round.
    """
    vectors = wish.outputs.vectors
    if takes_vectors and vectors is None:
        what = f"head {wish.head} is for the vectors of classes, and this task has none"
        raise UserError(what, where="head", todo="task: {name: semantic, embeddings: FILE}; or another head")
    if vectors is not None and not takes_vectors:
        what = f"the task has vectors of classes, which head {wish.head} has no use for"
        raise UserError(what, where="head", todo="head: semantic")
    if wish.options.projection and not takes_vectors:
        raise UserError("a projection is of head semantic", where="head.init", todo="head: semantic")


def _refuse_split_answers(name: str, auxiliary: Auxiliary, outputs: Outputs) -> None:
    """
    Raises:
        UserError: several views are shown of a sample, of which auxiliary classifiers would answer to each alone.
    """
    if outputs.views > 1 and auxiliary.heads:
        what = f"{name} has auxiliary classifiers ({', '.join(auxiliary.heads)}), and the task shows several views"
        todo = "args: {aux_logits: false}, if it takes that; or another network"
        raise UserError(what, where="backbone", todo=todo)


def _loaded(net: nn.Module, where: str, filled: Filled) -> Loaded:
    new = tuple(name for name, _ in net.named_parameters() if name not in filled.taken)
    resized, left = filled.resized, filled.left
    return Loaded(where, len(filled.taken), resized=resized, left=left, new=new, notes=filled.notes)


def _build(source: Source, wish: BuildOptions, tag: str | None) -> nn.Module:
    def build() -> nn.Module:
        return source.build(wish.classes, wish.args, tag, wish.channels)

    try:
        return build_empty(build) if wish.empty else build()
    except UserError as error:
        raise error if error.where else UserError(error.what, where=source.name, todo=error.todo) from error
    except Exception as error:
        if not wish.args and wish.channels == RGB:
            raise
        asked = f" with {dict(wish.args)}" if wish.args else ""
        asked += f" for images of {wish.channels} channels" if wish.channels != RGB else ""
        raise UserError(f"cannot be built{asked}: {error}", where=source.name) from error


def _as_given(backbone: Backbone, source: Source, wish: BuildOptions) -> Backbone:
    """A function that returns a Backbone answers for all of it."""
    if not wish.outputs.is_single:
        what = f"{source.name} brings its own head, and the task needs several: {', '.join(wish.outputs.heads)}"
        raise UserError(what, todo="let the function return a plain torch.nn.Module")
    if wish.head != "linear" or wish.head_args or wish.weights not in ("default", "none"):
        raise UserError(
            f"{source.name} brings its own head and weights",
            todo="leave out `head` and `weights`, or let the function return a plain torch.nn.Module",
        )
    if backbone.input.channels != wish.channels:
        raise _other_channels(source, backbone.input)
    backbone.layers.verify(name for name, _ in backbone.module.named_parameters())
    return backbone


def _spec(source: Source, found: InputSpec, channels: int) -> InputSpec:
    if found.channels not in (RGB, channels):
        raise _other_channels(source, found)
    return found.for_channels(channels)


def _other_channels(source: Source, found: InputSpec) -> UserError:
    todo = f"set input.channels: {found.channels}"
    return UserError(f"takes images of {found.channels} channels", where=source.name, todo=todo)


def _auxiliary(net: nn.Module, heads: tuple[str, ...], spec: InputSpec, name: str) -> Auxiliary:
    try:
        return auxiliary(net, heads, spec.size, spec.channels)
    except Exception as error:
        raise _does_not_run(error, spec, name, "in training mode ") from error


def _trace(net: nn.Module, spec: InputSpec, name: str) -> Trace:
    try:
        seen = trace(net, spec.size, spec.channels)
    except Exception as error:
        raise _does_not_run(error, spec, name) from error
    if not seen.output:
        raise UserError(
            "the network returns no tensor",
            where=name,
            todo="it must return logits [N, classes]; in training mode also a tuple that begins with them",
        )
    return seen


def _does_not_run(error: Exception, spec: InputSpec, name: str, mode: str = "") -> UserError:
    size = "x".join(str(n) for n in spec.size)
    size += " pixels" if spec.channels == RGB else f" pixels in {spec.channels} channels"
    return UserError(
        f"a forward pass {mode}on images of {size} fails: {str(error).splitlines()[0] if str(error) else error!r}",
        where=name,
        todo="check backbone.args; a network of your own says its input size in an attribute `input` (InputSpec)",
    )


def _dropped_units(plain: TracedModel, head: str) -> tuple[str, ...]:
    """Units that a head which pools by itself makes superfluous (VGG's two linear layers)."""
    tap = _tap(plain, _takes(head))
    return tap.after if tap else ()


def _takes(head: str) -> Takes:
    """What a head says that it takes; pooled features where it says nothing."""
    said: Any = getattr(plug.find("head", head), "takes", "pooled")
    if said not in get_args(Takes):
        raise UserError(
            f'head {head} takes "{said}"{did_you_mean(str(said), get_args(Takes))}',
            todo=f"its attribute `takes` is one of {', '.join(get_args(Takes))}",
        )
    return said  # type: ignore[no-any-return]


def _tap(plain: TracedModel, takes: Takes) -> surgery.Tap | None:
    if takes == "pooled":
        return None
    units = cut(plain.net, plain.seen, plain.running, None).units
    beside = branch_units(units, plain.auxiliary.branches, plain.seen)
    return surgery.find_tap([u for u in units if u.path not in beside], plain.seen, plain.running, takes)


def _with_head(source: Source, plain: TracedModel, wish: BuildOptions) -> tuple[TracedModel, int]:
    """The network with the new head, and how many features that takes."""
    if not wish.empty:
        surgery.renew(plain.net, plain.heads)
    width = surgery.features(plain.net, plain.running[0], plain.seen)
    if wish.head == "linear" and wish.outputs.is_single and wish.outputs.features_joined == 1:
        if wish.head_args.get("dropout"):
            surgery.drop_before(plain.net, plain.heads, wish.head_args["dropout"])
        return plain, width
    tap = _suitable(source, plain, wish.head)
    if tap is not None and wish.outputs.features_joined > 1:
        what = f"head {wish.head} pools a map or tokens, and this task puts pooled features of several views together"
        raise UserError(what, where="head", todo="use mlp or linear")
    features = tap.width if tap else width
    head = _new_head(wish, features * wish.outputs.features_joined)
    if wish.outputs.features_joined > 1:
        head = JoinedViews(head, wish.outputs.views)
    path = surgery.place(plain.net, head, plain.running, tap)
    seen = _trace(plain.net, plain.spec, f"{source.name} with head {wish.head}")
    if seen.output != (BATCH, wish.classes):
        raise UserError(f"head {wish.head} gives {seen.output[1:]} instead of {wish.classes} outputs on {source.name}")
    known = {name for name, _ in plain.net.named_parameters()}
    labels = {n: i for n, i in plain.labels.items() if n in known} if plain.labels else None
    return replace(plain, seen=seen, running=(path,), labels=labels), features


def _suitable(source: Source, plain: TracedModel, head: str) -> surgery.Tap | None:
    """Where the features for `head` are to be had, None for the classifier's own place.

    Raises:
        UserError: the network has nothing that the head could take.
    """
    takes = _takes(head)
    tap = _tap(plain, takes)
    if takes == "map" and tap is None:
        raise UserError(
            f"head {head} pools the last feature map, and {source.name} ends in tokens or vectors",
            todo="use attention_pool, linear, mlp or cosine, or a convolutional backbone",
        )
    if takes == "tokens" and tap is None:
        raise UserError(
            f"head {head} pools the last tokens, and {source.name} ends in vectors, neither tokens nor a map",
            todo="use linear, mlp or cosine",
        )
    widths = dict.fromkeys(surgery.features(plain.net, path, plain.seen) for path in plain.running)
    if len(widths) > 1:
        raise UserError(
            f"{source.name} has classifiers of {', '.join(map(str, widths))} features each, and puts their logits "
            f"together; head {head} cannot take the place of all of them",
            todo="use linear",
        )
    return tap


def _new_head(wish: BuildOptions, features: int) -> nn.Module:
    part, outputs = plug.find("head", wish.head), wish.outputs
    vectors = () if outputs.vectors is None else (outputs.vectors,)

    def one(count: int) -> nn.Module:
        made = plug.call(f"head {wish.head}", part, features, count, *vectors, **wish.head_args)
        if not isinstance(made, nn.Module):
            raise UserError(f"head {wish.head} returned {type(made).__name__}, not a torch.nn.Module")
        return made

    def build() -> nn.Module:
        if outputs.is_single:
            return one(outputs.count)
        return TaskHeads({name: one(count) for name, count in outputs.heads.items()}, outputs.constants)

    return build_empty(build) if wish.empty else build()
