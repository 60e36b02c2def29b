"""`tlx train` as users and accidents treat it: killed, stopped, started again, misconfigured."""

from __future__ import annotations

import html
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_runs import raw_for, same_bits
from commands import environment, kill_all, last_step, ranks_of, rows, start, status, tlx, wait_for_step, write_config
from composed import claimed
from images import make_shards
from safetensors.torch import load_file

from tlx.base.errors import UserError
from tlx.plan.config import parse
from tlx.runs.run_folder import RunFolder
from tlx.runs.run_lock import RunLock
from tlx.runs.run_status import folder_of, status_text


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards") / "s", classes=3, per_class={"train": 10, "val": 7}, size=24)


@pytest.fixture(scope="module")
def config(shards, tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("config") / "c.yaml", raw_for(shards, "unset"))


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """An uninterrupted training."""
    run = tmp_path_factory.mktemp("whole") / "run"
    done = tlx("train", config, f"run={run}", "track.report=true")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"report: {run}/report.html" in done.stdout
    return run


def check_report(run, typed):
    made = {str(p.relative_to(run)) for p in run.glob("**/*") if p.suffix in (".html", ".png")}
    figures = ("curves", "phases", "plan", "confusion", "reliability")
    assert {"report.html", *(f"figures/{name}.png" for name in figures)} <= made
    assert json.loads((run / "result.json").read_text())["command"] == typed
    assert typed in html.unescape((run / "report.html").read_text())


def test_a_training_leaves_its_report_and_the_command_that_was_typed(whole, config):
    check_report(whole, f"python -m tlx train {config} run={whole} track.report=true")


@pytest.mark.slow
def test_the_command_that_was_typed_names_launcher_and_ranks(config, tmp_path):
    words = ["train", config, f"run={tmp_path / 'run'}", "track.report=true", "phases.fine_tuning.duration=2"]
    done = tlx(*words, ranks=2)
    assert f"report: {tmp_path}/run/report.html" in done.stdout
    launcher = "python -m torch.distributed.run --standalone --nproc-per-node=2 -m"
    check_report(tmp_path / "run", f"{launcher} tlx {' '.join(map(str, words))}")


def test_every_row_of_training_tells_its_speed_and_the_best_so_far(whole):
    told = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    training = [row for row in told if "train/lr_head" in row]
    assert len(training) == 400
    for row in training:
        assert row["time/images_per_s"] > 0
        assert row["time/step_s"] > 0
        assert 0.05 < row["memory/process_gib"] < 20
        assert (row["time/left_s"] == 0) is (row["step"] == 400)
    best = 0.0
    for row in told:
        best = max(best, row.get("val/top1", 0.0))
        assert row.get("best/val/top1", 0.0) == best


@pytest.mark.slow
def test_a_report_that_cannot_be_drawn_is_one_warning_and_the_run_is_done(config, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "figures").write_text("in the way")
    words = ("train", config, f"run={run}", "track.report=true", "phases.feature_extraction.duration=2")
    done = tlx(*words, "phases.fine_tuning.duration=2", is_forked=True)
    assert (done.returncode, status(run)["status"]) == (0, "done")
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert "no report was drawn" in warnings[0]
    assert f"-> tlx report {run}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (run / "report.html").exists()
    (run / "figures").unlink()
    again = tlx(
        *words, "phases.fine_tuning.duration=2", is_forked=True
    )  # it is done: the result is shown, the report made up for
    assert f"report: {run}/report.html" in again.stdout
    assert (run / "figures" / "curves.png").exists()


def test_the_run_folder_holds_all_that_is_promised(whole):
    run = whole
    for name in ("config.yaml", "plan.json", "status.json", "metrics.jsonl", "result.json"):
        assert (run / name).exists(), name
    latest, best = run / "checkpoints" / "latest", run / "checkpoints" / "best"
    assert {p.name for p in latest.iterdir()} == {"model.safetensors", "optimizer.pt", "state.json"}
    state = json.loads((latest / "state.json").read_text())
    assert state["step"] == 400
    assert state["identity"]["classes"] == ["class0", "class1", "class2"]
    result = json.loads((run / "result.json").read_text())
    assert best.resolve().name == f"step-{result['best']['step']:08d}"
    assert result["phases"].keys() == {"feature_extraction", "fine_tuning"}
    assert result["last"]["val/top1"] > 0.9
    assert status(run)["status"] == "done"
    assert all(key.startswith(("features.", "fc.")) for key in load_file(latest / "model.safetensors"))


def test_the_same_command_again_shows_the_result_and_a_changed_one_is_refused(whole, config, tmp_path):
    run = tmp_path / "copy"
    shutil.copytree(whole, run, symlinks=True)
    before, said, verdict = (run / "metrics.jsonl").read_bytes(), (run / "status.json").read_bytes(), tmp_path / "v"
    again = tlx("train", config, f"run={run}", is_forked=True, TLX_VERDICT=str(verdict))
    assert again.returncode == 0
    assert "best" in again.stdout
    assert json.loads(verdict.read_text())["status"] == "done"
    assert (status(run)["step"], status(run)["steps"]) == (400, 400)
    words = "train", config, f"run={run}", "phases.each.lr=0.5", "data.workers=0"
    changed = tlx(*words, is_forked=True, TLX_VERDICT=str(verdict))
    assert changed.returncode == 2
    assert verdict.read_text().startswith('{"status": "user-error"')
    assert "phases.each.lr: 0.01 -> 0.5" in json.loads(verdict.read_text())["message"]
    assert "phases.each.lr: 0.01 -> 0.5" in changed.stderr
    assert "workers" not in changed.stderr
    assert (run / "status.json").read_bytes() == said  # a mistake of a later command is none of the run's
    assert "Traceback" not in changed.stderr
    fresh = tlx(
        "train", config, f"run={run}", "phases.each.lr=0.5", "phases.fine_tuning.duration=5", "--fresh", is_forked=True
    )
    assert fresh.returncode == 0, fresh.stderr
    assert last_step(run) == 105
    (aside,) = tmp_path.glob("copy.before-*")
    assert (aside / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_training_again_from_the_written_configuration_gives_the_same_run(whole, tmp_path):
    run = tmp_path / "again"
    done = tlx("train", whole / "config.yaml", f"run={run}", "data.workers=2", is_forked=True)
    assert done.returncode == 0, done.stderr
    same_bits(run, whole)


@pytest.mark.slow
def test_kill_9_without_a_launcher_then_the_same_command_again_gives_the_same_bits(whole, config, tmp_path):
    """Two ranks are killed in `test_survival`."""
    run = tmp_path / "killed"
    for step in (70, 230):
        process = start("train", config, f"run={run}")
        wait_for_step(process, run, step)
        kill_all(process)
    done = tlx("train", config, f"run={run}", is_forked=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed from" in done.stdout
    same_bits(run, whole)


@pytest.mark.slow
def test_a_request_to_stop_leaves_a_resumable_run(whole, config, tmp_path):
    run = tmp_path / "stopped"
    process = start("train", config, f"run={run}")
    wait_for_step(process, run, 50)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    assert status(run)["status"] == "resumable"
    stopped_at = status(run)["step"]
    assert f"stopped at step {stopped_at} of 400 (SIGTERM) and saved" in process.stdout.read()
    assert rows(run)[-1]["step"] == stopped_at < 400
    second = start("train", config, f"run={run}")
    wait_for_step(second, run, stopped_at + 20)
    (run / "stop").touch()
    assert second.wait(timeout=60) == 75
    assert tlx("train", config, f"run={run}", is_forked=True).returncode == 0
    same_bits(run, whole)


@pytest.mark.slow
def test_under_a_launcher_a_stop_ends_with_0_and_another_number_of_ranks_goes_on(config, shards, tmp_path):
    run, grouped = tmp_path / "elastic", {"args": {"norm": "group"}, "name": "toys:small", "weights": "none"}
    config = write_config(tmp_path / "g.yaml", raw_for(shards, run, backbone=grouped))
    process = start("train", config, ranks=2)
    wait_for_step(process, run, 120)
    for rank in ranks_of(process)[:1]:
        rank.send_signal(signal.SIGTERM)  # one rank is asked, all agree
    assert process.wait(timeout=60) == 0
    assert status(run)["status"] == "resumable"
    assert tlx("train", config, is_forked=True).returncode == 0
    assert tlx("train", config, f"run={tmp_path / 'one'}", is_forked=True).returncode == 0
    one, other = (load_file(r / "checkpoints" / "latest" / "model.safetensors") for r in (run, tmp_path / "one"))
    assert all((one[k] - other[k]).abs().max() < 1e-3 for k in one)


@pytest.mark.slow
def test_ctrl_c_on_a_terminal_reaches_launcher_and_ranks_and_leaves_a_resumable_run(config, tmp_path):
    run = tmp_path / "interrupted"
    process = start("train", config, f"run={run}", ranks=2)
    wait_for_step(process, run, 60)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert status(run)["status"] == "resumable"
    assert rows(run)[-1]["step"] == status(run)["step"]


def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_used(whole, config, tmp_path):
    run = tmp_path / "damaged"
    shutil.copytree(whole, run, symlinks=True)
    (run / "result.json").unlink()
    newest = (run / "checkpoints" / "latest").resolve() / "model.safetensors"
    data = bytearray(newest.read_bytes())
    data[-5] ^= 1
    newest.write_bytes(data)
    done = tlx("train", config, f"run={run}", is_forked=True)
    assert done.returncode == 0, done.stderr
    assert "is damaged (model.safetensors is not what was written); going back" in done.stdout
    same_bits(run, whole)


@pytest.mark.slow
def test_a_users_mistake_ends_every_rank_with_0_and_is_said_once(config, tmp_path):
    run, verdict = tmp_path / "mistake", tmp_path / "verdict"
    told = {"is_forked": True, "TLX_VERDICT": str(verdict)}
    for words, why in ((["data.train=nowhere"], "nowhere"), (["data.bach=3"], 'did you mean "batch"')):
        verdict.write_text("")
        done = tlx("train", config, f"run={run}", *words, ranks=2, **told)
        assert done.returncode == 0
        assert done.stderr.count("error:") == 1
        assert why in done.stderr
        assert "Traceback" not in done.stderr
        said = json.loads(verdict.read_text())
        assert said["status"] == "user-error"
        assert why in said["message"]
        assert not run.exists()
    assert tlx("train", config, f"run={run}", "data.train=nowhere", **told).returncode == 2
    assert not run.exists()


def test_unreadable_samples_are_an_error_or_within_a_quota_named_and_counted(shards, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(shards, broken)
    index = json.loads((broken / "train" / "index.json").read_text())
    from tlx.data.shards.manifest import Manifest

    tar, offset, size = Manifest.open(broken / "train").locate(4)
    with open(tar, "r+b") as file:
        file.seek(offset)
        file.write(os.urandom(size))
    assert index["samples"] == 30
    short = {"each": {"lr": 0.01}, "feature_extraction": {"duration": 4}, "fine_tuning": {"duration": 4}}
    config = write_config(tmp_path / "c.yaml", raw_for(broken, tmp_path / "run", phases=short))
    failed = tlx("train", config, ranks=2, is_forked=True)
    assert "1 unreadable samples, 0 allowed" in failed.stderr
    assert f"{tar.name}: " in failed.stderr
    assert "tlx shards check" in failed.stderr
    [(where, reason)] = json.loads((tmp_path / "run" / "result.json").read_text())["unreadable"].items()
    assert f"{where}: {reason}" in failed.stderr
    assert status(tmp_path / "run")["status"] == "user-error"
    # the same command, corrected: no checkpoint of the first start is there to be protected
    allowed = tlx("train", config, "data.bad_samples=1", ranks=2, is_forked=True)
    assert allowed.returncode == 0, allowed.stderr
    assert "failed before its first checkpoint; its folder was moved to " in allowed.stderr
    (aside,) = tmp_path.glob("run.before-*")
    assert (aside / "metrics.jsonl").exists()
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert len(result["unreadable"]) == 1
    assert result["replaced"] == 2  # two epochs
    [(where, reason)] = result["unreadable"].items()
    assert f"1 unreadable sample, replaced 2 times:\n    {where}: {reason}" in allowed.stdout


@pytest.mark.slow
def test_early_stopping_and_plateaus_end_phases(shards, tmp_path):
    plateau = {"max": 200, "metric": "val/loss", "patience": 2, "min_delta": 10.0}
    phases = {"each": {"lr": 0.01}, "feature_extraction": {"duration": plateau}, "fine_tuning": {"duration": 300}}
    config = write_config(
        tmp_path / "c.yaml",
        raw_for(shards, tmp_path / "run", phases=phases, evaluate={"every": 4, "patience": 30}),
    )
    assert tlx("train", config, is_forked=True).returncode == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["phases"]["feature_extraction"]["stop"] == 12  # the first is the best, two bring nothing
    assert result["phases"]["fine_tuning"]["start"] == 12
    assert result["step"] < 312
    assert result["finished"]


def test_where_a_run_stands_is_told_from_its_folder(whole, config, tmp_path):
    told = status_text(whole)
    assert re.search(r"run: done since 20\d\d-", told)
    assert "step 400 of 400 (100%), phase fine_tuning" in told
    assert "latest checkpoint: step-00000400" in told
    assert "->" not in told
    killed = tmp_path / "killed"
    (killed / "checkpoints" / "step-00000030").mkdir(parents=True)
    (killed / "checkpoints" / "latest").symlink_to("step-00000030")
    (killed / "status.json").write_text('{"status": "running", "time": "then"}')
    (killed / "plan.json").write_text('{"steps": 60}')
    (killed / "metrics.jsonl").write_text('{"step": 44, "phase": "a", "train/loss": 0.5}\n{"step": 45, "pha')
    told = status_text(killed)
    assert "was killed" in told
    assert "step 44 of 60 (73%), phase a, train/loss 0.5" in told
    assert "the same command goes on" in told
    lock = RunLock.take(killed)
    assert f"running since then\n  trained by process {os.getpid()} on " in status_text(killed)
    lock.release()
    assert status_text(killed).endswith("-> the same command goes on from the latest checkpoint")
    (killed / "status.json").write_text('{"status": "user-error", "message": "no such \\u001b[2Jkey\\n  -> see"}')
    assert "  no such \\x1b[2Jkey\n    -> see\n" in status_text(killed)
    assert status_text(killed).endswith("-> mend that; the same command goes on from the latest checkpoint")
    shutil.rmtree(killed / "checkpoints")
    assert status_text(killed).endswith("-> mend that; the same command begins anew")
    (killed / "status.json").write_text('{"status": "fault"}')
    assert status_text(killed).endswith("-> the same command begins anew")
    assert status_text(tmp_path / "nothing").endswith("nothing: not there yet")
    assert folder_of(config, ["run=elsewhere"]) == Path("elsewhere")
    with pytest.raises(UserError, match="takes no key=value"):
        folder_of(killed, ["seed=1"])


@pytest.mark.slow
def test_a_stream_that_is_closed_changes_no_exit_code(config, tmp_path):
    short = "phases.feature_extraction.duration=2 phases.fine_tuning.duration=2"

    def code(words):
        script = f"{shlex.quote(sys.executable)} -m tlx train {config} run={tmp_path / 'run'} {short} {words}"
        done = subprocess.run(["bash", "-c", script], env=environment(), capture_output=True, text=True, timeout=120)
        assert "Traceback" not in done.stderr + done.stdout
        return done.returncode

    assert (code(">&-"), status(tmp_path / "run")["status"]) == (0, "done")
    assert code("2>&-") == 0
    assert code("| :; exit ${PIPESTATUS[0]}") == 0  # a reader that has gone
    assert code("data.bach=3 2>&-") == 2
    assert code("data.bach=3 2>/dev/full") == 2


def test_a_requeued_job_begins_anew_only_once(tmp_path, monkeypatch):
    """Slurm may requeue a job before, or after, its first start has moved the former run aside."""
    config = parse(raw_for(tmp_path / "s", tmp_path / "run"))

    def begin():
        folder = RunFolder(tmp_path / "run")
        claimed(folder, config, fresh=True)
        folder.release()

    begin()
    (tmp_path / "run" / "metrics.jsonl").touch()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    begin()  # the first start has come to nothing
    assert len(list(tmp_path.glob("run.before-*"))) == 1
    (tmp_path / "run" / "metrics.jsonl").touch()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    begin()
    assert (tmp_path / "run" / "metrics.jsonl").exists()
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    begin()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
