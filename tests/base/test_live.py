"""What a terminal shows of a training: the live view by itself, on an emulated terminal, and where it must not be."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from commands import environment
from screen import Screen

from tlx.base.console import Console
from tlx.base.live import Latest, Position, frame
from tlx.base.terminal import be_quiet

PHASES = [
    SimpleNamespace(name="feature_extraction", start=0, stop=1544),
    SimpleNamespace(name="fine_tuning", start=1544, stop=4632),
]
TRAINED = {"train/loss": 0.51234, "train/top1": 0.81, "train/lr_head": 1e-3, "train/lr_lowest": 1e-5}
SPEED = {"time/images_per_s": 210.5, "time/step_s": 0.152, "time/left_s": 3088.0, "time/data_wait": 0.034}
EVALUATED = {"val/loss": 0.43, "val/top1": 0.88, "val/top5": 0.99, "best/val/top1": 0.88}
BEST = {"metric": "val/top1", "value": 0.883, "step": 1500, "phase": "feature_extraction"}


def row(step, **more):
    return {"step": step, "epoch": step / 193, "phase": "fine_tuning", **more}


def lines(columns, *, step=1544, phases=PHASES, best=BEST, stage="step", rows=(TRAINED, EVALUATED, SPEED)):
    latest = Latest()
    for one in rows:
        latest.take(row(step, **one), steps=4632)
    position = Position(step, phases, 193, stage, best)
    return frame(position, latest, stage, columns=columns).plain.split("\n")


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 100, 131, 132, 160, 200])
def test_a_frame_has_as_many_lines_at_every_moment_and_none_reaches_the_edge(columns):
    long = [SimpleNamespace(name="a_phase_with_a_name_of_fifty_letters_or_more_\x1b[2J", start=0, stop=10**7)]
    many = {f"val/metric_number_{i}": 0.123456 for i in range(30)}
    moments = [
        lines(columns),
        lines(columns, rows=(), best=None, stage=""),
        lines(columns, phases=long, rows=(TRAINED, many, SPEED | {"time/left_s": 1e7, "time/images_per_s": 1e6})),
        lines(columns, step=4632),
    ]
    assert {len(moment) for moment in moments} == {7 if columns < 132 else 5}
    assert max(len(line) for moment in moments for line in moment) < columns
    assert all(line.isprintable() for moment in moments for line in moment)


def test_a_frame_says_where_the_training_stands_and_how_long_it_takes():
    """3,088 steps are left in 3,088 s: 0:51:28 in all, as long in this phase, the last, of which nothing is done."""
    bar, whole, *rest = lines(80)
    assert bar.startswith("phase 2/2 fine_tuning")
    assert bar.endswith("  0%  0:51:28 left")
    assert whole.startswith("all       2 phases")
    assert whole.endswith(" 33%  0:51:28 left")
    assert rest == [
        "step  1544/4632  epoch 8.00/24  step",
        "train loss 0.5123  top1 0.81    lr 0.001",
        "val   loss 0.43    top1 0.88    top5 0.99  ",
        "best  val/top1 0.883  step 1500  feature_extraction",
        "speed 210.5 images/s  data wait 3%  0:00:00 so far  0.152 s/step",
    ]
    assert lines(80, stage="evaluation")[0].startswith("phase 1/2 feature_extraction"), "whose end is evaluated"
    assert lines(80, step=1000)[0].endswith(" 64%  0:07:43 left"), "544 steps of 0.85 s"


def test_best_and_plan_are_asked_for_at_every_frame(monkeypatch):
    """A plan that an early stop has shortened; what is done between two rows."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    out = Tty()
    console, at = Console(4632, True, file=out), [Position(1544, PHASES, 193, "step", BEST)]
    console.position = lambda: at[0]
    console.begin()
    at[0] = Position(1600, [PHASES[0], SimpleNamespace(name="fine_tuning", start=1544, stop=2000)], 193, "evaluation")
    console._live.refresh()
    console.row(row(1600, **EVALUATED))
    console.close()
    shown = out.getvalue()
    assert "1544/4632" in shown
    assert "1600/2000" in shown
    assert "evaluating" in shown
    assert "step 1600/2000" in shown, "the line of the evaluation, too"


class Tty(io.StringIO):
    def isatty(self):
        return True


def test_what_goes_wrong_in_a_frame_ends_no_training(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    console = Console(10, True, file=Tty())
    console.position = lambda: Position(1, [])
    console.begin()
    console.note("goes on")
    console.close()
    assert "goes on" in console._stream.stream.getvalue()


# --- on a terminal

TRAINING = """
import os, sys, time, types
from tlx.base.console import Console
from tlx.base.live import Position
from tlx.base.terminal import as_courtesy
as_courtesy()
S = types.SimpleNamespace
phases = [S(name="feature_extraction", start=0, stop=1544), S(name="fine_tuning", start=1544, stop=4632)]
at, best = [0], [None]
console = Console(4632, True)
console.position = lambda: Position(at[0], phases, 193, "step", best[0])
console.plan("the plan")
console.begin()
console.note("WARNING: a note that is as long as such notes are, whose words no terminal of any width may break in two")
for step in range(1500, 1600, 10):
    at[0] = step
    row = {"step": step, "epoch": step / 193, "phase": "feature_extraction"}
    console.row(row | {"train/loss": 0.5, "train/top1": 0.8, "train/lr_head": 1e-3,
                       "time/images_per_s": 210.5, "time/step_s": 0.152, "time/left_s": 480.0, "time/data_wait": 0.03})
    if step == 1550:
        best[0] = {"metric": "val/top1", "value": 0.9, "step": step, "phase": "fine_tuning"}
        console.row(row | {"val/loss": 0.4, "val/top1": 0.9, "val/top5": 0.99, "best/val/top1": 0.9})
        print("printed by a library")
        print("said on standard error", file=sys.stderr)
    time.sleep(float(os.environ.get("PAUSE", "0.02")))
console.close()
print("the result")
"""


def on_a_terminal(columns, **env):
    return Screen([sys.executable, "-c", TRAINING], environment(**env), columns=columns)


@pytest.mark.parametrize("columns", [60, 80, 160, 200])
def test_a_terminal_shows_the_training_and_keeps_what_was_said(columns):
    screen = on_a_terminal(columns, PAUSE="0.1")
    moments, shown = [], ""
    while screen.take():
        shown = screen.text
        if "phase 1/2" in shown or "phase 2/2" in shown:
            moments.append(shown)
    left = screen.ended()
    assert any("data wait 3%" in moment and "left" in moment and "lr 0.001" in moment for moment in moments)
    assert "words no terminal" in " ".join(left.split()), "a note is broken between words alone"
    said = ["the plan", "printed by a library", "said on standard error", "the result"]
    assert [line for line in left.splitlines() if line in said] == said, "each once, whole, and in order"
    assert "val/top1 0.9" in left
    for gone in ("phase 1/2", "phase 2/2", "images/s", "all       2 phases"):
        assert gone not in left, "the live view leaves nothing"
    assert screen.shown.rfind(b"\x1b[?25h") > screen.shown.rfind(b"\x1b[?25l"), "the cursor is there"


def test_a_terminal_may_change_its_size():
    screen = on_a_terminal(120, PAUSE="0.15")
    screen.until(lambda text: "phase 1/2" in text)
    screen.resize(70, 40)
    screen.until(lambda text: "phase 2/2" in text)
    assert max(map(len, screen.text.splitlines()[-7:])) < 70
    screen.resize(160, 40)
    left = screen.ended()
    assert left.endswith("the result")
    assert "images/s" not in left


def test_standard_error_in_a_file_stays_there(tmp_path):
    words = ["bash", "-c", f'exec "{sys.executable}" -c "$SCRIPT" 2>"$ERR"']
    err = tmp_path / "err"
    screen = Screen(words, environment(SCRIPT=TRAINING, ERR=str(err)), columns=80)
    assert "said on" not in screen.ended()
    assert err.read_text() == "said on standard error\n"


@pytest.mark.parametrize(
    ("env", "is_live", "colours"),
    [
        ({}, True, True),
        ({"NO_COLOR": "1"}, True, False),
        ({"TERM": "dumb"}, False, False),
    ],
    ids=["usual", "NO_COLOR", "TERM=dumb"],
)
def test_colours_and_a_terminal_that_knows_no_control_characters(env, is_live, colours):
    screen = Screen([sys.executable, "-c", TRAINING], environment(), columns=80, own=env)
    screen.ended()
    assert (b"phase 1/2" in screen.shown) is is_live
    assert (b"\x1b[33m" in screen.shown) is colours
    if not is_live:
        assert b"\x1b" not in screen.shown


def test_a_log_has_whole_lines_and_colours_only_where_they_are_forced():
    def logged(**env):
        words = [sys.executable, "-c", TRAINING]
        return subprocess.run(words, env=environment(**env), capture_output=True, text=True, check=True).stdout

    plain = logged()
    assert "\x1b" not in plain
    assert plain.splitlines()[0] == "the plan"
    assert any("val/top1" in line and line.endswith("left") for line in plain.splitlines()), "one line, however long"
    forced = logged(FORCE_COLOR="1")
    assert "\x1b[33mWARNING" in forced
    assert "phase 1/2" not in forced


def test_quiet_shows_warnings_and_how_it_stopped(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    be_quiet(True)
    try:
        out = Tty()
        console = Console(10, True, file=out)
        console.plan("the plan")
        console.begin()
        console.note("WARNING: odd")
        console.note("phase x: steps 0 to 10")
        console.row(row(5, **TRAINED))
        console.row(row(5, **EVALUATED))
        console.note("stopped at step 5 of 10")
        console.close()
        assert out.getvalue().splitlines() == ["\x1b[33mWARNING: odd\x1b[0m", "stopped at step 5 of 10"]
    finally:
        be_quiet(False)


@pytest.mark.slow
def test_a_notebook_shows_the_same_in_one_display(tmp_path):
    """By a real kernel: the display is there once and was updated; what was said stands beside it."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(TRAINING.replace("as_courtesy()", "", 1))])
    nbclient.NotebookClient(book, timeout=60, kernel_name="python3").execute()
    outputs = book.cells[0].outputs
    shown = [one for one in outputs if one.output_type == "display_data"]
    assert len(shown) == 1, [one.output_type for one in outputs]
    assert "phase 2/2 fine_tuning" in shown[0].data["text/plain"]
    assert "best  val/top1 0.9  step 1550" in shown[0].data["text/html"]
    streams = "".join(one.text for one in outputs if one.output_type == "stream" and one.name == "stdout")
    assert "\x1b[2K" not in streams
    assert "the plan" in streams
    assert len(json.dumps(book.cells[0].outputs)) < 10_000
