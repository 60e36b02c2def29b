"""What normalisation layers do in a phase: statistics and affine parameters, in frozen and in trained layers.

The policy speaks of the backbone. The head is new: its norms learn and their statistics move whenever it trains.
LayerNorm, GroupNorm, RMSNorm, FilterResponseNorm ... keep no statistics; only `affine` concerns them.

`fixed` statistics stay bit-equal and are what the norm uses; `moving` ones follow the batches, which the norm then uses
itself. That holds for BatchNorm in every variant, synchronised ones too, for InstanceNorm where it tracks statistics,
and for the variance of EvoNorm-B0. A BatchNorm without running statistics has none to fix: it always uses its batch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class NormState:
    statistics: Literal["fixed", "moving"]
    affine: Literal["frozen", "trained"]


@dataclass(frozen=True)
class NormPolicy:
    """`frozen` holds in layers that are frozen as a whole, `trained` in those where something trains."""

    frozen: NormState
    trained: NormState


_FIXED = NormState("fixed", "frozen")
_LEARN = NormState("moving", "trained")

POLICIES: dict[str, NormPolicy] = {
    # Frozen means frozen. Rows 2 and 6 of the clothing article, and the safe default.
    "frozen_is_frozen": NormPolicy(frozen=_FIXED, trained=_LEARN),
    # Its row 1: what `requires_grad = False` and then `model.train()` does.
    "statistics_move": NormPolicy(frozen=NormState("moving", "frozen"), trained=_LEARN),
    # Its rows 3 and 4: norms learn everywhere, in frozen layers too.
    "norms_train": NormPolicy(frozen=_LEARN, trained=_LEARN),
    # Its row 5: the rest of the body trains, norms stay as they were pretrained.
    "norms_fixed": NormPolicy(frozen=_FIXED, trained=_FIXED),
    # Weights of norms learn, pretrained statistics stay: the usual choice for small batches.
    "statistics_fixed": NormPolicy(frozen=_FIXED, trained=NormState("fixed", "trained")),
}


def written_out(policy: Any) -> Any:
    """The mapping that a policy's name stands for, as plain data; anything else as it is."""
    return asdict(POLICIES[policy]) if isinstance(policy, str) and policy in POLICIES else policy
