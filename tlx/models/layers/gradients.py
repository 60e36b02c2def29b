"""Which parameters of a network a loss can reach: one backward pass on shapes alone."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from tlx.data.stream.randomness import own_randomness
from tlx.models.layers.trace import BATCH, restoring_modes, without_storage


def idle_parameters(net: nn.Module, size: tuple[int, int], channels: int = 3) -> frozenset[str]:
    """Names of parameters that no gradient reaches, in training mode or in evaluation mode; `net` stays untouched.

    A network may define more than it runs. Under DDP one such parameter that is meant to train stops the second step.
    A layer that a network drops at random counts as reached, since evaluation mode runs it.

    Returns:
        Nothing where the network does not run on shapes alone (it decides by values).
    """
    state = without_storage(net)
    names = [name for name, _ in net.named_parameters()]
    weights = [state[name].requires_grad_() for name in names]
    images = torch.empty(BATCH, channels, *size, device="meta")
    idle = set(names)
    with restoring_modes(net), own_randomness() as seed:
        seed(0)
        for training in (True, False):
            net.train(training)
            try:
                with torch.enable_grad():
                    output = torch.func.functional_call(net, state, (images,), tie_weights=False)
                    losses = [t.sum() for t in tree_leaves(output) if isinstance(t, torch.Tensor) and t.requires_grad]
                    gradients = torch.autograd.grad(sum(losses), weights, allow_unused=True)  # type: ignore[arg-type]
            except Exception:  # whatever other people's code does with tensors that have no values
                return frozenset()
            idle -= {name for name, gradient in zip(names, gradients, strict=True) if gradient is not None}
            if not idle:
                break
    return frozenset(idle)
