"""What a person sees at a terminal: columns, control characters, speed, help."""

from __future__ import annotations

import io
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from composed import composer
from images import make_shards
from nets import resnet_like
from typer.testing import CliRunner
from updates import classifying

from tlx.base import terminal
from tlx.base.console import Console
from tlx.base.errors import UserError
from tlx.base.terminal import escaped, folded, say
from tlx.cli.main import app
from tlx.plan.config import parse
from tlx.plan.plan import Plan
from tlx.plan.timetable import timetable
from tlx.runs.checkpoint import read
from tlx.runs.run_folder import versions
from tlx.tasks.objectives import cross_entropy
from tlx.train import build
from tlx.train.result import result_of
from tlx.train.resume import resume
from tlx.train.run import save
from tlx.train.step_timer import StepTimer

EVIL = "a\x1b[2J\u202eb\nc"
TAMED = r"a\x1b[2J\u202eb\nc"


def plan_of(unfreeze, layers=None, **each):
    raw = {
        "run": "runs/x",
        "data": {"train": "shards/train", "batch": 32},
        "backbone": {"name": "toys:small"},
        "unfreeze": unfreeze,
        "phases": {"each": {"duration": "2ep", "lr": 1e-3, **each}},
    }
    return Plan.make(parse(raw), layers or resnet_like(), samples=6149)


# --- columns


@pytest.mark.parametrize("width", [80, 100, 150])
@pytest.mark.parametrize(
    "unfreeze",
    [
        "two_phase",
        {"name": "gradual", "every": "2ep"},
        {
            "name": "explicit",
            "phases": [
                {"name": f"a_phase_with_a_name_of_fifty_letters_or_so_number_{i}", "layers": {"head": "all"}}
                for i in range(6)
            ],
        },
    ],
    ids=["two phases", "seven phases", "long names"],
)
def test_a_plan_fits_the_terminal_and_breaks_no_number(unfreeze, width):
    plan = plan_of(unfreeze, layer_decay={"name": "exponential", "factor": "1/3"}, curve={"name": "cosine"}, warmup=30)
    text = timetable(plan, width=width)
    assert max(map(len, text.splitlines())) <= width
    for phase in plan.phases:
        assert text.count(phase.name[:20]) >= 2  # in the table of phases, and of layers
        assert f"{phase.start}-{phase.stop}" in text
        for layer in plan.layers:
            if phase.trained(layer):
                assert f" {phase.lr * phase.factors[layer.name]:.4g}" in text
    for whole in ("exponential(factor=1/3)", "frozen_is_frozen", "cosine", "layer3"):
        assert whole in text


def test_plan_json_holds_the_curve_of_each_phase():
    """16 epochs of 193 steps: samples of them; 4 steps: each. The warm-up of 2 steps rises by halves, then a line."""
    [long] = plan_of("all", duration="16ep", curve="cosine").data()["phases"]
    steps, rates = long["curve"]["steps"], long["curve"]["head"]
    assert (steps[0], steps[-1]) == (0, 3087)
    assert 190 <= len(steps) == len(rates) <= 202
    assert max(b - a for a, b in itertools.pairwise(steps)) <= 16
    assert rates == sorted(rates, reverse=True)
    [short] = plan_of("all", duration=4, curve="linear", warmup=2).data()["phases"]
    rates = [0.5e-3, 1e-3, 1e-3, 0.5e-3]
    assert short["curve"] == {"steps": [0, 1, 2, 3], "head": rates, "lowest": rates}


def test_columns_are_those_that_columns_says_and_a_log_has_150(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(sys, "__stdout__", io.StringIO())  # no terminal
    assert terminal.width() == 150
    monkeypatch.setenv("COLUMNS", "80")
    assert terminal.width() == 80
    assert max(map(len, timetable(plan_of("two_phase")).splitlines())) <= 80
    assert folded("one two three", columns=8) == "one two\n  three"


def row(step, **more):
    return {"step": step, "epoch": step / 10, "phase": "fine_tuning", **more}


SPEED = {"time/images_per_s": 210.5, "time/step_s": 0.152, "time/left_s": 5025.0}


def test_a_line_of_a_log_is_broken_between_its_items_where_a_terminal_ends(monkeypatch):
    out = io.StringIO()
    monkeypatch.setenv("COLUMNS", "80")
    console = Console(4632, True, file=out)
    console.row(row(10, **{"train/loss": 1.25, "train/lr_head": 1e-3}, **SPEED))
    console.row(row(20, **{"val/loss": 0.25, "val/top1": 0.9, "val/top5": 0.99, "best/val/top1": 0.91}))
    lines = out.getvalue().splitlines()
    assert lines == [
        "step   10/4632  epoch   1.00  fine_tuning  train/loss 1.25  lr 0.001",
        "    210.5 images/s  0.152 s/step  1:23:45 left",
        "step   20/4632  epoch   2.00  fine_tuning  val/loss 0.25  val/top1 0.9",
        "    val/top5 0.99  best val/top1 0.91  210.5 images/s  0.152 s/step",
        "    1:23:34 left",  # ten steps later, by the same speed
    ]
    monkeypatch.delenv("COLUMNS")
    out = io.StringIO()
    Console(4632, True, file=out).row(row(10, **{f"val/metric{i}": 0.5 for i in range(20)}))
    assert len(out.getvalue().splitlines()) == 1  # a log's lines stay whole


@pytest.mark.slow
def test_a_reader_that_has_gone_ends_what_is_shown_and_not_the_training():
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    console = Console(10, True, file=Gone())
    console.note("a line")
    console.row(row(10, **{"val/top1": 0.5}))
    console.close()
    script = f"{sys.executable} -m tlx models 'res*' | head -1"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_a_name_between_colons_is_no_emoji():
    out = io.StringIO()
    Console(10, True, file=out).note("class a:dog: is one")
    assert out.getvalue() == "class a:dog: is one\n"


# --- control characters


def test_control_characters_are_shown_escaped_wherever_they_reach_a_terminal(capsys, tmp_path):
    assert escaped(EVIL) == TAMED
    assert escaped("één two\n", lines=True) == "één two\n"
    say(f"1\n{EVIL}", error=True)
    assert capsys.readouterr().err == "1\na\\x1b[2J\\u202eb\nc\n"
    assert str(UserError("is wrong", where=EVIL)) == f"{TAMED}: is wrong"
    out = io.StringIO()
    console = Console(10, True, file=out)
    console.note(f"resumed from {EVIL}")
    console.row(row(10, **{"val/top1": 0.5}) | {"phase": EVIL})
    assert "\x1b" not in out.getvalue()
    assert TAMED in out.getvalue()
    config = parse({"run": "runs/x", "data": {"train": "x", "batch": 2}, "backbone": {"name": "toys:small"}})
    head = build.header(config.model_copy(update={"run": Path(f"runs/{EVIL}")}), classifying(cross_entropy([1, 1, 1])))
    assert TAMED in head
    assert head.isprintable()


def test_a_surrogate_and_a_narrow_encoding_are_no_traceback(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    say("x\udc80 é")
    assert raw.getvalue() == b"x\\udc80 \\xe9\n"


def test_a_phase_with_control_characters_is_planned_on_one_line():
    plan = plan_of({"name": "explicit", "phases": [{"name": EVIL, "layers": {"head": "all"}}]})
    text = timetable(plan, width=150)
    assert text.count(TAMED) == 2
    assert all(line.isprintable() for line in text.splitlines())


# --- speed


class Clock:
    """A clock that stands until it is moved."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_speed_is_of_the_steps_since_the_last_row_without_what_lies_between_them():
    clock = Clock()
    timer = StepTimer(clock)
    timer.begin(before_s=50.0, samples=1000)
    rows = []

    def asked():
        for step in range(4):
            clock.now += 1.0  # the batch is waited for
            yield step

    for step in timer.each(timer.waited(asked())):
        clock.now += 1.0  # the update
        wall = timer.step_done()
        if step % 2:
            rows.append(timer.row(samples=1000 + 32 * (step + 1), steps_left=10 - step - 1))
            clock.now += 6.0  # an evaluation
    # 64 pictures in 2 steps of 2 s; 8 steps are left, and nothing lay between steps so far
    means = {"time/images_per_s": 16.0, "time/step_s": 2.0, "time/data_wait": 0.5}
    assert rows[0] == {**means, "time/left_s": 16.0}
    # 6 s of evaluation in 4 steps: 1.5 s a step on top
    assert rows[1] == {**means, "time/left_s": 6 * (2.0 + 1.5)}
    assert wall == 50.0 + 4 * 2.0 + 6.0


# --- what changes numbers


def test_another_number_of_cpu_threads_is_told_when_a_run_goes_on(tmp_path, monkeypatch):
    shards = make_shards(tmp_path / "s", classes=3, per_class={"train": 8, "val": 4}, size=16)
    compose = composer(shards, tmp_path / "run", monkeypatch)
    threads = torch.get_num_threads()
    run = compose()
    resume(run)
    save(run)
    run.saver.settle()
    assert json.loads((run.checkpoints.path(0) / "state.json").read_text())["threads"] == threads
    assert result_of(run, finished=True)["threads"] == threads
    again = compose()
    resume(again)
    assert not [note for note in again.notes if "threads" in note]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 3)
    other = compose()
    resume(other)
    told = f"ranks computed with {threads} CPU threads until here, now with {threads + 3} (OMP_NUM_THREADS)"
    assert [note for note in other.notes if told in note]
    snapshot = read(run.checkpoints.path(0))  # of a checkpoint from before, which does not know
    del snapshot.state["threads"]
    monkeypatch.setattr("tlx.train.resume.read", lambda _: snapshot)
    before = compose()
    resume(before)
    assert not [note for note in before.notes if "threads" in note]


# --- help


def tlx(*words):
    return CliRunner().invoke(app, list(words))


@pytest.mark.parametrize("words", [(), ("shards",), ("weights",), ("bench",), ("track",)], ids=" ".join)
def test_a_command_without_its_words_shows_its_help_and_exits_with_2(words):
    command = [sys.executable, "-m", "tlx", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("Usage: ")
    assert done.stdout == ""


@pytest.mark.parametrize("words", [(), ("train",), ("shards",), ("shards", "build"), ("bench", "data")], ids=" ".join)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_on_stdout_with_0(words, flag):
    shown = tlx(*words, flag)
    assert shown.exit_code == 0
    assert "Usage: " in shown.stdout
    assert "-h, --help" in shown.stdout


def test_the_version_is_told():
    assert versions()["tlx"] == "0.2.0"
    shown = tlx("--version")
    assert (shown.exit_code, shown.stdout) == (0, "tlx 0.2.0\n")


def test_a_mistake_in_a_command_points_to_its_own_help(monkeypatch, capsys):
    from tlx.cli import main as cli

    monkeypatch.setattr(sys, "argv", ["tlx", "shards", "build"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith("-> tlx shards build --help\n")
