"""LogME: the evidence that a linear model has for labels, given features (You, Liu, Wang and Long 2021, "LogME:
Practical Assessment of Pre-trained Models for Transfer Learning", arXiv:2102.11005)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import one_hot

_ITERATIONS = 1000
_CLOSE = 1e-6  # of alpha / beta between two iterations


def logme(features: Tensor, labels: Tensor, classes: int) -> float:
    """The logarithm of the marginal likelihood of each class against the rest under Bayesian linear regression, its two
    precisions chosen to maximise it; the mean over classes that have pictures, and over pictures. Higher is better.

    Args:
        features: float [n, width], as they are.
        labels: int64 [n].
    """
    left, values, _ = torch.linalg.svd(features.double(), full_matrices=False)
    present = labels.unique()  # type: ignore[no-untyped-call]
    truth = one_hot(labels, classes)[:, present].double()
    along = (left.T @ truth).square()  # [rank, present]: of the labels, in directions of the features
    beside = (truth.square().sum(0) - along.sum(0)).clamp(min=0)
    of_class = _evidence(values.square()[:, None], along, beside, len(labels), features.shape[1])
    return float(of_class.mean() / len(labels))


def _evidence(squares: Tensor, along: Tensor, beside: Tensor, count: int, width: int) -> Tensor:
    """[classes], by the fixed point of the paper's equations."""
    ratio = torch.ones(along.shape[1], dtype=along.dtype)  # alpha / beta
    for _ in range(_ITERATIONS):
        norm = (squares * along / (ratio + squares).square()).sum(0)  # of the weights, squared
        residual = (along / (1 + squares / ratio).square()).sum(0) + beside
        used = (squares / (ratio + squares)).sum(0)
        alpha, beta = used / norm.clamp(min=1e-12), (count - used) / residual.clamp(min=1e-12)
        before, ratio = ratio, alpha / beta
        if bool(((ratio - before).abs() <= _CLOSE * before).all()):
            break
    norm = (squares * along / (ratio + squares).square()).sum(0)
    residual = (along / (1 + squares / ratio).square()).sum(0) + beside
    log_determinant = (alpha + beta * squares).log().sum(0) + (width - len(squares)) * alpha.log()
    return (
        width / 2 * alpha.log() + count / 2 * (beta.log() - math.log(2 * math.pi)) - log_determinant / 2
        - beta / 2 * residual - alpha / 2 * norm
    )  # fmt: skip
