"""Ranks that die, hang, or were given different things: named, and the end of all ranks within a bound."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch.distributed as dist
from commands import free_port, kill_all, ranks_of, start, status, wait_for_step
from images import make_shards
from places import SUPPORT
from plain_ranks import BOUND_S, PATIENCE_S, PATIENT, Plain, took

import tlx.ranks.store_prefix
from tlx.base.errors import TlxError, UserError
from tlx.ranks.heartbeat import HeartbeatChannel
from tlx.ranks.same_inputs import compare
from tlx.ranks.state import Heartbeat, SharedState, Snapshot
from tlx.ranks.store_prefix import of_this_attempt
from tlx.ranks.watch import Watch
from tlx.runs.run_folder import RunFolder


def name(rank, pid) -> str:
    return f"rank {rank} ({socket.gethostname()}, pid {pid})"


# Deaths


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1, 2], ids="rank{}".format)
def test_a_killed_rank_is_named_without_a_launcher(config, run, dead, record_property):
    with Plain(config, ranks=3 if dead else 2) as plain:
        plain.until_step(run, 10)
        killed = plain.ranks[dead]
        killed.kill()
        since = time.monotonic()
        assert set(plain.ends(within=BOUND_S, but=[dead])) == {1}, plain.text()
        took(record_property, f"rank {dead} killed, no launcher", since)
        said = status(run)
        assert said["status"] == "fault", plain.text()
        for rank in range(len(plain.ranks)):
            if rank != dead:
                assert name(dead, killed.pid) in plain.text(rank)
        assert name(dead, killed.pid) in said["message"]
        assert "at step " in said["message"]


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1])
def test_a_killed_rank_is_named_under_torchrun_and_is_no_stop_request(config, run, dead, record_property):
    process = start("train", config, ranks=2)
    try:
        wait_for_step(process, run, 10)
        killed = ranks_of(process)[dead]
        killed.kill()
        since = time.monotonic()
        text = process.communicate(timeout=BOUND_S)[0]
        took(record_property, f"rank {dead} killed under torchrun", since)
        assert process.returncode == 1
        assert status(run)["status"] == "fault", text[-3000:]
        assert f"{name(dead, killed.pid)} died at step " in status(run)["message"]
        assert f"fault: {name(dead, killed.pid)} died" in text
    finally:
        kill_all(process)


@pytest.mark.slow
def test_a_rank_that_raises_is_named_with_what_it_said(config, run):
    with Plain(config, "backbone.name=toys:faulty", "backbone.args={how: raise}") as plain:
        assert set(plain.ends(within=240)) == {1}
        assert re.search(rf"{re.escape(name(1, plain.ranks[1].pid))} failed at step \d: ", plain.text(0))
        assert "ValueError: a fault of the backbone" in status(run)["message"]


# Hangs


@pytest.mark.slow
def test_a_rank_that_sleeps_is_found_with_stacks_of_all(config, run, record_property):
    with Plain(config, "backbone.name=toys:faulty", "backbone.args={how: sleep}", PATIENT) as plain:
        plain.until_step(run, 1)
        since = time.monotonic()
        assert set(plain.ends(within=PATIENCE_S + BOUND_S)) == {1}, plain.text()
        took(record_property, f"rank 1 sleeps, patience {PATIENCE_S} s", since)
        said = status(run)
        assert said["status"] == "fault"
        assert re.search(rf"{re.escape(name(1, plain.ranks[1].pid))} hangs at step \d, in 'step'", said["message"])
        assert name(0, plain.ranks[0].pid) not in said["message"]
        assert "toys.py" in said["message"]
        assert "in fail" in said["message"]
        stacks = (run / "stacks" / "rank-1.txt").read_text()
        assert "in fail" in stacks
        assert "'step'" in stacks
        assert "backward" in (run / "stacks" / "rank-0.txt").read_text()


@pytest.mark.slow
def test_a_rank_that_keeps_the_interpreters_lock_is_found_and_leaves_its_stack(config, run, record_property):
    with Plain(config, "backbone.name=toys:faulty", "backbone.args={how: lock}", PATIENT) as plain:
        plain.until_step(run, 1)
        since = time.monotonic()
        assert plain.ends(within=PATIENCE_S + BOUND_S, but=[1]) == [1], plain.text()
        took(record_property, f"rank 1 keeps the interpreter's lock, patience {PATIENCE_S} s", since)
        assert f"{name(1, plain.ranks[1].pid)} does not answer since it was at step" in status(run)["message"]
        # it cannot end itself: no clock tells that from a job that was suspended
        while "in fail" not in (run / "stacks" / "rank-1.txt").read_text():
            assert plain.ranks[1].poll() is None
            assert time.monotonic() < since + PATIENCE_S + BOUND_S
            time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_is_named_with_stacks_of_the_others(config, run, stopped, record_property):
    with Plain(config, PATIENT) as plain:
        plain.until_step(run, 10)
        process = plain.ranks[stopped]
        process.send_signal(signal.SIGSTOP)
        since = time.monotonic()
        assert plain.ends(within=PATIENCE_S + BOUND_S, but=[stopped]) == [1], plain.text()
        took(record_property, f"rank {stopped} stopped, patience {PATIENCE_S} s", since)
        said = status(run)
        assert said["status"] == "fault"
        assert f"{name(stopped, process.pid)} does not answer" in said["message"]
        assert "its process is stopped (SIGSTOP)" in said["message"]
        assert "Thread" in (run / "stacks" / f"rank-{1 - stopped}.txt").read_text()
        process.send_signal(signal.SIGCONT)
        assert plain.ends(within=BOUND_S)[stopped] == 1
        assert status(run)["message"] == said["message"]


@pytest.mark.slow
def test_a_lone_process_that_hangs_ends_with_its_stacks(config, run):
    words = ("backbone.name=toys:faulty", "backbone.args={how: sleep, rank: 0}", PATIENT)
    process = start("train", config, *words)
    try:
        text = process.communicate(timeout=240)[0]
        assert process.returncode == 1
        assert re.search(r"hangs at step \d, in 'step'", status(run)["message"]), text[-3000:]
        assert "in fail" in (run / "stacks" / "rank-0.txt").read_text()
    finally:
        kill_all(process)


@pytest.mark.slow
def test_a_job_that_is_suspended_as_a_whole_goes_on(config, run):
    with Plain(config, "phases.feature_extraction.duration=60", "phases.fine_tuning.duration=60", PATIENT) as plain:
        plain.until_step(run, 10)
        workers = [child for p in plain.ranks for child in psutil.Process(p.pid).children()]
        for signal_, pause in ((signal.SIGSTOP, PATIENCE_S + 15 + 4), (signal.SIGCONT, 0)):
            for process in [*plain.ranks, *workers]:
                os.kill(process.pid, signal_)
            time.sleep(pause)
        assert plain.ends(within=240) == [0, 0], plain.text()
        assert status(run)["status"] == "done"
        assert "had been suspended" in (run / "stacks" / "rank-0.txt").read_text()


def test_stacks_of_an_earlier_hang_stay(tmp_path):
    for left in ('  File "yesterday.py", line 1\n', None):
        file = tmp_path / str(left is None) / "stacks" / "rank-0.txt"
        file.parent.mkdir(parents=True)
        if left:
            file.write_text(left)
        watch = Watch(RunFolder(file.parent.parent), patience_s=1800)
        watch.start(None, 0, 1)
        assert "of 1, " in file.read_text()
        watch.close()
        assert (file.read_text() if file.exists() else None) == left


def test_stacks_that_the_clock_alone_has_written_are_explained_also_at_the_end(tmp_path):
    """A training that was suspended may be over before the watch looks again."""
    file = tmp_path / "stacks" / "rank-0.txt"
    watch = Watch(RunFolder(tmp_path), patience_s=1800)
    watch.start(None, 0, 1)
    faulthandler.dump_traceback(file=watch.stacks.open())  # as its timer does where no thread gets to run
    watch.close()
    said = "It went on after that: it had been suspended, or the interpreter's lock was kept.\n"
    assert file.read_text().endswith(said)


def test_stacks_move_with_the_run_folder(tmp_path):
    folder, moved = RunFolder(tmp_path / "run"), tmp_path / "moved"
    folder.path.mkdir()
    watch = Watch(folder, patience_s=1800)
    watch.start(None, 0, 1)
    folder.path = folder.path.rename(moved)
    assert watch.stacks.folder == str(moved / "stacks")
    watch.close()
    assert list(moved.iterdir()) == []


def test_a_folder_that_cannot_be_looked_at_ends_no_training():
    class Stale(type(Path())):
        def is_dir(self):
            raise OSError(116, "Stale file handle")

    watch = Watch(RunFolder(Stale("run")), patience_s=1800)
    watch.start(None, 0, 1)
    watch.close()


class Ranks:
    """Processes of tests/support/watched.py."""

    def __init__(self, how, folder, ranks=2) -> None:
        folder.mkdir()
        port = free_port()
        words = [sys.executable, str(SUPPORT / "watched.py"), how]
        self.ranks = [
            subprocess.Popen(
                [*words, str(rank), str(port), str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            for rank in range(ranks)
        ]

    def ends(self) -> list[tuple[int, str, str]]:
        """Exit code, output and errors, by rank."""
        try:
            texts = [process.communicate(timeout=120) for process in self.ranks]
        finally:
            for process in self.ranks:
                process.kill()
        return [(process.returncode, *text) for process, text in zip(self.ranks, texts, strict=True)]


@pytest.mark.slow
def test_a_rank_on_another_machine_that_falls_silent_is_lost_after_a_while(tmp_path):
    ranks = Ranks("lost", tmp_path / "run")
    code, _, text = ranks.ends()[0]
    assert code == 1, text
    assert f"fault: rank 1 (machine-1, pid {ranks.ranks[1].pid}) died at step 8, in 'batch'" in text


@pytest.mark.slow
def test_what_all_ranks_raise_alike_cuts_none_that_still_writes(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    RunFolder(run).say("running")
    run.rename(tmp_path / "moved")
    ranks = Ranks("alike", run)
    (tmp_path / "moved" / "status.json").rename(run / "status.json")
    (first, said, text), (second, other, _) = ranks.ends()
    assert (first, second) == (2, 2), text
    assert (said, other) == ("a mistake, on rank 0\n", "a mistake, on rank 1\n")
    assert status(run)["status"] == "user-error"


@pytest.mark.slow
def test_a_checkpoint_under_way_is_waited_for(tmp_path):
    code, _, text = Ranks("before-exit", tmp_path / "run", ranks=1).ends()[0]
    assert code == 1
    assert "hangs at step 1, in 'step'" in text
    assert (tmp_path / "run" / "checkpoint").read_text() == "written"


def test_a_mistake_of_one_rank_is_told_to_the_one_whose_collective_failed():
    store, watches = dist.HashStore(), [Watch(patience_s=600) for _ in range(2)]
    for rank, watch in enumerate(watches):
        watch.start(store, rank, 2)
        watch.beat("step", 3)
    mistake = UserError("there is no such file", where="data.train")
    assert watches[1].explained(mistake) is mistake
    told = watches[0].explained(dist.DistNetworkError("connection closed by peer"))
    assert isinstance(told, UserError)
    assert "rank 1 (" in str(told)
    assert "stopped at step 3: data.train: there is no such file" in str(told)
    for watch in reversed(watches):
        watch.close()


def test_a_watch_that_fails_leaves_no_frozen_heartbeat(capfd):
    store, watch = dist.HashStore(), Watch(patience_s=600)
    watch._round = lambda *_: 1 / 0
    watch.start(store, 1, 2, serves=True)
    key, deadline = "heartbeats/1", time.monotonic() + 60
    while not store.check([key]) or '"left"' not in store.get(key).decode():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    since = time.monotonic()
    watch.close()
    assert time.monotonic() < since + 2  # it waits for nobody's heartbeat
    assert "no longer watched: ZeroDivisionError" in capfd.readouterr().err


# The store


class Proxy:
    """Between a store and its clients; connections can be cut."""

    def __init__(self, port) -> None:
        self.server, self.target, self.open = socket.create_server(("127.0.0.1", 0)), port, []
        self.port = self.server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        for one in self.open:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self.open.clear()

    def close(self) -> None:
        self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.server.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self.target))
            self.open += [client, server]
            for pair in ((client, server), (server, client)):
                threading.Thread(target=self._pass, args=pair, daemon=True).start()

    def _pass(self, one, other) -> None:
        try:
            while data := one.recv(65536):
                other.sendall(data)
            other.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


@pytest.mark.slow
def test_a_connection_that_is_cut_is_made_again_and_one_refused_is_the_end():
    def until(true) -> None:
        deadline = time.monotonic() + 60
        while not true():
            assert time.monotonic() < deadline
            state.change(lambda known: known.told("alive"))
            time.sleep(0.02)

    def answers() -> bool:
        """Whether the store has answered since it was last asked here."""
        known = state.change(lambda known: replace(known, now_s=known.now_s + 1))
        time.sleep(0.1)
        return state.read().answered_s > known.answered_s

    serving = dist.TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False, timeout=timedelta(seconds=60))
    proxy = Proxy(serving.port)
    store = dist.TCPStore("127.0.0.1", proxy.port, 2, False, timeout=timedelta(seconds=60))
    state = SharedState(Snapshot(Heartbeat(1, "h", 1, 0.0), 2))
    channel = HeartbeatChannel(dist.PrefixStore("tlx", store), state, 2)
    until(answers)
    for _ in range(3):
        proxy.cut()
        until(answers)
    assert state.read().store_error is None
    state.beat("step", 9)
    until(lambda: '"step": 9' in serving.get("tlx/heartbeats/1").decode())
    proxy.close()
    until(lambda: state.read().store_error is not None)
    assert state.read().store_refused
    channel.close(timeout_s=3)


def test_ranks_that_have_come_do_not_blame_rank_0_and_ask_it_ever_less(monkeypatch):
    rests = []
    clock = SimpleNamespace(monotonic=lambda: sum(rests), sleep=rests.append)
    monkeypatch.setattr(tlx.ranks.store_prefix, "time", clock)
    with pytest.raises(TlxError, match="rank 0 did not join"):
        of_this_attempt(dist.HashStore(), 1, 3, timeout=timedelta(seconds=60))
    assert len(rests) < 80
    assert rests[0] < 0.05
    monkeypatch.undo()

    store, errors = dist.HashStore(), {}

    def come(rank, timeout) -> None:
        try:
            of_this_attempt(store, rank, 3, timeout=timedelta(seconds=timeout))
        except TlxError as error:
            errors[rank] = str(error)

    threads = [threading.Thread(target=come, args=(rank, 2 - rank)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors[0].startswith("rank 2 of 3 did not join")
    assert errors[1].startswith("not all ranks joined; rank 0 did")


# Differences


def test_other_settings_and_other_code_are_refused_before_anything_else(config, run, tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        shutil.copy(SUPPORT / "toys.py", tmp_path / folder / "mynet.py")
    with (tmp_path / "two" / "mynet.py").open("a") as file:
        file.write("# another line\n")
    paths = {rank: str(tmp_path / folder) for rank, folder in enumerate(("one", "two"))}
    different = {1: ["seed=6", "world.size=3"]}  # the size alone would end rank 1 only
    with Plain(config, "backbone.name=mynet:small", of_rank=different, paths=paths) as plain:
        assert plain.ends(within=240) == [2, 2], plain.text()
        text = plain.text(0)
    host = socket.gethostname()
    assert f"configuration, seed: 5 on rank 0 ({host}), 6 on rank 1 ({host})" in text
    assert "configuration, world.size: null on rank 0" in text
    assert "code of your own, mynet: " in text
    assert "tlx's code" not in text
    assert "look at PYTHONPATH" in text


@pytest.mark.slow
def test_other_weights_and_other_shards_are_refused(config, run, shards, tmp_path):
    other = make_shards(tmp_path / "t", classes=3, per_class={"train": 10, "val": 7}, size=24, seed=1)
    words = ["backbone.name=toys:faulty", "backbone.args={how: weights}", "data.train=train"]
    with Plain(config, *words, places={0: shards, 1: other}) as plain:
        assert plain.ends(within=240) == [2, 2], plain.text()
        text = plain.text(0)
    assert not run.exists()
    assert "weights as loaded, features.0.0.weight: " in text
    assert "features.1.0.weight" not in text
    assert "shards, data.train: 30 samples, digest" in text
    assert "data.val: " not in text


def test_what_differs_is_told_by_value_rank_and_host():
    ranks = [{"a": "1", "b": "x"}, {"a": "2", "b": "x"}, {"b": "x"}]
    topics = [{"configuration": one, "versions": {"torch": "2.15"}} for one in ranks]

    first = [["h", {"configuration": str(i), "versions": "same"}] for i in range(3)]
    answers = {"n": first, "n-details": [{"configuration": one} for one in ranks]}
    errors = []
    for rank in range(3):
        with pytest.raises(UserError) as caught:
            compare(topics[rank], lambda value, *, topic: answers[topic], name="n")
        errors.append(str(caught.value))
    assert len(set(errors)) == 1
    assert "configuration, a: 1 on rank 0 (h), 2 on rank 1 (h), nothing on rank 2 (h)" in errors[0]
    assert "b:" not in errors[0]
    same = [["h", {"configuration": "1", "versions": "same"}]] * 3
    assert compare(topics[0], lambda value, *, topic: same, name="n") is None
