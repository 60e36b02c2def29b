"""What is not finite moves nothing; training stops and says where it was made, or skips; odd losses are told."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from composed import composer
from safetensors.torch import load_file
from updates import classifying

from tlx.base.errors import TlxError
from tlx.base.files import json_text
from tlx.data.stream.stream import Batch
from tlx.plan.loop_config import NonFinite
from tlx.runs.metrics_file import read_rows
from tlx.runs.progress import MEMORY, Progress, Trend
from tlx.tasks.objectives import cross_entropy
from tlx.train.evaluation import constant
from tlx.train.loop import fit
from tlx.train.nonfinite import _keep, tolerated
from tlx.train.result import result_of
from tlx.train.run import settle


@pytest.fixture
def compose(shards, tmp_path, monkeypatch):
    backbone = {"name": "toys:small", "weights": "none", "args": {"dropout": 0.1}}
    phases = {"each": {"lr": 0.02, "duration": "4ep", "norm": "statistics_move"}}
    return composer(shards, tmp_path / "run", monkeypatch, backbone=backbone, unfreeze="all", phases=phases)


def spoil(run, step, module, how):
    """A module gives something else for the pictures of one step, whenever they are shown."""
    (batch,) = run.stream.batches(step, step + 1)
    pictures = run.normalise(batch.images)

    def look(_module, args):
        look.now = args[0].shape == pictures.shape and torch.equal(args[0], pictures)

    look.now = False
    run.net.register_forward_pre_hook(look)
    dict(run.net.named_modules())[module].register_forward_hook(lambda m, a, out: how(out) if look.now else None)
    return [run.stream.manifest.describe(int(i)) for i in batch.ids]


def infinite(out):
    return torch.cat([out[:1] * float("inf"), out[1:]])


class Burst(torch.autograd.Function):
    """Finite on the way up, infinite on the way down."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


@pytest.mark.parametrize(
    ("how", "place"),
    [
        (infinite, "the output of features.1.0 (Conv2d)"),
        (Burst.apply, "the gradient of features.1.0.weight"),
    ],
    ids=["forward", "backward"],
)
def test_it_stops_and_names_the_module_and_the_samples(compose, how, place):
    run = compose(checkpoint={"every": 2})
    samples = spoil(run, 6, "features.1.0", how)
    with pytest.raises(TlxError) as caught:
        fit(run)
    run.saver.close()
    said = str(caught.value)
    assert "not finite at step 7 of phase fine_tuning" in said
    assert f"first on rank 0: {place}" in said
    assert samples[0] in said
    assert "the last checkpoint is of step 6" in said
    report = json.loads((run.folder / "nonfinite" / "step-00000007.json").read_text())
    (finding,) = report["findings"]
    assert finding["samples"] == samples
    saved = load_file(finding["file"])
    assert saved["images"].shape == (8, 3, 16, 16)
    assert saved["labels"].shape == saved["ids"].shape == (8,)
    weights = load_file(run.checkpoints.folder / "latest" / "model.safetensors")
    assert all(torch.isfinite(t).all() for t in weights.values())


def test_what_is_saved_has_every_target_under_a_name_of_its_own(tmp_path):
    images, ids, labels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([5, 6]), torch.tensor([0, 1])
    targets = {"label": labels, **{name: torch.full((2,), 7.0) for name in ("images", "ids", "labels")}}
    batch = Batch(0, 0, 1, images, labels, ids, 2.0, targets=targets)
    saved = load_file(_keep(tmp_path / "nonfinite" / "b.safetensors", batch))
    assert torch.equal(saved["images"], images)
    assert [saved[name].tolist() for name in ("ids", "labels")] == [[5, 6], [0, 1]]
    assert [saved[f"target/{name}"].tolist() for name in ("images", "ids", "labels")] == [[7, 7]] * 3


def test_a_loss_that_is_not_finite_though_its_gradient_is_moves_nothing(compose):
    run = compose()
    loss, before = run.task.objective.loss, None

    def spoilt(output, labels, mix):
        nonlocal before
        if run.progress.step == 3 and before is None:
            before = [p.detach().clone() for p in run.net.parameters()]
            return loss(output, labels, mix) + float("inf")
        return loss(output, labels, mix)

    run.task.objective.__dict__["loss"] = spoilt
    with pytest.raises(TlxError, match=r"step 4 of(.|\n)*computed once more, everything is finite"):
        fit(run)
    assert all(torch.equal(p, b) for p, b in zip(run.net.parameters(), before, strict=True))


def test_skipped_steps_leave_nothing_behind(compose, monkeypatch):
    run = compose(loop={"nonfinite": "skip", "ema": {"decay": 0.5}}, track={"every": 1})
    spoil(run, 4, "features.1.0", infinite)
    update, kept = type(run.updater).update, {}

    def watched(self, phase_model, step, batches, **options):
        nets = {"raw": run.net, "ema": run.ema.module}
        before = {f"{k}.{n}": t.clone() for k, net in nets.items() for n, t in net.state_dict().items()}
        found = update(self, phase_model, step, batches, **options)
        after = {f"{k}.{n}": t for k, net in nets.items() for n, t in net.state_dict().items()}
        kept[step] = all(torch.equal(before[n], after[n]) for n in before)
        return found

    monkeypatch.setattr(type(run.updater), "update", watched)
    assert fit(run)
    settle(run)
    assert [step for step, same in kept.items() if same] == [4]
    assert run.progress.nonfinite == 1
    assert run.ema.updates == 11  # of 12 steps
    assert sum("the step is skipped; 1 of 10 allowed" in n for n in run.notes) == 1
    for net in (run.net, run.ema.module):
        assert all(torch.isfinite(t).all() for t in net.state_dict().values())
    rows = read_rows(run.folder / "metrics.jsonl")
    assert [r["step"] for r in rows if "train/lr_head" in r] == list(range(1, 13))


def test_too_many_skipped_steps_end_the_training(compose):
    run = compose(loop={"nonfinite": {"policy": "skip", "limit": 2}})
    for step in (3, 5, 8):
        spoil(run, step, "features.2.0", infinite)
    with pytest.raises(TlxError, match=r"step 9 (.|\n)*features\.2\.0"):
        fit(run)
    assert run.progress.nonfinite == 3


def test_overflows_of_fp16_are_the_scalers_and_a_loss_that_is_not_finite_is_not():
    reading = {"loss": 1.0, "total": 1.0, "correct": 0, "seen": 8, "told": 8}
    reading |= {"bad": 0, "stop": 0, "nonfinite": 1, "step": 1}
    progress, wanted = Progress(), NonFinite(policy="skip", limit=1, overflows=3)

    def meet(**over):
        progress.absorb({**reading, **over}, scaled=True)
        return tolerated({**reading, **over}, progress, wanted, scaled=True)

    assert [meet() for _ in range(4)] == ["", "", "", None]
    progress.absorb({**reading, "nonfinite": 0}, scaled=True)
    assert (progress.overflows, progress.overflows_in_a_row, progress.nonfinite) == (4, 0, 0)
    assert meet() == ""
    assert "1 of 1 allowed" in meet(loss=float("nan"))
    assert meet(loss=float("nan")) is None


# --- warnings


def test_a_leap_of_the_loss_is_told_once_and_noise_is_not():
    trend, draw = Trend(), torch.Generator().manual_seed(0)
    losses = [2.0 * 0.99**i + 0.1 * float(torch.randn((), generator=draw)) for i in range(200)]
    assert not any(trend.spike("a", i, loss) for i, loss in enumerate(losses))
    assert trend.spike("a", 200, 5.0)
    assert not trend.spike("a", 201, 5.0)
    assert not any(trend.spike("a", i, 0.3) for i in range(202, 200 + MEMORY))
    assert trend.spike("a", 200 + MEMORY, 50.0)
    assert not trend.spike("b", 300, 50.0)  # another phase begins anew


def test_a_leap_of_the_loss_is_told_in_training(compose):
    run = compose(phases={"each": {"lr": 1e-3, "duration": "16ep"}}, optimizer={"name": "sgd"})
    spoil(run, 40, "fc", lambda out: out * -1000)
    fit(run)
    (said,) = [n for n in run.notes if "loss spike" in n]
    assert "at step 41 of phase" in said


# --- evaluations


def meter_of(*, top_k):
    return classifying(cross_entropy([1, 1, 1]), top_k=top_k).meter(torch.device("cpu"))


def test_logits_that_are_not_finite_count_as_wrong():
    """The greatest of NaNs is class 0, which would be right for all of class 0."""
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[nan, nan, nan], [9.0, nan, 1.0], [inf, 0.0, 0.0], [9.0, 0.0, 0.0], [-inf, 9.0, 0.0]])
    labels = torch.tensor([0, 0, 0, 0, 1])
    meter = meter_of(top_k=2)
    meter.update(logits, {"label": labels}, torch.arange(5))
    found = meter.result()
    assert math.isnan(found["loss"])
    assert (found["top1"], found["top2"]) == (pytest.approx(2 / 5), pytest.approx(2 / 5))
    assert (found["samples"], found["nonfinite"]) == (5, 3)  # a class that a network rules out with -inf is none
    assert found["per_class"] == [pytest.approx(1 / 4), 1.0, None]


def test_an_evaluation_without_a_finite_answer_has_no_accuracy():
    meter = meter_of(top_k=5)
    meter.update(torch.full((4, 3), float("nan")), {"label": torch.zeros(4, dtype=torch.int64)}, torch.arange(4))
    found = meter.result()
    assert math.isnan(found["top1"])
    assert (found["nonfinite"], found["per_class"]) == (4, [None, None, None])


def test_finite_logits_have_no_such_count():
    meter = meter_of(top_k=5)
    meter.update(torch.eye(3) * 1e38, {"label": torch.arange(3)}, torch.arange(3))
    assert meter.result() == {"loss": 0.0, "top1": 1.0, "samples": 3, "per_class": [1.0, 1.0, 1.0]}


@pytest.mark.parametrize("metric", ["val/top1", "val/loss"])
def test_logits_that_are_not_finite_are_told_once_an_evaluation_and_never_the_best(compose, metric):
    run = compose(
        evaluate={"metric": metric}, loop={"ema": {"decay": 0.5}}, phases={"each": {"lr": 1e-3, "duration": "1ep"}}
    )
    module = dict(run.net.named_modules())["features.1.1"]

    def spoil_statistics(found):
        if run.progress.step == 2:  # of 3
            with torch.no_grad():
                module.running_var[0] = float("nan")
        return found

    update = run.updater.update
    run.updater.__dict__["update"] = lambda *given, **options: spoil_statistics(update(*given, **options))
    assert fit(run)
    said = [n for n in run.notes if "not finite" in n]
    assert len(said) == 1
    assert "at step 3 validation samples got logits that are not finite (NaN or infinity)" in said[0]
    assert "the network: 12 of 12 samples; features.1.1.running_var is not finite itself" in said[0]
    assert "the moving average: 12 of 12" not in said[0]
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]  # strict
    (row,) = [r for r in rows if "val/samples" in r]
    assert (row["val/loss"], row["val/top1"], row["val/nonfinite"]) == (None, None, 12)
    assert run.progress.best["weights"] == "ema"
    json.loads(json_text(result_of(run, finished=True)), parse_constant=pytest.fail)


def test_a_head_that_always_says_the_same_is_told(compose):
    run = compose(phases={"each": {"lr": 1e-3, "duration": "1ep"}})
    run.net.fc.register_forward_hook(lambda m, a, out: out * 0 + 1)
    fit(run)
    assert [n for n in run.notes if "the same answer" in n]


def test_what_differs_by_more_than_rounding_is_not_constant():
    one = [[1.0, -2.0], [1.0, -2.0]]
    assert constant([one, one])
    assert not constant([one, [[1.0, -2.1], [1.0, -2.1]]])  # constant on each rank, not over both
    assert not constant([[[1.0, -2.0], [1.0, -1.9999]]])
    assert not constant([])


def test_a_healthy_training_warns_of_nothing(compose):
    run = compose(phases={"each": {"lr": 0.01, "duration": "20ep"}})
    assert fit(run)
    assert not [n for n in run.notes if "WARNING" in n]
    assert not (Path(run.folder) / "nonfinite").exists()
