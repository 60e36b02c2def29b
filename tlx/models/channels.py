"""Networks for images of other than three channels: which parameters see the image, and what values they get.

For one channel the weights of the three are summed: a grey image gives what it gave as R = G = B, but for means and
deviations, which are averaged. For four, RGBA, those of alpha are zero: an opaque picture gives what it gave as RGB,
and what transparency means is learned. For other numbers they are timm's (``adapt_input_conv``): repeated (R, G, B,
R ...) and scaled by 3 / channels. A network without pretrained weights starts likewise from what its library draws for
three channels, or, where the library builds it for any number (timm), from what that draws.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from tlx.base.errors import UserError
from tlx.models.layers.trace import BATCH, Shape, trace
from tlx.models.weights.state_dict_formats import Convert, State

RGB, RGBA = 3, 4


def rechannel(net: nn.Module, channels: int, size: tuple[int, int]) -> None:
    """Makes a network for RGB images of `size` one for images of `channels`: its first convolutions change in place.

    Raises:
        UserError: something else than a convolution takes the image.
    """
    for path in _first(net, size):
        convolution = net.get_submodule(path)
        assert isinstance(convolution, nn.Conv2d)
        convolution.weight = nn.Parameter(_adapted(convolution.weight.detach(), channels, path))
        convolution.in_channels = channels


def image_weights(net: nn.Module, rgb: nn.Module) -> dict[str, Shape]:
    """The parameters of `net` that see the image: those whose shape differs in `rgb`, the same for three channels.

    Returns:
        Name -> shape for three channels.
    """
    shapes = {name: tuple(p.shape) for name, p in rgb.named_parameters()}
    return {n: shapes[n] for n, p in net.named_parameters() if n in shapes and shapes[n] != tuple(p.shape)}


def adapted(state: State, shapes: Mapping[str, Shape], channels: int) -> State:
    """`state` with what was trained on three channels made for `channels`; anything else stays as it is.

    Args:
        shapes: see :func:`image_weights`.

    Raises:
        UserError: there is no rule for one of them.
    """
    seen = {n: _adapted(state[n], channels, n) for n in shapes if n in state and tuple(state[n].shape) == shapes[n]}
    return {**state, **seen}


def adapting(convert: Convert | None, shapes: Mapping[str, Shape], channels: int) -> Convert:
    """A library's `convert`, then :func:`adapted`."""

    def converted(state: State, net: nn.Module) -> State:
        return adapted(convert(state, net) if convert else state, shapes, channels)

    return converted


def _first(net: nn.Module, size: tuple[int, int]) -> list[str]:
    """The convolutions that take the image, found by one forward pass on shapes."""
    seen, image = trace(net, size), (BATCH, RGB, *size)
    modules = dict(net.named_modules())
    taking = [path for path in seen.order if seen.inputs.get(path) == image and isinstance(modules[path], nn.Conv2d)]
    if taking and seen.outputs[taking[0]] == image:  # what follows a convolution from three to three is not the first
        taking = taking[:1]
    if not taking or any(modules[path].groups != 1 for path in taking):
        raise UserError(
            f"no convolution of {type(net).__name__} takes the image, so it cannot be made for other than RGB images",
            todo="input.channels: 3; or a function of your own that takes the number as a keyword argument `in_chans`",
        )
    return taking


def _adapted(weight: torch.Tensor, channels: int, name: str) -> torch.Tensor:
    from timm.models import adapt_input_conv

    if channels == RGBA and weight.dim() == 4 and weight.shape[1] == RGB:
        return torch.cat([weight, torch.zeros_like(weight[:, :1])], 1)
    try:
        changed: torch.Tensor = adapt_input_conv(channels, weight)
    except (NotImplementedError, ValueError) as error:  # timm 1.0.20 unpacks the shape of a linear layer's weight
        raise UserError(
            f"no rule makes {name} {tuple(weight.shape)}, trained on RGB images, one for {channels} channels",
            todo="input.channels: 3, or backbone.weights: none",
        ) from error
    return changed
