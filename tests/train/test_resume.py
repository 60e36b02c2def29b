"""Checkpoints and phases, part by part, in this process: what is kept, what is taken up again, what starts anew."""

from __future__ import annotations

import json

import pytest
import torch
from composed import composer

from tlx.base.errors import ConfigError, UserError
from tlx.runs.checkpoint import Checkpoints, Snapshot, read, weights_of
from tlx.train.freeze import train_mode
from tlx.train.loop import begin, fit
from tlx.train.resume import resume
from tlx.train.run import save


@pytest.fixture
def compose(shards, tmp_path, monkeypatch):
    """Makes a run of the same folder, as often as it is called."""
    backbone = {"name": "toys:small", "weights": "none", "args": {"dropout": 0.2}}
    return composer(shards, tmp_path / "run", monkeypatch, backbone=backbone)


def tensors(run):
    return {name: t.clone() for name, t in run.net.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_a_phase_may_start_from_the_best_weights_and_with_a_fresh_optimizer(compose):
    phases = {"each": {"lr": 0.02, "duration": "2ep"}}
    phases["fine_tuning"] = {"start_from": "best", "optimizer_state": "reset"}
    run = compose(phases=phases)
    resume(run)
    run.progress.best = {"metric": "val/top1", "value": 1.0, "step": 0, "phase": "x", "weights": "raw"}
    save(run)
    best = tensors(run)
    for parameter in run.net.parameters():
        parameter.data.add_(1.0)
        run.optimizer.state[parameter] = {"step": torch.tensor(5.0)}
    run.progress.step = run.plan.phases[1].start + 1
    begin(run, run.plan.phases[1])  # in the middle of a phase, as after a resume: nothing happens
    assert not same(tensors(run), best)
    assert run.optimizer.state
    run.progress.step = run.plan.phases[1].start
    begin(run, run.plan.phases[1])
    assert same(tensors(run), best)
    assert not run.optimizer.state


def test_a_best_checkpoint_that_is_damaged_is_not_started_from(compose):
    phases = {"each": {"lr": 0.02, "duration": "2ep"}, "fine_tuning": {"start_from": "best"}}
    run = compose(phases=phases)
    resume(run)
    run.progress.step = 3
    run.progress.best = {"metric": "val/top1", "value": 1.0, "step": 3, "phase": "x", "weights": "raw"}
    save(run)
    run.saver.settle()
    file = run.checkpoints.path(3) / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    for parameter in run.net.parameters():
        parameter.data.add_(1.0)
    before = tensors(run)
    run.progress.step = run.plan.phases[1].start
    begin(run, run.plan.phases[1])
    assert same(tensors(run), before)
    assert any("is not whole" in n for n in run.notes)


def test_the_moving_average_is_taken_up_again(compose):
    run = compose(loop={"ema": {"decay": 0.9}})
    assert fit(run)
    again = compose(loop={"ema": {"decay": 0.9}})
    resume(again)
    assert same(weights_of(again.ema.module), weights_of(run.ema.module))
    assert not same(weights_of(again.ema.module), weights_of(again.net))
    assert again.ema.updates == run.ema.updates == 12
    assert again.progress == run.progress


def test_a_phase_that_ended_early_stays_ended(compose):
    phases = {"each": {"lr": 0.02, "duration": "2ep"}}
    phases["feature_extraction"] = {"duration": {"max": "9ep", "patience": 1, "min_delta": 100.0}}
    run = compose(phases=phases)
    assert fit(run)
    assert run.plan.phases[0].stop == 6
    again = compose(phases=phases)
    assert again.plan.phases[0].stop == 27
    resume(again)
    assert [(p.start, p.stop) for p in again.plan.phases] == [(0, 6), (6, 12)]


def test_what_is_random_in_frozen_layers_is_off_unless_asked_for(compose, tmp_path):
    for stochastic, expected in (("off_in_frozen", False), ("on", True)):
        phases = {"each": {"lr": 0.02, "duration": "2ep", "stochastic": stochastic}}
        run = compose(run=str(tmp_path / stochastic), phases=phases)
        train_mode(run.net, run.plan.phases[0], run.plan)
        modules = dict(run.net.named_modules())
        assert modules["features.1.3"].training is expected
        assert modules["features.1.1"].training is False  # the norm follows its own policy
        train_mode(run.net, run.plan.phases[1], run.plan)
        assert modules["features.1.3"].training


def snapshot(best=None):
    leaders = [{"step": best, "value": 1.0}] if best is not None else []
    state = {"best": {"step": best} if best is not None else None, "progress": {"leaders": leaders}}
    return Snapshot(model={"w": torch.zeros(3)}, optimizer={}, state=state)


def test_the_last_ones_and_the_best_of_each_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, best in ((10, 10), (20, 10), (30, 10), (40, 40), (50, 40)):
        checkpoints.save(step, snapshot(best))
    assert [p.name for p in sorted(tmp_path.glob("step-*"))] == ["step-00000040", "step-00000050"]
    checkpoints.save(60, snapshot(40))
    assert (tmp_path / "best").resolve().name == "step-00000040"
    assert (tmp_path / "latest").resolve().name == "step-00000060"
    assert len(list(tmp_path.glob("step-*"))) == 3


@pytest.mark.parametrize("damage", ["model.safetensors", "state.json"])
def test_going_back_behind_a_damaged_checkpoint_loses_nothing(tmp_path, damage):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(100, snapshot(100))
    checkpoints.save(200, snapshot(100))
    (tmp_path / "step-00000200" / damage).write_bytes(b"{")
    said = []
    assert checkpoints.newest(said.append).name == "step-00000100"
    assert damage in said[0]
    checkpoints.save(150, snapshot(100))
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000100", "step-00000150"]
    assert checkpoints.newest(said.append).name == "step-00000150"


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    import tlx.runs.checkpoint

    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, snapshot())

    def full(*args, **kwargs):
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(tlx.runs.checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(2, snapshot())
    assert [p.name for p in tmp_path.iterdir() if "step" in p.name] == ["step-00000001"]


def test_training_goes_on_when_a_checkpoint_cannot_be_written(compose, monkeypatch):
    run = compose()
    monkeypatch.setattr(Checkpoints, "write", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
    assert fit(run)
    assert any("could not be written" in n and "No space left" in n for n in run.notes)


def test_another_format_or_other_shards_are_refused(compose, tmp_path):
    run = compose()
    assert fit(run)
    path = (tmp_path / "run" / "checkpoints" / "latest").resolve()
    again = compose()
    again.identity = {**again.identity, "classes": ["a", "b"]}
    with pytest.raises(UserError, match="belongs to another training"):
        resume(again)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "format": 99}))
    with pytest.raises(UserError, match="format 99"):
        read(path)


def test_mistakes_of_phases_are_told_together(compose):
    phases = {"each": {"duration": "2ep"}, "fine_tunning": {"lr": 1}, "fine_tuning": {"lr": 1, "warmup": "5ep"}}
    with pytest.raises(ConfigError) as caught:
        compose(phases=phases)
    assert len(caught.value.problems) == 2
