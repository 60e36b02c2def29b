"""Checkpoints beside training, full disks, folders that are held, checkpoints of other trainings."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from commands import rows
from composed import claimed, composer
from safetensors.torch import load_file

from tlx.base.differences import differences
from tlx.base.errors import TlxError, UserError
from tlx.plan.config import parse
from tlx.runs import run_lock
from tlx.runs.checkpoint import Checkpoints, Saver, Snapshot, optimizer_state, read, weights_of
from tlx.runs.metrics_file import MetricsFile, read_rows
from tlx.runs.run_folder import RunFolder
from tlx.runs.run_lock import RunLock
from tlx.runs.stop import StopRequest
from tlx.train.loop import fit
from tlx.train.resume import resume
from tlx.train.run import settle


def snapshot(step=0, leaders=(), size=3):
    best = {"step": leaders[0]} if leaders else None
    progress = {"leaders": [{"step": s, "value": 1.0} for s in leaders]}
    return Snapshot(
        model={"w": torch.full((size,), float(step))}, optimizer={}, state={"best": best, "progress": progress}
    )


def steps(folder):
    return sorted(int(p.name[5:]) for p in folder.glob("step-*"))


# --- which checkpoints stay


def test_the_last_the_best_and_those_for_good_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1, every=40)
    for step, leaders in ((10, (10,)), (20, (20, 10)), (30, (20, 10)), (40, (20, 10)), (50, (50, 20)), (60, (50, 20))):
        checkpoints.save(step, snapshot(step, leaders))
    assert steps(tmp_path) == [20, 40, 50, 60]
    assert (tmp_path / "best").resolve().name == "step-00000050"


def test_what_a_killed_process_was_writing_is_swept_away(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, snapshot())
    (tmp_path / ".step-00000002.writing").mkdir()
    (tmp_path / ".step-00000002.writing" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".latest.writing").symlink_to("step-00000001")
    checkpoints.sweep()
    assert {p.name for p in tmp_path.iterdir()} == {"step-00000001", "latest"}


def test_a_process_killed_before_it_moved_the_links_is_made_up_for(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, snapshot(1, (1,)))
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "kept")
    checkpoints.save(2, snapshot(2, (2,)))
    (tmp_path / "kept").rename(tmp_path / "step-00000001")
    for name in ("latest", "best"):
        (tmp_path / name).unlink()
        (tmp_path / name).symlink_to("step-00000001")
    checkpoints.settle(tmp_path / "step-00000002")
    assert steps(tmp_path) == [2]
    assert {(tmp_path / name).resolve().name for name in ("latest", "best")} == {"step-00000002"}


def test_a_damaged_checkpoint_does_not_push_out_the_one_before(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, snapshot(1))
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "kept")
    checkpoints.save(2, snapshot(2))
    (tmp_path / "kept").rename(tmp_path / "step-00000001")
    (tmp_path / "step-00000002" / "model.safetensors").write_bytes(b"")
    newest = checkpoints.newest(print)
    checkpoints.settle(newest)
    assert newest.name == "step-00000001"
    assert newest.exists()


def test_a_changed_state_is_noticed(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, snapshot())
    checkpoints.save(2, snapshot())
    file = tmp_path / "step-00000002" / "state.json"
    file.write_text(file.read_text().replace('"best": null', '"best": 17'))
    said = []
    assert checkpoints.newest(said.append).name == "step-00000001"
    assert "state.json is not what was written" in said[0]


# --- beside training


def saver(folder, said, **options):
    return Saver(Checkpoints(folder), lambda: folder, lambda: None, said.append, **options)


def test_training_does_not_wait_for_the_disk_and_the_snapshot_is_of_its_step(tmp_path, monkeypatch):
    go, real = threading.Event(), Checkpoints.write
    monkeypatch.setattr(Checkpoints, "write", lambda self, *given: (go.wait(10), real(self, *given))[1])
    net, others = torch.nn.Linear(2, 2), set(threading.enumerate())
    saving = saver(tmp_path, [])
    held, before = net.weight.detach().clone(), weights_of(net)
    saving.save(5, Snapshot(before, {}, snapshot().state))  # returns though the disk does not answer
    assert saving.written == 0
    with torch.no_grad():
        net.weight.add_(1.0)
    go.set()
    saving.save(6, snapshot())  # waits for the one before
    assert saving.written == 5
    saving.close()
    assert saving.written == 6
    assert torch.equal(load_file(tmp_path / "step-00000005" / "model.safetensors")["weight"], held)
    assert not [t for t in set(threading.enumerate()) - others if t.name.startswith("checkpoint")]


@pytest.mark.parametrize("background", [True, False])
def test_a_disk_that_refuses_is_told_with_the_room_that_is_needed(tmp_path, monkeypatch, background):
    said = []
    saving = saver(tmp_path / "checkpoints", said, background=background)
    saving.save(1, snapshot())
    real = Checkpoints.write

    def full(self, *given):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Checkpoints, "write", full)
    saving.save(2, snapshot(size=1 << 20))
    saving.settle()
    assert "checkpoint of step 2 could not be written" in said[0]
    assert "No space left" in said[0]
    assert "the one of step 1 is untouched" in said[0]
    assert "it takes 4.0 MiB" in said[0]
    assert saving.written == 1
    monkeypatch.setattr(Checkpoints, "write", real)
    saving.save(3, snapshot())
    saving.close()
    assert saving.written == 3


def test_what_is_written_counts_though_links_or_old_ones_give_trouble(tmp_path, monkeypatch):
    said = []
    saving = saver(tmp_path, said, background=False)
    saving.save(1, snapshot())
    monkeypatch.setattr(Checkpoints, "_link", lambda *_: (_ for _ in ()).throw(OSError(errno.EACCES, "denied")))
    saving.save(2, snapshot())
    assert saving.written == 2
    assert "is written, but not the links to it" in said[0]
    monkeypatch.undo()
    Checkpoints(tmp_path).settle(tmp_path / "step-00000002")
    assert (tmp_path / "latest").resolve().name == "step-00000002"


def test_the_best_one_stays_where_a_better_one_could_not_be_written(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(10, snapshot(10, (10,)))
    for step in (30, 40):  # 20 was better, and the disk full
        checkpoints.save(step, snapshot(step, (20,)))
    assert steps(tmp_path) == [10, 40]
    assert (tmp_path / "best").resolve().name == "step-00000010"


def test_a_checkpoint_that_cannot_be_read_is_passed_over(tmp_path, monkeypatch):
    import tlx.runs.checkpoint

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, snapshot())
    checkpoints.save(2, snapshot())
    real = tlx.runs.checkpoint._hash

    def broken(path):
        if "00000002" in str(path):
            raise OSError(errno.EIO, "Input/output error")
        return real(path)

    monkeypatch.setattr(tlx.runs.checkpoint, "_hash", broken)
    said = []
    assert checkpoints.newest(said.append).name == "step-00000001"
    assert "Input/output error" in said[0]


def test_a_snapshot_of_the_optimizer_is_a_copy():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([{"params": [weight], "names": ["w"]}], lr=0.1, momentum=0.9)
    weight.grad = torch.ones(3)
    optimizer.step()
    kept = optimizer_state(optimizer)["w"]["momentum_buffer"]
    before = kept.clone()
    optimizer.step()
    assert torch.equal(kept, before)
    assert not torch.equal(kept, optimizer.state[weight]["momentum_buffer"])


def test_who_lost_the_folder_saves_no_more(tmp_path):
    def taken():
        raise TlxError("another training has begun in this folder")

    saving = Saver(Checkpoints(tmp_path), taken, lambda: None, print)
    with pytest.raises(TlxError, match="another training"):
        saving.save(1, snapshot())
    saving.close()
    assert not steps(tmp_path)


# --- a whole training, in this process


@pytest.fixture
def compose(shards, tmp_path, monkeypatch):
    backbone = {"name": "toys:small", "weights": "none", "args": {"norm": "group"}}
    often = {"track": {"every": 1}, "checkpoint": {"every": 2}}
    return composer(shards, tmp_path / "run", monkeypatch, backbone=backbone, **often)


def bits(run):
    return load_file(run.checkpoints.folder / "latest" / "model.safetensors")


def test_saving_beside_training_or_in_it_changes_no_bit(compose, tmp_path):
    runs = [
        compose(tmp_path / str(b), checkpoint={"every": every, "background": b}) for b, every in ((True, 1), (False, 5))
    ]
    for run in runs:
        assert fit(run)
        settle(run)
    one, other = map(bits, runs)
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_the_best_ones_by_their_metric_stay(compose):
    run = compose(checkpoint={"every": 2, "keep": {"last": 1, "best": 3, "every": 4}}, evaluate={"every": 1})
    assert fit(run)
    settle(run)
    rows = [row for row in read_rows(run.folder / "metrics.jsonl") if "val/top1" in row]
    rows.sort(key=lambda row: (-row["val/top1"], row["val/loss"], row["step"]))  # ties go to the lower loss
    best = [row["step"] for row in rows[:3]]
    assert [leader["step"] for leader in run.progress.leaders] == best
    assert set(steps(run.checkpoints.folder)) == {*best, 4, 8, 12}
    assert best[0] == run.progress.best["step"]


def test_checkpoints_for_good_come_at_shares_of_the_plan_although_a_phase_ends_early(compose):
    ends_at_6 = {"max": 20, "metric": "val/loss", "patience": 1, "min_delta": 100.0}
    run = compose(
        phases={
            "each": {"lr": 0.02, "duration": 20},
            "feature_extraction": {"duration": ends_at_6},
        },
        checkpoint={"every": 1000, "keep": {"last": 1, "best": 1, "every": "10%"}},
        evaluate={"every": 3},
    )
    assert fit(run)
    settle(run)
    assert run.plan.steps == 26
    best = run.progress.best["step"]
    assert set(steps(run.checkpoints.folder)) == {4, 8, 12, 16, 20, 24, 26, best}  # 10 % of the 40 that were planned


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no file system of its own here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder):
    subprocess.run(["dd", "if=/dev/zero", f"of={folder / 'filler'}", "bs=4k"], stderr=subprocess.DEVNULL, check=False)


def test_a_full_disk_costs_nothing_once_there_is_room_again(compose, small_disk, monkeypatch):
    whole = compose(small_disk.parent / "whole")
    assert fit(whole)
    run = compose(small_disk / "run")
    row = run.journal.console.row

    def disk(seen):
        if seen["step"] == 5:
            fill(small_disk)
        if seen["step"] == 9:
            (small_disk / "filler").unlink(missing_ok=True)
        row(seen)

    monkeypatch.setattr(run.journal.console, "row", disk)
    assert fit(run)
    settle(run)
    loud = [n for n in run.notes if "WARNING" in n]
    assert any("checkpoint of step 6 could not be written" in n and "MiB are free" in n for n in loud)
    assert rows(run.folder) == rows(whole.folder)  # the speed apart
    one, other = bits(run), bits(whole)
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_a_disk_that_stays_full_ends_in_an_error_that_says_from_where_it_goes_on(compose, small_disk, monkeypatch):
    run = compose(small_disk / "run")
    row = run.journal.console.row
    monkeypatch.setattr(run.journal.console, "row", lambda seen: (seen["step"] == 5 and fill(small_disk), row(seen)))
    assert fit(run)
    with pytest.raises(UserError, match=r"could not be written(.|\n)*goes on from step 4"):
        settle(run)
    (small_disk / "filler").unlink()
    again = compose(small_disk / "run")
    resume(again)
    assert again.progress.step == 4
    assert [r["step"] for r in read_rows(run.folder / "metrics.jsonl")][-1] <= 4


def test_rows_wait_in_memory_and_a_row_that_was_cut_off_is_finished(tmp_path, monkeypatch):
    said = []
    file = MetricsFile(tmp_path / "m.jsonl", said.append)
    file.append({"step": 1})
    real, room = os.pwrite, 5

    def little(handle, data, offset):
        nonlocal room
        count, room = min(room, len(data)), max(room - len(data), 0)
        if not count:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, data[:count], offset)

    monkeypatch.setattr(os, "pwrite", little)
    file.append({"step": 2})
    file.append({"step": 3})
    assert len(said) == 1
    assert [r["step"] for r in read_rows(tmp_path / "m.jsonl")] == [1]
    with pytest.raises(OSError, match="No space"):
        file.sync()
    monkeypatch.setattr(os, "pwrite", real)
    file.append({"step": 4})
    assert [r["step"] for r in read_rows(tmp_path / "m.jsonl")] == [1, 2, 3, 4]
    assert len(said) == 2


def test_rows_that_were_lost_are_told(tmp_path):
    said = []
    file = MetricsFile(tmp_path / "m.jsonl", said.append)
    file.append({"step": 1})
    file.cut(10**6)
    assert "rows are missing" in said[0]


def test_readings_that_come_late_are_in_every_checkpoint(compose, monkeypatch):
    run = compose(checkpoint={"every": 5, "keep": {"every": 4}}, evaluate={"every": 100}, track={"every": 100})
    monkeypatch.setattr(type(run.exchange.world), "cuda", True)
    monkeypatch.setattr("tlx.train.loop.on_device", lambda batches, device: batches)
    monkeypatch.setattr("tlx.train.evaluation.on_device", lambda batches, device: batches)
    assert fit(run)
    settle(run)
    for step in (4, 8, 10):
        path = run.checkpoints.path(step)
        if path.exists():
            assert read(path).state["progress"]["samples_seen"] == 8 * step
    assert run.checkpoints.path(4).exists()


# --- one training at a time

HOLD = """
import sys, time
from pathlib import Path
from tlx.runs.run_lock import RunLock
lock = RunLock.take(Path(sys.argv[1]), patience=0)
print("held", flush=True)
time.sleep(100)
"""


def hold(folder):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_folder_is_held_by_one_training_until_its_process_is_gone(tmp_path):
    process = hold(tmp_path)
    try:
        with pytest.raises(UserError, match=rf"another training runs in this folder: process {process.pid} on "):
            RunLock.take(tmp_path, patience=0.2)
        with pytest.raises(UserError, match=rf"another training runs in this folder: process {process.pid} on "):
            run_lock.wait_until_free(tmp_path, patience=0.2)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    run_lock.wait_until_free(tmp_path, patience=0)
    RunLock.take(tmp_path, patience=0).release()


def test_without_locks_the_first_training_notices_at_its_next_checkpoint(tmp_path, monkeypatch):
    def none(*given):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    first = RunLock.take(tmp_path)
    assert not first.enforced
    first.check()
    second = RunLock.take(tmp_path)
    second.check()
    with pytest.raises(TlxError, match="another training has begun in this folder"):
        first.check()
    run_lock.wait_until_free(tmp_path, patience=0)  # nobody can tell, and a look is no claim
    second.check()
    second.release()


def test_who_waits_for_a_folder_that_is_moved_aside_gets_the_new_one(tmp_path):
    folder, got = tmp_path / "run", []
    folder.mkdir()
    first = RunLock.take(folder)
    waiting = threading.Thread(target=lambda: got.append(RunLock.take(folder, patience=20)))
    waiting.start()
    time.sleep(0.3)
    folder.rename(tmp_path / "aside")
    first.release()
    time.sleep(0.3)  # in which nothing is there
    folder.mkdir()
    waiting.join()
    assert got[0].file == folder / ".lock"
    assert os.path.samestat(os.fstat(got[0].lock.handle), os.stat(folder / ".lock"))
    got[0].release()


def test_fresh_moves_the_folder_aside_and_holds_the_new_one(tmp_path):
    raw = {"run": str(tmp_path / "run"), "data": {"train": "x", "batch": 8}, "backbone": {"name": "toys:small"}}
    config = parse(raw)
    first = RunFolder(config.run)
    claimed(first, config, fresh=True)  # nothing was there: nothing is moved
    first.release()
    second = RunFolder(config.run)
    claimed(second, config, fresh=True)
    (aside,) = tmp_path.glob("run.before-*")
    assert (aside / "config.yaml").exists()
    assert first.id != second.id
    with pytest.raises(UserError, match="another training runs"):
        RunLock.take(tmp_path / "run", patience=0)
    second.release()


# --- checkpoints of other trainings


def test_a_checkpoint_of_another_configuration_is_refused_with_what_differs(compose, tmp_path):
    run = compose(tmp_path / "one")
    assert fit(run)
    settle(run)
    other = compose(tmp_path / "other", phases={"each": {"lr": 0.5, "duration": "2ep"}}, track={"every": 3})
    shutil.copytree(run.checkpoints.folder, other.checkpoints.folder, symlinks=True)
    with pytest.raises(UserError) as caught:
        resume(other)
    assert "config.phases.each.lr: 0.02 -> 0.5" in str(caught.value)
    assert "track" not in str(caught.value)
    assert "each.duration" not in str(caught.value)


def test_long_lists_are_compared_by_what_they_do_not_share():
    classes = [f"class {n}" for n in range(100)]
    assert differences({"c": classes}, {"c": [*classes[1:], "new"]}) == ["c: without 'class 0' and with 'new'"]
    assert differences({"c": classes}, {"c": classes[::-1]}) == ["c: in another order"]
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "d": 2}}) == ["a.c: 2 -> None", "a.d: None -> 2"]


def test_what_does_not_fit_is_named_without_a_traceback(compose):
    run = compose()
    assert fit(run)
    settle(run)
    path = run.checkpoints.newest(print)
    bad = read(path)
    bad.optimizer["fc.weight"] = {"exp_avg": torch.zeros(7)}
    bad.state.pop("sha256")
    bad.state.pop("files")
    run.checkpoints.save(run.progress.step, bad)
    with pytest.raises(TlxError, match=r"step-00000012: this is not a checkpoint of this training(.|\n)*exp_avg of fc"):
        resume(compose())


# --- when to stop


def test_a_time_limit_counts_from_the_start_of_the_command(tmp_path):
    stop = StopRequest(tmp_path, launched=False, after=10**6)
    assert not stop.asked(look=True)
    stop.close()
    stop = StopRequest(tmp_path, launched=False, after=0.01)  # this process has been there for longer
    assert not stop.asked(look=False)  # rank 0 looks, for all
    assert stop.asked(look=True)
    assert "time limit" in stop.reason
    stop.close()
