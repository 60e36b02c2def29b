"""The trial of memory before the first step: what it does, that it leaves no trace, what is chosen, what is said."""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import rows, status, tlx, write_config
from images import make_shards
from safetensors.torch import load_file
from torch import nn
from trainings import Alone, alone, bits
from typer.testing import CliRunner
from updates import classifying

from tlx.base.errors import UserError
from tlx.cli.main import app
from tlx.plan.config import parse
from tlx.plan.plan import Plan
from tlx.ranks.collectives import World
from tlx.tasks.objectives import cross_entropy
from tlx.train import command as training
from tlx.train import components as parting
from tlx.train import micro_batch
from tlx.train.data import open_sets
from tlx.train.memory_estimate import Images, memory_by_phase, optimizer_bytes
from tlx.train.memory_trial import Attempt, Load, distinct, optimizer_states, ran_out
from tlx.train.micro_batch import Choice, Found, Refusal, Share, choose, decide, largest_that_fits, search


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("s") / "s", classes=3, per_class={"train": 10, "val": 7}, size=24)


@pytest.fixture(autouse=True)
def by_hand(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def raw(shards, run, *, args=None, name="toys:limited", fit="always", **over):
    return {
        "run": str(run),
        "seed": 5,
        "data": {"train": str(shards / "train"), "val": str(shards / "val"), "batch": 8, "workers": 0},
        "input": {"size": 16},
        "backbone": {"name": name, "weights": "none", "args": args or {}},
        "phases": {"each": {"lr": 0.01}, "feature_extraction": {"duration": 3}, "fine_tuning": {"duration": 5}},
        "evaluate": {"every": 4, "batch": 2},
        "track": {"every": 1, "report": False},
        "world": {"device": "cpu"},
        "checkpoint": {"background": False},
        **over,
        "loop": {"fit_micro_batch": fit, **over.get("loop", {})},
    }


def tried(config, world=None):
    """A trial of a configuration, its plan, and what a rank gets."""
    world = world or alone()
    sets = open_sets(config)
    torch.manual_seed(0)
    backbone, updater = parting.parts_of(config, world, classifying(cross_entropy([10, 10, 10])))
    plan = Plan.make(config, backbone.layers, samples=sets.samples_per_epoch, world=world.size)
    share = Share.of(config, plan, ranks=world.size)
    return parting.trial_of(config, backbone, updater, plan, ranks=world.size), plan, share


# How many


@pytest.mark.parametrize(
    ("start", "limit", "found", "tries"),
    [
        (8, 8, 8, [8]),
        (8, 3, 2, [8, 4, 2]),
        (10, 2, 2, [10, 5, 3, 2]),
        (1, 1, 1, [1]),
        (5, 0, None, [5, 3, 2, 1]),
    ],
)
def test_halves_until_it_fits(start, limit, found, tries):
    asked = []
    assert largest_that_fits(start, lambda n: asked.append(n) or n <= limit) == found
    assert asked == tries


def share_of(batch, samples, ranks, micro=None, val="val"):
    config = SimpleNamespace(
        loop=SimpleNamespace(micro_batch=micro), evaluate=SimpleNamespace(samples=64), data=SimpleNamespace(val=val)
    )
    return Share.of(config, SimpleNamespace(batch=batch, samples=samples), ranks=ranks)


def test_what_a_rank_takes_at_once():
    assert share_of(8, 30, 2).start == 4
    assert share_of(10, 30, 1, micro=8).start == 5  # two even parts
    assert share_of(10, 30, 1, micro=8).load(5) == Load(5, True, 64)  # an evaluation batch is as it is
    assert share_of(64, 30, 4).start == 8  # more than there are samples
    assert share_of(64, 30, 4).load(8) == Load(8, False, 64)
    assert share_of(64, 30, 4).load(4) == Load(4, True, 64)
    assert share_of(10, 30, 1).load(3) == Load(3, True, 64)  # 3 + 3 + 2 + 2
    assert share_of(9, 30, 1).load(5) == Load(5, True, 64)
    assert share_of(8, 30, 8).start == 1
    assert share_of(8, 30, 1, val=None).load(8) == Load(8, False, 0)


# What a trial does


@pytest.fixture
def seen(monkeypatch):
    """What goes through a network while a trial runs: (samples, training, gradients)."""
    import toys

    found, forward = [], toys.Limited.forward

    def watched(self, x):
        found.append((len(x), self.training, torch.is_grad_enabled()))
        return forward(self, x)

    monkeypatch.setattr(toys.Limited, "forward", watched)
    return found


def test_a_trial_trains_and_evaluates_with_mixed_pictures(shards, tmp_path, seen, monkeypatch):
    trial, plan, share = tried(parse(raw(shards, tmp_path, args={"samples": 99}, mix={"mixup": 0.2})))
    normalised, backward = [], []
    monkeypatch.setattr(type(trial.updater.normalise), "__call__", lambda _, x: normalised.append(len(x)) or x.float())
    plain = trial.updater.world.accelerator.backward
    trial.updater.world.accelerator.backward = lambda loss: (plain(loss), backward.append(loss.item()))
    seen.clear()
    assert trial.attempt(plan.phases[1], Load(4, True, 6)) == Attempt()
    assert seen == [(4, True, True), (6, False, False)]
    assert normalised == [6, 6]  # two guests
    assert len(backward) == 1
    assert trial.attempt(plan.phases[1], Load(4, True, 0)) == Attempt()
    assert len(seen) == 3  # no validation, no evaluation
    assert share.load(8) == Load(8, False, 2)


@pytest.mark.parametrize("limit", [99, 3], ids=["fits", "out_of_memory"])
@pytest.mark.parametrize("where", ["training", "evaluation"])
def test_it_leaves_no_trace(shards, tmp_path, limit, where):
    world = World(0, 1, torch.device("cpu"), False, Alone())
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    world.accelerator.scaler, world.accelerator.backward = scaler, lambda loss: scaler.scale(loss).backward()
    moving = {"each": {"lr": 0.1, "norm": "statistics_move", "duration": 2}}
    args = {"samples": limit, "where": where, "norm": "batch", "dropout": 0.5}
    trial, plan, _ = tried(parse(raw(shards, tmp_path, args=args, phases=moving)), world)
    net, optimizer = trial.net, trial.updater.optimizer
    net.train()(torch.randn(3, 3, 16, 16)).sum().backward()  # an optimizer with states, gradients that lie about
    optimizer.step()
    net.features[1].eval()
    net.features[0][0].weight.requires_grad_(False)
    numpy_state, torch_state, python_state = np.random.get_state()[1].copy(), torch.get_rng_state(), random.getstate()

    def everything():
        kept = {n: bits(t.detach()).clone() for n, t in [*net.named_parameters(), *net.named_buffers()]}
        kept |= {f"{n} gradient": p.grad.clone() for n, p in net.named_parameters()}
        states = [(n, s) for n, s in enumerate(optimizer.state.values())]
        return kept | {f"state {i} {k}": torch.as_tensor(v).clone() for i, s in states for k, v in s.items()}

    def flags():
        return [(n, m.training) for n, m in net.named_modules()], [p.requires_grad for p in net.parameters()]

    about = flags()
    before, gradients = everything(), [p.grad for p in net.parameters()]
    buffers = [id(b) for b in net.buffers()]
    assert any("running_mean" in name for name in before)
    for phase in plan.phases:
        found = trial.attempt(phase, Load(4, True, 4))
        out = limit < 4 and (where == "evaluation" or phase.name == "fine_tuning")
        assert found == Attempt(failed=where if out else None)
        now = everything()
        assert now.keys() == before.keys()
        assert [name for name in now if not torch.equal(now[name], before[name])] == []
        assert flags() == about
        assert all(p.grad is g for p, g in zip(net.parameters(), gradients, strict=True))
        assert [id(b) for b in net.buffers()] == buffers
        assert torch.equal(torch.get_rng_state(), torch_state)
        assert np.array_equal(np.random.get_state()[1], numpy_state)
        assert random.getstate() == python_state
        assert scaler.state_dict() == torch.amp.GradScaler("cpu", init_scale=8.0).state_dict()
        assert not any(p._post_accumulate_grad_hooks for p in net.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_gradients_of_earlier_micro_batches_are_there_and_buckets_take_over_the_only_one(shards, tmp_path, monkeypatch):
    trial, plan, _ = tried(parse(raw(shards, tmp_path, args={"samples": 99})))
    several = dataclasses.replace(trial, ranks=2)
    held, counts = [], []
    backward = type(trial.updater).backward

    def watched(self, phase_model, batch):
        counts.append((batch.micro, batch.micros, sum(p.grad is not None for p in phase_model.parameters)))
        told = backward(self, phase_model, batch)
        held.append(sum(p.grad is not None for p in phase_model.parameters))
        return told

    monkeypatch.setattr(type(trial.updater), "backward", watched)
    for each in (trial, several):
        for load in (Load(4, False, 0), Load(4, True, 0)):
            assert each.attempt(plan.phases[1], load) == Attempt()
    every = len(list(trial.net.parameters()))
    assert counts == [(0, 2, 0), (0, 2, every)] * 2  # never the last micro-batch, whose gradients ranks share
    assert held == [every, every, 0, every]


def test_synchronised_norms_do_not_wait_for_other_ranks(shards, tmp_path, monkeypatch):
    trial, plan, _ = tried(parse(raw(shards, tmp_path, args={"samples": 99, "norm": "batch"})))
    for module in trial.net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = nn.SyncBatchNorm
            module.process_group = None
    forward = nn.SyncBatchNorm.forward
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)  # their forward pass would ask for a GPU
    with pytest.raises((ValueError, RuntimeError)):
        trial.net.train()(torch.zeros(4, 3, 16, 16))
    monkeypatch.setattr(type(trial.updater.world), "distributed", property(lambda _: False))
    assert trial.attempt(plan.phases[1], Load(4, False, 4)) == Attempt()
    assert nn.SyncBatchNorm.forward is forward


def test_the_optimizers_state_is_as_large_as_the_estimate_says(shards, tmp_path):
    gradual = {"unfreeze": {"name": "gradual", "every": 2}, "phases": {"each": {"lr": 0.1}}}
    for state in ("keep", "reset"):
        gradual["phases"]["each"]["optimizer_state"] = state
        config = parse(raw(shards, tmp_path, args={"samples": 99}, **gradual))
        trial, plan, _ = tried(config)
        make = functools.partial(parting.make, "optimizer", config.optimizer)
        said = memory_by_phase(plan, trial.net, Images(2, (3, 16, 16), "fp32"), make, averaged=False)
        assert trial.state == {name: needs.optimizer for name, needs in said.items()}
        assert trial.state == optimizer_states(plan, optimizer_bytes(make))
        assert list(trial.state.values())[-1] == 8 * sum(p.numel() for p in trial.net.parameters())


def test_phases_in_which_the_same_happens_are_tried_once(shards, tmp_path):
    layers = [("head", "head"), ("all", "*"), ("again", "head"), ("moving", "head")]
    explicit = {"name": "explicit", "phases": [{"name": n, "layers": {y: "all"}, "duration": 2} for n, y in layers]}
    phases = {"each": {"lr": 0.1}, "moving": {"norm": "statistics_move"}}
    trial, plan, _ = tried(parse(raw(shards, tmp_path, args={"samples": 99}, unfreeze=explicit, phases=phases)))
    stood_for = {name: phase.name for name, phase in distinct(plan, trial.state).items()}
    # the later one, which has the states of everything beside it
    assert stood_for == {"head": "again", "all": "all", "again": "again", "moving": "moving"}


def test_what_is_out_of_memory():
    assert ran_out(torch.OutOfMemoryError("x"))
    assert ran_out(RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"))
    assert ran_out(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert ran_out(RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"))
    assert ran_out(RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"))
    assert not ran_out(RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasSgemm`"))
    assert ran_out(RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"))
    assert not ran_out(RuntimeError("does not have a deterministic implementation"))
    assert not ran_out(ValueError("out of memory"))


@pytest.mark.parametrize(("free", "is_want"), [(5, True), (50, False)])
def test_a_convolution_without_an_algorithm_is_want_of_memory_where_memory_is_short(monkeypatch, free, is_want):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 100))
    assert ran_out(RuntimeError("FIND was unable to find an engine to execute this computation")) == is_want


# What is chosen


class Two:
    """A world of two ranks, of which the other one's findings are known."""

    def __init__(self, other):
        self.other = other

    def gather(self, value):
        return [value, self.other(value)]


def test_ranks_agree_on_what_fits_the_smallest_memory(shards, tmp_path):
    trial, _, share = tried(parse(raw(shards, tmp_path, args={"samples": 99})))
    assert search(trial, share, alone()).fits == share.start == 8
    told = iter([{"feature_extraction": Attempt(peak=5), "fine_tuning": Attempt("training")}] * 2)
    good = {"feature_extraction": Attempt(peak=5), "fine_tuning": Attempt(peak=7)}
    found = search(trial, share, Two(lambda _: next(told, good)))
    assert found.fits == 2
    assert [(r.samples, r.phase, r.stage) for r in found.refused] == [(n, "fine_tuning", "training") for n in (8, 4)]
    assert found.peaks == {"feature_extraction": 5, "fine_tuning": 7}
    found = search(trial, share, Two(lambda _: {"feature_extraction": Attempt(fault="ValueError: odd")}))
    assert (found.fits, found.fault) == (8, "ValueError: odd (phase feature_extraction, rank 1)")


def test_an_evaluation_batch_is_not_the_micro_batchs_matter(shards, tmp_path):
    args = {"samples": 5, "where": "evaluation"}
    trial, _, share = tried(parse(raw(shards, tmp_path, args=args, evaluate={"batch": 16})))
    found = search(trial, share, alone())
    assert (found.fits, found.evaluation) == (8, 4)
    with pytest.raises(UserError, match=r"evaluate.batch: an evaluation batch does not fit.*\n.*evaluate.batch=4"):
        decide(found, on="it", moving=["fine_tuning"])
    with pytest.raises(UserError, match=r"an evaluation batch does not fit.*\n.*gradient_checkpointing"):
        decide(Found(8, 8, {}, evaluation=0), on="it", moving=[], may_halve=True)


@pytest.mark.slow
def test_an_evaluation_batch_that_nobody_has_said_is_what_fits(shards, tmp_path, capsys):
    said = raw(shards, tmp_path / "run", args={"samples": 5, "where": "evaluation"}, evaluate={"every": 4})
    result, shown = train(said, capsys)
    assert result["step"] == 8
    assert "for 64 (evaluation in feature_extraction), 32 (evaluation in feature_extraction), 16" in shown
    assert "micro-batches of 8 fit; evaluation batches of 4 fit, with the same numbers but for rounding" in shown
    kept = json.loads((tmp_path / "run" / "memory.json").read_text())
    assert (kept["evaluation"], kept["facts"]["evaluation"], kept["facts"]["evaluate_batch"]) == (4, 64, None)
    (tmp_path / "run" / "result.json").unlink()
    assert "evaluation batches of 4, as tried" in train(said, capsys)[1]
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(UserError, match=r"evaluate.batch: an evaluation batch does not fit"):  # not the trial of before
        train({**said, "evaluate": {"every": 4, "batch": 64}}, capsys)
    assert train({**said, "evaluate": {"every": 4, "batch": 3}}, capsys)[0]["step"] == 8  # the same run


def test_where_neither_fits_both_shrink(shards, tmp_path):
    trial, _, share = tried(parse(raw(shards, tmp_path, args={"samples": 99}, evaluate={"batch": 16})))
    too_much = iter([{"feature_extraction": Attempt("evaluation")}, {"fine_tuning": Attempt("training")}])
    found = search(trial, share, Two(lambda _: next(too_much, {})))
    assert (found.fits, found.evaluation) == (4, 8)
    assert [(r.samples, r.stage) for r in found.refused] == [(16, "evaluation"), (8, "training")]
    assert decide(found, on="it", moving=[], may_halve=True) == 4
    with pytest.raises(UserError, match=r"in phase fine_tuning; 4 would"):
        decide(found, on="it", moving=["fine_tuning"], may_halve=True)


def test_moving_statistics_forbid_to_shrink(shards, tmp_path):
    of = {"each": {"lr": 0.1, "duration": 2}, "feature_extraction": {"norm": "norms_fixed"}}
    trial, plan, share = tried(parse(raw(shards, tmp_path, args={"samples": 3, "norm": "batch"}, phases=of)))
    assert plan.moving == ("fine_tuning",)
    found = search(trial, share, alone())
    with pytest.raises(UserError) as error:
        decide(found, on="a GPU", moving=plan.moving)
    said = str(error.value)
    assert "micro-batches of 8 samples do not fit the memory of a GPU in phase fine_tuning; 2 would" in said
    assert "loop.micro_batch=2" in said
    assert "loop.fit_micro_batch=always" in said
    assert "norms_fixed" in said
    assert decide(found, on="a GPU", moving=[]) == 2
    assert decide(Found(8, 8, {}), on="a GPU", moving=["fine_tuning"]) == 8  # it fits: nothing to forbid
    still = parse(raw(shards, tmp_path, args={"samples": 3, "norm": "batch"}, phases={"each": {"lr": 0.1, "duration": 2,
                      "norm": "norms_fixed"}}))  # fmt: skip
    assert tried(still)[1].moving == ()


def test_nothing_fits(shards, tmp_path):
    trial, _, share = tried(parse(raw(shards, tmp_path, args={"samples": 0})))
    found = search(trial, share, alone())
    assert found.fits is None
    assert [r.samples for r in found.refused] == [8, 4, 2, 1]
    with pytest.raises(UserError, match=r"not even one sample at once fits the memory of it in phase fine_tuning"):
        decide(found, on="it", moving=[])
    refused = (Refusal(4, "a", "training"), Refusal(2, "a", "training"))
    with pytest.raises(UserError, match=r"micro-batches of 2 do not fit.*fewer could not be tried: ValueError: x"):
        decide(Found(4, None, {}, refused, fault="ValueError: x"), on="it", moving=[])


def test_where_nothing_is_tried(shards, tmp_path):
    def never():
        raise AssertionError("tried")

    for fit in ("auto", "never"):  # on a CPU
        config = parse(raw(shards, tmp_path, args={"samples": 3}, fit=fit))
        assert choose(config, None, None, never, alone(), tmp_path) == Choice()


def test_a_fault_that_is_not_memorys_is_left_to_training(shards, tmp_path, monkeypatch):
    config = parse(raw(shards, tmp_path, args={"samples": 3}))
    trial, plan, share = tried(config)

    def odd(*_):
        raise ValueError("odd\nlines")

    monkeypatch.setattr(type(trial.updater.task), "loss", odd)
    choice = choose(config, plan, share, lambda: trial, alone(), tmp_path)
    assert choice.samples is None
    assert choice.said == "memory: not tried: ValueError: odd (phase feature_extraction, rank 0)"
    assert not (tmp_path / "memory.json").exists()


def test_what_was_found_holds_while_the_facts_are_the_same(shards, tmp_path, monkeypatch):
    config = parse(raw(shards, tmp_path, args={"samples": 3}))
    trial, plan, share = tried(config)
    times = []

    def once():
        times.append(1)
        return trial

    first = choose(config, plan, share, once, alone(), tmp_path)
    assert first.samples == 2
    assert not (tmp_path / "memory.json").exists()  # nothing is written before the run folder is claimed
    (tmp_path / "memory.json").write_text(first.record)
    written = (tmp_path / "memory.json").read_bytes()
    again = choose(config, plan, share, once, alone(), tmp_path)
    assert (again.samples, len(times)) == (2, 1)
    assert f"as tried {json.loads(written)['time']}" in again.said
    assert again.record is None
    monkeypatch.setattr(micro_batch, "_device", lambda _: ("a larger one", 10**12))
    record = choose(config, plan, share, once, alone(), tmp_path).record
    assert len(times) == 2
    assert json.loads(record)["facts"]["devices"][0]["name"] == "a larger one"
    too_many = record.replace('"fits": 2', '"fits": 99')
    for damage in ("", "[]", '{"facts": 3}', "\0", too_many):
        (tmp_path / "memory.json").write_text(damage)
        assert choose(config, plan, share, once, alone(), tmp_path).samples == 2
    assert len(times) == 7


# Trainings


def train(raw, capsys):
    result = training.train(parse(raw), fresh=False)
    return result, capsys.readouterr().out


def test_a_shrunk_micro_batch_is_the_same_training_as_one_set_by_hand(shards, tmp_path, capsys):
    args = {"samples": 3, "dropout": 0.2, "calls": str(tmp_path / "calls")}
    one, other = tmp_path / "shrunk", tmp_path / "by_hand"
    _, said = train(raw(shards, one, args=args), capsys)
    assert "no room for 8 (training in fine_tuning), 4 (training in fine_tuning) samples at once" in said
    assert "micro-batches of 2 fit: gradients accumulate over 4, the global batch stays the same" in said
    _, said = train(raw(shards, other, args=args, fit="never", loop={"micro_batch": 2}), capsys)
    assert "memory" not in said
    assert not (other / "memory.json").exists()
    for run in (one, other):
        state = json.loads((run / "checkpoints" / "latest" / "state.json").read_text())
        assert state["dealt"] == {"world": 1, "micro_batch": 2}
    weights = [load_file(run / "checkpoints" / "latest" / "model.safetensors") for run in (one, other)]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    optimizers = [torch.load(run / "checkpoints/latest/optimizer.pt", weights_only=True) for run in (one, other)]
    assert all(torch.equal(s["exp_avg"], optimizers[1][n]["exp_avg"]) for n, s in optimizers[0].items())
    assert rows(one) == rows(other)
    assert "micro_batch: null" in (one / "config.yaml").read_text()
    kept = json.loads((one / "memory.json").read_text())
    assert (kept["fits"], kept["facts"]["micro_batch"], kept["facts"]["batch"]) == (2, None, 8)
    assert kept["peaks"] == {"feature_extraction": None, "fine_tuning": None}
    # resumed: no second trial
    assert (tmp_path / "calls").read_text() == "8\n4\n"
    (one / "result.json").unlink()
    _, said = train(raw(shards, one, args=args), capsys)
    assert "resumed from" in said
    assert f"micro-batches of 2, as tried {kept['time']} (memory.json)" in said
    assert "dealt" not in said
    assert json.loads((one / "memory.json").read_text()) == kept
    assert (tmp_path / "calls").read_text() == "8\n4\n"
    # asked for something else: tried anew
    (one / "result.json").unlink()
    _, said = train(raw(shards, one, args=args, loop={"micro_batch": 3}), capsys)
    assert "micro-batches of 3 fit" in said
    assert "batches were dealt as {'world': 1, 'micro_batch': 2}, now as {'world': 1, 'micro_batch': 3}" in said


def test_a_trial_changes_nothing_where_everything_fits(shards, tmp_path, capsys):
    args = {"samples": 99, "norm": "batch", "dropout": 0.2}
    for fit in ("always", "never"):
        train(raw(shards, tmp_path / fit, args=args, fit=fit), capsys)
    one, other = (load_file(tmp_path / f / "checkpoints/latest/model.safetensors") for f in ("always", "never"))
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert rows(tmp_path / "always") == rows(tmp_path / "never")


def test_batchnorm_that_bears_no_single_samples_is_named_with_the_reason(shards, tmp_path):
    with pytest.raises(UserError, match=r"memory: 2 phases.*micro-batches of 1 fit.*BatchNorm statistics move"):
        training.train(parse(raw(shards, tmp_path / "run", args={"samples": 1, "norm": "batch"})), fresh=False)


def test_out_of_memory_in_training_names_phase_and_micro_batch_and_the_run_goes_on_with_a_smaller_one(shards, tmp_path):
    said = raw(shards, tmp_path / "run", args={"samples": 5}, fit="never")
    with pytest.raises(UserError) as error:
        training.train(parse(said), fresh=False)
    assert "out of memory at step 3, in phase fine_tuning, with micro-batches of 8 samples" in str(error.value)
    assert "loop.micro_batch=4, with which this run goes on" in str(error.value)
    assert "evaluate.batch=1, where it was evaluating" in str(error.value)
    assert status(tmp_path / "run")["status"] == "user-error"
    smaller = parse(raw(shards, tmp_path / "run", args={"samples": 5}, fit="never", loop={"micro_batch": 4}))
    assert training.train(smaller, fresh=False)["step"] == 8


@pytest.mark.slow
def test_two_ranks_of_which_one_has_little_memory(shards, tmp_path):
    said = raw(shards, tmp_path / "run", args={"samples": 1, "rank": 1})
    done = tlx("train", write_config(tmp_path / "c.yaml", said), ranks=2, is_forked=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "no room for 4 (training in fine_tuning), 2 (training in fine_tuning) samples at once" in done.stdout
    assert done.stdout.count("micro-batches of 1 fit") == 1
    kept = json.loads((tmp_path / "run" / "memory.json").read_text())
    assert (kept["fits"], kept["facts"]["world"], kept["facts"]["devices"][0]["ranks"]) == (1, 2, 2)
    state = json.loads((tmp_path / "run" / "checkpoints" / "latest" / "state.json").read_text())
    assert state["dealt"] == {"world": 2, "micro_batch": 1}
    assert state["step"] == 8


@pytest.mark.slow
def test_on_two_ranks_it_is_the_training_that_was_set_by_hand_and_running_out_names_the_rank(shards, tmp_path):
    for run, extra in (("shrunk", {}), ("by_hand", {"fit": "never", "loop": {"micro_batch": 2}})):
        args = {"samples": 3, "rank": 1, "dropout": 0.2, "norm": "batch"}
        said = raw(shards, tmp_path / run, args=args, **extra)
        said["data"]["drop_last"] = True  # BatchNorm bears no micro-batch of one
        done = tlx("train", write_config(tmp_path / f"{run}.yaml", said), ranks=2, is_forked=True)
        assert done.returncode == 0, done.stderr[-3000:]
    one, other = (load_file(tmp_path / r / "checkpoints/latest/model.safetensors") for r in ("shrunk", "by_hand"))
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert rows(tmp_path / "shrunk") == rows(tmp_path / "by_hand")
    said = raw(shards, tmp_path / "out", args={"samples": 3, "rank": 1}, fit="never")
    done = tlx("train", write_config(tmp_path / "out.yaml", said), ranks=2, is_forked=True)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr.partition("rank 1 is")[0]
    assert "rank 1 is out of memory at step 4, in phase fine_tuning" in done.stderr


def test_the_plan_shows_what_was_tried(shards, tmp_path):
    config = write_config(tmp_path / "c.yaml", raw(shards, tmp_path / "run", args={"samples": 3}, fit="auto"))

    def invoke(*words):
        return CliRunner().invoke(app, ["plan", str(config), *words], catch_exceptions=False).output

    plain, measured = invoke(), invoke("--measure")
    assert "memory: " not in plain
    assert measured.startswith(plain.rstrip().rsplit("memory of a rank", 1)[0])
    assert "micro-batches of 2 fit" in measured
    assert "a CPU does not tell how much was used" in measured
    assert "training would" not in measured
    moving = invoke("--measure", "backbone.args.norm=batch")
    assert "training would be refused: loop.micro_batch: micro-batches of 8 samples do not fit" in moving
    assert "run out of memory (loop.fit_micro_batch=never)" in invoke("--measure", "loop.fit_micro_batch=never")
    assert "no room for 4 (training" in invoke("--measure", "world.size=2")
    with pytest.raises(UserError, match="one of the two"):
        invoke("--measure", "--write")
    assert not (tmp_path / "run").exists()


# On a GPU


@pytest.fixture
def on_gpu(shards, monkeypatch):
    """Composes a training of a ResNet on the GPU."""
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    worlds = []

    def compose(run, **over):
        from tlx.ranks.rendezvous import join_ranks
        from tlx.runs.run_folder import RunFolder

        said = raw(shards, run, name="timm/resnet18", fit="auto", world={"device": "cuda"}, input={"size": 224}, **over)
        config = parse(said)
        while worlds:  # another precision
            worlds.pop().leave()
        ranks, folder = join_ranks(config), RunFolder(config.run)
        worlds.append(ranks)
        claim = folder.look(config)
        composed = training.compose(config, ranks, folder)
        folder.claim(claim, composed.files)
        composed.stop.close()
        return composed

    yield compose
    for left in worlds:
        left.leave()


FIXED = {"each": {"lr": 0.01, "duration": 3, "norm": "norms_fixed"}}


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("micro", [None, 4])
def test_a_gpus_peak_is_what_training_then_takes(on_gpu, tmp_path, precision, micro):
    from tlx.train.loop import fit

    run = on_gpu(tmp_path / "run", loop={"precision": precision, "micro_batch": micro}, phases=FIXED)
    kept = json.loads((tmp_path / "run" / "memory.json").read_text())
    assert kept["fits"] == (micro or 8)
    assert 0 < kept["peaks"]["feature_extraction"] < kept["peaks"]["fine_tuning"]
    assert kept["facts"]["devices"][0]["name"] == torch.cuda.get_device_name()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    assert fit(run)
    assert torch.cuda.max_memory_allocated() == pytest.approx(kept["peaks"]["fine_tuning"], rel=0.15)


@pytest.mark.gpu
def test_a_small_gpu_takes_fewer_samples_and_the_training_runs(on_gpu, tmp_path):
    from tlx.train.loop import fit

    whole = on_gpu(tmp_path / "whole", phases=FIXED)
    peaks = json.loads((tmp_path / "whole" / "memory.json").read_text())["peaks"]
    del whole
    total = torch.cuda.get_device_properties(0).total_memory
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.8 * peaks["fine_tuning"] / total)
    try:
        run = on_gpu(tmp_path / "small", phases=FIXED)
        kept = json.loads((tmp_path / "small" / "memory.json").read_text())
        assert kept["fits"] < 8
        assert run.config.loop.micro_batch == kept["fits"]
        assert kept["peaks"]["fine_tuning"] < peaks["fine_tuning"]
        assert fit(run)
        moving = {"each": {"lr": 0.01, "duration": 3, "norm": "statistics_move"}}
        with pytest.raises(UserError, match="BatchNorm statistics move"):
            on_gpu(tmp_path / "moving", phases=moving)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
