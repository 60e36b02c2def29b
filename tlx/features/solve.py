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
            weight, bias = fitted(scaled[~held_out], labels[~held_out], classes, penalty, beat)
            losses.append(float(cross_entropy(scaled[held_out] @ weight.T + bias, labels[held_out])))
        best = penalties[losses.index(min(losses))]
    weight, bias = fitted(scaled, labels, classes, best, beat)
    weight = weight / deviation
    return weight, bias - weight @ mean, best


def fitted(
    features: Tensor,
    labels: Tensor,
    classes: int,
    penalty: float,
    beat: Callable[[], None] = lambda: None,
    *,
    start: tuple[Tensor, Tensor] | None = None,
    iterations: int = _ITERATIONS,
) -> tuple[Tensor, Tensor]:
    """Weights [classes, width] and biases that minimise the mean cross-entropy, and `penalty` times half the squared
    norm of the weights.

    Args:
        start: weights and biases to begin with; by default 0.
    """
    weight, bias = start or (features.new_zeros(classes, features.shape[1]), features.new_zeros(classes))
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=iterations, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        beat()
        optimizer.zero_grad()
        value = cross_entropy(features @ weight.T + bias, labels) + penalty / 2 * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()
