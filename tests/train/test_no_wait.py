"""A step that is not finite moves nothing, and no step asks the host for it: the device's own flag decides.

On a CPU, with the CPU versions of the kernels that a GPU has: a question to the host is the same operation there.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from updates import OPTIONS, TORCHS, batch, phase_model

from tlx.plan.loop_config import EMA
from tlx.train import optim
from tlx.train.averaging import MovingAverage


@pytest.fixture(autouse=True)
def _fused(monkeypatch):
    monkeypatch.setattr(optim, "_fused", lambda groups: True)


class Questions(TorchDispatchMode):
    """Counts what the host asks of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


def careful(name, **options):
    """An updater that must leave nothing behind of a step that is not finite, and its network."""
    updater, net = phase_model(getattr(optim, name), **{**OPTIONS[name], **options})
    updater.__dict__.update(skips=True, clip=1.0, ema=MovingAverage(net.net, EMA(decay=0.9)))
    return updater, net


def spoil(net):
    """The gradient of the first weight is infinite until the returned handle is removed."""
    return net.parameters[0].register_hook(lambda g: g * float("inf"))


@pytest.mark.parametrize("name", OPTIONS)
def test_no_step_asks_the_host(name):
    updater, net = careful(name)
    with Questions() as questions:
        updater.update(net, 0, [batch()])
        spoil(net)
        updater.update(net, 1, [batch()])
    assert questions.count == 0
    assert updater.ema.updates == 1


def test_an_optimizer_of_others_is_asked_for():
    updater, net = phase_model(torch.optim.SGD)
    with Questions() as questions:
        updater.update(net, 0, [batch()])
    assert questions.count


@pytest.mark.parametrize("name", OPTIONS)
def test_a_first_step_that_is_not_finite_leaves_nothing_behind(name):
    """What follows is, to rounding, what torch's plain optimizer makes of the other steps."""
    updater, net = careful(name)
    before = {n: t.clone() for n, t in net.net.state_dict().items()}
    spoilt = spoil(net)
    tally, _, _ = updater.update(net, 0, [batch()])
    spoilt.remove()
    assert tally[3] == 1
    assert all(torch.equal(t, before[n]) for n, t in net.net.state_dict().items())
    plain, other = phase_model(TORCHS[name], **OPTIONS[name])
    plain.__dict__["clip"] = 1.0
    for step in (1, 2, 3):
        updater.update(net, step, [batch()])
        plain.update(other, step, [batch()])
    for (n, ours), (_, theirs) in zip(net.net.state_dict().items(), other.net.state_dict().items(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6), n


@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_in_between_that_is_not_finite_moves_no_state(name):
    updater, net = careful(name)
    updater.update(net, 0, [batch()])
    before = {(i, k): t.clone() for i, state in enumerate(states(updater)) for k, t in state.items()}
    spoil(net)
    updater.update(net, 1, [batch()])
    after = {(i, k): t for i, state in enumerate(states(updater)) for k, t in state.items()}
    assert before.keys() == after.keys()
    assert len(before) >= (1 if name == "sgd" else 2) * len(net.parameters)
    assert all(torch.equal(t, before[key]) for key, t in after.items())


def states(updater):
    return [updater.optimizer.state[p] for group in updater.optimizer.param_groups for p in group["params"]]


def test_rmsprop_without_momentum_is_torchs():
    updater, net = careful("rmsprop", momentum=0.0)
    plain, other = phase_model(torch.optim.RMSprop, **{**OPTIONS["rmsprop"], "momentum": 0.0})
    plain.__dict__["clip"] = 1.0
    for step in range(3):
        updater.update(net, step, [batch()])
        plain.update(other, step, [batch()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(net.parameters, other.parameters, strict=True))


def test_momentum_begins_at_zero_also_for_what_thaws_later():
    """The fused kernel takes no group in which one weight has a momentum and another has none."""
    found = []
    for make in (optim.sgd, torch.optim.SGD):
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(3)) for _ in range(2)]
        made = make([{"params": weights, "names": ["a", "b"], "layer": "x", "lr": 0.1}], momentum=0.9)
        made.param_groups[0]["lr"] = 0.1
        for thawed in (weights[:1], weights, weights):
            for weight in weights:
                weight.grad = torch.ones(3) if any(weight is t for t in thawed) else None
            made.step()
        found.append([w.tolist() for w in weights])
    assert found[0] == [pytest.approx(values) for values in found[1]]


@pytest.mark.parametrize("ramp", [True, False])
def test_a_moving_average_told_by_the_device_which_steps_were_taken(ramp):
    """Bit for bit the average that was updated after these steps alone, its first copy included."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4))
    told, alone = (MovingAverage(net, EMA(decay=0.9, ramp=ramp)) for _ in range(2))
    for taken in (False, True, True, False, True, *[True] * 100):
        for tensor in [*net.parameters(), net[1].running_mean]:
            tensor.data.add_(torch.randn_like(tensor) * taken)
        net[1].num_batches_tracked.add_(int(taken))
        told.update(net, taken=torch.tensor(taken))
        if taken:
            alone.update(net)
    assert told.updates == alone.updates == 103
    for (name, ours), (_, theirs) in zip(
        told.module.state_dict().items(), alone.module.state_dict().items(), strict=True
    ):
        assert torch.equal(ours, theirs), name
