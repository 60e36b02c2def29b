"""What a phase does with the optimizer's state of the phases before it: keep, reset, reset_thawed."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from composed import composer

import tlx.train.loop
from tlx.base.layers import LayerMap
from tlx.plan import stale_state
from tlx.plan.parts import Part
from tlx.train.loop import fit

WEIGHT = "features.0.0.weight"
LR = 0.02


@pytest.fixture
def compose(shards, tmp_path, monkeypatch):
    """A run in which everything trains for 3 steps, then the head alone, then everything again."""
    train_step = tlx.train.loop.train_step

    def watched(run, *given):
        stopping = train_step(run, *given)
        run.watched(run)
        return stopping

    monkeypatch.setattr(tlx.train.loop, "train_step", watched)

    def compose(rule, momentum=0.9):
        make = composer(shards, tmp_path / "run", monkeypatch, optimizer={"name": "sgd", "momentum": momentum})
        names = ("everything", "pause", "again")
        layers = [{"name": n, "layers": {"head" if n == "pause" else "*": "all"}, "duration": "3 steps"} for n in names]
        phases = {"each": {"lr": LR}, "again": {"optimizer_state": rule}}
        return make(unfreeze={"name": "explicit", "phases": layers}, phases=phases)

    return compose


def states(run):
    """By parameter: weight, gradient of the last step, momentum."""
    return {
        name: (p.detach().clone(), None if p.grad is None else p.grad.clone(), momentum(run, p))
        for name, p in run.net.named_parameters()
    }


def momentum(run, parameter):
    found = run.optimizer.state.get(parameter, {}).get("momentum_buffer")
    return None if found is None else found.clone()


def around_the_thaw(run):
    """What was there at the end of the pause, and after the first step that follows it."""
    seen = {}
    run.watched = lambda run: seen.update({run.progress.step: states(run)})
    assert fit(run)
    return seen[6], seen[7]


def test_reset_thawed_updates_a_layer_that_thaws_again_as_a_new_optimizer_would(compose):
    before, after = around_the_thaw(compose("reset_thawed"))
    weight, gradient, kept = after[WEIGHT]
    assert torch.equal(kept, gradient)  # momentum of a first update: the gradient alone
    assert torch.allclose(weight, before[WEIGHT][0] - LR * gradient, rtol=0, atol=1e-7)
    head_before, head_after = before["fc.weight"], after["fc.weight"]
    assert torch.allclose(head_after[2], 0.9 * head_before[2] + head_after[1], rtol=0, atol=1e-7)
    assert head_before[2].abs().max() > 0


def test_keep_lets_the_first_update_follow_momentum_of_before_the_pause_and_the_plan_says_so(compose):
    run = compose("keep")
    (told,) = [w for w in run.plan.warnings if "after a pause" in w]
    assert "train again in again after a pause" in told
    assert "phases.again.optimizer_state: reset_thawed" in told
    before, after = around_the_thaw(run)
    weight, gradient, kept = after[WEIGHT]
    assert torch.allclose(kept, 0.9 * before[WEIGHT][2] + gradient, rtol=0, atol=1e-7)
    assert not torch.allclose(weight, before[WEIGHT][0] - LR * gradient, rtol=0, atol=1e-6)


def test_reset_drops_the_momentum_of_what_went_on_training_too(compose):
    _, after = around_the_thaw(compose("reset"))
    for name in (WEIGHT, "fc.weight"):
        _, gradient, kept = after[name]
        assert torch.equal(kept, gradient)


@pytest.mark.parametrize("rule", ["reset", "reset_thawed"])
def test_without_stale_state_the_plan_does_not_warn(compose, rule):
    run = compose(rule)
    assert not [w for w in run.plan.warnings if "pause" in w]
    pause, again = run.plan.phases[1:]
    every = {p.name for y in run.plan.layers for p in y.parameters}
    assert run.plan.forgotten(pause) == set()
    assert run.plan.forgotten(again) == (every if rule == "reset" else every - {"fc.weight", "fc.bias"})


def test_an_optimizer_without_state_has_none_from_before_a_pause(compose):
    assert not [w for w in compose("keep", momentum=0.0).plan.warnings if "pause" in w]


def test_one_layer_trains_and_several_train(compose):
    plan = compose("keep").plan
    (told,) = stale_state.warnings(plan, Part(name="adamw"))
    assert " train again in again after a pause, with the optimizer's state from before it" in told
    one = dataclasses.replace(plan, layers=LayerMap((plan.layers.layers[0], plan.layers.head)))
    (told,) = stale_state.warnings(one, Part(name="adamw"))
    assert told.startswith("features.0.0 trains again in again after a pause")
