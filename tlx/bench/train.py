"""`tlx bench train`: how long the training loop waits for pictures, and what it costs beside a bare PyTorch loop.

Three loops take turns over one network and optimizer: the loop on shards; the loop on batches that are on the device
already; and a bare loop on these, with no more than forward, loss, backward and an optimizer's step. All three start
from bytes on the device, so that normalisation is in each. Nothing is written to the run's folder.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tlx.base.errors import UserError, did_you_mean
from tlx.base.launcher import environment
from tlx.bench.clock import median_interval
from tlx.data.stream.stream import Batch
from tlx.data.stream.transfer import on_device
from tlx.plan.config import Config
from tlx.plan.plan import Phase
from tlx.ranks.rendezvous import join_ranks
from tlx.runs.run_folder import RunFolder
from tlx.tasks import Truth
from tlx.train import command as training
from tlx.train import components as parts
from tlx.train.data import open_sets
from tlx.train.loop import begin, train_step
from tlx.train.run import Run
from tlx.train.step import PhaseModel, by_step, prepare_phase

_ROUNDS = 6  # the fewest that give an interval
_ON_SHARDS = 3
_KEPT = 2  # steps whose batches are on the device already
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Report:
    """Seconds of a step, medians over rounds.

    Attributes:
        shards: the training loop on shards.
        resident: the same on batches that are on the device already.
        bare: a bare PyTorch loop on those.
        steps: of each loop that were measured.
        overheads: of each round, what the loop cost more than the bare one that ran after it, as a share of that.
    """

    shards: float
    resident: float
    bare: float
    steps: int
    batch: int
    phase: str
    device: str
    precision: str
    workers: int
    overheads: Sequence[float]
    notes: Sequence[str] = ()

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of the median of `overheads`."""
        return median_interval(self.overheads)

    @property
    def waiting(self) -> float:
        """The share of the time that goes into waiting for pictures, or, on a CPU, into making them."""
        return max(1 - self.resident / self.shards, 0.0)

    @property
    def overhead(self) -> float:
        """What the loop costs more than the bare one, as a share of the bare one."""
        return self.resident / self.bare - 1

    @property
    def data(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        said = asdict(self)
        seconds = {f"{name}_ms": 1e3 * said.pop(name) for name in ("shards", "resident", "bare")}
        rates = {f"{name}_images_per_s": self.batch / getattr(self, name) for name in ("shards", "resident", "bare")}
        return {
            **seconds, **rates, "waiting": self.waiting, "overhead": self.overhead, "interval": self.interval, **said,
            "verdict": verdict(self),
        }  # fmt: skip


def measure(config: Config, *, steps: int = 30, phase: str | None = None, rounds: int = _ROUNDS) -> Report:
    """
    Args:
        steps: of each loop.
        phase: by name; None is the last one, in which everything trains that ever will.
        rounds: that the loops take turns, each with its part of the steps, that on shards three times; at least 6.

    Raises:
        UserError: several processes, no such phase, and whatever a training would raise before its first step.
    """
    if environment().size > 1:
        raise UserError("tlx bench train measures one process", todo="start it without a launcher")
    if steps < max(rounds, _ROUNDS):
        raise UserError(f"--steps is at least {max(rounds, _ROUNDS)}")
    with tempfile.TemporaryDirectory(prefix="tlx-bench-") as folder:
        own, notes = alone(config, Path(folder) / "run")
        world = join_ranks(own)
        own.run.mkdir()
        run = training.compose(own, world, RunFolder(own.run), silent=True)
        run.stop.close()  # Ctrl-C ends a measurement at once
        try:
            run.journal.start(0, resumed=False)
            return _measure(run, _phase(run, phase), steps, notes, rounds)
        finally:
            run.journal.finish({})


def alone(config: Config, folder: Path) -> tuple[Config, list[str]]:
    """One rank's part of the training, without weights and trackers, in another folder."""
    from tlx.tasks import outputs_of

    sets, notes = open_sets(config), []
    outputs = outputs_of(parts.task_of(config, sets.samples))
    spec = config.input.over(parts.backbone_of(config, outputs, empty=True).input)
    as_loaded = ("size", "mean", "std", "crop_pct", "interpolation")  # of the weights, which are not loaded
    seen = config.input.model_copy(update={name: getattr(spec, name) for name in as_loaded})
    data = config.data
    if (ranks := config.world.size or 1) > 1:
        data = data.model_copy(update={"batch": -(-data.batch // ranks)})
        notes.append(f"the batch is one rank's part: {data.batch} of {config.data.batch}")
    changes = {
        "run": folder,
        "data": data,
        "input": seen,
        "track": config.track.model_copy(update={"trackers": []}),
        "world": config.world.model_copy(update={"size": None}),
    }
    return config.untrained().model_copy(update=changes), notes


def _phase(run: Run, name: str | None) -> Phase:
    if name is None:
        return run.plan.phases[-1]
    for phase in run.plan.phases:
        if phase.name == name:
            return phase
    names = [phase.name for phase in run.plan.phases]
    raise UserError(f'there is no phase "{name}"{did_you_mean(name, names)}', where="--phase")


def _measure(run: Run, phase: Phase, steps: int, notes: list[str], rounds: int) -> Report:
    run.progress.step = phase.start
    begin(run, phase)
    phase_model = prepare_phase(run.net, phase, run.plan, world=run.world, compiled=run.config.loop.compile)
    batches = endless(run, phase)
    resident = itertools.cycle(_kept(batches))
    autocast = _autocast(run)
    loops: dict[str, Callable[[], object]] = {
        "shards": lambda: train_step(run, phase, phase_model, *next(batches)),
        "resident": lambda: train_step(run, phase, phase_model, *next(resident)),
        "bare": lambda: _bare(run, phase_model, next(resident)[1], autocast),
    }
    # batches that were made while the other loops ran are no measure of the loader
    ready = 2 * run.config.data.workers + 3
    warm = {"shards": ready, "resident": 2, "bare": 2}
    turns = {"shards": _ON_SHARDS, "resident": rounds, "bare": rounds}
    found: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(rounds):
        for name, loop in loops.items():
            if number >= turns[name]:
                continue
            each = -(-steps // turns[name])
            for _ in range(warm[name] + (3 if number == 0 else 0)):
                loop()
            settle(run)
            began = time.perf_counter()
            for _ in range(each):
                loop()
            settle(run)
            found[name].append((time.perf_counter() - began) / each)
    if run.ema is not None or run.config.loop.clip is not None:
        notes.append("the bare loop has no moving average and clips no gradients")
    if not run.world.cuda and run.config.data.workers:
        notes.append("on a CPU the workers take time from the training, which counts as waiting")
    middle = {name: statistics.median(seconds) for name, seconds in found.items()}
    return Report(
        **middle,
        steps=-(-steps // rounds) * rounds,
        batch=run.stream.batch,
        phase=phase.name,
        device=torch.cuda.get_device_name(run.world.device) if run.world.cuda else "CPU",
        precision=run.config.loop.precision,
        workers=run.config.data.workers,
        notes=tuple(notes),
        overheads=tuple(ours / bare - 1 for ours, bare in zip(found["resident"], found["bare"], strict=True)),
    )


def endless(run: Run, phase: Phase) -> Iterator[tuple[int, Iterator[Batch]]]:
    """Steps of the phase, from its start again at its end."""
    while True:
        yield from by_step(on_device(run.stream.batches(phase.start, phase.stop), run.world.device))


def _kept(steps: Iterator[tuple[int, Iterator[Batch]]]) -> list[tuple[int, Iterable[Batch]]]:
    """A few whole steps in memory of their own on the device."""
    return [
        (step, [batch.map(torch.Tensor.clone) for batch in micros]) for step, micros in itertools.islice(steps, _KEPT)
    ]


def _bare(
    run: Run, phase_model: PhaseModel, micros: Iterable[Batch], autocast: Callable[[], AbstractContextManager[Any]]
) -> None:
    """What a loop cannot do without."""
    scaler = run.world.scaler
    run.optimizer.zero_grad(set_to_none=True)
    for batch in micros:
        with autocast():
            images = run.normalise(batch.images)
            output = phase_model.forward(batch.mix.apply(images) if batch.mix else images)
            loss = run.task.loss(output, Truth.of(batch)) / (batch.total or 1.0)
        torch.autograd.backward(loss if scaler is None else scaler.scale(loss))
    if scaler is None:
        run.optimizer.step()
    else:
        scaler.step(run.optimizer)
        scaler.update()


def _autocast(run: Run) -> Callable[[], AbstractContextManager[Any]]:
    dtype = _DTYPES.get(run.config.loop.precision)
    if dtype is None:
        return nullcontext
    return lambda: torch.autocast(run.world.device.type, dtype)


def settle(run: Run) -> None:
    if run.world.cuda:
        torch.cuda.synchronize(run.world.device)


def verdict(report: Report) -> str:
    """One sentence."""
    if report.waiting > 0.05:
        fed = (
            f"the loop waits for pictures {report.waiting:.0%} of the time: raise data.workers (now {report.workers}), "
            "and see tlx bench data"
        )
    else:
        fed = f"pictures keep up with the training ({report.waiting:.0%} of the time is spent on them)"
    low, high = report.interval
    if low <= 0 <= high:
        return f"{fed}; the loop costs as much as a bare one, to within what rounds differ by"
    more = "more" if report.overhead > 0 else "less"
    return f"{fed}; the loop costs {abs(report.overhead):.0%} {more} than a bare one"
