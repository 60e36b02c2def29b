"""A new head for a network, without a wrapper: every other name stays as the library has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from tlx.base.errors import UserError
from tlx.models.heads import Takes
from tlx.models.layers.trace import Shape, Trace
from tlx.models.layers.units import Unit, ancestors

Layout = Literal["map", "channels_last", "tokens"]
"""[N, C, H, W], [N, H, W, C], [N, L, C]."""


@dataclass(frozen=True)
class Tap:
    """Where a network's last features can be had before they are pooled.

    Attributes:
        path: the module that returns them, or the pooling that takes them.
        taken: whether `path` is such a pooling.
        width: how many channels.
        layout: as the network has them.
        takes: what the head wants them as.
        after: units with parameters that only see the pooled features.
    """

    path: str
    taken: bool
    width: int
    layout: Layout
    takes: Takes
    after: tuple[str, ...]

    def turned(self, features: torch.Tensor) -> torch.Tensor:
        """Features of this layout as the head takes them."""
        if self.layout == "tokens":
            return features
        maps = features.permute(0, 3, 1, 2) if self.layout == "channels_last" else features
        return maps.flatten(2).transpose(1, 2) if self.takes == "tokens" else maps


def find_tap(units: Sequence[Unit], seen: Trace, heads: Sequence[str], takes: Takes) -> Tap | None:
    """The last map, or the last tokens (a map counts as such), of what leads to the classifiers; None: it has none."""
    start = min((u.start for u in units if u.path in heads and u.start is not None), default=0)
    ran = sorted((u for u in units if u.start is not None and u.start < start), key=lambda u: u.start or 0)
    attention = _attention(ran, seen, heads)
    if attention:
        shape = seen.inputs[attention]
        return _tap(attention, shape, seen, takes, taken=True, after=(attention,))
    last = max((i for i, u in enumerate(ran) if u.parameters and _spatial(u)), default=None)
    if last is None:
        return None
    source, taken = ran[last], False
    for unit in ran[last + 1 :]:
        shape = seen.inputs.get(unit.path, ())
        if unit.parameters or len(shape) != 4:
            break
        if unit.vector:  # the pooling itself
            source, taken = unit, True
            break
        source = unit
    path, shape = source.path, seen.inputs[source.path] if taken else source.output
    if len(shape) == 3 and takes == "map":
        around = next((a for a in ancestors(path) if _same(seen.outputs.get(a, ()), shape)), None)
        if around is None:
            return None
        path, shape = around, seen.outputs[around]
    later = (u for u in units if u.start is not None and u.start > (source.start or 0))
    after = tuple(u.path for u in later if u.parameters and u.path not in heads)
    return _tap(path, shape, seen, takes, taken=taken, after=after)


def _tap(path: str, shape: Shape, seen: Trace, takes: Takes, *, taken: bool, after: tuple[str, ...]) -> Tap:
    if len(shape) == 3:
        return Tap(path, taken, shape[2], "tokens", takes, after)
    layout = layout_of(shape, seen.image)
    return Tap(path, taken, shape[1 if layout == "map" else 3], layout, takes, after)


def layout_of(shape: Shape, image: Shape) -> Literal["map", "channels_last"]:
    """Of a map [N, ...] of four dimensions: its sides are those whose ratio is that of the image's."""
    first, last = (abs(shape[i] * image[1] - shape[i + 1] * image[0]) for i in (1, 2))
    return "channels_last" if first < last else "map"


def _attention(ran: Sequence[Unit], seen: Trace, heads: Sequence[str]) -> str | None:
    """A module that attends over a map and makes the classes itself (CLIP's ResNets): its tokens are no features."""
    inner = [u.path for u in ran if u.parameters and len(u.output) == 3]
    for path in (a for head in heads for a in ancestors(head)):
        shape = seen.inputs.get(path, ())
        if len(shape) == 4 and shape[2:] != seen.image and any(u.startswith(f"{path}.") for u in inner):
            return path
    return None


def _spatial(unit: Unit) -> bool:
    """Whether it returned a map, or more than one token."""
    if len(unit.output) == 3:
        return unit.output[1] > 1
    return len(unit.output) == 4 and (unit.block or not unit.vector)


def _same(shape: Shape, tokens: Shape) -> bool:
    """Whether a map of this shape may be these tokens [N, L, C]: a stage that works on tokens and returns a map."""
    places, width = tokens[1:]
    return len(shape) == 4 and (places, width) in ((shape[2] * shape[3], shape[1]), (shape[1] * shape[2], shape[3]))


def features(net: nn.Module, head: str, seen: Trace) -> int:
    """What the old classifier `head` takes per image.

    Raises:
        UserError: it is no module that takes features.
    """
    module, taken = net.get_submodule(head), seen.inputs.get(head, ())
    width = getattr(module, "in_features", None) or getattr(module, "in_channels", None)
    width = width or (taken[1] if len(taken) == 4 else taken[-1] if len(taken) > 1 else None)
    if width is None:
        raise UserError(
            f"{head} takes no features: {type(module).__name__} does not run as a module with an input",
            todo="a classifier is a module that is called, such as torch.nn.Linear",
        )
    return int(width)


def renew(net: nn.Module, heads: Sequence[str]) -> None:
    """Draws new values for linear and convolutional classifiers as PyTorch does for a new layer, in place.

    Uniform within 1 / sqrt(inputs) for weights and biases, so that a head starts alike on networks of every library.
    """
    for path in heads:
        module = net.get_submodule(path)
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            module.reset_parameters()


def drop_before(net: nn.Module, heads: Sequence[str], share: float) -> None:
    """Dropout right before the classifiers, without a module: the names of the network stay as they are."""
    for path in heads:
        net.get_submodule(path).register_forward_pre_hook(partial(_drop, share=share))


def place(net: nn.Module, head: nn.Module, heads: Sequence[str], tap: Tap | None) -> str:
    """Puts `head` after the network, in place of the classifiers `heads`, and returns its path.

    The old classifiers become identities, so that the network returns pooled features; a hook passes them on, or what
    is kept at `tap`. The path is ``head``, or ``head.new`` where the network has a `head` of its own (``new_head``
    where that would run whatever is put into it).
    """
    for path in [*heads, *(tap.after if tap else ())]:
        _set(net, path, nn.Identity())
    own = getattr(net, "head", None)
    sequence = isinstance(own, nn.Sequential) or isinstance(net, nn.Sequential)  # which would run, or not run, a child
    path = "head" if not isinstance(own, nn.Module) else "new_head" if sequence else "head.new"
    _set(net, path, head)
    kept = _Kept(tap) if tap else None
    if kept:
        module = net.get_submodule(kept.tap.path)
        if kept.tap.taken:
            module.register_forward_pre_hook(partial(_keep_input, kept=kept))
        else:
            module.register_forward_hook(partial(_keep_output, kept=kept))
    if not isinstance(net, nn.Sequential):
        net.register_forward_hook(partial(_finish, path=path, kept=kept))
    elif kept:  # it runs all its children by itself, the new one last
        head.register_forward_pre_hook(partial(_take, kept=kept))
    return path


class _Kept:
    """Features between the hook that sees them and the head. A copy of the network gets a place of its own, empty."""

    def __init__(self, tap: Tap) -> None:
        self.tap = tap
        self.features: torch.Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Kept:
        return _Kept(self.tap)

    def __reduce__(self) -> tuple[type[_Kept], tuple[Tap]]:
        return _Kept, (self.tap,)


def _drop(module: nn.Module, args: tuple[torch.Tensor, ...], *, share: float) -> tuple[torch.Tensor, ...]:
    return (functional.dropout(args[0], share, module.training), *args[1:])


def _keep_input(_module: nn.Module, args: tuple[torch.Tensor, ...], *, kept: _Kept) -> None:
    kept.features = args[0]


def _keep_output(_module: nn.Module, _args: Any, output: Any, *, kept: _Kept) -> None:
    first = output if isinstance(output, torch.Tensor) else tree_leaves(output)[0]
    kept.features = first  # of several, the one that the trace has looked at


def _take(_head: nn.Module, _args: Any, *, kept: _Kept) -> torch.Tensor:
    if kept.features is None:  # left out at random in training, or it ended by another way
        raise UserError(
            "the layer whose output the head pools did not run",
            where="head",
            todo="use a head that takes pooled features",
        )
    features, kept.features = kept.features, None
    return kept.tap.turned(features)


def _finish(net: nn.Module, _args: Any, output: Any, *, path: str, kept: _Kept | None) -> Any:
    head = net.get_submodule(path)
    pooled = output[0] if isinstance(output, tuple) else output
    if kept is not None:
        pooled = _take(head, (), kept=kept)
    logits = head(pooled)
    if not isinstance(output, tuple):
        return logits
    rest = (logits, *output[1:])  # auxiliary outputs in training
    return type(output)(*rest) if hasattr(output, "_fields") else rest


def _set(net: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(net.get_submodule(parent), name, module)
