"""How large one step was: the gradient's norm, and of each layer how far the weights moved for their size.

The ratio ||update|| / ||weights|| says more of a learning rate than the rate does: about 1e-3 is usual, far more is
unstable, far less learns nothing (A. Karpathy, "A Recipe for Training Neural Networks"; LARS, You et al. 2017). It is
measured, not computed from an optimizer's formula, so that it holds for any: the weights before a step are kept until
after it. Only steps that are logged are measured, and only by the rank that logs.
"""

from __future__ import annotations

import math

import torch
from torch.optim import Optimizer


class UpdateSize:
    """Of one step. Everything stays on the device until :meth:`row` is asked, when the step's counts have arrived."""

    def __init__(self) -> None:
        self._norm: torch.Tensor | None = None
        self._layers: dict[str, list[torch.Tensor]] = {}
        self._before: list[torch.Tensor] = []
        self._ratios: torch.Tensor | None = None

    @torch.no_grad()
    def before(self, optimizer: Optimizer, norm: torch.Tensor) -> None:
        """Keeps the weights that are about to move: those with a gradient. Where the device has no room for a copy of
        them, no ratio is told.

        Args:
            norm: of the gradient, a scalar on the device; before it is clipped.
        """
        self._norm = norm.detach().clone()
        for group in optimizer.param_groups:
            moving = [p.detach() for p in group["params"] if p.grad is not None and p.is_floating_point()]
            if moving:
                self._layers.setdefault(group["layer"], []).extend(moving)
        try:
            self._before = [torch.clone(p) for of in self._layers.values() for p in of]
        except torch.OutOfMemoryError:
            self._layers, self._before = {}, []

    @torch.no_grad()
    def after(self) -> None:
        """The optimizer has stepped."""
        after = [p for of in self._layers.values() for p in of]
        if not after:
            return
        old = torch.stack([n.double() for n in torch._foreach_norm(self._before)])
        torch._foreach_sub_(self._before, after)
        moved = torch.stack([n.double() for n in torch._foreach_norm(self._before)])
        self._before = []
        lengths = [len(of) for of in self._layers.values()]
        by_layer = zip(torch.split(moved, lengths), torch.split(old, lengths), strict=True)  # type: ignore[no-untyped-call]
        self._ratios = torch.stack([torch.linalg.vector_norm(m) / torch.linalg.vector_norm(o) for m, o in by_layer])

    def row(self) -> dict[str, float]:
        """``train/grad_norm`` and ``update_ratio/LAYER`` of the layers that train. Nothing of a step whose gradient
        was not finite, which moved nothing, and no ratio to weights that are all zero."""
        if self._norm is None or not math.isfinite(norm := self._norm.item()):
            return {}
        ratios = self._ratios.tolist() if self._ratios is not None else []
        told = {f"update_ratio/{layer}": ratio for layer, ratio in zip(self._layers, ratios, strict=False)}
        named = {"train/grad_norm": norm, **told}
        return {name: float(f"{value:.6g}") for name, value in named.items() if math.isfinite(value)}
