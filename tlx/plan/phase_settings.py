"""What may be said of a phase."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    Field,
    PositiveInt,
)

from tlx.base.durations import Duration, Length
from tlx.base.errors import did_you_mean
from tlx.base.metrics import LOSS
from tlx.base.norms import POLICIES, NormPolicy, written_out
from tlx.plan.overrides import Short
from tlx.plan.parts import Direction, Model, Part, part_of


def _policy(value: str | NormPolicy) -> str | NormPolicy:
    if isinstance(value, str) and value not in POLICIES:
        raise ValueError(f'there is no norm policy "{value}"{did_you_mean(value, POLICIES)}')
    return value


class Plateau(Model):
    """The phase ends when a validation metric has stopped improving."""

    max: Length
    """The longest that the phase lasts; its curve runs over that."""
    metric: str = LOSS
    """The metric that is watched; whether higher is better follows from its name."""
    mode: Direction = Field(default=None, exclude=True)
    patience: PositiveInt = 3
    """The phase ends after this many evaluations without progress."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """A change of the metric counts as progress where it is larger than this."""


class EarlierRates(Model):
    """How a phase's learning rate ran until the run was extended: the settings of then."""

    duration: Length
    lr: Annotated[float, Field(gt=0)]
    curve: part_of("curve") = Part(name="constant")  # type: ignore[valid-type]
    warmup: Length = Duration(0, "steps")
    layer_decay: part_of("layer_decay") = Part(name="none")  # type: ignore[valid-type]


class PhaseSettings(Model):
    """What may be said of a phase. ``phases: {each: ...}`` says it of all, a phase's own name overrides it."""

    duration: Length | Plateau | None = None
    """How long it trains, or until a plateau. Percent is of the configuration's `duration`."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """The learning rate, of which `curve` and `layer_decay` make that of each layer at each step."""
    curve: part_of("curve") = Part(name="constant")  # type: ignore[valid-type]
    """The rate's course over the phase, as a factor of `lr`. Percent is of the phase."""
    warmup: Length = Duration(0, "steps")
    """The rate rises to its value for so long. Percent is of the phase."""
    layer_decay: part_of("layer_decay") = Part(name="none")  # type: ignore[valid-type]
    """The factor of each layer's rate, by its depth."""
    norm: Annotated[str | NormPolicy, Short(written_out), AfterValidator(_policy)] = "frozen_is_frozen"
    """What norm layers do in frozen and in trained layers: a policy's name, or written out."""
    stochastic: Literal["off_in_frozen", "on"] = "off_in_frozen"
    """Whether dropout and drop-path act in frozen layers."""
    optimizer_state: Literal["keep", "reset", "reset_thawed"] = "keep"
    """At the phase's first step the optimizer's state (momentum, moments) is kept, dropped (`reset`), or dropped for
    what was frozen in the phase before and trains now (`reset_thawed`)."""
    start_from: Literal["last", "best"] = "last"
    """The weights that the phase begins with: those of the step before, or the best so far."""
    before: dict[PositiveInt, EarlierRates] = {}
    """Until so many steps of the phase, its rates were these: `tlx train --extend --rest` writes it."""

    def over(self, base: PhaseSettings) -> PhaseSettings:
        """These settings where they were said, `base` elsewhere."""
        return base.model_copy(update={name: getattr(self, name) for name in self.model_fields_set})
