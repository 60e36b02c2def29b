"""A metric knows its direction: everything that compares evaluations asks it, ties go to the lower loss."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import yaml
from nets import resnet_like

from tlx.base.errors import ConfigError
from tlx.base.metrics import Metric, Score, top_ks
from tlx.plan.config import dump, parse
from tlx.plan.plan import Plan
from tlx.runs.history import read_history
from tlx.runs.metrics_file import MetricsFile
from tlx.runs.progress import Patience
from tlx.train.evaluation import should_stop_early, update_best

NAN = math.nan
RAW = {"run": "r", "data": {"train": "t", "val": "v", "batch": 8}, "backbone": {"name": "toys:small"}}


def test_the_module_needs_no_torch():
    code = "import sys, tlx.base.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_directions():
    names = ["val/loss", "val/top1", "val/top5", "ema/val/loss", "ema/val/top1"]
    assert [Metric.of(n).mode for n in names] == ["min", "max", "max", "min", "max"]
    assert Metric.of("ema/val/top1") == Metric.of("val/top1")
    lower = ["val/age/mae", "val/rmse", "val/pinball_loss", "val/distance", "val/box/mse", "val/word_error"]
    assert {Metric(n).mode for n in lower} == {"min"}
    assert {Metric(n).mode for n in ("val/score", "val/tags/map", "val/kappa", "val/losses", "val/age/r2")} == {"max"}
    assert all(Metric(n).judges for n in ("val/loss", "val/species/top1"))
    assert not any(Metric(n).judges for n in ("val/samples", "val/nonfinite", "train/loss"))
    assert (top_ks(3, 5), top_ks(1000, 5)) == ([1], [1, 5])


@pytest.mark.parametrize(
    ("name", "score", "than", "wins"),
    [
        ("val/top1", (0.8, 1.0), (0.7, 0.5), True),
        ("val/loss", (0.8, 0.8), (0.7, 0.7), False),
        ("val/loss", (0.6, 0.6), (0.7, 0.7), True),
        ("val/top1", (0.8, 0.4), (0.8, 0.5), True),  # a tie goes to the lower loss
        ("val/top1", (0.8, 0.6), (0.8, 0.5), False),
        ("val/top1", (0.8, 0.5), (0.8, 0.5), False),  # the earlier one stays
        ("val/top1", (0.8, 0.4), (0.8, None), False),  # of an older checkpoint
        ("val/top1", (0.8, 0.4), (0.8, NAN), True),
        ("val/top1", (0.8, NAN), (0.8, 9.0), False),
        ("val/top1", (NAN, 0.1), (0.1, 9.0), False),
        ("val/top1", (0.1, 9.0), (NAN, 0.1), True),
        ("val/loss", (math.inf, math.inf), (NAN, NAN), False),
    ],
)
def test_which_evaluation_is_better(name, score, than, wins):
    assert Metric(name).better(Score(*score), Score(*than)) is wins


def test_what_is_not_finite_is_not_better_than_nothing():
    assert not Metric("val/loss").better(Score(NAN, NAN), None)
    assert not Metric("val/loss").better(Score(math.inf, math.inf), None)
    assert Metric("val/loss").better(Score(9.0, 9.0), None)


def test_the_better_of_raw_weights_and_average():
    top1, loss = Metric("val/top1"), Metric("val/loss")
    row = {"val/top1": 0.6, "val/loss": 0.9, "ema/val/top1": 0.6, "ema/val/loss": 0.8}
    assert top1.best_of(row) == (0.6, 0.8)
    assert loss.best_of(row) == (0.8, 0.8)
    assert top1.best_of(row | {"val/top1": NAN}) == (0.6, 0.8)
    assert top1.best_of(row | {"val/top1": 0.7}) == (0.7, 0.9)
    assert top1.best_of({"train/loss": 1.0}) is None


def test_patience_is_with_the_metric_itself():
    patience, loss = Patience(), Metric("val/loss")
    assert [patience.watch("p", v, metric=loss) for v in (NAN, 2.0, 3.0, 1.0, 1.0)] == [0, 0, 1, 0, 1]
    patience, top1 = Patience(), Metric("val/top1")
    assert [patience.watch("p", v, metric=top1, min_delta=0.1) for v in (0.2, 0.25, 0.35, 0.1)] == [0, 1, 0, 1]


def judged(run, rows):
    """What a run keeps of these (top1, loss), one evaluation at each step."""
    phase, keep = run.plan.phases[0], run.config.checkpoint.keep.best
    metric = Metric.of(run.config.evaluate.metric)
    run.progress.phases[phase.name] = {"start": 0, "stop": phase.stop}
    for step, (top1, loss) in enumerate(rows, 1):
        run.progress.step = step
        row = {"step": step, "val/top1": top1, "val/loss": loss}
        update_best(run.progress, phase, row, metric=metric, keep=keep)
        if should_stop_early(run.progress, phase, row, run.config.evaluate):
            run.progress.ends[phase.name] = step
    best = run.progress.phases[phase.name].get("best", {})
    return (run.progress.best or {}).get("step"), best.get("step"), [leader["step"] for leader in run.progress.leaders]


ROWS = [(0.5, 1.0), (0.7, 0.9), (0.7, 0.6), (0.6, 0.5), (0.7, 0.6)]


@pytest.mark.parametrize(
    ("metric", "step", "leaders"), [("val/top1", 3, [3, 5, 2]), ("val/loss", 4, [4, 3, 5])], ids=["top1", "loss"]
)
def test_best_and_kept_checkpoints_follow_the_metric(compose, metric, step, leaders):
    run = compose(evaluate={"metric": metric}, checkpoint={"keep": {"best": 3}})
    assert judged(run, ROWS) == (step, step, leaders)
    assert run.progress.best["loss"] == ROWS[step - 1][1]


def test_an_evaluation_that_is_not_finite_is_never_kept(compose):
    run = compose(evaluate={"metric": "val/loss"})
    assert judged(run, [(NAN, NAN), (NAN, math.inf)]) == (None, None, [])
    assert judged(run, [(NAN, NAN), (0.3, 2.0), (NAN, NAN)]) == (2, 2, [2])


def test_a_best_that_an_older_checkpoint_keeps_is_read(compose):
    run = compose()
    run.progress.best = {"metric": "val/top1", "value": 0.7, "step": 9, "phase": "x", "weights": "raw"}
    run.progress.leaders = [{"step": 9, "value": 0.7}]
    assert judged(run, [(0.7, 0.1)])[::2] == (9, [9])
    assert judged(run, [(0.8, 0.1)])[::2] == (1, [1])


def test_a_plateau_of_an_accuracy_waits_for_it_to_rise(compose):
    """It once waited for val/top1 to fall: `mode` had a default of its own."""
    duration = {"max": "9ep", "metric": "val/top1", "patience": 2}
    run = compose(phases={"each": {"lr": 0.02, "duration": duration}})
    judged(run, [(0.1 * i, 1.0) for i in range(1, 9)])
    assert not run.progress.ends
    judged(run, [(0.8, 0.9), (0.7, 0.8)])
    assert list(run.progress.ends.values()) == [2]


def test_reports_read_the_best_of_rows_by_the_same_rule(tmp_path):
    for metric, step in (("val/top1", 3), ("val/loss", 4)):
        folder = tmp_path / metric.replace("/", "-")
        folder.mkdir()
        (folder / "config.yaml").write_text(f"evaluate: {{metric: {metric}}}\n")
        (folder / "status.json").write_text(json.dumps({"status": "running"}))
        file = MetricsFile(folder / "metrics.jsonl")
        for i, (top1, loss) in enumerate([*ROWS, (NAN, NAN)], 1):
            file.append({"step": i, "epoch": float(i), "phase": "a", "val/top1": top1, "val/loss": loss})
        file.close()
        assert read_history(folder).best.step == step


# --- `mode`, which was a key once


def test_a_mode_that_agrees_is_read_and_forgotten():
    plateau = {"max": "3ep", "metric": "val/loss", "mode": "min"}
    phases = {"each": {"lr": 1, "duration": plateau}}
    old = parse({**RAW, "evaluate": {"metric": "val/top1", "mode": "max"}, "phases": phases})
    del plateau["mode"]
    assert old == parse({**RAW, "phases": phases})
    assert "mode" not in yaml.safe_load(dump(old))["evaluate"]
    assert "mode" not in str(Plan.make(old, resnet_like(), samples=40).explicit()["phases"])


@pytest.mark.parametrize(
    ("over", "said"),
    [
        (
            {"evaluate": {"metric": "val/loss", "mode": "max", "top_kk": 3}},
            ["evaluate.mode: val/loss is better when it is lower, which need not be said; remove mode (given: 'max')",
             "evaluate.top_kk: unknown key"],
        ),
        (
            {"phases": {"each": {"lr": 1, "duration": {"max": "3ep", "metric": "val/top1", "mode": "min"}}}},
            ["phases.each.duration.mode: val/top1 is better when it is higher, which need not be said; remove mode"],
        ),
    ],
)  # fmt: skip
def test_a_mode_that_contradicts_is_refused(over, said):
    with pytest.raises(ConfigError) as caught:
        parse({**RAW, **over})
    for line in said:
        assert line in str(caught.value)


def test_mode_is_not_suggested():
    with pytest.raises(ConfigError, match=r"evaluate\.modee: unknown key(?!.*mode\b)"):
        parse({**RAW, "evaluate": {"modee": "max"}})
