"""The learning-rate range test (Smith 2017, Cyclical learning rates for training neural networks): the ramp, when it
ends, and what its curve suggests. Pure numbers; :mod:`tlx.train.lr_find` makes the steps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

BETA = 0.98
"""Of the moving average of losses, as in fastai and Lightning."""
DIVERGED = 4.0
"""The smoothed loss ends the ramp at so many times its minimum, as in fastai and Lightning."""
RULES = ("valley", "steepest", "minimum/10")
_FEWEST = 8  # points of which a curve may be told


@dataclass(frozen=True)
class Ramp:
    """Rates from `low` to `high`, each the same multiple of the one before."""

    low: float = 1e-7
    high: float = 10.0
    steps: int = 100

    def rate(self, at: int) -> float:
        """Of a step, from 0 on."""
        return float(self.low * (self.high / self.low) ** (at / max(self.steps - 1, 1)))


@dataclass
class Curve:
    """Losses at rising rates.

    Attributes:
        losses: of each step's batch, before its update.
        smoothed: their moving average, not biased to 0.
        ended: why it ends: the ramp does, or the loss `diverged`, or was `not finite`, which is in none of the lists.
    """

    rates: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    smoothed: list[float] = field(default_factory=list)
    ended: str = "end of the ramp"
    _average: float = 0.0

    def add(self, rate: float, loss: float) -> bool:
        """Takes in a step; whether the ramp is over."""
        if not math.isfinite(loss):
            self.ended = "not finite"
            return True
        self._average = BETA * self._average + (1 - BETA) * loss
        self.rates.append(rate)
        self.losses.append(loss)
        self.smoothed.append(self._average / (1 - BETA ** len(self.losses)))
        if len(self.losses) > 1 and self.smoothed[-1] > DIVERGED * min(self.smoothed):
            self.ended = "diverged"
            return True
        return False

    @property
    def last(self) -> float | None:
        """The rate that it came to."""
        return self.rates[-1] if self.rates else None

    def suggestions(self) -> dict[str, float | None]:
        """A rate by each of :data:`RULES`; None where the curve has no such point.

        As fastai does, the first tenth and the last five points do not count.
        """
        first, stop = len(self.rates) // 10, max(len(self.rates) - 5, 0)
        rates, losses = self.rates[first:stop], self.smoothed[first:stop]
        rules: Mapping[str, Callable[[Sequence[float]], int | None]] = {"valley": valley, "steepest": steepest}
        enough = len(rates) >= _FEWEST
        places = {name: rule(losses) if enough else None for name, rule in rules.items()}
        found = {name: None if place is None else rates[place] for name, place in places.items()}
        lowest = losses.index(min(losses)) if enough else 0
        return found | {"minimum/10": rates[lowest] / 10 if lowest else None}


def valley(losses: Sequence[float]) -> int | None:
    """Half of the way down the longest falling subsequence: fastai's default of this name, as its code has it.

    None where the losses do not fall.
    """
    length = [1] * len(losses)
    for i, loss in enumerate(losses):
        length[i] += max((length[j] for j in range(i) if loss < losses[j]), default=0)
    longest = max(length)
    if longest < 3:
        return None
    end = length.index(longest)
    third = longest / 3
    return max(end - longest + int(third) + int(third / 2), 0)


def steepest(losses: Sequence[float]) -> int | None:
    """Where the loss falls fastest over the logarithm of the rate: fastai's `steep`, Lightning's suggestion.

    None where it does not fall.
    """
    slopes = [(after - before) / 2 for before, after in zip(losses, losses[2:], strict=False)]
    best = min(range(len(slopes)), key=slopes.__getitem__)
    return best + 1 if slopes[best] < 0 else None


@dataclass(frozen=True)
class Suggestion:
    """A rate by one rule, of several seeds.

    Attributes:
        rates: by seed; None where a curve has no such point.
    """

    rates: Mapping[int, float | None]

    @property
    def known(self) -> list[float]:
        return [rate for rate in self.rates.values() if rate is not None]

    @property
    def rate(self) -> float | None:
        """The median, of logarithms, in two digits."""
        logs = [math.log(rate) for rate in self.known]
        return float(f"{math.exp(statistics.median(logs)):.1e}") if logs else None

    @property
    def factor(self) -> float | None:
        """How many times the lowest the highest is."""
        return max(self.known) / min(self.known) if self.known else None

    def data(self) -> dict[str, Any]:
        return {"lr": self.rate, "factor": self.factor, "seeds": {str(s): rate for s, rate in self.rates.items()}}
