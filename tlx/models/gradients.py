"""Which parameters of a network a loss can reach: one backward pass on shapes alone."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from tlx.models.trace import BATCH, restoring_modes, without_storage


def idle_parameters(net: nn.Module, size: tuple[int, int], channels: int = 3) -> frozenset[str]:
    """Names of parameters that no gradient reaches in training mode; `net` itself stays untouched.

    A network may define more than it runs. Under DDP one such parameter that is meant to train stops the second step.

    Returns:
        Nothing where the network does not run on shapes alone in training mode (it decides by values).
    """
    state = without_storage(net)
    weights = {name: state[name].requires_grad_() for name, _ in net.named_parameters()}
    images = torch.empty(BATCH, channels, *size, device="meta")
    with restoring_modes(net):
        net.train()
        try:
            with torch.enable_grad():
                output = torch.func.functional_call(net, state, (images,), tie_weights=False)
                losses = [t.sum() for t in tree_leaves(output) if isinstance(t, torch.Tensor) and t.requires_grad]
                reached = torch.autograd.grad(sum(losses), list(weights.values()), allow_unused=True)  # type: ignore[arg-type]
        except Exception:  # whatever other people's code does with tensors that have no values
            return frozenset()
    return frozenset(name for name, gradient in zip(weights, reached, strict=True) if gradient is None)
