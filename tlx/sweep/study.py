"""The trials of a sweep in Optuna's journal, a file that any number of workers on any number of machines append to.

Whoever asks for a trial holds the turn meanwhile, by a lock that NFS knows (a file made with O_EXCL): so that trials
are counted, none is given out twice, and what a sampler draws follows from the seed and the trials before alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlx.base.errors import UserError
from tlx.base.metrics import AVERAGED
from tlx.base.terminal import say
from tlx.runs.metrics_file import read_rows
from tlx.sweep import space as spaces
from tlx.sweep.ended import Ended, step_of
from tlx.sweep.grammar import Dimension, Range
from tlx.sweep.space import Point
from tlx.sweep.spec import LOGS, Spec
from tlx.sweep.trial_lock import TrialLock

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

    from tlx.runs.stop import Judge

JOURNAL = "journal.log"

MOST_STARTS = 3
"""A trial that was killed so often at one checkpoint is not started again."""

ENOUGH = 10
"""Of fewer trials nobody can tell which keys matter."""

_DRAWS = 20
_NAME = "sweep"


@dataclass(frozen=True)
class Taken:
    """A trial that this worker is to train.

    Attributes:
        before: seconds that earlier starts have taken.
        goes_on: whether another process has begun it.
    """

    number: int
    point: Point
    lock: TrialLock
    goes_on: bool = False
    before: float = 0.0


@dataclass(frozen=True)
class Trial:
    """A trial as the journal has it. `state`: running, or how it ended; `seconds`: NaN where nobody has told."""

    number: int
    point: Point
    values: Mapping[str, Any]
    state: str
    value: float
    seconds: float
    why: str = ""


class Study:
    """Opens the journal of a sweep, or begins it."""

    def __init__(self, spec: Spec) -> None:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        file = str((spec.folder / JOURNAL).absolute())
        self.spec = spec
        self.storage = JournalStorage(JournalFileBackend(file, lock_obj=JournalFileOpenLock(file)))
        self.study = optuna.create_study(
            storage=self.storage, study_name=_NAME, direction=spec.direction, load_if_exists=True,
            pruner=pruner_of(spec), sampler=optuna.samplers.RandomSampler(seed=spec.seed),
        )  # fmt: skip

    def take(self, trials: int) -> Taken | None:
        """The next trial: one whose processes are gone, else a new one; None where there is nothing left to begin.

        Args:
            trials: how many there may be in all.
        """
        with turn(self.spec.folder):
            return self._left() or self._new(trials)

    def tell(self, taken: Taken, end: Ended, seconds: float) -> None:
        """Writes down how a trial has ended; one that goes on is left to whoever comes next."""
        self.storage.set_trial_user_attr(self._id(taken.number), "seconds", round(taken.before + seconds, 1))
        if not end.goes_on:
            self._write(taken.number, end)
        taken.lock.release()

    def _write(self, number: int, end: Ended) -> None:
        from optuna.trial import TrialState

        key = self._id(number)
        self.storage.set_trial_user_attr(key, "ended", end.state)
        self.storage.set_trial_user_attr(key, "why", end.why)
        # to a sampler, what has diverged is worse than anything that was pruned; what failed tells it nothing
        state = {"done": TrialState.COMPLETE, "failed": TrialState.FAIL}.get(end.state, TrialState.PRUNED)
        self.study.tell(number, end.value if end.state == "done" else None, state=state, skip_if_finished=True)

    def judge(self, number: int) -> Judge:
        """Hears of the evaluations of a trial, and ends it where the pruner says so. A journal that cannot be written
        ends no training."""
        metric, key, warned = self.spec.metric, self._id(number), list[str]()
        metrics = self.spec.run_of(number) / "metrics.jsonl"

        def consider(step: int, value: float) -> str | None:
            at = sum(any(name in row for name in (metric, AVERAGED + metric)) for row in read_rows(metrics))
            try:
                self.storage.set_trial_intermediate_value(key, at, value)
                ends = self.study.pruner.prune(self.study, self.storage.get_trial(key))
            except (OSError, ValueError, RuntimeError) as error:
                if not warned:
                    warned.append(str(error))
                    say(
                        f"warning: the sweep's journal cannot be used ({error}); the trial goes on unpruned", error=True
                    )
                return None
            words = f"{metric} {value:.4g} at evaluation {at} (step {step})"
            return f"{words}: others did better by then ({self.spec.pruner})" if ends else None

        return consider

    def point(self, number: int) -> Point:
        """What a trial sets."""
        return spaces.point(self.spec.space, self.storage.get_trial(self._id(number)).params)

    def trials(self) -> list[Trial]:
        """All that there are, but for those that repeated another one's parameters, by number."""
        return [_read(self.spec, trial) for trial in self._counted()]

    def importance(self) -> dict[str, float]:
        """How much of the differences each key accounts for (PED-ANOVA, Watanabe et al. 2023), the largest first; empty
        where there are too few trials that are done, or they are all alike."""
        import optuna
        from optuna.trial import TrialState

        done = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        keys = [d.key for d in self.spec.space if len({trial.params.get(d.key) for trial in done}) > 1]
        if len(done) < max(ENOUGH, 3 * len(keys)) or len({trial.value for trial in done}) < 3:
            return {}
        with contextlib.suppress(ValueError, RuntimeError):
            found: dict[str, float] = optuna.importance.get_param_importances(self.study, params=keys)
            return found
        return {}

    def _counted(self) -> list[FrozenTrial]:
        return [t for t in self.study.get_trials(deepcopy=False) if "same_as" not in t.user_attrs and t.params]

    def _id(self, number: int) -> int:
        study = self.storage.get_study_id_from_name(_NAME)
        return int(self.storage.get_trial_id_from_study_id_trial_number(study, number))

    def again(self, taken: Taken) -> Taken | None:
        """A trial of this worker whose process was killed, to be started once more; None where that was so too often,
        which is told then."""
        return self._started_again(taken.number, taken.point, taken.lock)

    def _left(self) -> Taken | None:
        """A trial that is said to run, and that nobody is at."""
        from optuna.trial import TrialState

        for trial in self._counted():
            lock = TrialLock.take(self._lock_file(trial.number)) if trial.state == TrialState.RUNNING else None
            if lock is not None:
                taken = self._started_again(trial.number, spaces.point(self.spec.space, trial.params), lock)
                if taken is not None:
                    return taken
                lock.release()
        return None

    def _started_again(self, number: int, point: Point, lock: TrialLock) -> Taken | None:
        key, step = self._id(number), step_of(self.spec.run_of(number))
        said = self.storage.get_trial(key).user_attrs
        before = list(said.get("starts", []))
        taken = Taken(number, point, lock, True, float(said.get("seconds", 0.0)))
        if before[-MOST_STARTS:] == [step] * MOST_STARTS:
            self._write(number, Ended("failed", why=f"was killed {MOST_STARTS} times at step {step}"))
            return None
        self.storage.set_trial_user_attr(key, "starts", [*before, step])
        return taken

    def _new(self, trials: int) -> Taken | None:
        from optuna.trial import TrialState

        known = self._counted()
        tried = {spaces.point(self.spec.space, trial.params): trial.number for trial in known}
        points = spaces.count(self.spec.space)
        if len(known) >= trials or (points is not None and len(tried) >= points):
            return None
        for _ in range(_DRAWS):
            seed = f"{self.spec.seed}/{len(self.study.get_trials(deepcopy=False))}"
            if self.spec.sampler == "grid":
                self._enqueue(spaces.untried(self.spec.space, tried, None))
            self.study.sampler = sampler_of(self.spec, trials, seed)
            asked = self.study.ask(distributions(self.spec.space))
            point = spaces.point(self.spec.space, asked.params)
            if point not in tried:
                lock = TrialLock.take(self._lock_file(asked.number))
                if lock is None:
                    raise UserError(
                        "is held by a process that this sweep does not know", where=str(self._lock_file(asked.number))
                    )
                self.storage.set_trial_user_attr(self._id(asked.number), "starts", [0])
                return Taken(asked.number, point, lock)
            self.storage.set_trial_user_attr(self._id(asked.number), "same_as", tried[point])
            self.study.tell(asked.number, state=TrialState.FAIL)
            if points is not None and points <= spaces.FEW:
                self._enqueue(spaces.untried(self.spec.space, tried, seed))
        return None

    def _enqueue(self, values: Mapping[str, Any] | None) -> None:
        """What is asked for next."""
        if values is not None:
            self.study.enqueue_trial(dict(values))

    def _lock_file(self, number: int) -> Path:
        return self.spec.folder / LOGS / f"{number:04d}.lock"


@contextlib.contextmanager
def turn(folder: Path) -> Iterator[None]:
    """Holds the turn of a sweep's folder. That of a worker that was killed with it is free after half a minute."""
    from optuna.storages.journal import JournalFileOpenLock

    lock = JournalFileOpenLock(str((folder / "turn").absolute()))
    lock.acquire()
    try:
        yield
    finally:
        with contextlib.suppress(RuntimeError):  # taken over from a machine that was asleep
            lock.release()


def distributions(space: Sequence[Dimension]) -> dict[str, BaseDistribution]:
    """The space in Optuna's terms."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    made: dict[str, BaseDistribution] = {}
    for d in space:
        if not isinstance(d, Range):
            made[d.key] = CategoricalDistribution(d.values)
        elif d.whole:
            made[d.key] = IntDistribution(int(d.low), int(d.high), log=d.log, step=int(d.step or 1))
        else:
            made[d.key] = FloatDistribution(d.low, d.high, log=d.log, step=d.step)
    return made


def sampler_of(spec: Spec, trials: int, seed: str) -> BaseSampler:
    """What draws the next trial; of a grid the point is given."""
    import random

    import optuna

    number = random.Random(seed).randrange(1 << 31)
    if spec.sampler != "tpe":
        return optuna.samplers.RandomSampler(seed=number)
    return optuna.samplers.TPESampler(seed=number, n_startup_trials=min(10, max(trials // 3, 1)))


def pruner_of(spec: Spec) -> BasePruner:
    """What ends a trial early, counted in evaluations, the first of which is 1."""
    import optuna

    if spec.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=2)
    if spec.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=max(spec.evaluations, 1), reduction_factor=3)
    return optuna.pruners.NopPruner()


def _read(spec: Spec, trial: FrozenTrial) -> Trial:
    from optuna.trial import TrialState

    said = trial.user_attrs
    nan = float("nan")
    seen = [value for value in trial.intermediate_values.values() if value == value]
    best = nan if not seen else max(seen) if spec.direction == "maximize" else min(seen)
    if trial.state == TrialState.COMPLETE and trial.value is not None:
        best = trial.value
    state = "running" if trial.state == TrialState.RUNNING else str(said.get("ended", trial.state.name.lower()))
    point, seconds = spaces.point(spec.space, trial.params), float(said.get("seconds", nan))
    return Trial(trial.number, point, dict(trial.params), state, float(best), seconds, str(said.get("why", "")))
