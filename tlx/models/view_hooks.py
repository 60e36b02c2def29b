"""Networks that take several views of a picture at once, [N, views, channels, H, W]: each goes through the trunk.

By hooks, so that every name stays as the library has it, and a network that is shown lone pictures does what it always
did.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from tlx.models import Outputs
from tlx.models.head_modules import JoinedViews


def take_views(net: nn.Module, heads: Sequence[str], outputs: Outputs) -> None:
    """Lets `net`, whose head is in place, take several views."""
    if outputs.views == 1:
        return
    seen = _Seen()
    net.register_forward_pre_hook(partial(_split, seen=seen, heads=tuple(heads)))
    if not outputs.joined:
        net.register_forward_hook(partial(_beside, seen=seen, views=outputs.views))


class _Seen:
    """Whether the images of this pass are views."""

    views = False


def _split(net: nn.Module, args: tuple[Any, ...], *, seen: _Seen, heads: Sequence[str]) -> tuple[Any, ...]:
    images: torch.Tensor = args[0]
    seen.views = images.ndim == 5
    for head in (net.get_submodule(path) for path in heads):
        if isinstance(head, JoinedViews):
            head.split = seen.views
    return (images.flatten(0, 1), *args[1:]) if seen.views else args


def _beside(_net: nn.Module, _args: tuple[Any, ...], output: Any, *, seen: _Seen, views: int) -> Any:
    """[N * views, outputs] as [N, views * outputs]."""
    if not seen.views:
        return output
    if isinstance(output, tuple):
        return tuple(None if one is None else one.unflatten(0, (-1, views)).flatten(1) for one in output)
    return output.unflatten(0, (-1, views)).flatten(1)
