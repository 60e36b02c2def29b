"""What a phase takes of a rank's memory, as numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Memory:
    """Bytes that a rank needs in one phase.

    Attributes:
        weights: parameters and buffers; twice with a moving average.
        gradients: of what trains.
        optimizer: states of all that has trained so far.
        activations: of one micro-batch, with its images; None where the network does not run without values.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int | None

    @property
    def total(self) -> int | None:
        fixed = self.weights + self.gradients + self.optimizer
        return None if self.activations is None else fixed + self.activations
