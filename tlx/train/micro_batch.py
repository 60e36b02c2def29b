"""How many samples a rank takes at once: as many as was asked for, or as many as the memory of every phase allows.

The global batch stays what it is; gradients accumulate over more micro-batches. An evaluation batch that nobody has
said shrinks alike, which changes rounding only. What was found is kept in the run's
folder (``memory.json``) and holds as long as devices, ranks and what was asked for are the same.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tlx.base.errors import TlxError, UserError
from tlx.base.files import json_text
from tlx.plan.config import Config
from tlx.plan.plan import Plan
from tlx.ranks.collectives import World
from tlx.train.memory_trial import Attempt, Load, Stage, Trial, distinct

FILE = "memory.json"
_LESS = (
    "loop.precision=bf16, loop.gradient_checkpointing=true, a smaller input.size or backbone, or a GPU with more memory"
)


@dataclass(frozen=True)
class Share:
    """What a rank gets of a global batch.

    Attributes:
        samples: the most of one global batch.
        start: the most at once, as the configuration says.
        evaluation: of an evaluation batch; 0 without validation.
    """

    samples: int
    start: int
    evaluation: int

    @classmethod
    def of(cls, config: Config, plan: Plan, *, ranks: int) -> Share:
        samples = -(-min(plan.batch, plan.samples) // ranks)
        start = _largest(samples, min(samples, config.loop.micro_batch or samples))
        return cls(samples, start, config.evaluate.samples if config.data.val is not None else 0)

    def load(self, most: int, evaluation: int | None = None) -> Load:
        """The largest micro-batch where `most` samples may be taken at once."""
        return Load(_largest(self.samples, most), most < self.samples, evaluation or self.evaluation)


@dataclass(frozen=True)
class Refusal:
    """A number of samples, of a micro-batch or an evaluation batch, that there was no memory for."""

    samples: int
    phase: str
    stage: Stage


@dataclass(frozen=True)
class Found:
    """What trials have shown, the same on every rank.

    Attributes:
        asked: samples that a rank takes at once, as the configuration says.
        fits: the most that fit of `asked`, its half, the half of that ...; None where not even one does.
        peaks: bytes by phase with `fits` samples, the most of any rank; None where the device does not tell.
        refused: in the order in which they were tried.
        evaluation: where an evaluation batch as it is does not fit: its samples that do; 0 for none.
        fault: why trials were given up; `fits` is then what was asked, or None where that was refused before.
    """

    asked: int
    fits: int | None
    peaks: Mapping[str, int | None]
    refused: tuple[Refusal, ...] = ()
    evaluation: int | None = None
    fault: str | None = None


@dataclass(frozen=True)
class Choice:
    """`samples`: what to set loop.micro_batch to; None leaves it as it is. `said`: a line for people, or nothing.
    `record`: what was tried, for `memory.json` of the run's folder; None where nothing new was. `evaluation`: what to
    set evaluate.batch to, alike."""

    samples: int | None = None
    said: str | None = None
    record: str | None = None
    evaluation: int | None = None

    def over(self, config: Config) -> Config:
        update: dict[str, Any] = {}
        if self.samples is not None:
            update["loop"] = config.loop.model_copy(update={"micro_batch": self.samples})
        if self.evaluation is not None:
            update["evaluate"] = config.evaluate.model_copy(update={"batch": self.evaluation})
        return config.model_copy(update=update) if update else config


def largest_that_fits(start: int, fits: Callable[[int], bool]) -> int | None:
    """`start` samples, or a half (rounded up) as often as it takes; None where not even one fits."""
    count = start
    while not fits(count):
        if count == 1:
            return None
        count = -(-count // 2)
    return count


def choose(
    config: Config, plan: Plan, share: Share, trial: Callable[[], Trial], world: World, folder: Path | None
) -> Choice:
    """Finds the micro-batch of a training, or knows it from an earlier start of the run. The same on every rank.

    Args:
        trial: makes what tries a phase, if it comes to that.
        folder: of the run, where it goes on; None for a new one.

    Raises:
        UserError: it does not fit and may not shrink, or not even one sample fits.
    """
    policy = config.loop.fit_micro_batch
    if policy == "never" or (policy == "auto" and not world.cuda):
        return Choice()
    facts = facts_of(config, share, world)
    kept = world.from_main(recorded(folder, facts) if world.main and folder is not None else None)
    if kept is not None:
        of = "" if kept["evaluation"] is None else f", evaluation batches of {kept['evaluation']}"
        tried = f"as tried {kept['time']} ({FILE}): same devices, ranks, batch"
        said = f"memory: micro-batches of {kept['fits']}{of}, {tried}"
        return Choice(kept["fits"] if kept["fits"] < share.start else None, said, evaluation=kept["evaluation"])
    found = search(trial(), share, world)
    on = " and ".join(device_words(d) for d in facts["devices"])
    fits = decide(found, on=on, moving=plan.moving if policy == "auto" else (), may_halve=may_halve(config))
    kept_as = record_of(facts, found) if found.fault is None else None
    return Choice(fits if fits < share.start else None, report(found, share, on=on), kept_as, found.evaluation)


def may_halve(config: Config) -> bool:
    """Whether an evaluation batch may shrink: nobody has said how many samples it has."""
    return config.evaluate.batch is None


def search(trial: Trial, share: Share, world: World) -> Found:
    """Tries every phase with as many samples as asked for, then with fewer, on all ranks alike."""
    phases = distinct(trial.plan, trial.state)
    refused: list[Refusal] = []
    faults: list[str] = []
    peaks: dict[str, int | None] = {}
    evaluation: int | None = None

    def fits(most: int) -> bool:
        load = share.load(most, evaluation)
        tried: dict[str, Attempt] = {}
        for name, phase in {p.name: p for p in phases.values()}.items():
            trial.updater.world.watch.beat("trying memory")
            tried[name] = trial.attempt(phase, load)
            if tried[name].failed or tried[name].fault:
                break
        everywhere = world.gather(tried)
        faults.extend(
            f"{attempt.fault} (phase {name}, rank {rank})"
            for rank, own in enumerate(everywhere)
            for name, attempt in own.items()
            if attempt.fault
        )
        failed = [(name, a.failed) for own in everywhere for name, a in own.items() if a.failed]
        if failed and not faults:
            where, stage = failed[0]
            refused.append(Refusal(load.evaluation if stage == "evaluation" else most, where, stage))
            return False
        if not failed:
            for name, phase in phases.items():
                told = [own[phase.name].peak for own in everywhere if phase.name in own]
                peaks[name] = max((n for n in told if n is not None), default=None)
        return True

    def trains(most: int) -> bool:
        nonlocal evaluation
        while not fits(most):
            if refused[-1].stage == "training":
                return False
            evaluation = -(-refused[-1].samples // 2) if refused[-1].samples > 1 else 0
            if not evaluation:
                return True  # fewer in training would not help
        return True

    most = largest_that_fits(share.start, trains)
    if faults:
        known = share.start if all(r.stage == "evaluation" for r in refused) else None
        return Found(share.start, known, dict.fromkeys(phases), tuple(refused), evaluation, fault=faults[0])
    return Found(share.start, most, dict(peaks), tuple(refused), evaluation)


def decide(found: Found, *, on: str, moving: Sequence[str], may_halve: bool = False) -> int:
    """The micro-batch to train with.

    Args:
        on: the device, in words.
        moving: phases that forbid to shrink it, since their BatchNorm statistics would be others.
        may_halve: an evaluation batch may be smaller than it is.

    Raises:
        UserError: it does not fit and may not shrink, or nothing fits.
    """
    if found.fits is None:
        last = _of_training(found)[-1]
        what = (
            "not even one sample at once fits" if last.samples == 1 else f"micro-batches of {last.samples} do not fit"
        )
        fewer = f"; fewer could not be tried: {found.fault}" if found.fault else ""
        raise UserError(f"{what} the memory of {on} in phase {last.phase}{fewer}", where="loop.micro_batch", todo=_LESS)
    if found.evaluation == 0 or (found.evaluation is not None and not may_halve):
        todo = (
            f"evaluate.batch={found.evaluation}, which fits; numbers stay the same but for rounding"
            if found.evaluation
            else _LESS
        )
        raise UserError(f"an evaluation batch does not fit the memory of {on}", where="evaluate.batch", todo=todo)
    if found.fits < found.asked and moving:
        raise UserError(
            f"micro-batches of {found.asked} samples do not fit the memory of {on} in phase "
            f"{_of_training(found)[0].phase}; {found.fits} would. BatchNorm statistics move in {', '.join(moving)}, "
            "so results depend on that, and nothing is changed unasked",
            where="loop.micro_batch",
            todo=f"loop.micro_batch={found.fits} (or loop.fit_micro_batch=always), a norm policy that moves nothing "
            "(norms_fixed, statistics_fixed), more ranks, loop.precision=bf16 or loop.gradient_checkpointing=true",
        )
    return found.fits


def _of_training(found: Found) -> list[Refusal]:
    return [refusal for refusal in found.refused if refusal.stage == "training"]


def report(found: Found, share: Share, *, on: str) -> str:
    """What was tried, what was chosen and why, in a line."""
    if found.fault is not None:
        return f"memory: not tried: {found.fault}"
    peak = max((n for n in found.peaks.values() if n is not None), default=None)
    told = f", at most {gibibytes(peak)} of tensors" if peak is not None else ""
    phases = f"{len(found.peaks)} phase{'s' if len(found.peaks) != 1 else ''}"
    if not found.refused:
        return f"memory: {phases} tried on {on}: micro-batches of {found.asked} fit{told}"
    no = ", ".join(f"{r.samples} ({r.stage} in {r.phase})" for r in found.refused)
    refused = f"tried on {on}: no room for {no} samples at once"
    if found.fits is None:
        return f"memory: {refused}"
    said = f"memory: {phases} {refused}; micro-batches of {found.fits} fit{told}"
    if found.fits < found.asked:
        over = -(-share.samples // found.fits)
        said += f": gradients accumulate over {over}, the global batch stays the same"
    if found.evaluation:
        said += f"; evaluation batches of {found.evaluation} fit, with the same numbers but for rounding"
    return said


def facts_of(config: Config, share: Share, world: World) -> dict[str, Any]:
    """What a finding rests on, beside what a run cannot change. Every rank asks."""
    devices = Counter(world.gather(_device(world.device)))
    return {
        "devices": [{"name": n, "bytes": b, "ranks": count} for (n, b), count in sorted(devices.items())],
        "world": world.size,
        "batch": config.data.batch,
        "micro_batch": config.loop.micro_batch,
        "fit_micro_batch": config.loop.fit_micro_batch,
        "evaluate_batch": config.evaluate.batch,
        "start": share.start,
        "evaluation": share.evaluation,
        "torch": str(torch.__version__),
    }


def device_words(device: Mapping[str, Any]) -> str:
    return f"{device['name']} ({gibibytes(device['bytes'])})"


def record_of(facts: Mapping[str, Any], found: Found) -> str:
    """What :func:`recorded` reads."""
    content = {
        "facts": facts,
        "fits": found.fits,
        "evaluation": found.evaluation,
        "peaks": found.peaks,
        "refused": [{"samples": r.samples, "phase": r.phase, "stage": r.stage} for r in found.refused],
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    return json_text(content)


def recorded(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """What an earlier start has found under the same facts."""
    try:
        kept = json.loads((folder / FILE).read_text(encoding="utf-8"))
        fits, evaluation = kept["fits"], kept["evaluation"]
        same = kept["facts"] == facts and isinstance(fits, int) and 1 <= fits <= facts["start"]
        same = same and (evaluation is None or 1 <= int(evaluation) <= facts["evaluation"])
        return {"fits": fits, "evaluation": evaluation, "time": str(kept["time"])} if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def out_of_memory(config: Config, plan: Plan, world: World, step: int) -> TlxError:
    """What to tell when memory ran out in training after all. Of several ranks the one that has run out must end with a
    fault, so that the launcher ends the others, which wait for it; alone it is the user's to mend."""
    share = Share.of(config, plan, ranks=world.size)
    phase = plan.phase(min(step, plan.steps - 1))
    of = f"rank {world.rank} is out of memory" if world.size > 1 else "out of memory"
    half, evaluation = -(-share.start // 2), -(-share.evaluation // 2)
    ways = [f"loop.micro_batch={half}, with which this run goes on from its last checkpoint"] if share.start > 1 else []
    ways += [f"evaluate.batch={evaluation}, where it was evaluating"] if share.evaluation > 1 else []
    error = UserError(
        f"{of} at step {step}, in phase {phase.name}, with micro-batches of {share.start} samples",
        where=device_words(dict(zip(("name", "bytes"), _device(world.device), strict=True))),
        todo="; or ".join([*ways, f"a new run with {_LESS}"]),
    )
    return error if world.size == 1 else TlxError(str(error))


def _largest(samples: int, most: int) -> int:
    """The largest of the even parts that `samples` are dealt in, of at most `most` each."""
    parts = -(-samples // most)
    return -(-samples // parts)


def _device(device: torch.device) -> tuple[str, int]:
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        return about.name, about.total_memory
    import psutil

    return device.type, psutil.virtual_memory().total


def gibibytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
