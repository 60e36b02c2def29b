"""Pixels as a network was trained on them."""

from __future__ import annotations

import torch

from tlx.base.inputs import InputSpec


class Normalise:
    """uint8 pixels [N, channels, H, W] on a device to the float32 that the backbone was trained on."""

    def __init__(self, spec: InputSpec, device: torch.device, *, channels_last: bool) -> None:
        shape = (1, len(spec.mean), 1, 1)
        self.scale = (1 / (255 * torch.tensor(spec.std, device=device))).view(shape)
        self.shift = (torch.tensor(spec.mean, device=device) / torch.tensor(spec.std, device=device)).view(shape)
        self.layout = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, images: torch.Tensor, full: int | None = None) -> torch.Tensor:
        """
        Args:
            full: pictures of a full batch: those that are missing are of zeros. What a kernel adds up in which order
                depends on the size of the batch, and so would a picture's logits.
        """
        count = len(images)
        out = torch.empty((full or count, *images.shape[1:]), device=images.device, memory_format=self.layout)
        torch.mul(images, self.scale, out=out[:count]).sub_(self.shift)
        out[count:] = 0
        return out


class NormaliseViews:
    """The same of several pictures of each sample, one below the other: [N, channels, count * H, W] to float32
    [N, count, channels, H, W]."""

    def __init__(self, normalise: Normalise, count: int) -> None:
        self.normalise, self.count = normalise, count

    def __call__(self, images: torch.Tensor, full: int | None = None) -> torch.Tensor:
        below = self.normalise(images, full)
        count, channels, height, width = below.shape
        return below.reshape(count, channels, self.count, height // self.count, width).transpose(1, 2)
