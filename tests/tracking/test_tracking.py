"""Rows, trackers and the progress display: what survives which accident."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from tracked import history

from tlx.base import plug
from tlx.base.console import Console
from tlx.base.errors import UserError
from tlx.runs.metrics_file import MetricsFile, read_rows
from tlx.tracking import PhaseEnd, RunInfo, TrainedModel, guarded
from tlx.tracking.tracker import WAITING_ROWS, Tracker


def row(step: int, **more: object) -> dict[str, object]:
    return {"step": step, "epoch": step / 10, "phase": "feature_extraction", "train/loss": 1 / (step + 1), **more}


@pytest.fixture
def run(tmp_path: Path) -> RunInfo:
    return RunInfo(folder=tmp_path, name="a name", run_id="fixed-id", config={"seed": 3})


# --- metrics.jsonl


def test_rows_are_strict_json_and_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append({"step": 1, "a": math.nan, "b": -math.inf, "c": np.float32(0.5), "d": [math.inf, 1]})

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    raw = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert raw == {"step": 1, "a": None, "b": None, "c": 0.5, "d": [None, 1]}
    [back] = read_rows(tmp_path / "metrics.jsonl")
    assert math.isnan(back["a"])
    assert back["c"] == 0.5


def test_a_row_is_in_the_file_as_soon_as_it_was_appended(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append(row(1))
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 1
    file.sync()


def test_cut_goes_back_to_the_checkpoint_and_appending_goes_on_there(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.append(row(1))
    mark = file.position()
    file.append(row(2))
    file.close()
    again = MetricsFile(path)
    assert again.position() > mark
    again.cut(mark)
    again.append(row(3))
    assert [r["step"] for r in read_rows(path)] == [1, 3]


def test_cut_drops_a_torn_last_line_and_never_grows_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path).append(row(1))
    whole = path.stat().st_size
    with path.open("ab") as file:
        file.write(b'{"step": 2, "trai')
    assert [r["step"] for r in read_rows(path)] == [1], "a report may read while a row is written"
    file = MetricsFile(path)
    file.cut(10**6)
    assert path.stat().st_size == whole
    file.append(row(2))
    assert [r["step"] for r in read_rows(path)] == [1, 2]


# --- the guard


class Breaks:
    def __init__(self) -> None:
        self.calls = 0

    def log(self, row: object) -> None:
        self.calls += 1
        raise ConnectionResetError("Connection lost")

    def finish(self, result: object) -> None:
        raise AssertionError("a tracker that failed must be left alone")


def test_a_failing_tracker_is_warned_about_once_and_then_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    broken = Breaks()
    tracker = guarded("mine", lambda: broken)
    for step in range(5):
        tracker.log(row(step))
    tracker.finish({})
    said = capsys.readouterr().err
    assert said.count("warning") == 1
    assert 'tracker "mine" failed' in said
    assert "Connection lost" in said
    assert broken.calls == 1


def test_a_tracker_that_cannot_start_does_not_stop_training(capsys: pytest.CaptureFixture[str]) -> None:
    def make() -> Breaks:
        raise OSError("no space left")

    tracker = guarded("mine", make)
    tracker.log(row(1))
    assert capsys.readouterr().err.count("no space left") == 1


def test_what_the_user_must_mend_is_not_swallowed() -> None:
    def make() -> Breaks:
        raise UserError("TensorBoard is not installed")

    with pytest.raises(UserError, match="not installed"):
        guarded("tensorboard", make)


class Keeps:
    """Has what it was told, and in which thread it was made."""

    def __init__(self) -> None:
        self.thread = threading.current_thread()
        self.steps: list[object] = []
        self.result: object = None
        self.let_go = threading.Event()

    def log(self, row: dict[str, object]) -> None:
        assert threading.current_thread() is self.thread
        self.steps.append(row["step"])

    def finish(self, result: object) -> None:
        self.result = result

    def abandon(self) -> None:
        self.let_go.set()


def test_a_tracker_that_begins_slowly_holds_nothing_up_and_gets_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    go, made = threading.Event(), []

    def make() -> Keeps:
        go.wait(60)
        made.append(Keeps())
        return made[0]

    tracker = guarded("mine", make, begin_s=0.1)
    tracker.log(row(1))
    assert 'the tracker "mine" has not begun within 0.1 s' in capsys.readouterr().err
    go.set()
    tracker.log(row(2))
    tracker.finish({"finished": True})
    assert made[0].steps == [1, 2]
    assert made[0].result == {"finished": True}
    assert made[0].thread is not threading.current_thread()
    assert capsys.readouterr().err == ""


def test_a_tracker_that_begins_after_the_end_lets_go_and_its_error_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    go, late = threading.Event(), Keeps()

    def make() -> Keeps:
        go.wait(60)
        return late

    tracker = guarded("mine", make, begin_s=0.1, finish_s=0.1)
    tracker.finish({})
    go.set()
    assert late.let_go.wait(60)
    assert late.result is None
    assert capsys.readouterr().err.count("warning") == 2, "slow to begin, and not at its end"

    def fails() -> Keeps:
        broken.wait(60)
        raise UserError("TensorBoard is not installed")

    broken = threading.Event()
    tracker = guarded("mine", fails, begin_s=0.1)
    broken.set()
    tracker.finish({})
    assert "UserError: TensorBoard is not installed" in capsys.readouterr().err


def test_letting_go_that_hangs_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tlx.tracking.tracker.ABANDON_S", 0.1)
    over = threading.Event()

    class Stuck(Hangs):
        def abandon(self) -> None:
            over.wait(60)
            self.let_go.set()

    stuck = Stuck()
    guarded("mine", lambda: stuck, finish_s=0.1).finish({})
    assert not stuck.let_go.is_set(), "the end came while it was still at it"
    over.set()
    assert stuck.let_go.wait(60)


def test_a_tracker_is_told_of_a_fault_and_not_of_a_stop() -> None:
    kept: list[Keeps] = []

    def begun() -> Tracker:
        kept.append(Keeps())
        return kept[-1]

    stopped, faulty = guarded("a", begun), guarded("b", begun)
    stopped.finish({"finished": False})
    with contextlib.suppress(ZeroDivisionError):
        try:
            _ = 1 / 0
        finally:
            faulty.finish({"finished": False})
    assert [k.result for k in kept] == [{"finished": False}, {"finished": False, "fault": "ZeroDivisionError"}]


class Hangs:
    def __init__(self) -> None:
        self.let_go = threading.Event()

    def log(self, row: object) -> None:
        self.let_go.wait(60)

    finish = log

    def abandon(self) -> None:
        self.let_go.set()


@pytest.mark.parametrize("step", ["log", "finish"])
def test_a_tracker_that_hangs_holds_nothing_up(capsys: pytest.CaptureFixture[str], step: str) -> None:
    hanging = Hangs()
    tracker = guarded("mine", lambda: hanging, finish_s=0.2)
    if step == "log":
        for at in range(WAITING_ROWS + 10):  # more than may wait
            tracker.log(row(at))
    tracker.finish({})
    said = capsys.readouterr().err
    assert said.count("warning") == 1
    assert (f"{WAITING_ROWS} rows wait" if step == "log" else "within 0.2 s") in said
    assert hanging.let_go.is_set(), "it must be told to let go"


class Shows(Keeps):
    """Takes what a phase came to, and not the weights."""

    finish_s = 0.5

    def phase_ended(self, end: object) -> None:
        self.steps.append(end)

    def model_trained(self, model: object) -> None:
        raise OSError("no room for it")


def test_a_tracker_is_told_of_phases_and_weights_where_it_has_a_method(capsys: pytest.CaptureFixture[str]) -> None:
    shows, plain = Shows.__new__(Shows), Keeps.__new__(Keeps)

    def made(kept: Keeps) -> Keeps:
        kept.__init__()
        return kept

    end = PhaseEnd(Path(), "head", 0, 0, 3)
    for tracker in (guarded("a", lambda: made(shows)), guarded("b", lambda: made(plain))):
        tracker.log(row(3))
        tracker.phase_ended(end)
        tracker.model_trained(TrainedModel(Path("m"), ("best", "last"), 3, "raw", {}, {}))
        tracker.log(row(4))
        tracker.finish({"finished": True})
    assert (shows.steps, plain.steps) == ([3, end, 4], [3, 4])
    assert shows.result == plain.result == {"finished": True}, "it goes on without them"
    said = capsys.readouterr().err
    assert (
        said
        == 'warning: the tracker "a" did not take the best and last weights (OSError: no room for it); it goes on\n'
    )


def test_a_tracker_that_uploads_much_may_take_longer_at_the_end_of_a_training_that_is_done() -> None:
    for finished in (True, False):
        slow = Shows.__new__(Shows)

        def made(slow: Shows = slow) -> Shows:
            slow.__init__()
            slow.finish = lambda result: (time.sleep(0.2), setattr(slow, "result", result))
            return slow

        guarded("a", made, finish_s=0.05).finish({"finished": finished})
        assert (slow.result is not None) is finished


# --- trackers that come with tlx


def test_importing_trackers_imports_no_tracking_library() -> None:
    heavy = ("wandb", "torch", "tensorboard", "mlflow", "numpy", "PIL")
    code = f"import sys, tlx.tracking; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_arguments_of_trackers_are_checked() -> None:
    assert plug.names("tracker")[:3] == ["mlflow", "tensorboard", "wandb"]
    with pytest.raises(UserError, match='did you mean "project"'):
        plug.arguments(plug.find("tracker", "wandb"), {"projct": "x"}, label="tracker wandb")


@pytest.fixture
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without credentials, and without a way to the server should anything try."""
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_MODE", "")  # what `export WANDB_MODE=` in a batch script leaves; wandb itself refuses it


@pytest.mark.usefixtures("no_account")
def test_wandb_without_an_account_goes_offline_and_a_resumed_run_is_whole(run: RunInfo) -> None:
    import wandb as library

    make = plug.find("tracker", "wandb")
    metrics = MetricsFile(run.folder / "metrics.jsonl")

    def start(steps: range, resumed: bool) -> None:
        tracker = make(RunInfo(run.folder, run.name, run.run_id, run.config, resumed), project="p", tags=["t"])
        for step in steps:
            metrics.append(row(step))
            tracker.log(row(step))
        tracker.finish({"best": {"value": 0.5}, "finished": steps.stop == 5})

    start(range(3), False)
    start(range(3, 5), True)
    library.teardown()
    header, rows = history(run.folder)
    assert (header["run_id"], header["project"], header["display_name"]) == ("fixed-id", "p", "a name")
    assert [r["step"] for r in rows] == [0, 1, 2, 3, 4], "the newest offline folder holds the whole run"


@pytest.mark.usefixtures("no_account")
def test_training_goes_on_when_the_wandb_service_is_killed(run: RunInfo, capfd: pytest.CaptureFixture[str]) -> None:
    import wandb as library

    tracker = guarded("wandb", lambda: plug.find("tracker", "wandb")(run))
    tracker.log(row(1))
    service = [c for c in psutil.Process().children(recursive=True) if "wandb-core" in c.name()]
    assert service, "nothing to kill"
    for process in service:
        process.kill()
        process.wait(5)
    for step in range(2, 100):
        tracker.log(row(step))
    tracker.finish({})
    with contextlib.suppress(Exception):  # it is dead; the next test starts its own
        library.teardown()
    assert capfd.readouterr().err.count("warning: the tracker") == 1


UNREACHABLE = """
import sys
import threading
import time
from pathlib import Path
from tlx.tracking import RunInfo, wandb
tracker = wandb(RunInfo(Path(sys.argv[1]), "a name", "fixed-id", {}))
tracker.log({"step": 1})
tracker.finish({"finished": True})
"""


@pytest.mark.slow
@pytest.mark.usefixtures("no_account")
def test_wandb_goes_offline_when_the_server_does_not_answer(run: RunInfo) -> None:
    environment = {**os.environ, "WANDB_API_KEY": "a" * 40}
    done = subprocess.run(
        [sys.executable, "-c", UNREACHABLE, str(run.folder)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.lower().count("warning") == 1, done.stderr
    assert "this start is logged offline" in done.stderr
    assert [r["step"] for r in history(run.folder)[1]] == [1]


def test_tensorboard_takes_back_points_after_the_checkpoint(run: RunInfo) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    make, metrics = plug.find("tracker", "tensorboard"), MetricsFile(run.folder / "metrics.jsonl")
    first = make(run)
    for step in range(4):
        first.log(row(step))
    first.finish({})
    metrics.append(row(0))
    metrics.append(row(1))  # the checkpoint knows no more
    second = make(RunInfo(run.folder, run.name, run.run_id, {}, resumed=True))
    second.log(row(2, **{"train/loss": 7.0}))
    second.finish({"step": 2, "test": {"metrics": {"top1": {"value": 0.5, "low": 0.25, "high": 0.75}}}})
    reader = events.EventAccumulator(str(run.folder / "tensorboard"))
    reader.Reload()
    assert [(e.step, round(e.value, 3)) for e in reader.Scalars("train/loss")] == [(0, 1.0), (1, 0.5), (2, 7.0)]
    assert [(e.step, e.value) for e in reader.Scalars("test/top1")] == [(2, 0.5)]


def test_mlflow_goes_on_with_the_run_and_has_each_step_once(run: RunInfo, monkeypatch, tmp_path) -> None:
    client = pytest.importorskip("mlflow.tracking").MlflowClient(uri := f"sqlite:///{tmp_path}/m.db")
    monkeypatch.chdir(tmp_path)
    make, metrics = plug.find("tracker", "mlflow"), MetricsFile(run.folder / "metrics.jsonl")

    def start(steps: range, *, finished: bool, told: bool = True) -> None:
        tracker = make(RunInfo(run.folder, run.name, run.run_id, {"seed": 3}, steps.start > 1), uri=uri)
        for step in steps:
            metrics.append(row(step))
            if told:
                tracker.log(row(step))
        if told:
            tracker.finish({"finished": finished, "step": steps[-1]})

    start(range(1, 4), finished=False)  # 3 waits: it may yet get its evaluation
    start(range(4, 6), finished=False, told=False)  # killed
    start(range(3, 8), finished=True)  # back to the checkpoint, and on
    (found,) = client.search_runs([client.get_experiment_by_name("tlx").experiment_id])
    assert (found.info.status, found.info.run_name) == ("FINISHED", "a name")
    assert sorted(m.step for m in client.get_metric_history(found.info.run_id, "train/loss")) == list(range(1, 8))
    assert found.data.params == {"seed": "3"}


# --- the display


def test_a_log_has_plain_lines_and_evaluations_always() -> None:
    out = io.StringIO()
    console = Console(100, True, file=out)
    console.plan("phase [a]  1e-3")
    for step in range(1, 30):
        console.row(row(step, **{"train/lr_head": 1e-3, "train/lr_stem": 1e-5}))
    console.row(row(30, **{"val/loss": 0.25, "val/top1": 0.9}))
    console.close()
    lines = out.getvalue().splitlines()
    assert lines[0] == "phase [a]  1e-3", "brackets are text, not markup"
    assert "\x1b" not in out.getvalue()
    assert "lr 0.001" in lines[1]
    assert "val/top1 0.9" in lines[-1]
    assert len(lines) == 3, "rows of training are thinned out"


def test_a_terminal_gets_a_bar_and_the_evaluations_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tty(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    out = Tty()
    console = Console(100, True, file=out)
    console.row(row(50))
    console.row(row(60, **{"val/top1": 0.5}))
    console.close()
    assert "60/100" in out.getvalue()
    assert "val/top1 0.5" in out.getvalue()
    assert "\x1b[" in out.getvalue()


def test_other_ranks_are_silent() -> None:
    out = io.StringIO()
    console = Console(10, False, file=out)
    console.plan("x")
    console.row(row(1, **{"val/top1": 1.0}))
    console.close()
    assert out.getvalue() == ""
