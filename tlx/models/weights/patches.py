"""Pixels that a network does not look at: those beyond the last whole patch, where it cuts pictures, or maps of them,
into patches and leaves the rest out."""

from __future__ import annotations

import math
from collections.abc import Collection
from weakref import WeakKeyDictionary

from torch import nn

from tlx.models.layers.groups import within
from tlx.models.layers.trace import trace

Size = tuple[int, int]

_KNOWN: WeakKeyDictionary[nn.Module, dict[Size, Size]] = WeakKeyDictionary()


def patch_sides(net: nn.Module, blocks: Collection[str]) -> dict[str, Size]:
    """Convolutions that cut what they get into patches: path -> height and width of one.

    Args:
        blocks: paths of blocks, inside which data have another way (a spatial reduction of keys and values).
    """
    found = {}
    for path, module in net.named_modules():
        if isinstance(module, nn.Conv2d) and not any(within(path, block) for block in blocks):
            kernel, stride = tuple(module.kernel_size), tuple(module.stride)
            if kernel == stride and max(kernel) > 1 and module.padding in ((0, 0), "valid"):
                found[path] = (kernel[0], kernel[1])
    return found


def whole(net: nn.Module, blocks: Collection[str]) -> Size:
    """Multiples of this height and width certainly are whole patches, at every level."""
    sides = list(patch_sides(net, blocks).values())
    return math.prod(side[0] for side in sides), math.prod(side[1] for side in sides)


def unseen(net: nn.Module, size: Size, channels: int, blocks: Collection[str]) -> Size:
    """So many rows of pixels at the lower edge, and columns at the right one, that reach no patch.

    Args:
        size: height and width of the pictures.
        blocks: see :func:`patch_sides`.
    """
    known = _KNOWN.setdefault(net, {})
    if size not in known:
        known[size] = _measured(net, size, channels, blocks)
    return known[size]


def _measured(net: nn.Module, size: Size, channels: int, blocks: Collection[str]) -> Size:
    sides = patch_sides(net, blocks)
    if all(side % multiple == 0 for side, multiple in zip(size, whole(net, blocks), strict=True)):
        return 0, 0
    try:
        seen = trace(net, size, channels)
    except Exception:  # of other people's modules; the dry run before training tells what does not run
        return 0, 0
    lost: tuple[dict[int, int], dict[int, int]] = ({}, {})  # by axis: pixels of a place -> the most that are lost there
    for path, patch in sides.items():
        shape = seen.inputs.get(path, ())
        for axis in (0, 1) if len(shape) == 4 else ():
            places = shape[2 + axis]
            scale = round(size[axis] / places)
            lost[axis][scale] = max(lost[axis].get(scale, 0), places % patch[axis] * scale)
    return sum(lost[0].values()), sum(lost[1].values())
