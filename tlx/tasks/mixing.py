"""The sum of a loss over samples: mixed with those of partners, with auxiliary outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tlx.tasks import Truth


def summed(
    each: Callable[[Tensor, Tensor], Tensor], output: Any, truth: Truth, target: str, aux_weight: float
) -> Tensor:
    """The sum over samples, as :meth:`tlx.tasks.Task.loss` returns it.

    A mixed sample's loss is that by its own target and that by its partner's, in the shares of the mixture (Zhang et
    al. 2018, arXiv:1710.09412): for losses that are linear in the target it is the loss by the mixed target.

    Args:
        each: (outputs [m, k], target) -> losses [m] in float32, times what each sample weighs: 0 where it lacks the
            target.
        aux_weight: of auxiliary outputs.
    """
    main, *auxiliary = output if isinstance(output, tuple) else (output,)
    loss = _mixed(each, main, truth, target)
    for given in auxiliary:
        if given is not None:
            loss = loss + aux_weight * _mixed(each, given, truth, target)
    return loss


def _mixed(each: Callable[[Tensor, Tensor], Tensor], output: Tensor, truth: Truth, target: str) -> Tensor:
    own = each(output, truth.own[target])
    if truth.partner is None or truth.lam is None:
        return own.sum()
    return (truth.lam * own + (1 - truth.lam) * each(output, truth.partner[target])).sum()
