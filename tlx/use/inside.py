"""Inside a trained network, for a report: what reaches its head; which places of a picture speak for what was told."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tlx.data.shards.manifest import Manifest
from tlx.data.stream.file_list import FileList
from tlx.runs.run_files import RunFiles, within
from tlx.use.load import load
from tlx.use.model import Model

_DEEPEST = 12
"""Layers that are asked for a map, from the last one down."""


@dataclass(frozen=True)
class Inside:
    """A run's best network and pictures to show it.

    Attributes:
        layers: names of the backbone's layers, from the input on; `head`: of the head.
    """

    model: Model
    source: Manifest | FileList
    layers: Sequence[str]
    head: str

    @staticmethod
    def of(run: Path, source: Manifest | FileList, *, device: str | None = None) -> Inside:
        """
        Raises:
            UserError: the run has no weights that can be loaded.
        """
        return Inside.around(run, load(run, device=device), source)

    @staticmethod
    def around(run: Path, model: Model, source: Manifest | FileList) -> Inside:
        """A network that is loaded already."""
        planned = within(RunFiles(run).plan, "layers")
        layers = [str(layer.get("name")) for layer in planned if layer.get("role") == "backbone"]
        head = next((str(layer.get("name")) for layer in planned if layer.get("role") == "head"), "")
        return Inside(model, source, layers, head)

    def features(self, ids: NDArray[np.int64], until: float) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """What reaches the head, float32 [n, features] (the mean over places of a map), and the ids of those n: as many
        as there was time for, of `time.monotonic` up to `until`, in batches that are spread over all."""
        head = self.model.module.get_submodule(self.head)
        found: list[Tensor] = []
        hooks = [module.register_forward_pre_hook(lambda _, given: found.append(given[0])) for module in head.modules()]
        seen: list[Tensor] = []
        kept: list[Tensor] = []
        batch = self.model.description.batch
        try:
            for part in _spread(ids, batch):
                there, pixels = self.model.forward.pixels(self.source, torch.from_numpy(part))
                if len(there):
                    found.clear()
                    self.model.forward.outputs(pixels)
                    seen.append(there)
                    kept.append(_flat(found[0])[: len(there)].float().cpu())
                if time.monotonic() > until:
                    break
        finally:
            for hook in hooks:
                hook.remove()
        if not kept:
            return np.zeros(0, np.int64), np.zeros((0, 1), np.float32)
        return torch.cat(seen).numpy(), torch.cat(kept).numpy()

    def maps(self, wanted: Sequence[tuple[int, int]], until: float) -> list[tuple[int, NDArray[np.uint8]]]:
        """For each (id, output) the picture with its map over it, uint8 [H, W, 3]: as many as there was time for.

        A map is gradient times activation of a late layer, summed over channels, where it is positive (HiResCAM,
        Draelos & Carin 2020, arXiv:2011.08891; captum's `LayerGradientXActivation`); of tokens those of patches. The
        layer is the last one whose output has places and a map that is not 0: behind the last block of a vision
        transformer only the class token counts.

        Raises:
            ImportError: captum is not installed.
        """
        from captum.attr import LayerGradientXActivation

        drawn: list[tuple[int, NDArray[np.uint8]]] = []
        layer: nn.Module | None = None
        for place, output in wanted:
            there, pixels = self.model.forward.pixels(self.source, torch.tensor([place]))
            if not len(there):
                continue
            images = self.model.forward.normalised(pixels)
            candidates = [layer] if layer is not None else self._candidates()
            for candidate in candidates:
                found = LayerGradientXActivation(_first_output(self.model.module), candidate).attribute(images, output)
                heat = _places(found if isinstance(found, Tensor) else found[0])
                if heat is not None and float(heat.max()) > 0:
                    layer = candidate
                    drawn.append((place, _over(pixels[0], heat)))
                    break
            if time.monotonic() > until:
                break
        return drawn

    def _candidates(self) -> list[nn.Module]:
        """Layers from the last one down."""
        modules = dict(self.model.module.named_modules())
        return [modules[name] for name in reversed(self.layers) if name in modules][:_DEEPEST]


def _spread(ids: NDArray[np.int64], batch: int) -> list[NDArray[np.int64]]:
    """Batches, each of which is spread over all."""
    count = max(-(-len(ids) // batch), 1)
    return [ids[at::count] for at in range(count)]


def _flat(features: Tensor) -> Tensor:
    """[n, features] of [n, features], of maps [n, channels, H, W] and of tokens [n, tokens, features]."""
    if features.ndim == 4:
        return features.mean((2, 3))
    return features.mean(1) if features.ndim == 3 else features.flatten(1)


def _first_output(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """A network of which auxiliary outputs are left out."""

    class Main(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, images: Tensor) -> Tensor:
            output = self.module(images)
            first: Tensor = output[0] if isinstance(output, tuple) else output
            return first

    return Main()


def _places(found: Tensor) -> Tensor | None:
    """float32 [h, w], where it is positive, of what one picture's layer gave; None of one without places."""
    found = found.detach().float().cpu()
    if found.ndim == 4:
        channels_last = found.shape[1] == found.shape[2] != found.shape[3]
        heat = found[0].sum(2 if channels_last else 0)
    elif found.ndim == 3:  # tokens: those of patches make a square, others stand before them
        side = int(found.shape[1] ** 0.5)
        heat = found[0, found.shape[1] - side * side :].sum(1).reshape(side, side)
    else:
        return None
    return heat.clamp(min=0) if min(heat.shape) > 1 else None


def _over(pixels: Tensor, heat: Tensor) -> NDArray[np.uint8]:
    """A picture, uint8 [channels, H, W], with a map over it: grey where nothing speaks for what was told."""
    import matplotlib

    size = (int(pixels.shape[1]), int(pixels.shape[2]))
    smooth = nn.functional.interpolate(heat[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    share = (smooth / smooth.max().clamp(min=1e-12)).numpy()
    grey = pixels[:3].float().mean(0).numpy()[..., None] / 255
    colours = matplotlib.colormaps["inferno"](share)[..., :3]
    weight = 0.75 * share[..., None]
    return np.asarray(((1 - weight) * grey + weight * colours) * 255, np.uint8)
