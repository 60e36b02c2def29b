"""Several runs: grouped by configuration, compared over seeds and pictures, and told as page, Markdown and JSON."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats
from typer.testing import CliRunner
from written_runs import finish, write_done, write_run

from tlx.cli.main import app
from tlx.report.compare import Comparison, compare, compare_histories
from tlx.report.groups import differing, label, letter
from tlx.report.statistics import PAIRED, PICTURES, RESAMPLED, WELCH
from tlx.runs import predictions
from tlx.runs.history import read_history
from tlx.tasks.told import About

PLAIN = (0.80, 0.82, 0.79, 0.81, 0.83)
BETTER = (0.82, 0.83, 0.815, 0.83, 0.845)
LOW = "phases: {each: {lr: 0.001}}\n"
HIGH = "phases: {each: {lr: 0.01}}\n"


def seeds(folder: Path, name: str, values, *, config: str, first: int = 0, **over: object) -> list[Path]:
    return [
        write_done(folder / f"{name}-{first + i}", seed=first + i, best=value, config=config, **over)
        for i, value in enumerate(values)
    ]


def numbers(runs: list[Path]) -> Comparison:
    """Compared, and neither drawn nor written."""
    return compare_histories([read_history(run) for run in runs], out=None)


def only(comparison: Comparison):
    [found] = comparison.sets
    return found


def keep_predictions(run: Path, right: np.ndarray, *, digest: str = "v", ids: np.ndarray | None = None) -> None:
    """Of a task of two classes; the run's best value is made the share of those that are right."""
    n = len(right)
    truth, told = np.zeros(n, np.int32), np.where(right, 0, 1).astype(np.int32)
    arrays = {"truth": truth, "told": told, "probabilities": np.full((n, 2), 0.5, np.float16)}
    part = predictions.Part(About("class", ("a", "b"), "label"), arrays)
    ids = np.arange(n) if ids is None else ids
    about = {"phase": "fine_tuning", "which": "best", "step": 20, "weights": "raw", "digest": digest, "content": None}
    predictions.write(run, predictions.Predictions(**about, samples=n, metrics={}, ids=ids, parts=(part,)))


def test_seeds_of_one_configuration_are_a_group_and_groups_are_compared_by_seed(tmp_path: Path) -> None:
    runs = [*seeds(tmp_path, "x", PLAIN, config=LOW), *seeds(tmp_path, "y", BETTER, config=HIGH)]
    found = numbers(runs)
    of = only(found)
    assert [(g.letter, g.label, len(g.runs)) for g in of.groups] == [("A", "lr=0.01", 5), ("B", "lr=0.001", 5)]
    estimate = of.estimates["A"]["best"]
    assert (estimate.value, estimate.deviation) == pytest.approx((np.mean(BETTER), np.std(BETTER, ddof=1)))
    assert of.estimates["B"]["extraction"].value == 0.5
    [difference] = of.differences
    theirs = stats.ttest_rel(BETTER, PLAIN)
    assert (difference.seeds.method, difference.paired) == (PAIRED, (0, 1, 2, 3, 4))
    assert difference.p == pytest.approx(theirs.pvalue)
    low, high = theirs.confidence_interval(0.95)
    assert found.verdicts[0].startswith(
        "A (lr=0.01) is better than B (lr=0.001) by 1.8 points "
        f"(95 % {100 * low:.1f} to {100 * high:.1f}, 5 seeds, paired"
    )


def test_other_seeds_are_not_paired_and_what_is_of_one_alone_is_said(tmp_path: Path) -> None:
    runs = [*seeds(tmp_path, "x", PLAIN, config=LOW), *seeds(tmp_path, "y", BETTER, config=HIGH, first=10)]
    [difference] = only(numbers(runs)).differences
    assert (difference.seeds.method, difference.paired) == (WELCH, ())
    runs = [*runs[:5], *seeds(tmp_path, "z", BETTER, config=HIGH, first=3)]
    found = numbers(runs)
    [difference] = only(found).differences
    assert (difference.paired, difference.seeds.n) == ((3, 4), 2)
    assert any(
        "over the seeds of both (3 and 4); 0, 1, 2, 5 and 2 more of one alone" in n for n in found.data()["notes"]
    )


def test_no_difference_is_no_victory(tmp_path: Path) -> None:
    runs = [*seeds(tmp_path, "x", PLAIN, config=LOW), *seeds(tmp_path, "y", PLAIN[::-1], config=HIGH)]
    found = numbers(runs)
    assert found.verdicts[0].startswith("No difference can be told between A (lr=0.001) and B (lr=0.01)")
    alone = numbers([runs[0], runs[7]])
    assert "not two seeds of each" in alone.verdicts[0]
    assert only(alone).differences[0].p is None
    assert "One run" in numbers(runs[:1]).verdicts[0]


def test_a_metric_that_is_better_lower(tmp_path: Path) -> None:
    runs = []
    for name, config, values in (("x", LOW, (0.30, 0.31, 0.32)), ("y", HIGH, (0.40, 0.42, 0.41))):
        for i, value in enumerate(values):
            best = {"metric": "val/mae", "value": value, "step": 20, "phase": "fine_tuning", "weights": "raw"}
            own = {"fine_tuning": {"start": 8, "stop": 20, "best": {"step": 20, "weights": "raw", "val/mae": value}}}
            run = write_done(tmp_path / f"{name}{i}", seed=i, best=0.5, config=config)
            finish(run, best=best, phases=own)
            (run / "metrics.jsonl").write_text("")
            runs.append(run)
    of = only(numbers(runs))
    assert of.metric == "val/mae"
    assert of.groups[0].label == "lr=0.001"
    assert of.differences[0].seeds.value == pytest.approx(0.1)
    assert of.differences[0].sure


def test_pictures_tell_where_their_predictions_are_kept(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    right = {c: random.random((2, 400)) < share for c, share in ((LOW, 0.7), (HIGH, 0.9))}
    runs = []
    for config, rows in right.items():
        for seed, row in enumerate(rows):
            runs.append(write_done(tmp_path / f"{len(runs)}", seed=seed, best=float(row.mean()), config=config))
            keep_predictions(runs[-1], row)
    both = only(numbers(runs)).differences[0]
    assert (both.pictures.method, both.pictures.n, both.seeds.method) == (RESAMPLED, 400, PAIRED)
    assert both.pictures.value == pytest.approx(right[HIGH].mean() - right[LOW].mean())
    found = numbers([runs[0], runs[2]])
    [one] = only(found).differences
    assert (one.pictures.method, one.seeds, one.sure) == (PICTURES, None, True)
    assert "400 validation pictures, paired" in found.verdicts[0]
    assert "what other seeds would bring is not known" in found.verdicts[0]


def test_predictions_of_another_evaluation_or_of_other_pictures_tell_nothing(tmp_path: Path) -> None:
    runs = seeds(tmp_path, "x", (0.8,), config=LOW) + seeds(tmp_path, "y", (0.9,), config=HIGH)
    right = [np.arange(100) < 80, np.arange(100) < 90]

    def pictures():
        return only(numbers(runs)).differences[0].pictures

    for run, own in zip(runs, right, strict=True):
        keep_predictions(run, own)
    assert pictures().n == 100
    keep_predictions(runs[1], right[1], ids=np.arange(10, 110))  # one could not read ten, the other ten others
    assert (pictures().n, pictures().value) == (90, pytest.approx((90 - 70) / 90))
    keep_predictions(runs[1], right[1], digest="other")
    assert pictures() is None
    keep_predictions(runs[1], np.arange(100) < 50)  # not what the number is made of
    assert pictures() is None


def test_other_validation_data_are_not_compared(tmp_path: Path) -> None:
    runs = seeds(tmp_path, "x", PLAIN, config=LOW) + seeds(tmp_path, "y", BETTER[:2], config=HIGH, val="w")
    found = numbers(runs)
    assert [(s.validation, len(s.runs), s.differences) for s in found.sets] == [("v", 5, ()), ("w", 2, ())]
    assert [g.letter for s in found.sets for g in s.groups] == ["A", "B"]
    assert any("not compared" in note for note in found.data()["notes"])


def test_runs_that_are_not_done_or_torn_are_shown_and_do_not_count(tmp_path: Path) -> None:
    runs = seeds(tmp_path, "x", PLAIN, config=LOW) + seeds(tmp_path, "y", BETTER, config=HIGH)
    (runs[0] / "result.json").unlink()
    (runs[1] / "config.yaml").write_text("a: [1")
    (runs[2] / "result.json").write_text('{"best": ')
    going = write_run(tmp_path / "going")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "status.json").write_text("")
    found = numbers([*runs, going, tmp_path / "empty"])
    groups = {tuple(r.name for r in g.runs): len(g.done) for s in found.sets for g in s.groups}
    assert groups["x-0", "x-2", "x-3", "x-4"] == 2
    assert groups["x-1",] == 1
    assert groups["going",] == groups["empty",] == 0
    assert any(n.startswith("Not done") and "going (running, step 20 of 20)" in n for n in found.data()["notes"])


def test_a_run_without_a_checkpoint_yet_is_of_the_data_at_its_paths(tmp_path: Path) -> None:
    data = "data: {train: a, val: b}\n"
    runs = seeds(tmp_path, "x", PLAIN, config=data)
    (runs[1] / "model.json").unlink()
    assert len(only(numbers(runs)).groups[0].runs) == 5
    runs += seeds(tmp_path, "y", PLAIN, config=data, val="other")  # the data at these paths were others once
    assert [len(of.runs) for of in numbers(runs).sets] == [5, 4, 1]


def test_of_three_groups_p_values_are_holms_and_the_front_is_told(tmp_path: Path) -> None:
    runs = seeds(tmp_path, "x", PLAIN, config=LOW, wall_time_s=60.0)
    runs += seeds(tmp_path, "y", BETTER, config=HIGH, wall_time_s=600.0)
    runs += seeds(
        tmp_path, "z", [v - 0.1 for v in BETTER[::-1]], config="phases: {each: {lr: 0.1}}\n", wall_time_s=300.0
    )
    found = numbers(runs)
    of = only(found)
    assert of.fronts["time"] == ("A", "B")  # C is beaten by B in both
    raw = sorted(d.seeds.p for d in of.differences)
    least, middle = 3 * raw[0], max(3 * raw[0], 2 * raw[1])
    assert sorted(d.p for d in of.differences) == pytest.approx([least, middle, max(middle, raw[2])])
    assert any("adjusted by Holm" in note for note in found.data()["notes"])
    assert "A is better than C as well" in found.verdicts[0]


def test_many_trials_are_compared_with_the_best_and_drawn(tmp_path: Path) -> None:
    """As a sweep has them: a configuration each, one run each."""
    runs = [
        write_done(tmp_path / f"{i}", seed=0, best=0.5 + i / 100, config=f"phases: {{each: {{lr: {i}e-4}}}}\n")
        for i in range(30)
    ]
    of = only(compare(runs, out=tmp_path / "out"))
    assert (len(of.groups), len(of.differences)) == (30, 29)
    assert of.groups[0].label == "lr=0.0029"
    assert of.groups[-1].letter == letter(29) == "AD"
    assert "The first 15 of 30." in (tmp_path / "out" / "comparison.md").read_text()


def test_page_markdown_pictures_and_json_tell_the_same(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>|`x`"
    config = f"backbone: {{name: '{evil}'}}\n"
    runs = seeds(tmp_path, "x", PLAIN[:2], config=LOW, wall_time_s=60.0)
    runs += seeds(tmp_path, "y", BETTER[:2], config=LOW + config, wall_time_s=90.0)
    out = tmp_path / "out"
    data = compare([*runs, write_run(tmp_path / evil.replace("/", ""))], out=out).data()
    assert data["sets"][0]["groups"][0]["measures"]["best"]["value"] == pytest.approx(np.mean(BETTER[:2]))
    assert [r["seed"] for r in data["sets"][0]["groups"][1]["runs"]] == [0, 1]
    json.dumps(data, allow_nan=False)
    page, text = (out / "comparison.html").read_text(), (out / "comparison.md").read_text()
    assert "<script" not in page
    assert "<script" not in text.replace("\\<", "")
    assert "\n| B<br>no backbone | 2 |" in text
    drawn = ["", "-phases", "-differences", "-cost", "-2"]
    for name in drawn:
        assert f"](figures/comparison{name}.png)" in text
        with Image.open(out / "figures" / f"comparison{name}.png") as image:
            assert len(image.convert("L").getcolors(256) or []) > 10
    assert page.count('src="data:image/png;base64,') == len(drawn)
    for verdict in data["verdicts"]:
        assert verdict.partition(" (")[0] in page


def test_json_of_a_single_run_writes_no_comparison(tmp_path: Path) -> None:
    [run] = seeds(tmp_path, "x", PLAIN[:1], config=LOW)
    data = json.loads(CliRunner().invoke(app, ["report", str(run), "--json"]).output)
    assert data["verdicts"][0].startswith("One run that is done: val/top1 80.00 %")
    assert str(run / "report.html") in data["files"]
    assert not (run / "comparison.html").exists()


def test_names_of_groups_are_what_differs() -> None:
    both = {"seed": 1, "optimizer.name": "sgd"}
    found = differing([both | {"decay": None}, both | {"decay.name": "exponential", "decay.factor": 0.7}])
    assert found == {"decay": ["-", "exponential factor=0.7"]}
    assert differing([both, both]) == {}
    assert label({"a.lr": "1", "b.lr": "2", "c.x": "-"}) == "a.lr=1, b.lr=2"
    assert label(
        {"backbone.name": "timm/resnet50", "backbone.args": "x=1", "input.size": "9", "phases.each.lr": "1"}
    ) == ("timm/resnet50, lr=1")
    assert [letter(i) for i in (0, 25, 26, 27)] == ["A", "Z", "AA", "AB"]
