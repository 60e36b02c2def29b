"""`tlx bench cache`: what phases would save on this machine that train from stored features.

Of each phase whose lower layers are frozen: a step from pictures, a step from features, and what features cost. The
evaluations, which save as much, are not counted. Nothing is written to the run's folder or the cache.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tlx.base.errors import UserError
from tlx.base.launcher import environment
from tlx.bench.train import alone, endless, settle
from tlx.data.stream.stream import Batch
from tlx.features.cut import Cut, features_of, find_cut
from tlx.plan.config import Config
from tlx.plan.plan import Phase
from tlx.ranks.rendezvous import join_ranks
from tlx.runs.run_folder import RunFolder
from tlx.train import command as training
from tlx.train.freeze import unfreeze
from tlx.train.loop import begin, train_step
from tlx.train.run import Run
from tlx.train.step import PhaseModel, prepare_phase

_WARM = 3
Step = tuple[int, Iterator[Batch]]


@dataclass(frozen=True)
class PhaseSavings:
    """Of one phase.

    Attributes:
        cut: where the network is cut; None where it cannot be, and the rest is 0.
        steps: of the phase.
        from_pictures, from_features: seconds of a step.
        features: seconds to compute those of one view of all pictures.
        views: that would be computed.
        bytes: that they would take.
    """

    phase: str
    cut: str | None
    steps: int = 0
    from_pictures: float = 0.0
    from_features: float = 0.0
    features: float = 0.0
    views: int = 1
    bytes: int = 0

    @property
    def before(self) -> float:
        """Seconds of the phase from pictures."""
        return self.steps * self.from_pictures

    @property
    def after(self) -> float:
        """Seconds of the phase from features, these included."""
        return self.views * self.features + self.steps * self.from_features

    @property
    def data(self) -> dict[str, Any]:
        return {**asdict(self), "before": self.before, "after": self.after}


def measure(config: Config, *, steps: int = 10) -> list[PhaseSavings]:
    """
    Args:
        steps: of each kind that are measured.

    Raises:
        UserError: several processes, and whatever a training would raise before its first step.
    """
    if environment().size > 1:
        raise UserError("tlx bench cache measures one process", todo="start it without a launcher")
    with tempfile.TemporaryDirectory(prefix="tlx-bench-") as folder:
        own, _ = alone(config, Path(folder) / "run")
        world = join_ranks(own)
        own.run.mkdir()
        run = training.compose(own, world, RunFolder(own.run), silent=True)
        run.stop.close()
        try:
            run.journal.start(0, resumed=False)
            first = next(iter(run.plan.layers)).name
            return [_of_phase(run, phase, steps) for phase in run.plan.phases if phase.trains[first] == "frozen"]
        finally:
            run.journal.finish({})


def _of_phase(run: Run, phase: Phase, steps: int) -> PhaseSavings:
    run.progress.step = phase.start
    begin(run, phase)
    unfreeze(run.net, phase, run.plan)
    height, width, channels = run.stream.loader.pictures.shape
    cut = find_cut(run.net, (channels, height, width), device=run.world.device, autocast=run.world.autocast)
    if cut is None:
        return PhaseSavings(phase.name, None)
    pictures = endless(run, phase)
    whole = prepare_phase(run.net, phase, run.plan, world=run.world, compiled=run.config.loop.compile)
    from_pictures = _seconds(run, steps, lambda: train_step(run, phase, whole, *next(pictures)))
    computing = _seconds(run, steps, lambda: [_features(run, cut, batch) for batch in next(pictures)[1]])
    step, micros = next(pictures)
    kept = [replace(batch, images=_features(run, cut, batch)) for batch in micros]
    rest = prepare_phase(run.net, phase, run.plan, world=run.world, compiled=False, cut=cut)
    return PhaseSavings(
        phase=phase.name,
        cut=str(cut),
        steps=phase.stop - phase.start,
        from_pictures=from_pictures,
        from_features=_seconds(run, steps, lambda: _again(run, phase, rest, step, kept)),
        features=computing / run.stream.batch * len(run.stream.manifest),
        views=run.config.cache.kept,
        bytes=run.config.cache.kept * len(run.stream.manifest) * cut.picture_bytes,
    )


def _features(run: Run, cut: Cut, batch: Batch) -> torch.Tensor:
    with run.world.autocast():
        return features_of(run.net, cut, run.normalise(batch.images))


def _again(run: Run, phase: Phase, rest: PhaseModel, step: int, kept: Sequence[Batch]) -> None:
    train_step(run, phase, rest, step, iter(kept))


def _seconds(run: Run, steps: int, once: Callable[[], object]) -> float:
    """Of one, after some to warm up."""
    for _ in range(_WARM):
        once()
    settle(run)
    began = time.perf_counter()
    for _ in itertools.repeat(None, steps):
        once()
    settle(run)
    return (time.perf_counter() - began) / steps


def text(found: Sequence[PhaseSavings]) -> str:
    """For people."""
    if not found:
        return "no phase has frozen layers below what trains: there is nothing to keep"
    lines = []
    for one in found:
        if one.cut is None:
            lines.append(f"{one.phase}: there is no place below which nothing trains and nothing is drawn")
            continue
        views = f"{one.views} view{'s' if one.views > 1 else ''} of each picture"
        lines += [
            f"{one.phase}: cut at the {one.cut}; {views}: {one.bytes / 1e6:,.1f} MB",
            f"  a step from pictures {1e3 * one.from_pictures:,.1f} ms, from features "
            f"{1e3 * one.from_features:,.1f} ms; a view of all pictures {one.features:,.1f} s",
            f"  {one.steps:,} steps: {one.before:,.1f} s from pictures, {one.after:,.1f} s from features "
            f"({one.before / one.after:.1f} times as fast), evaluations aside",
        ]
    return "\n".join(lines)
