"""The page of one run: what it shows of predictions, what it does without, and that nothing stops it."""

from __future__ import annotations

import base64
import io
import math
import re
from pathlib import Path

import numpy as np
import pytest
from images import make_shards
from PIL import Image
from told_runs import classified, labelled, numbered, told_run
from written_runs import finish, write_run

from tlx.data.shards.manifest import Manifest
from tlx.report import inside_report, run_report
from tlx.report.parts import Parts, limit
from tlx.report.report import report_run
from tlx.report.written_plan import WrittenPlan

EVIL = "<script>alert(1)</script> | `x` ![a](b)"


@pytest.fixture(scope="module")
def val(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "s"
    return make_shards(folder, classes=3, per_class={"train": 2, "val": 12}, size=40) / "val"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Pictures of the training are another test's, and those of the module's page are drawn before this."""
    for name in ("curves", "phases"):
        monkeypatch.setattr(run_report.figures, name, lambda *about: None)


class Network:
    """Features that tell classes apart, and a map for each picture that is asked about."""

    def features(self, ids, until):
        return ids, np.random.default_rng(0).normal(size=(len(ids), 8)).astype(np.float32)

    def maps(self, wanted, until):
        return [(place, np.full((16, 16, 3), 90, np.uint8)) for place, _ in wanted]


def page_of(run: Path, **how) -> str:
    return report_run(run, **how).read_text()


def pictures(page: str, kind: str) -> list[Image.Image]:
    found = re.findall(rf"data:image/{kind};base64,([A-Za-z0-9+/=]+)", page)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


@pytest.fixture(scope="module")
def page(val, tmp_path_factory) -> tuple[str, Path]:
    manifest = Manifest.open(val)
    part = classified(manifest.classes, manifest.labels, right=0.7)
    before = classified(manifest.classes, manifest.labels, right=0.4, seed=3)
    run = told_run(tmp_path_factory.mktemp("run") / "run", [part], val=val, before=[before])
    return page_of(run, network=lambda run, source: Network()), run


def test_every_part_is_there_and_pictures_are_from_the_shards(page):
    text, run = page
    for said in ("tells 3 classes apart", "Confusion matrix", "Largest confusions", "Most confident mistakes"):
        assert said in text
    for said in ("Least confident hits", "What the network looked at", "t-SNE", "Best and last of each phase"):
        assert said in text
    assert "Can its probabilities be trusted?" in text
    names = {"curves", "phases", "confusion", "reliability", "embedding"}
    assert {file.stem for file in (run / "figures").glob("*.png")} == names  # this run's plan.json has no curves
    assert len(pictures(text, "png")) == len(names) - 1  # 3 classes are a table
    thumbnails = pictures(text, "jpeg")
    assert len(thumbnails) > 12
    assert any(image.size == (40, 40) for image in thumbnails)
    assert "What this page leaves out" not in text


def test_the_page_needs_no_other_file_and_runs_nothing(page):
    text, _ = page
    assert not re.search(r"<(script|link|iframe|object|embed)", text)
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", text)
    assert "prefers-color-scheme: dark" in text
    assert "url(" not in text


def test_markdown_says_the_same_with_files_beside_it(page):
    _, run = page
    said = (run / "report.md").read_text()
    for name in re.findall(r"\(figures/([^)]+)\)", said):
        assert (run / "figures" / name).is_file()
    assert "Largest confusions" in said
    assert "tells 3 classes apart" in said


def test_rows_of_the_table_are_the_predictions(val, tmp_path):
    manifest = Manifest.open(val)
    part = classified(manifest.classes, manifest.labels, right=1.0)
    part.told[part.truth == 2] = 0
    text = page_of(told_run(tmp_path / "run", [part], val=val))
    assert re.search(r"<td>class2</td>\s*<td class=\"n\">12</td>\s*<td class=\"n\">0</td>", text)
    assert "A class was never predicted: class2" in text
    assert 'title="class2 told as class0: 12 of 12">12</td>' in text


def test_other_tasks_in_their_own_forms(tmp_path):
    parts = [
        labelled(("x", "y"), 40, task="tags"),
        numbered(("h", "w"), 40, task="size"),
        classified(("low", "mid", "high"), np.arange(40) % 3, task="grade", kind="rank"),
    ]
    text = page_of(told_run(tmp_path / "run", parts))
    for said in (
        "Labels of tags",
        "Labels missed",
        "Numbers of size",
        "Largest errors",
        "Ranks of grade",
        "does 3 tasks",
    ):
        assert said in text
    assert text.index("<td>low</td>") < text.index("<td>mid</td>") < text.index("<td>high</td>")
    assert {"numbers-size", "reliability-tags", "confusion-grade"} <= {
        f.stem for f in (tmp_path / "run" / "figures").glob("*.png")
    }


def test_many_classes_are_an_image_and_the_worst_thirty_rows_stand_open(tmp_path):
    names = [f"class {i}" for i in range(200)]
    text = page_of(told_run(tmp_path / "run", [classified(names, np.arange(800) % 200)]))
    assert '<table class="matrix">' not in text
    assert (tmp_path / "run" / "figures" / "confusion.png").is_file()
    assert "all 200" in text
    assert text.index("<td>class ") < text.index("<details>")


def test_what_fails_or_comes_too_late_is_told_and_the_rest_stands(val, tmp_path, monkeypatch):
    manifest = Manifest.open(val)
    run = told_run(tmp_path / "run", [classified(manifest.classes, manifest.labels)], val=val)

    def broken(*args, **how):
        raise RuntimeError("the pencil broke")

    monkeypatch.setattr(inside_report, "embedding", broken)
    text = page_of(run, network=lambda run, source: Network())
    assert "map of pictures: it could not be made (RuntimeError: the pencil broke)" in text
    assert "What the network looked at" in text

    text = page_of(run, network=broken, seconds=0.0)
    assert "the network: the 0 s of the report were over" in text
    assert f"tlx report {run} --full" in text
    assert "Most confident mistakes" in text


def test_without_the_extra_a_line_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cleanlab.filter", None)
    text = page_of(told_run(tmp_path / "run", [classified(("a", "b"), np.arange(40) % 2)]))
    assert "cleanlab is not installed: pip install &#39;tlx[report]&#39;" in text


def test_a_run_without_predictions_and_shards_that_are_others_now(val, tmp_path):
    old = page_of(finish(write_run(tmp_path / "old")))
    assert "the run has no predictions of its best evaluation" in old
    assert "daisy" in old
    manifest = Manifest.open(val)
    part = classified(("a", "b"), np.arange(40) % 2)
    run = told_run(tmp_path / "run", [part])
    config = (run / "config.yaml").read_text().replace("val: none", f"val: {manifest.path}")
    (run / "config.yaml").write_text(config)
    text = page_of(run)
    assert "the validation shards are others now than in training" in text
    assert "no picture" in text


def test_predictions_of_another_evaluation_are_not_shown_as_the_best(tmp_path):
    best = {"metric": "val/top1", "value": 0.9, "step": 20, "phase": "fine_tuning", "weights": "raw"}
    run = told_run(tmp_path / "run", [classified(("a", "b"), np.arange(40) % 2)], best=best)
    assert "Confusion matrix" not in page_of(run)


def test_names_of_classes_and_runs_are_only_text(tmp_path):
    run = told_run(tmp_path / "run", [classified((EVIL, "b"), np.arange(40) % 2)], command=EVIL)
    text = page_of(run)
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    said = (run / "report.md").read_text()
    table = [line for line in said.splitlines() if line.startswith("| \\<script")]
    assert table
    assert all(re.sub(r"\\.", "", line).count("|") in (3, 5, 7) for line in table)


def test_a_plan_is_drawn_from_what_was_written(tmp_path):
    layers = [
        {"name": n, "role": r, "depth": i, "parameters": 10}
        for i, (n, r) in enumerate((("a", "backbone"), ("fc", "head")))
    ]
    phases = [
        {
            "name": "tune", "start": 0, "stop": 8,
            "curve": {"steps": [0, 7], "head": [0.1, 0.0], "lowest": [0.01, 0.0]},
            "layers": {n: {"trains": "all", "trained": 10, "lr": lr} for n, lr in (("a", 0.01), ("fc", 0.1))},
        }
    ]  # fmt: skip
    data = {"steps": 8, "steps_per_epoch": 4, "samples": 30, "batch": 8, "layers": layers, "phases": phases}
    plan = WrittenPlan.of(data)
    rates = plan.phases[0].rates(3)
    assert rates == pytest.approx({"a": 0.01 * 4 / 7, "fc": 0.1 * 4 / 7})
    assert WrittenPlan.of({**data, "layers": []}) is None
    assert run_report.picture(plan, title="x").startswith(b"\x89PNG")


def test_the_time_of_a_report():
    assert limit(None) == limit(60.0) == 20.0
    assert limit(1000.0) == 50.0
    parts = Parts(math.inf, "-")
    assert parts.make("a", lambda: 3, needs_s=100.0) == 3
