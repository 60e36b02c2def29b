"""The linear head that fits stored features best: multinomial logistic regression, by L-BFGS."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""Tried on a fifth that is held out: of half the squared norm of the weights, for features of deviation 1."""

_HELD_OUT = 5
_ITERATIONS = 200


def solved_head(
    features: Tensor,
    labels: Tensor,
    classes: int,
    groups: Tensor,
    penalties: Sequence[float] = PENALTIES,
    beat: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor, float]:
    """Weights and biases of a linear head, and the penalty that a held-out fifth has chosen.

    The start of LP-FT (Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features and Underperform
    Out-of-Distribution").

    Args:
        features: float [n, width].
        labels: int64 [n].
        groups: int64 [n], the pictures: views of one are held out together.
        beat: called in each iteration.

    Returns:
        float32 [classes, width], float32 [classes], the penalty.
    """
    mean, deviation = features.mean(0), features.std(0, unbiased=False).clamp(min=1e-6)
    scaled = (features - mean) / deviation
    held_out = groups % _HELD_OUT == 0
    best = penalties[0]
    if len(penalties) > 1 and bool(held_out.any()) and not bool(held_out.all()):
        losses = []
        for penalty in penalties:
            weight, bias = _fitted(scaled[~held_out], labels[~held_out], classes, penalty, beat)
            losses.append(float(cross_entropy(scaled[held_out] @ weight.T + bias, labels[held_out])))
        best = penalties[losses.index(min(losses))]
    weight, bias = _fitted(scaled, labels, classes, best, beat)
    weight = weight / deviation
    return weight, bias - weight @ mean, best


def _fitted(
    features: Tensor, labels: Tensor, classes: int, penalty: float, beat: Callable[[], None]
) -> tuple[Tensor, Tensor]:
    weight = torch.zeros(classes, features.shape[1], dtype=features.dtype, requires_grad=True)
    bias = torch.zeros(classes, dtype=features.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        beat()
        optimizer.zero_grad()
        value = cross_entropy(features @ weight.T + bias, labels) + penalty / 2 * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()
