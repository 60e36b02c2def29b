"""The moving average: its decay rises, norm statistics are averaged with the weights, and nothing counts twice."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from updates import batch, phase_model

from tlx.plan.config import parse
from tlx.plan.loop_config import EMA
from tlx.plan.plan import Plan
from tlx.train.averaging import MovingAverage
from tlx.train.loop import begin, fit
from tlx.train.resume import resume
from tlx.train.run import save, settle


def test_the_decay_rises_to_its_value():
    ramp, constant = EMA(decay=0.999), EMA(decay=0.999, ramp=False)
    assert [ramp.at(n) for n in (1, 9, 39)] == pytest.approx([2 / 11, 10 / 19, 40 / 49])
    assert ramp.at(8989) < 0.999
    assert ramp.at(8990) == ramp.at(10**9) == 0.999
    assert [constant.at(n) for n in (1, 39)] == [0.999, 0.999]


def test_weights_and_statistics_are_averaged_alike():
    """Three updates by hand: decays 0 (a copy), 2/11, 3/12."""
    net = nn.BatchNorm1d(1)
    average = MovingAverage(net, EMA(decay=0.999))
    for value in (1.0, 2.0, 3.0):
        for tensor in (net.weight, net.bias, net.running_mean, net.running_var):
            tensor.data.fill_(value)
        net.num_batches_tracked.fill_(int(value))
        average.update(net)
    expected = 3 / 12 * (2 / 11 * 1.0 + 9 / 11 * 2.0) + 9 / 12 * 3.0  # 2.7045...
    assert {n: float(t) for n, t in average.module.state_dict().items()} == {
        **dict.fromkeys(("weight", "bias", "running_mean", "running_var"), pytest.approx(expected, rel=1e-6)),
        "num_batches_tracked": 3.0,
    }
    assert average.updates == 3


def test_without_the_ramp_the_decay_is_constant():
    net = nn.Linear(1, 1, bias=False)
    average = MovingAverage(net, EMA(decay=0.75, ramp=False))
    for value in (1.0, 2.0):
        net.weight.data.fill_(value)
        average.update(net)
    assert average.module.weight.item() == pytest.approx(0.75 * 1 + 0.25 * 2)


def test_what_does_not_move_stays_as_it_is():
    torch.manual_seed(0)
    net = nn.Linear(97, 31)
    average = MovingAverage(net, EMA(decay=0.9371))
    before = {n: t.clone() for n, t in net.state_dict().items()}
    for _ in range(60):
        average.update(net)
    assert all(torch.equal(t, before[n]) for n, t in average.module.state_dict().items())


class Odd(nn.Module):
    """A tied weight, a buffer that is a view of one value, one that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.b.weight = self.a.weight
        self.register_buffer("view", torch.ones(1).expand(5))
        self.register_buffer("unsaved", torch.zeros(2), persistent=False)


def test_odd_tensors():
    net = Odd()
    average = MovingAverage(net, EMA(decay=0.5, ramp=False))
    for value in (0.0, 1.0):
        net.a.weight.data.fill_(value)
        net.unsaved.fill_(7)
        average.update(net)
    assert average.module.b.weight is average.module.a.weight
    assert average.module.a.weight.tolist() == [[0.5, 0.5], [0.5, 0.5]]  # once, not twice
    assert average.module.view.tolist() == [1.0] * 5
    assert average.module.unsaved.tolist() == [0.0, 0.0]


def test_buffers_that_are_no_statistics_are_those_of_the_last_step():
    """An attention mask holds -inf, and -inf - -inf is NaN; spectral norm's vectors are no average of vectors."""
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    net[0].register_buffer("mask", torch.tensor([0.0, float("-inf")]))
    net[0].register_buffer("_u", torch.tensor([1.0, 0.0]))
    average = MovingAverage(net, EMA(decay=0.75, ramp=False))
    for value in (1.0, 2.0):
        net[0]._u.copy_(torch.tensor([2 - value, value - 1]))
        net[1].running_mean.fill_(value)
        average.update(net)
    assert average.module[0].mask.tolist() == [0.0, float("-inf")]
    assert average.module[0]._u.tolist() == [0.0, 1.0]  # of length 1
    assert average.module[1].running_mean.tolist() == [0.75 * 1 + 0.25 * 2] * 2


# --- in a training


def test_a_short_training_evaluates_its_average_near_its_weights(compose):
    """40 steps: with a constant 0.999 the average was 96 % the weights of step 1, and guessed."""
    phases = {"each": {"lr": 0.01, "duration": 40, "norm": "statistics_move"}}
    run = compose(unfreeze="all", phases=phases, loop={"ema": {"decay": 0.999}}, evaluate={"every": 40})
    assert fit(run)
    last = run.progress.last
    assert last["val/top1"] >= 0.9
    assert last["ema/val/top1"] >= last["val/top1"] - 0.1
    assert run.ema.updates == 40


def test_a_resumed_training_goes_on_with_the_same_decay(compose, tmp_path):
    phases = {"each": {"lr": 0.02, "duration": "2ep", "norm": "statistics_move"}}
    over = {"loop": {"ema": {"decay": 0.999}}, "unfreeze": "all", "phases": phases}
    whole = compose(tmp_path / "whole", **over)
    assert fit(whole)
    run = compose(**over)
    run.stop.asked = lambda **_: run.progress.step >= 3
    assert not fit(run)
    settle(run)
    again = compose(**over)
    resume(again)
    assert again.ema.updates == 3
    assert fit(again)
    assert again.ema.updates == 6
    for name, tensor in again.ema.module.state_dict().items():
        assert torch.equal(tensor, whole.ema.module.state_dict()[name]), name


def test_a_phase_that_starts_from_the_best_begins_its_average_anew(compose):
    phases = {"each": {"lr": 0.02, "duration": "2ep"}, "fine_tuning": {"start_from": "best"}}
    run = compose(phases=phases, loop={"ema": {"decay": 0.9}})
    resume(run)
    run.progress.step = 3
    run.progress.best = {"metric": "val/top1", "value": 1.0, "loss": 1.0, "step": 3, "phase": "x", "weights": "raw"}
    save(run)
    run.saver.settle()
    best = {n: t.clone() for n, t in run.net.state_dict().items()}
    for parameter in run.net.parameters():
        parameter.data.add_(1.0)
        run.ema.update(run.net)
    run.progress.step = run.plan.phases[1].start
    begin(run, run.plan.phases[1])
    assert run.ema.updates == 1
    assert all(torch.equal(t, best[n]) for n, t in run.ema.module.state_dict().items())


def test_a_phase_without_a_best_to_start_from_says_so(compose):
    run = compose(phases={"each": {"lr": 0.02, "duration": "2ep"}, "fine_tuning": {"start_from": "best"}})
    run.progress.step = run.plan.phases[1].start
    begin(run, run.plan.phases[1])
    assert "begins from the last weights: no evaluation so far gave a finite val/top1" in run.notes[0]


class Scaler:
    """fp16's, of which the last step has overflowed."""

    def unscale_(self, optimizer): ...
    def step(self, optimizer): ...
    def update(self): ...


def test_an_overflow_of_fp16_is_no_update(monkeypatch):
    updater, net = phase_model(torch.optim.SGD)
    updater.__dict__["ema"] = average = MovingAverage(net.net, EMA())
    updater.update(net, 0, [batch()])
    updater.world.accelerator.scaler = Scaler()
    net.parameters[0].register_hook(lambda g: g * float("inf"))
    updater.update(net, 1, [batch()])
    assert average.updates == 1


# --- in the plan


def warnings(steps, **ema):
    from nets import resnet_like

    phases = {"each": {"lr": 0.1, "duration": steps, "norm": "norms_fixed"}}
    raw = {"run": "r", "data": {"train": "t", "batch": 8}, "backbone": {"name": "toys:small"}, "unfreeze": "all"}
    plan = Plan.make(parse({**raw, "phases": phases, "loop": {"ema": ema}}), resnet_like(), samples=80)
    return [w for w in plan.warnings if "loop.ema" in w]


def test_the_plan_says_where_decay_and_steps_do_not_fit():
    (said,) = warnings(40, decay=0.999)  # (1 + 39) / (10 + 39) leaves 9 / 49
    assert (
        "a mean over about the last 1,000 steps, and in 40 steps the ramp comes to a mean over about the last 5" in said
    )
    assert "nothing need be done" in said
    assert not warnings(40, decay=0.81)
    assert not warnings(2000, decay=0.999)  # the last 223
    assert not warnings(8990, decay=0.999)
    assert warnings(1700, decay=0.999)  # the last 190
    (said,) = warnings(10_000, decay=0.9999)
    assert "the last 10,000 steps, and in 10,000 steps the ramp comes to a mean over about the last 1,112" in said
    (said,) = warnings(40, decay=0.999, ramp=False)
    assert "still 96% those of the first step. Set decay=0.75 (a mean over the last tenth) or ramp=true" in said
    assert not warnings(40, decay=0.75, ramp=False)
    assert not warnings(1000, decay=0.999, ramp=False)
    assert warnings(999, decay=0.999, ramp=False)
