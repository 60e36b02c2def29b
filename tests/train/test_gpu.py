"""Training on a GPU as on a CPU: no step waits for the device, what overflows moves nothing, resuming gives the bits,
a checkpoint holds the weights of its step, a rank that hangs is named."""

from __future__ import annotations

import signal

import pytest
import torch
from commands import write_config
from composed import composer
from images import make_shards
from plain_ranks import BOUND_S, PATIENCE_S, PATIENT, RAW, Plain
from updates import OPTIONS, TORCHS

from tlx.data.stream.slots import Slots
from tlx.train.loop import apply_readings, begin, fit, steps_of, train_step
from tlx.train.resume import resume
from tlx.train.run import save, settle
from tlx.train.step import prepare_phase

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("s") / "s", classes=3, per_class={"train": 16, "val": 4}, size=40)


@pytest.fixture
def compose(shards, tmp_path, monkeypatch):
    """Composes a training on the GPU."""
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    usual = {"world": {"device": "cuda"}, "input": {"size": 32}, "unfreeze": "all"}
    phases = {"each": {"lr": 0.01, "duration": "4ep", "norm": "statistics_move"}}
    make = composer(shards, tmp_path / "run", monkeypatch, phases=phases, **usual)
    made = []

    def compose(*place, **over):
        if made:
            made.pop().world.leave()  # a precision of its own
        made.append(make(*place, **over))
        return made[-1]

    yield compose
    torch.use_deterministic_algorithms(False)
    for run in made:
        run.world.leave()


LOOP = {"clip": 1.0, "ema": {"decay": 0.9}, "nonfinite": "skip", "fit_micro_batch": "never"}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", OPTIONS)
def test_no_step_waits_for_the_device(compose, name, precision):
    """torch raises where the host would wait; the exchange waits for an event of the step before, which is no such."""
    loop = {**LOOP, "precision": precision}
    run = compose(optimizer={"name": name, **OPTIONS[name]}, loop=loop, track={"every": 1000}, evaluate={"every": 1000})
    phase = run.plan.phases[0]
    begin(run, phase)
    phase_model = prepare_phase(run.net, phase, run.plan, world=run.world, compiled=False)
    each = steps_of(run.stream, phase, run.progress.step, run.world.device)
    train_step(run, phase, phase_model, *next(each))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            train_step(run, phase, phase_model, *next(each))
    finally:
        torch.cuda.set_sync_debug_mode("default")
        each.close()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_first_step_that_overflows_leaves_nothing_behind(compose, name, precision):
    loop = {**LOOP, "precision": precision}
    run = compose(optimizer={"name": name, **OPTIONS[name]}, loop=loop)
    phase = run.plan.phases[0]
    begin(run, phase)
    phase_model = prepare_phase(run.net, phase, run.plan, world=run.world, compiled=False)
    each = steps_of(run.stream, phase, run.progress.step, run.world.device)
    before = [t.clone() for t in run.net.state_dict().values()]
    spoilt = phase_model.parameters[0].register_hook(lambda g: g * float("inf"))
    train_step(run, phase, phase_model, *next(each))
    assert all(torch.equal(t, b) for t, b in zip(run.net.state_dict().values(), before, strict=True))
    spoilt.remove()
    for _ in range(3):
        train_step(run, phase, phase_model, *next(each))
    each.close()
    apply_readings(run, run.exchange.readings(settle=True))
    skipped = run.progress.overflows + run.progress.nonfinite  # at fp16's first scale others may too
    assert skipped >= 1
    assert run.ema.updates == 4 - skipped
    state = [t for s in run.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    assert all(t.isfinite().all() for t in [*run.net.parameters(), *run.ema.module.parameters(), *state])


@pytest.mark.parametrize("name", OPTIONS)
def test_kernels_of_one_piece_give_what_torchs_plain_ones_give(name):
    """Three steps on the same gradients; a second weight thaws after the first one."""

    from tlx.train import optim

    found = []
    for make in (getattr(optim, name), TORCHS[name]):
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(300, 7, device="cuda")) for _ in range(2)]
        made = make([{"params": weights, "names": ["a", "b"], "layer": "x", "lr": 0.1}], **OPTIONS[name])
        made.param_groups[0]["lr"] = 0.01
        for thawed in (1, 2, 2):
            for number, weight in enumerate(weights):
                weight.grad = torch.randn(300, 7, device="cuda") if number < thawed else None
            made.step()
        found.append(torch.cat([w.detach() for w in weights]))
    assert torch.allclose(*found, rtol=1e-4, atol=1e-6)


def test_batches_are_read_from_pinned_memory():
    """The memory that workers share (memfd) is registered with the driver."""
    slots = Slots(2, 1 << 20)
    assert slots.pin()
    batch = slots.lend(slots.take(), (1 << 20,))
    assert batch.is_pinned()
    assert torch.equal(batch.to("cuda", non_blocking=True).cpu(), batch)


def test_resuming_on_a_gpu_gives_the_bits(compose, tmp_path):
    said = {"loop": {"deterministic": True, "precision": "bf16", "ema": {}}, "checkpoint": {"every": 5}}
    whole = compose(tmp_path / "whole", **said)
    assert fit(whole)
    settle(whole)
    run = compose(tmp_path / "parts", **said)
    resume(run)
    phase = run.plan.phases[0]
    begin(run, phase)
    phase_model = prepare_phase(run.net, phase, run.plan, world=run.world, compiled=False)
    for step, batches in steps_of(run.stream, phase, run.progress.step, run.world.device):
        train_step(run, phase, phase_model, step, batches)
        if step + 1 == 7:
            break
    save(run)
    settle(run)
    again = compose(tmp_path / "parts", **said)
    assert fit(again)
    settle(again)
    for ours, theirs in ((again.net, whole.net), (again.ema.module, whole.ema.module)):
        for (name, a), (_, b) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
            assert torch.equal(a, b), name


def test_a_checkpoint_holds_the_weights_of_its_step_though_the_device_goes_on(compose):
    """The copy to the host is under way while the weights are changed already."""
    from tlx.runs.checkpoint import read

    run = compose()
    phase = run.plan.phases[0]
    begin(run, phase)
    wanted = {name: t.cpu() for name, t in run.net.state_dict().items()}
    torch.cuda._sleep(200_000_000)
    save(run)
    with torch.no_grad():
        for parameter in run.net.parameters():
            parameter.add_(1.0)
    settle(run)
    kept = read(run.checkpoints.folder / "latest").model
    assert all(torch.equal(kept[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
def test_a_rank_on_a_gpu_that_dies_or_hangs_is_named(shards, tmp_path, sign):
    """Two ranks share the GPU over gloo."""
    data = {**RAW["data"], "train": str(shards / "train"), "val": str(shards / "val")}
    world = {"backend": "gloo"}
    run = tmp_path / "run"
    config = write_config(tmp_path / "c.yaml", {**RAW, "run": str(run), "data": data, "world": world})
    patient = [PATIENT] if sign == signal.SIGSTOP else []
    with Plain(config, *patient, env={"ACCELERATE_USE_CPU": "false"}) as ranks:
        ranks.until_step(run, 10)
        ranks.ranks[1].send_signal(sign)
        codes = ranks.ends(within=BOUND_S + (PATIENCE_S if sign == signal.SIGSTOP else 0), but=(1,))
        assert codes == [1]
        assert "rank 1" in ranks.text()
