"""The journal of a sweep: trials are given out once each, taken up where a process died, and judged at evaluations."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace

import pytest

from tlx.base.errors import UserError
from tlx.sweep import trial_lock
from tlx.sweep.ended import Ended, ended
from tlx.sweep.grammar import parse
from tlx.sweep.report import table_csv
from tlx.sweep.spec import Spec
from tlx.sweep.study import MOST_STARTS, Study
from tlx.sweep.trial_lock import TrialLock

TEXT = "data: {train: x, batch: 8}\nbackbone: timm/resnet18\n"


def spec_of(folder, *words, **over):
    space, fixed = parse(words or ("seed=0,1,2", "data.batch=2..3"))
    usual = {"metric": "val/top1", "sampler": "tpe", "pruner": "none", "seed": 5, "trials": 9, "run": "runs/x"}
    made = Spec(folder=folder, space=space, fixed=tuple(fixed), text=TEXT, **{**usual, **over})
    made.write()
    return made


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid"])
def test_every_point_of_a_small_space_is_trained_once(tmp_path, sampler):
    study, seen = Study(spec_of(tmp_path, sampler=sampler)), []
    while (taken := study.take(20)) is not None:
        seen.append(taken.point)
        study.tell(taken, Ended("done", 0.1 * len(seen)), 1.0)
        assert len(seen) < 20
    assert len(seen) == len(set(seen)) == 6
    assert [t.state for t in study.trials()] == ["done"] * 6
    assert study.trials()[-1].value == pytest.approx(0.6)
    assert sampler != "grid" or seen[:2] == [("seed=0", "data.batch=2"), ("seed=0", "data.batch=3")]


def test_what_is_drawn_follows_from_the_seed_and_not_from_who_asks(tmp_path):
    """Two workers that draw from one seed alone would both begin with the same trials."""
    words = ("phases.each.lr=1e-4..1e-2:log", "mix.mixup=0..1")

    def drawn(folder, seed, workers):
        spec, points = spec_of(folder, *words, seed=seed), []
        studies = [Study(spec) for _ in range(workers)]
        for i in range(6):
            taken = studies[i % workers].take(6)
            points.append(taken.point)
            studies[i % workers].tell(taken, Ended("done", float(i)), 1.0)
        assert studies[0].take(6) is None, "six in all, whoever asks"
        return points

    first = drawn(tmp_path / "a", 1, 1)
    assert len(set(first)) == 6
    assert drawn(tmp_path / "b", 1, 3) == first
    assert drawn(tmp_path / "c", 2, 1) != first


def test_a_trial_whose_processes_are_gone_is_taken_up(tmp_path):
    spec = spec_of(tmp_path)
    one, other = Study(spec), Study(spec)
    first = one.take(9)
    assert other.take(9).number != first.number, "it is held"
    first.lock.release()  # as when the process ends, however that is
    again = other.take(9)
    assert (again.number, again.point, again.goes_on) == (first.number, first.point, True)
    other.tell(again, Ended("stopped"), 5.0)
    third = one.take(9)
    assert (third.number, third.before) == (first.number, 5.0), "one that was asked to stop goes on, too"


def test_a_trial_that_never_gets_on_is_given_up(tmp_path):
    study = Study(spec_of(tmp_path))
    taken = study.take(1)
    for _ in range(MOST_STARTS - 1):
        taken = study.again(taken)
        assert taken.goes_on
    assert study.again(taken) is None
    (trial,) = study.trials()
    assert (trial.state, trial.why) == ("failed", f"was killed {MOST_STARTS} times at step 0")


def test_locks_hold_between_processes_that_inherit_them(tmp_path):
    lock = TrialLock.take(tmp_path / "lock")
    kept = os.dup(lock.handle)
    lock.release()
    assert TrialLock.take(tmp_path / "lock") is None, "the training of a worker that was killed has it still"
    os.close(kept)
    assert TrialLock.take(tmp_path / "lock") is not None


def test_without_locks_a_file_that_is_touched_is_held(tmp_path, monkeypatch):
    def refused(handle, how):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("tlx.base.locks.fcntl.flock", refused)
    lock = TrialLock.take(tmp_path / "lock")
    assert lock is not None
    assert TrialLock.take(tmp_path / "lock") is None
    old = time.time() - 2 * trial_lock.SILENT_S
    os.utime(tmp_path / "lock", (old, old))
    assert TrialLock.take(tmp_path / "lock") is not None


def test_the_worse_half_is_pruned_at_evaluations(tmp_path):
    """MedianPruner begins after five trials that are done, and never at the first evaluation."""
    study = Study(spec_of(tmp_path, "phases.each.lr=1e-4..1e-2:log", pruner="median"))

    def train(values):
        taken = study.take(99)
        judge, run = study.judge(taken.number), study.spec.run_of(taken.number)
        run.mkdir(parents=True)
        for at, value in enumerate(values, start=1):
            with (run / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": 4 * at, "val/top1": value}) + "\n")
            why = judge(4 * at, value)
            if why is not None:
                study.tell(taken, Ended("pruned", why=why), 1.0)
                return at, why
        study.tell(taken, Ended("done", max(values)), 1.0)
        return len(values), None

    for i in range(5):
        assert train([0.1 * i, 0.5 + 0.1 * i, 0.6 + 0.1 * i]) == (3, None)
    assert train([0.9, 0.8, 0.9]) == (3, None), "better than half"
    at, why = train([0.0, 0.2, 0.9])
    assert (at, why) == (2, "val/top1 0.2 at evaluation 2 (step 8): others did better by then (median)")
    assert [t.state for t in study.trials()].count("pruned") == 1
    assert study.trials()[-1].value == 0.2, "the best that was seen of it"
    assert (
        table_csv(study.spec, study.trials()).splitlines()[0] == "trial,state,val/top1,seconds,phases.each.lr,run,why"
    )


def test_a_further_worker_has_the_same_sweep_or_is_refused(tmp_path):
    spec = spec_of(tmp_path, "seed=0,1", "data.batch=4")
    assert Spec.read(tmp_path) == spec
    spec.refuse_other(replace(spec, trials=99, metric="", evaluations=7))
    other = replace(spec, space=parse(["seed=0,1,2"])[0], text=TEXT.replace("batch: 8", "batch: 9"), fixed=())
    with pytest.raises(UserError, match="another sweep has begun here") as caught:
        spec.refuse_other(other)
    lines = str(caught.value).splitlines()
    assert "    space seed: '0,1' -> '0,1,2'" in lines
    assert "    configuration.data.batch: 8 -> 9" in lines
    assert "    set data.batch: '4' -> None" in lines
    assert f"tlx sweep {tmp_path}" in lines[-1]


def test_how_a_trial_ended(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps({"finished": True, "best": {"value": 0.75}}))
    assert ended(tmp_path, "done") == Ended("done", 0.75)
    assert ended(tmp_path, "fault", "the loss of step 3 is not finite").state == "diverged"
    assert ended(tmp_path, "fault", "a disk is full").state == "failed"
    assert ended(tmp_path, "user-error", "x: no such file\n  -> look").why == "x: no such file -> look"
    assert ended(tmp_path, "resumable").goes_on
    assert ended(tmp_path, None).state == "killed"
