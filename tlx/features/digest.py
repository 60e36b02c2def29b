"""What a network's weights are, in one word."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import nn


def weights_digest(net: nn.Module, names: Iterable[str]) -> str:
    """A hash of these parameters and buffers."""
    found, tensors = hashlib.sha256(), {**dict(net.named_parameters()), **dict(net.named_buffers())}
    for name in names:
        tensor = tensors.get(name)
        if tensor is None:  # a second name of one that counts already
            continue
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
