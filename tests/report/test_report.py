"""Reports of finished, unfinished, torn and odd runs, read from files as `tlx train` writes them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure
from PIL import Image
from written_runs import ACCURACIES, EPOCH, finish, write_run

from tlx.base.errors import UserError
from tlx.report import figures, run_facts
from tlx.report.report import report
from tlx.runs.history import article_reading, named, read_history
from tlx.tracking.wandb_run import WandbRun
from tlx.train.result import summary


class Page(HTMLParser):
    """Tags, images and text of a page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.images: list[str] = []
        self.text = ""
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.images += [str(dict(attrs)["src"])] if tag == "img" else []

    def handle_data(self, data: str) -> None:
        self.text += data


def pairs(history) -> dict[str, tuple[float | None, float | None, bool]]:
    return {a.phase: (a.best, a.last, a.over) for a in history.accuracies}


def test_a_finished_run_gets_figures_a_page_that_needs_no_other_file_and_a_table(tmp_path: Path, capsys) -> None:
    run = finish(write_run(tmp_path / "mnet"))
    files = report([run])
    assert [str(f.relative_to(run)) for f in files] == [
        "figures/curves.png",
        "figures/phases.png",
        "report.md",
        "report.html",
    ]
    for file in files[:2]:
        with Image.open(file) as image:
            assert image.format == "PNG"
            assert len(image.convert("L").getcolors(256) or []) > 10
    page = Page(files[3])
    assert len(page.images) == 2
    assert all(source.startswith("data:image/png;base64,") for source in page.images)
    assert not {"script", "link", "iframe"} & set(page.tags)
    for said in ("daisy", "60.00 %", "no samples", "12.jpg", "truncated", "9.9.9", "tlx train a.yaml", "2 ranks"):
        assert said in page.text
    assert page.text.index("daisy") < page.text.index("rose") < page.text.index("fern")  # the worst first, None last
    table = capsys.readouterr().out
    for said in (
        "mnet",
        "val/top1 80.00 %",
        "feature_extraction",
        "best 50.00 %, last 50.00 %",
        "best 80.00 %, last 70.00 %",
        "epoch 4",
        "raw",
        "12,345",
        "1:02:05",
    ):
        assert said in table


def test_an_unfinished_run_is_told_from_its_rows_and_its_last_checkpoint(tmp_path: Path, capsys) -> None:
    run = write_run(tmp_path / "going", accuracies=ACCURACIES[:4])
    checkpoint = run / "checkpoints" / "latest"
    checkpoint.mkdir(parents=True)
    own = {"step": 16, "weights": "raw", "val/top1": 0.8, "val/per_class": [0.25, 1.0]}
    progress = {"samples_seen": 777, "wall_time_s": 61.0, "phases": {"fine_tuning": {"best": own}}, "bad": {}}
    state = {"progress": progress, "identity": {"classes": ["oak", "elm"]}}
    (checkpoint / "state.json").write_text(json.dumps(state))
    history = read_history(run)
    assert (history.best.step, history.best.value("val/top1")) == (16, 0.8)
    assert [p.over for p in history.phases] == [True, False]
    assert pairs(history) == {"feature_extraction": (0.5, 0.5, True), "fine_tuning": (0.8, 0.8, False)}
    page = Page(report([run])[-1])
    assert "25.00 %" in page.text
    assert "not done (running, step 16 of 20)" in " ".join(page.text.split())
    table = capsys.readouterr().out
    assert "best 80.00 %, last 80.00 % so far" in table
    assert "777" in table


def test_a_phase_that_ended_early_switches_where_the_rows_say(tmp_path: Path) -> None:
    run = write_run(tmp_path / "early")
    plan = json.loads((run / "plan.json").read_text())
    plan["phases"][0]["stop"], plan["phases"][1]["start"] = 40, 40  # planned longer than the plateau allowed
    (run / "plan.json").write_text(json.dumps(plan))
    first, second = read_history(run).phases
    assert (first.stop, first.over, second.start) == (8, True, 8)


def test_a_run_killed_in_the_middle_of_a_line_and_with_torn_files(tmp_path: Path) -> None:
    run = write_run(tmp_path / "torn")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 22, "epo')
    (run / "plan.json").write_text('{"steps": 20, "pha')
    (run / "status.json").write_text("")
    (run / "config.yaml").write_text("a: [1")
    history = read_history(run)
    assert (history.step, history.steps_per_epoch, history.best.step) == (20, EPOCH, 16)
    assert pairs(history)["feature_extraction"] == (0.5, 0.5, True)
    # without a plan the first of two phases counts as extraction
    assert [a.kind for a in history.accuracies] == ["feature extraction", "fine-tuning"]
    assert len(report([run])) == 4


def test_numbers_that_are_not_finite_and_things_that_are_no_numbers_do_no_harm(tmp_path: Path) -> None:
    run = write_run(tmp_path / "nan", accuracies=(0.3, math.nan, math.nan, 0.4, math.inf))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 1}\n[1]\n{"step": "x"}\n{"step": 21, "phase": 7, "val/top1": "high", "epoch": null}\n')
    finish(run, best="?", phases={"fine_tuning": 3}, unreadable=[1], versions=None, samples_seen="many", classes=4)
    history = read_history(run)
    assert history.best.value("val/top1") == pytest.approx(0.4)
    drawn = figures.points(history, "val/top1")
    assert [math.isfinite(v) for _, v in drawn] == [True, False, False, True, False, False]  # gaps stay gaps
    assert len(report([run])) == 4


def test_runs_without_validation_of_one_phase_or_without_a_row(tmp_path: Path, capsys) -> None:
    blind = write_run(tmp_path / "blind", accuracies=(None,) * 5)
    single = write_run(tmp_path / "single", phases=(("all", 2, "all"),), accuracies=(0.2, 0.1))
    empty = write_run(tmp_path / "empty", accuracies=())
    probe = write_run(tmp_path / "probe", phases=(("probe", 2, "frozen"),), accuracies=(0.2, 0.1))
    files = [f"{f.parent.name}/{f.name}" for f in report([blind, single, empty])]
    assert files == [
        *("figures/curves.png", "blind/report.md", "blind/report.html"),
        *("figures/curves.png", "figures/phases.png", "single/report.md", "single/report.html"),
        *("empty/report.md", "empty/report.html", "figures/comparison.png"),
        *("blind/comparison.md", "blind/comparison.html"),
    ]
    assert "(running, step 8 of 8)" in capsys.readouterr().out
    assert pairs(read_history(single)) == {"all": (0.2, 0.1, True)}
    assert pairs(read_history(probe)) == {"probe": (0.2, 0.1, True)}
    assert article_reading(read_history(probe).accuracies) is None  # there is nothing to set beside it


def test_the_best_follows_metric_mode_and_moving_average(tmp_path: Path) -> None:
    average = read_history(write_run(tmp_path / "ema", ema=0.05))
    assert (average.best.weights, average.best.value("val/top1")) == ("ema", pytest.approx(0.85))
    # at the phase's end, of the same weights
    assert pairs(average)["feature_extraction"] == (pytest.approx(0.55), pytest.approx(0.55), True)
    low = read_history(write_run(tmp_path / "low", metric="val/loss", accuracies=(0.1, 0.9, 0.3)))
    assert (low.metric, low.best.step) == ("val/loss", 8)


def test_a_phase_that_hurt_is_not_shown_as_a_gain(tmp_path: Path, capsys) -> None:
    """85.4 % in feature extraction, which ends with 70.8 %; fine-tuning comes to 79.2 %: it has not helped."""
    run = write_run(tmp_path / "hurt", accuracies=(0.854, 0.708, 0.70, 0.792, 0.75))
    history = read_history(run)
    before, after = history.accuracies
    assert (before.best, before.last) == (0.854, 0.708)
    assert (after.best, after.last) == (0.792, 0.75)
    assert before.best > after.best
    assert article_reading(history.accuracies) == (0.708, 0.792)  # last against best: the article's
    page = Page(report([run])[-1])
    text = " ".join(page.text.split())
    assert "feature_extraction 0 to 2 85.40 % 1 70.80 %" in text
    assert "fine_tuning 2 to 5 79.20 % 4 75.00 %" in text
    assert "against the best of fine-tuning, which flatters tuning: here 70.80 % and 79.20 %" in text
    assert "best 85.40 %, last 70.80 %" in capsys.readouterr().out
    figure = Figure()
    figures._bars(figure.subplots(), history)
    bars = [(round(bar.get_width(), 4), kind.get_label()) for kind in figure.axes[0].containers for bar in kind]
    best, last = "best of the phase", "end of the phase (last)"
    assert bars == [(0.854, best), (0.708, last), (0.792, best), (0.75, last)]


def test_the_same_numbers_are_in_the_summary_and_in_trackers() -> None:
    result = {
        "name": "r",
        "step": 20,
        "samples_seen": 640,
        "best": {"metric": "val/top1", "value": 0.854, "step": 4, "phase": "feature_extraction", "weights": "ema"},
        "phases": {
            "feature_extraction": {
                "best": {"step": 4, "weights": "ema", "val/top1": 0.854},
                "last": {"step": 8, "val/top1": 0.1, "ema/val/top1": 0.708},
            },
            "fine_tuning": {
                "best": {"step": 16, "weights": "raw", "val/top1": 0.792},
                "last": {"step": 20, "val/top1": 0.2, "ema/val/top1": 0.75},
            },
        },
        "unreadable": {},
        "replaced": 0,
        "wall_time_s": 1.0,
        "world": 1,
        "pretrained": False,
    }
    lines = summary(result).splitlines()
    assert "from scratch" in lines[0]
    assert [line.split() for line in lines[1:5]] == [
        ["feature_extraction", "best", "at", "step", "4:", "val/top1", "0.8540", "(EMA", "weights)"],
        ["feature_extraction", "last", "at", "step", "8:", "val/top1", "0.7080", "(EMA", "weights)"],
        ["fine_tuning", "best", "at", "step", "16:", "val/top1", "0.7920"],
        ["fine_tuning", "last", "at", "step", "20:", "val/top1", "0.7500", "(EMA", "weights)"],
    ]
    handle = SimpleNamespace(summary={})
    offline = SimpleNamespace(_offline=True)
    client = SimpleNamespace(starting_step=0, summary=handle.summary, settings=offline)
    WandbRun(SimpleNamespace(later=""), client, None).summarise(result)
    assert {k: v for k, v in handle.summary.items() if k.startswith("accuracy/")} == {
        "accuracy/feature_extraction/best": 0.854,
        "accuracy/feature_extraction/last": 0.708,
        "accuracy/fine_tuning/best": 0.792,
        "accuracy/fine_tuning/last": 0.75,
    }


def test_a_run_from_scratch_is_called_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "scratch", phases=(("fine_tuning", 2, "all"),), accuracies=(0.2, 0.1))
    with (run / "config.yaml").open("a") as file:
        file.write("backbone: {name: timm/resnet10t, weights: none}\n")
    [found] = read_history(run).accuracies
    assert (found.kind, found.label) == ("from scratch", "fine_tuning (from scratch)")
    assert article_reading([found]) is None
    assert "fine_tuning (from scratch)" in Page(report([run])[-1]).text


def test_rates_are_the_plans_curve_and_old_folders_show_what_was_logged(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert figures._planned_rates(read_history(run)) == {}  # written by an earlier tlx
    plan = json.loads((run / "plan.json").read_text())
    first = [5e-3, 1e-2, 2.5e-3, 0.0]
    plan["phases"][0]["curve"] = {"steps": [0, 1, 6, 7], "head": first, "lowest": first}
    plan["phases"][1]["curve"] = {"steps": [0, 11], "head": [1e-2, 5e-3], "lowest": [1e-4, 5e-5]}
    (run / "plan.json").write_text(json.dumps(plan))
    rates = figures._planned_rates(read_history(run))
    nan = pytest.approx(math.nan, nan_ok=True)
    first = [(0.0, 5e-3), (0.25, 1e-2), (1.5, 2.5e-3), (1.75, 0.0), (1.75, nan)]  # in epochs of 4 steps
    assert rates["head"] == [*first, (2.0, 1e-2), (4.75, 5e-3), (4.75, nan)]
    assert rates["lowest"] == [*first, (2.0, 1e-4), (4.75, 5e-5), (4.75, nan)]  # the head alone, then the stem


def test_several_runs_are_compared_where_out_says(tmp_path: Path, capsys) -> None:
    runs = [finish(write_run(tmp_path / "x" / "run")), write_run(tmp_path / "y" / "run", ema=0.01)]
    drawn = {"comparison.png", "comparison-phases.png"}
    inside = report([*runs, runs[0]])[-4:]
    assert {*inside} == {runs[0] / "figures" / name for name in drawn} | {
        runs[0] / "comparison.md",
        runs[0] / "comparison.html",
    }
    assert len(Page(inside[-1]).images) == 2
    assert Page(inside[-1]).text.count("x/run") == 1  # a run given twice counts once
    assert named([read_history(run) for run in runs]) == ["x/run", "y/run"]
    assert "x/run" in capsys.readouterr().out
    out = tmp_path / "new" / "place"
    assert report(runs, out=out)[-1] == out / "comparison.html"


def test_many_phases_and_hostile_names_are_drawn_and_escaped(tmp_path: Path, capsys) -> None:
    evil = "<script>alert(1)</script>"
    phases = tuple((f"{evil} $\\frac{{{i}", 1, "all") for i in range(12))
    run = finish(write_run(tmp_path / "_a $x_{ [red]b", phases=phases, accuracies=(0.5,) * 12))
    finish(run, classes=[evil] * 3, unreadable={evil: evil}, versions={evil: evil}, command=evil, phases={})
    (run / "config.yaml").write_text(f"# {evil}")
    page = Page(report([run], out=tmp_path / "out")[-1])
    assert "script" not in page.tags
    assert page.text.count(evil) >= 6
    assert "_a $x_{ [red]b" in page.text
    assert "_a $x_{ [red]b" in capsys.readouterr().out  # no markup of the terminal's


def test_control_characters_reach_neither_pages_nor_warnings(tmp_path: Path, recwarn) -> None:
    evil = "a\x1b[2J\u202eb"
    run = finish(write_run(tmp_path / evil, phases=((evil, 5, "all"),)), classes=[evil] * 3, phases={})
    out = report([run], out=tmp_path / "out")[-1]
    for page in (out, run / "report.html"):
        assert not {"\x1b", "\u202e"} & set(page.read_text())
        assert "a\\x1b[2J\\u202eb" in Page(page).text
    assert [str(w.message) for w in recwarn if "Glyph" in str(w.message)] == []
    assert read_history(run).name == named([read_history(run)])[0] == "a\\x1b[2J\\u202eb"
    assert figures.clipped(evil, 40) == "a\\x1b[2J\\u202eb"
    figures.png(lambda figure: figure.suptitle("\x1b"), width=1, height=1)
    assert [str(w.message) for w in recwarn if "Glyph" in str(w.message)] == []


@pytest.mark.parametrize(
    ("given", "what", "todo"),
    [
        ("flowers-resnet5", "no such folder", 'did you mean "flowers-resnet50"?'),
        (".", "not a run folder", "flowers-resnet50"),
        ("file", "is a file", "give the folder"),
    ],
)
def test_what_is_no_run_is_told_with_a_way_out(tmp_path: Path, given: str, what: str, todo: str) -> None:
    write_run(tmp_path / "flowers-resnet50")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as error:
        report([tmp_path / given])
    assert what in error.value.what
    assert todo in str(error.value.todo)
    assert not (tmp_path / "flowers-resnet50" / "report.html").exists()


def test_a_folder_that_cannot_be_written_is_the_users_to_mend(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "figures").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot be written"):
        report([run])


def test_of_many_rows_of_training_some_thousand_are_drawn_and_every_evaluation(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", accuracies=())
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, 100_001):
            phase = "feature_extraction" if step <= 33_333 else "fine_tuning"
            row = {"step": step, "epoch": step / 1e4, "phase": phase}
            said = row | {"train/loss": 1.0, "train/lr_head": 0.01, "best/val/top1": 0.5}
            file.write(json.dumps(said) + "\n")
            if step % 1000 == 0:
                file.write(json.dumps(row | {"val/top1": step / 1e5, "train/loss": 2.0}) + "\n")
        file.write('{"step": 100001, "pha')
    history = read_history(run)
    steps = [row["step"] for row in history.rows if "train/lr_head" in row]
    assert 3500 <= len(steps) <= 4500
    assert {1, 33_333, 33_334} <= set(steps)
    assert len(figures.points(history, "val/top1")) == 100
    assert len(figures.points(history, "train/loss", logged=False)) == 100
    assert (history.step, history.best.step, history.phases[0].stop) == (100_000, 100_000, 33_333)


def test_matplotlib_and_jinja_come_with_the_report_not_with_the_import() -> None:
    code = "import sys, tlx.report.report; sys.exit(bool({'matplotlib', 'jinja2', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_speed_and_memory_of_each_phase_are_told(tmp_path: Path) -> None:
    """Rates by their harmonic mean, so that they and seconds agree; of memory the most."""
    run = write_run(tmp_path / "r")
    rows = {row["step"]: row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}
    for step, rate, seconds, memory in ((2, 10.0, 0.8, 1.5), (6, 40.0, 0.2, 1.25), (10, 8.0, 1.0, 3.5)):
        machine = {"time/images_per_s": rate, "time/step_s": seconds, "memory/peak_gib": memory, "time/left_s": 5.0}
        rows[step] |= machine
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    found = run_facts.speed(read_history(run))
    assert found is not None
    columns, (before, after) = found
    assert columns == ("phase", "pictures a second", "seconds a step", "GPU memory, peak (GiB)")
    assert before == ("feature_extraction", "16", "0.5", "1.5")
    assert after == ("fine_tuning", "8", "1", "3.5")
    assert "GPU memory, peak (GiB)" in Page(report([run])[-1]).text
