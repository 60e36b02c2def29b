"""Tensors that a task holds."""

from __future__ import annotations

import torch
from torch import Tensor


class Constant:
    """A tensor that is copied to a device once: a copy in each step would wait for the device."""

    def __init__(self, tensor: Tensor) -> None:
        self._on = {tensor.device: tensor}
        self._first = tensor

    def on(self, device: torch.device) -> Tensor:
        if device not in self._on:
            self._on[device] = self._first.to(device)
        return self._on[device]
