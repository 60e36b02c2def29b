"""Heads: what takes the place of a pretrained network's classifier.

A head is a function ``(features, classes, *, ...) -> nn.Module``. The module takes pooled features [N, features] and
returns logits [N, classes]. A head that does the pooling itself says by an attribute of the function what it takes::

    def my_head(features: int, classes: int, *, hidden: int = 512) -> nn.Module: ...

    my_head.takes = "map"       # the last feature map [N, features, H, W]
    my_head.takes = "tokens"    # the last tokens [N, L, features], or such a map as tokens [N, H*W, features]

A configuration names one of these, an entry point of the group ``tlx.head``, or ``package.module:function``.

**Names.** `linear` is the network's own kind of classifier and keeps its name; the rest of a classifier block of
several layers (VGG, AlexNet, MobileNetV3) stays in front of it. The parameters of any other head are under ``head.``,
or, where the network has a `head` of its own, under ``head.new.`` (``new_head.`` if that is a Sequential).

**Several classifiers.** Some networks put together what several classifiers say: distilled DeiT and LeViT average two,
VOLO adds half of a second one's. `linear` renews each of them, and the network goes on putting them together, in
training as in evaluation. Any other head takes the place of them all: it sees their inputs, put together in the same
way. Where those differ in width (CrossViT, EfficientViM) that is an error. Auxiliary classifiers (GoogLeNet,
Inception) are not the head: they stay linear, new ones, under every head, and train with the layer they hang on.

**Values.** Heads draw from torch's global generator, so ``torch.manual_seed`` fixes them. Unless said otherwise a
linear layer starts as PyTorch starts it: weights and biases uniform within 1 / sqrt(inputs).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from tlx.base.errors import UserError
from tlx.models import ClassVectors

if TYPE_CHECKING:
    from torch.nn import Module
else:
    Module = Any  # annotations are read when arguments are checked, which needs no torch

__all__ = ["attention_pool", "concat_pool", "cosine", "features", "linear", "mlp", "prototype", "semantic"]

Share = Annotated[float, Field(ge=0, lt=1)]
Width = Annotated[int, Field(ge=1)]
Factor = Annotated[float, Field(gt=0)]
Activation = Literal["relu", "gelu", "silu", "tanh", "leaky_relu", "elu"]
Takes = Literal["pooled", "map", "tokens"]


def linear(features: int, classes: int, *, dropout: Share | None = None) -> Module:
    """One linear layer, under the old classifier's name.

    Starts uniform within 1 / sqrt(features), on networks of every library.

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

    With ``hidden: [256], dropout: 0.4`` it is Linear-ReLU-Dropout-Linear. Linear layers start as PyTorch's, norms at 1
    and 0.

    Args:
        dropout: share of every hidden layer's values that is dropped after its activation.
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
    a network whose classifier has layers of its own (VGG) loses them. Dropout and first values are those of `mlp`.
    """
    from torch import nn

    from tlx.models.head_modules import ConcatPool

    stack = mlp(2 * features, classes, hidden=hidden, dropout=dropout, activation=activation, norm=norm)
    return nn.Sequential(ConcatPool(), *stack.children())


concat_pool.takes = "map"  # type: ignore[attr-defined]


def attention_pool(
    features: int,
    classes: int,
    *,
    heads: Width | None = None,
    norm: bool = True,
    mlp_ratio: Factor = 4.0,
    dropout: Share = 0.0,
) -> Module:
    """A learned query attends over the last tokens; what it finds goes through a residual MLP and a linear layer.

    timm's ``AttentionPoolLatent``: pooling by multi-head attention (Lee et al. 2019, Set Transformer), as the MAP head
    of Zhai et al. 2022 (Scaling Vision Transformers) and of SigLIP. All tokens take part, class, distillation and
    register tokens too, after the network's final norm. A norm, a pooling or a classifier block that the network
    applies to the pooled vector falls away. A map counts as tokens, one per position, so convolutional networks can
    have it.

    The query starts as a truncated normal of standard deviation 1 / sqrt(features), linear layers as PyTorch's, norms
    at 1 and 0. In all about (4 + 2 * mlp_ratio) * features^2 parameters.

    Args:
        heads: of the attention, a divisor of `features`; left out it is one per 64 features, as vision transformers
            have, or the next lower divisor.
        norm: layer norm of the tokens first; for networks that give them without one (maps, and transformers that pool
            before their final norm).
        mlp_ratio: width of the MLP's hidden layer, as a multiple of `features`.
        dropout: share of the pooled features dropped before the linear layer.

    Raises:
        UserError: `heads` does not divide `features`.
    """
    from timm.layers import AttentionPoolLatent
    from torch import nn

    divisors = [n for n in range(1, features + 1) if features % n == 0]
    if heads is not None and heads not in divisors:
        raise UserError(
            f"attention_pool cannot share {features} features among {heads} heads",
            where="head.heads",
            todo=f"one of {', '.join(str(n) for n in divisors if n <= max(features // 16, 1))}, or leave it out",
        )
    chosen = heads or max(n for n in divisors if n <= max(features // 64, 1))
    pool = AttentionPoolLatent(features, num_heads=chosen, mlp_ratio=mlp_ratio, norm_layer=nn.LayerNorm)
    first = nn.LayerNorm(features) if norm else nn.Identity()
    return nn.Sequential(first, pool, nn.Dropout(dropout), nn.Linear(features, classes))


attention_pool.takes = "tokens"  # type: ignore[attr-defined]


def cosine(
    features: int,
    classes: int,
    *,
    scale: Factor = 10.0,
    learn_scale: bool = True,
    dropout: Share = 0.0,
) -> Module:
    """`scale` times the cosine between the features and a vector per class: directions count, lengths do not.

    After Gidaris and Komodakis 2018 (Dynamic few-shot visual learning without forgetting), who learn the scale, from 10
    on; Chen et al. 2019 (A closer look at few-shot classification) keep it fixed. The vectors start uniform within
    1 / sqrt(features); there is no bias.

    Args:
        scale: at the start; logits lie between -scale and scale.
        learn_scale: whether it is a parameter (of kind ``scale``, so without weight decay by default).
        dropout: share of features dropped before it.
    """
    from torch import nn

    from tlx.models.head_modules import Cosine

    head = Cosine(features, classes, scale=scale, learn_scale=learn_scale)
    return nn.Sequential(nn.Dropout(dropout), head) if dropout else head


def features(features: int, classes: int, *, scale: Factor = 1.0) -> Module:
    """The backbone's features as they are, times one learned number: for tasks that compare pictures with each other.

    Their distances decide how sure a softmax over them is. Oreshkin et al. 2018 (TADAM, arXiv:1805.10123) learn such a
    factor of the distances, of which this is the root. A phase that trains the head alone trains no more than that:
    ``unfreeze: all``, or an explicit one, is what such a task wants.

    Args:
        scale: at the start; 1 / sqrt(features) makes squared distances means over features. It is a parameter (of kind
            ``scale``, so without weight decay by default).

    Raises:
        UserError: another number of outputs is asked for than there are features.
    """
    if features != classes:
        what = f"head features gives the backbone's {features} features, and the task asks for {classes} outputs"
        todo = f"task.width={features}; or, of a task that has classes, head: linear"
        raise UserError(what, where="head", todo=todo)

    from tlx.models.head_modules import Features

    return Features(scale)


def prototype(features: int, classes: int, *, scale: Factor = 1.0, dropout: Share = 0.0) -> Module:
    """Minus `scale` times the squared distance between the features and a prototype of each class.

    Snell et al. 2017 (Prototypical networks for few-shot learning): before the first step a prototype is the mean of
    its class's features, over the training pictures (`data.sampling.limit` of each), which must be stored (`cache`); a
    class without pictures keeps random numbers. Then prototypes train as other weights do.

    Args:
        scale: fixed; smaller where features are long, so that the softmax begins less sure.
        dropout: share of features dropped before it.
    """
    from torch import nn

    from tlx.models.head_modules import Prototypes

    head = Prototypes(features, classes, scale=scale)
    return nn.Sequential(nn.Dropout(dropout), head) if dropout else head


prototype.starts = "means"  # type: ignore[attr-defined]


def semantic(
    features: int,
    classes: int,
    vectors: ClassVectors,
    *,
    similarity: Literal["cosine", "dot"] = "cosine",
    scale: Factor | None = None,
    learn_scale: bool | None = None,
    learn_vectors: bool = False,
    bias: bool = False,
    dropout: Share = 0.0,
) -> Module:
    """Features are mapped, by a linear layer, to where the vectors of the classes are; logits are `scale` times the
    similarity to each. For the task `semantic`, which has the vectors; they stand in the file of weights.

    DeViSE (Frome et al. 2013) is `dot` with the task's `loss: hinge`; the closed form of ESZSL (Romera-Paredes and Torr
    2015) is ``init: solved``; a CLIP tower's projection stays with ``init: projection``, and cosines with vectors of
    prompts are CLIP's own logits (Radford et al. 2021).

    Args:
        similarity: cosine, or the product of the mapped features and the vector.
        scale: at the start; by default what the text encoder has learned (CLIP), else 10 of cosines and 1 of products.
        learn_scale: whether it is a parameter; by default of cosines.
        learn_vectors: the vectors train, too: a linear head that prompts have begun, for fine-tuning. Those of unseen
            classes then stay where they are only as far as no gradient reaches them.
        bias: of the map.
        dropout: share of features dropped before it.
    """
    from torch import nn

    from tlx.models.head_modules import Semantic

    is_cosine = similarity == "cosine"
    begun = scale or vectors.scale or (10.0 if is_cosine else 1.0)
    learned = is_cosine if learn_scale is None else learn_scale
    head = Semantic(features, vectors.values, is_cosine, begun, learned, learn_vectors, bias)
    return nn.Sequential(nn.Dropout(dropout), head) if dropout else head


semantic.starts = "vectors"  # type: ignore[attr-defined]
