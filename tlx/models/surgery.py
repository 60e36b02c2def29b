"""A new head for a network, without a wrapper: every other name stays as the library has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from tlx.models.trace import Trace
from tlx.models.units import Unit


@dataclass(frozen=True)
class Map:
    """Where the last feature map of a network can be had.

    Attributes:
        path: the module that returns it, or the pooling that takes it.
        taken: whether `path` is such a pooling.
        channels: how many.
        channels_last: whether it is [N, H, W, C].
        after: units with parameters that only see the pooled features.
    """

    path: str
    taken: bool
    channels: int
    channels_last: bool
    after: tuple[str, ...]


def find_map(units: Sequence[Unit], seen: Trace, heads: Sequence[str]) -> Map | None:
    """The map that the network itself pools; None where there is none (tokens)."""
    start = min((u.start for u in units if u.path in heads and u.start is not None), default=0)
    ran = sorted((u for u in units if u.start is not None and u.start < start), key=lambda u: u.start or 0)
    last = max((i for i, u in enumerate(ran) if u.parameters and (u.block or not u.vector)), default=None)
    if last is None or len(ran[last].output) != 4:
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
    shape = seen.inputs[source.path] if taken else source.output
    square = abs(shape[2] * seen.image[1] - shape[3] * seen.image[0])
    channels_last = abs(shape[1] * seen.image[1] - shape[2] * seen.image[0]) < square
    after = tuple(u.path for u in ran if u.parameters and (u.start or 0) > (source.start or 0))
    return Map(source.path, taken, shape[3] if channels_last else shape[1], channels_last, after)


def features(net: nn.Module, head: str) -> int:
    """What the old classifier `head` takes per image."""
    module = net.get_submodule(head)
    width = getattr(module, "in_features", None) or getattr(module, "in_channels", None)
    return int(width or next(p for p in module.parameters() if p.ndim > 1).shape[1])


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


def place(net: nn.Module, head: nn.Module, heads: Sequence[str], source: Map | None) -> str:
    """Puts `head` after the network, in place of the classifiers `heads`, and returns its path.

    The old classifiers become identities, so that the network returns pooled features; a hook passes them on, or the
    map kept at `source`. The path is ``head``, or ``head.new`` where the network has a `head` of its own.
    """
    for path in [*heads, *(source.after if source else ())]:
        _set(net, path, nn.Identity())
    own = getattr(net, "head", None)
    path = "head" if not isinstance(own, nn.Module) else "new_head" if isinstance(own, nn.Sequential) else "head.new"
    _set(net, path, head)
    kept = _Kept() if source else None
    if source and kept:
        module = net.get_submodule(source.path)
        if source.taken:
            module.register_forward_pre_hook(partial(_keep_input, kept=kept))
        else:
            module.register_forward_hook(partial(_keep_output, kept=kept))
    channels_last = bool(source and source.channels_last)
    if not isinstance(net, nn.Sequential):
        net.register_forward_hook(partial(_finish, path=path, kept=kept, channels_last=channels_last))
    elif kept:  # it runs all its children by itself, the new one last
        head.register_forward_pre_hook(partial(_take_map, kept=kept, channels_last=channels_last))
    return path


class _Kept:
    """One map between the hook that sees it and the head. A copy of the network gets a place of its own, empty."""

    def __init__(self) -> None:
        self.map: torch.Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Kept:
        return _Kept()

    def __reduce__(self) -> tuple[type[_Kept], tuple[()]]:
        return _Kept, ()


def _drop(module: nn.Module, args: tuple[torch.Tensor, ...], *, share: float) -> tuple[torch.Tensor, ...]:
    return (functional.dropout(args[0], share, module.training), *args[1:])


def _keep_input(_module: nn.Module, args: tuple[torch.Tensor, ...], *, kept: _Kept) -> None:
    kept.map = args[0]


def _keep_output(_module: nn.Module, _args: Any, output: torch.Tensor, *, kept: _Kept) -> None:
    kept.map = output


def _take_map(_head: nn.Module, _args: Any, *, kept: _Kept, channels_last: bool) -> torch.Tensor:
    assert kept.map is not None
    features, kept.map = kept.map, None
    return features.permute(0, 3, 1, 2) if channels_last else features


def _finish(net: nn.Module, _args: Any, output: Any, *, path: str, kept: _Kept | None, channels_last: bool) -> Any:
    head = net.get_submodule(path)
    pooled = output[0] if isinstance(output, tuple) else output
    if kept is not None:
        pooled = _take_map(head, (), kept=kept, channels_last=channels_last)
    logits = head(pooled)
    if not isinstance(output, tuple):
        return logits
    rest = (logits, *output[1:])  # auxiliary outputs in training
    return type(output)(*rest) if hasattr(output, "_fields") else rest


def _set(net: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(net.get_submodule(parent), name, module)
