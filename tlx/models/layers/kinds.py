"""What a module or a parameter is: norms in every variant, tokens and tables, per-channel factors, biases."""

from __future__ import annotations

import re
from collections.abc import Collection
from fnmatch import fnmatchcase

from torch import nn

from tlx.base.layers import Kind

_TORCH_NORMS = (
    nn.modules.batchnorm._NormBase,  # BatchNorm1d-3d, SyncBatchNorm, InstanceNorm and what timm derives from them
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)
_EMBEDDING = re.compile(
    r"(pos|position|positional|rel_pos|spatial)_?(embed|emb|embedding|embeddings)?(_\w+)?$"
    r"|(\w*_)?(token|tokens|embed|embedding|embeddings)(_?\d+)?$"
    r"|\w*(relative_position_bias_table|attention_biases|attention_bias|rel_pos_[hw]|rel_height|rel_width)$"
    r"|(height|width)_rel$|latent|query_embed|q_learned|rope_\w+$"
)
_POSITIONS = re.compile(r"(^|\.)cpb_mlp\.")
"""Networks that compute a table of positions: Swin V2's (Liu et al. 2022), which its authors exempt from decay. timm
lists it so, torchvision has no list."""

_SCALE = re.compile(
    r"(layer_?scale|gamma|alpha|lambda|temperature|logit_scale|scale|gain|resscale|skipinit|ls)(_?\w+)?$"
)


def is_norm(module: nn.Module) -> bool:
    """Whether `module` normalises: torch's norms, and by name those of torchvision, timm and others.

    ``FrozenBatchNorm2d``, ``EvoNorm``, ``FilterResponseNorm``, ``RmsNorm``, ResMLP's ``Affine`` ... derive from nothing
    in common; they are leaves as far as parameters go and hold nothing but vectors. ``Conv2dNormActivation`` and the
    like are containers. What keeps running statistics is one under any name (``InplaceAbn``).
    """
    if isinstance(module, _TORCH_NORMS):
        return True
    named = any(word in type(module).__name__.lower() for word in ("norm", "affine")) or bool(_running(module))
    if not named or any(True for c in module.children() for _ in c.parameters()):
        return False
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    leaf = not any(True for _ in module.children())
    return (bool(own) or leaf) and all(sum(n > 1 for n in t.shape) <= 1 for t in own)


def moves(norm: nn.Module) -> bool:
    """Whether a norm updates running statistics of its batches in training mode.

    ``EvoNorm2dB0`` keeps a variance alone and has no switch for it. ``FrozenBatchNorm2d`` has statistics that never
    move: even its weight is a buffer.
    """
    tracks = getattr(norm, "track_running_stats", "weight" not in dict(norm.named_buffers(recurse=False)))
    return bool(_running(norm)) and bool(tracks)


def _running(module: nn.Module) -> list[str]:
    """Buffers of its own that are running statistics, by the name that all libraries give them."""
    return [name for name, _ in module.named_buffers(recurse=False) if name.startswith("running_")]


def kind(owner: nn.Module, name: str, listed: Collection[str]) -> Kind:
    """The kind of the parameter `name` (its full name), which is an attribute of `owner`.

    Args:
        listed: what the model itself exempts from weight decay (timm's ``no_weight_decay()``): names, ends of names, or
            shell patterns, as timm's optimizers read them. A matrix among them is an ``embedding``.
    """
    last = name.rpartition(".")[2]
    if is_norm(owner):
        return "norm"
    if isinstance(owner, nn.Embedding):
        return "embedding"
    vector = sum(n > 1 for n in getattr(owner, last).shape) <= 1
    if vector and _SCALE.match(last):
        return "scale"
    if _EMBEDDING.match(last):
        return "embedding"
    if last.endswith("bias") or last.startswith("bias_"):
        return "bias"
    if vector and "norm" in type(owner).__name__.lower():
        return "norm"
    if _POSITIONS.search(name) or any(fnmatchcase(name, w) or name.endswith(f".{w}") for w in listed):
        return "scale" if vector and not _is_weight(owner, last) else "embedding"
    return "scale" if vector and not _is_weight(owner, last) else "weight"


def _is_weight(owner: nn.Module, last: str) -> bool:
    """A vector can be a weight: a linear layer with one output, a 1x1 depthwise convolution."""
    return last == "weight" and isinstance(owner, nn.Linear | nn.modules.conv._ConvNd)
