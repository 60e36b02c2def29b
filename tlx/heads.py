"""Heads: what takes the place of a pretrained network's classifier.

A head is a function ``(features, classes, *, ...) -> nn.Module``. The module takes pooled features [N, features] and
returns logits [N, classes]. A head that does the pooling itself says so with an attribute of the function::

    def my_head(features: int, classes: int, *, hidden: int = 512) -> nn.Module: ...

    my_head.pools = True      # takes the last feature map [N, features, H, W] instead

`linear` is the network's own kind of classifier and keeps its name; the parameters of any other head are under
``head.``. A configuration names one of these, an entry point of the group ``tlx.head``, or ``package.module:function``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

if TYPE_CHECKING:
    from torch.nn import Module
else:
    Module = Any  # annotations are read when arguments are checked, which needs no torch

__all__ = ["concat_pool", "linear", "mlp"]

Share = Annotated[float, Field(ge=0, lt=1)]
Width = Annotated[int, Field(ge=1)]
Activation = Literal["relu", "gelu", "silu", "tanh", "leaky_relu", "elu"]


def linear(features: int, classes: int, *, dropout: Share | None = None) -> Module:
    """One linear layer, under the old classifier's name.

    Starts as PyTorch starts a linear layer: uniform within 1 / sqrt(features), on networks of every library.

    Args:
        dropout: share of features dropped before it, on top of what the network itself drops; none when left out.
    """
    from torch import nn

    return nn.Sequential(nn.Dropout(dropout), nn.Linear(features, classes)) if dropout else nn.Linear(features, classes)


def mlp(
    features: int,
    classes: int,
    *,
    hidden: Annotated[Sequence[Width], Field(min_length=1)] = (512,),
    dropout: Share = 0.0,
    activation: Activation = "relu",
    norm: bool = False,
) -> Module:
    """Per hidden layer: linear, batch norm if wanted, activation, dropout; then a linear layer to the classes.

    With ``hidden: [256], dropout: 0.4`` it is Linear-ReLU-Dropout-Linear.
    """
    from torch import nn

    functions = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh, "elu": nn.ELU}
    layers: list[nn.Module] = []
    for width, inputs in zip(hidden, [features, *hidden], strict=False):
        layers.append(nn.Linear(inputs, width))
        layers += [nn.BatchNorm1d(width)] if norm else []
        layers += [functions.get(activation, nn.LeakyReLU)(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(list(hidden)[-1], classes))


def concat_pool(
    features: int,
    classes: int,
    *,
    hidden: Annotated[Sequence[Width], Field(min_length=1)] = (512,),
    dropout: Share = 0.5,
    activation: Activation = "relu",
    norm: bool = True,
) -> Module:
    """Average and maximum of every channel of the last feature map, concatenated, then the layers of `mlp`.

    After fastai's ``AdaptiveConcatPool2d`` (Howard and Gugger 2020). Convolutional networks and Swin have such a map;
    a network whose classifier has layers of its own (VGG) loses them.
    """
    from torch import nn

    from tlx.models.pooling import ConcatPool

    stack = mlp(2 * features, classes, hidden=hidden, dropout=dropout, activation=activation, norm=norm)
    return nn.Sequential(ConcatPool(), *stack.children())


concat_pool.pools = True  # type: ignore[attr-defined]
