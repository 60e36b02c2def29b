"""State dicts read as timm reads them: other layouts of names, and tables of positions for another image size."""

from __future__ import annotations

import inspect
import math
import sys
import typing
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed, resample_abs_pos_embed_nhwc
from torch import nn

from tlx.models.weights.positions import resampling
from tlx.models.weights.state_dict_formats import Convert, State


def converter(model: str) -> Convert:
    """The filter of the network's own module in timm, with what timm's builder of `model` asks of it.

    Learned position embeddings that it leaves at another size (CaiT, ConViT, PiT, VOLO, Visformer) are resized with
    timm's own function. Whatever else depends on the image size keeps its shape, so that it is seen not to fit.
    """
    asked: dict[str, Any] = {"adapt_layer_scale": True, **resampling(model)}

    def convert(state: State, net: nn.Module) -> State:
        own = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
        if own is not None:
            known = inspect.signature(own).parameters
            state = dict(own(dict(state), net, **{name: value for name, value in asked.items() if name in known}))
        shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
        grid = getattr(getattr(net, "patch_embed", None), "grid_size", None)
        return {name: _on_grid(name, tensor, shapes.get(name), grid) for name, tensor in state.items()}

    return convert


def _on_grid(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...] | None, grid: Sequence[int] | None
) -> torch.Tensor:
    """A position embedding [1, tokens, C], [1, H, W, C] or [1, C, H, W] in the shape that the network has.

    Where the layout is not plainly one of these (NesT's [1, blocks, tokens, C]), it stays as it is.
    """
    old = tuple(tensor.shape)
    if shape is None or shape == old or len(shape) != len(old) or "pos_embed" not in name.rpartition(".")[2]:
        return tensor
    if len(old) == 4 and (shape[0], shape[3]) == (old[0], old[3]) and old[1] == old[2] and shape[1] == shape[2]:
        return typing.cast(torch.Tensor, resample_abs_pos_embed_nhwc(tensor, list(shape[1:3])))
    if len(old) == 4 and shape[:2] == old[:2] and old[2] == old[3]:
        resized: torch.Tensor = resample_abs_pos_embed_nhwc(tensor.permute(0, 2, 3, 1), list(shape[2:]))
        return resized.permute(0, 3, 1, 2)
    if grid and len(old) == 3 and shape == (1, grid[0] * grid[1], old[2]) and math.isqrt(old[1]) ** 2 == old[1]:
        return typing.cast(torch.Tensor, resample_abs_pos_embed(tensor, list(grid), num_prefix_tokens=0))
    return tensor
