"""Gradient checkpointing per block: activations are computed again in the backward pass (Chen et al. 2016)."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from tlx.models.layers.kinds import is_norm


def recompute_blocks(net: nn.Module, blocks: Sequence[str]) -> None:
    """Checkpoints these modules from now on, without reentrance and under unchanged parameter names.

    Norm statistics are updated once: in the second forward pass the norms use the batch but leave their buffers alone.
    """
    modules = dict(net.named_modules())
    for name in blocks:
        block = modules[name]
        again = functools.partial(_contexts, block)
        block.forward = functools.partial(_forward, block, block.forward, again)  # type: ignore[method-assign]


def _forward(block: nn.Module, forward, again, *args, **kwargs):  # type: ignore[no-untyped-def]
    if not block.training and not any(p.requires_grad for p in block.parameters()):
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=again, **kwargs)


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _statistics_untouched(block)


@contextmanager
def _statistics_untouched(block: nn.Module) -> Iterator[None]:
    """With no momentum a batch leaves no trace; without buffers the graph would be another one."""
    norms: list[Any] = [m for m in block.modules() if m.training and hasattr(m, "momentum") and is_norm(m)]
    momenta = [norm.momentum for norm in norms]
    counters = [b for norm in norms for b in norm.buffers(recurse=False) if not b.is_floating_point()]
    batches = [counter.clone() for counter in counters]
    for norm in norms:
        norm.momentum = 0.0
    try:  # left by an exception of torch's as soon as all that is needed is there again
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for counter, before in zip(counters, batches, strict=True):
            counter.copy_(before)
