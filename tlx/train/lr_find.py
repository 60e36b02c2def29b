"""`tlx lr-find`: a ramp of learning rates for phases of a plan, in the training's own steps, and nothing left behind.

A ramp is a curve like any other: the phase runs with it in place of its own, so that rates of layers keep their
ratios, batches are those of the global order, frozen layers' features come from the cache, and losses are summed over
ranks, all of which see the same numbers and stop at the same step. Earlier phases lead in: a new head is not tried with
random values in a phase that never sees them. The run folder is neither read nor written.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tlx.base.errors import UserError, did_you_mean
from tlx.base.terminal import remark
from tlx.plan.config import Config
from tlx.plan.plan import Phase
from tlx.ranks.rendezvous import join_ranks
from tlx.runs.run_folder import RunFolder
from tlx.runs.stop import StopRequest
from tlx.train.cached import PhaseInput, input_of
from tlx.train.command import compose
from tlx.train.loop import begin, steps_of
from tlx.train.lr_curve import RULES, Curve, Ramp, Suggestion
from tlx.train.run import Run
from tlx.train.solved import solve_head
from tlx.train.step import PhaseModel, prepare_phase, set_rates, share_unreadable

if TYPE_CHECKING:
    from tlx.data.stream.stream import Batch
    from tlx.ranks.collectives import World

LEAD_IN = 100
"""Steps of each earlier phase, where it has more."""


@dataclass(frozen=True)
class LrFindOptions:
    """What is looked for.

    Attributes:
        phase: by name; None: every phase.
        seeds: the configuration's, and those that follow it.
        lead_in: steps of each earlier phase, whose curve is compressed to them.
    """

    ramp: Ramp = Ramp()  # noqa: RUF009  # frozen
    phase: str | None = None
    seeds: int = 1
    lead_in: int = LEAD_IN


@dataclass(frozen=True)
class Found:
    """What a phase's ramps have given.

    Attributes:
        lr: of the phase, as configured.
        input: what its batches hold: pictures, or features at a cut.
        lead_in: steps of all earlier phases that came before.
        curves: by seed.
    """

    phase: str
    lr: float
    input: str
    lead_in: int
    curves: Mapping[int, Curve]

    def suggestion(self, rule: str) -> Suggestion:
        return Suggestion({seed: curve.suggestions()[rule] for seed, curve in self.curves.items()})

    def data(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "phase": self.phase,
            "lr": self.lr,
            "input": self.input,
            "lead_in": self.lead_in,
            "suggestions": {rule: self.suggestion(rule).data() for rule in RULES},
            "curves": {
                str(seed): {"rates": c.rates, "losses": c.losses, "smoothed": c.smoothed, "ended": c.ended}
                for seed, c in self.curves.items()
            },
        }


def lr_find(config: Config, options: LrFindOptions) -> list[Found] | None:
    """The curves of each phase that is wanted, in the order of the plan; None on all ranks but the first.

    Raises:
        UserError: no such phase, and whatever a training would raise before its first step.
    """
    world = join_ranks(config)
    try:
        of_seeds = [_of_seed(config, seed, options, world) for seed in _seeds(config, options)]
    finally:
        world.leave()
        world.close()
    if not world.main:
        return None
    merged: list[Found] = []
    for of_phase in zip(*of_seeds, strict=True):
        curves = {seed: curve for one in of_phase for seed, curve in one.curves.items()}
        merged.append(dataclasses.replace(of_phase[0], curves=curves))
    return merged


def _seeds(config: Config, options: LrFindOptions) -> range:
    return range(config.seed, config.seed + options.seeds)


def _of_seed(config: Config, seed: int, options: LrFindOptions, world: World) -> list[Found]:
    with tempfile.TemporaryDirectory(prefix="tlx-lr-find-") as place:  # of which compose takes the name alone
        data = config.data.model_copy(update={"verify": "lengths"})
        folder = RunFolder(Path(place) / "run")
        own = config.model_copy(update={"seed": seed, "run": folder.path, "data": data})
        stop = StopRequest(folder.path, launched=world.launched)
        stop.close()  # a signal ends it at once
        run = compose(own, world, folder, stop, silent=True, anew=True)
        wanted = _phases(run, options.phase)
        found, before = list[Found](), 0
        for phase in run.plan.phases[: 1 + max(map(run.plan.phases.index, wanted))]:
            run.progress.step = phase.start
            begin(run, phase)
            source = input_of(run, phase)
            if run.config.solves_head and not phase.start:
                solve_head(run, source)
            if phase in wanted:
                if world.main:
                    remark(f"{phase.name}, seed {seed}: {options.ramp.steps} steps ...")
                with _restored(run):
                    curve = _curve(run, phase, source, options.ramp)
                what = f"features ({source.cut})" if source.cut is not None else "pictures"
                found.append(Found(phase.name, phase.lr, what, before, {seed: curve}))
            if phase is not wanted[-1]:
                before += _lead_in(run, phase, source, options.lead_in)
        return found


def _phases(run: Run, name: str | None) -> list[Phase]:
    names = [phase.name for phase in run.plan.phases]
    if name is not None and name not in names:
        raise UserError(f'there is no phase "{name}"{did_you_mean(name, names)}', where="--phase")
    return [phase for phase in run.plan.phases if name in (None, phase.name)]


def _curve(run: Run, phase: Phase, source: PhaseInput, ramp: Ramp) -> Curve:
    """Of a ramp from a phase's first step on; the run is another one afterwards."""
    rising = dataclasses.replace(
        phase, stop=phase.start + ramp.steps, length=ramp.steps, lr=1.0, warmup=0, curve=_rates_of(ramp), before=()
    )
    curve = Curve()
    for step, loss in _losses(run, rising, source):
        if curve.add(ramp.rate(step - phase.start), loss):
            break
    return curve


def _rates_of(ramp: Ramp) -> Any:
    return lambda step, _steps: ramp.rate(step)


def _lead_in(run: Run, phase: Phase, source: PhaseInput, steps: int) -> int:
    """Trains a phase in so many steps, or in its own where these are fewer; how many that were."""
    count = min(steps, phase.stop - phase.start)
    warmup = min(round(phase.warmup * count / phase.length), max(count - 1, 0))
    shorter = dataclasses.replace(phase, stop=phase.start + count, length=count, warmup=warmup, before=())
    for _ in _losses(run, shorter if count < phase.length else phase, source):
        pass
    return count


def _losses(run: Run, phase: Phase, source: PhaseInput) -> Iterator[tuple[int, float]]:
    """Makes the steps of a phase: each step, and the mean loss of its global batch, the same on every rank; NaN where
    nothing was updated because it was not finite."""
    phase_model = prepare_phase(run.net, phase, run.plan, world=run.world, compiled=False, cut=source.cut)
    for step, batches in steps_of(source.stream, phase, phase.start, run.world.device):
        yield step, _step(run, phase, phase_model, step, batches)


def _step(run: Run, phase: Phase, phase_model: PhaseModel, step: int, batches: Iterable[Batch]) -> float:
    world = run.world
    set_rates(run.optimizer, phase, step)
    tally, bad, total = run.updater.update(phase_model, step, batches)
    counts = torch.cat([tally[:4], torch.full_like(tally[:1], float(len(bad)))])
    loss, _, _, nonfinite, unreadable = world.sum(counts).tolist()
    if unreadable:
        run.progress.bad.update({one.where: one.reason for one in bad})
        share_unreadable(run.progress.bad, run.quota, world)
    if nonfinite and world.scaler is None:  # with a scaler an overflow comes before it has found its scale
        return float("nan")
    return float(loss / total) if total else 0.0


@contextmanager
def _restored(run: Run) -> Iterator[None]:
    """Afterwards weights, buffers, the optimizer's state, its scaler and the moving average are what they were."""
    nets = [run.net] if run.ema is None else [run.net, run.ema.module]
    tensors = [t for net in nets for t in (*net.parameters(), *net.buffers()) if 0 not in t.stride()]
    before = [t.detach().clone() for t in tensors]
    optimizer = copy.deepcopy(run.optimizer.state_dict())
    scaler = run.world.scaler
    scale = copy.deepcopy(scaler.state_dict()) if scaler is not None else {}
    updates = run.ema.updates if run.ema is not None else 0
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
        run.optimizer.load_state_dict(optimizer)
        if scaler is not None:
            scaler.load_state_dict(scale)
        if run.ema is not None:
            run.ema.updates = updates


def overrides(found: Sequence[Found], rule: str) -> list[str]:
    """What to paste behind the configuration's name; nothing of a phase without a suggestion."""
    rates = {one.phase: one.suggestion(rule).rate for one in found}
    return [f"phases.{name}.lr={rate:g}" for name, rate in rates.items() if rate is not None]
