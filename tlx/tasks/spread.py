"""Whether vectors tell pictures apart: two numbers that fall when a network gives all of them nearly the same."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

MOST = 2048
"""Vectors that are looked at, at most: enough for an average, few enough for an eigenvalue decomposition."""

COLLAPSED = 0.05


def spread(rows: Tensor) -> float:
    """The standard deviation of a component of vectors of length 1, as a multiple of what it is where they point
    everywhere alike, 1 / sqrt(width): 1 there, and 0 where all are the same (Chen and He 2021, arXiv:2011.10566).

    Args:
        rows: [n, width].
    """
    unit = normalize(rows.double(), dim=1)
    return float(unit.std(0, correction=0).mean()) * math.sqrt(rows.shape[1])


def effective_rank(rows: Tensor) -> float:
    """exp of the entropy of singular values as shares of their sum: how many directions vectors use (RankMe, Garrido et
    al. 2023, arXiv:2210.02885), from 1 on; vectors that are all 0 have the rank 0.

    Args:
        rows: [n, width].
    """
    few = rows[:MOST].double()
    square = few @ few.T if len(few) < few.shape[1] else few.T @ few
    values = torch.linalg.eigvalsh(square).clamp(min=0).sqrt()
    if not bool(values.sum()):
        return 0.0
    share = values / values.sum()
    return float(torch.exp(torch.special.entr(share).sum()))


def collapse(spread: float, rank: float, what: str) -> str | None:
    """A sentence that says so, where vectors hardly differ.

    Args:
        what: the vectors, in words.
    """
    if not spread < COLLAPSED:
        return None
    return (
        f"{what} are nearly the same for all pictures (spread {spread:.2g}, where 1 is the most; effective rank "
        f"{rank:.3g}): the training has collapsed. A loss without what keeps pictures apart, a rate that is "
        "too high or a batch that is too small are the usual causes"
    )
