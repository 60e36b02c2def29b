"""Ranks that die, hang, or were given different things: named, and the end of all ranks within a bound."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from commands import environment, kill_all, ranks_of, start, status, wait_for_step, write_config
from images import make_shards

from tlx.agreement import compare
from tlx.errors import UserError

BOUND_S = 45
"""Asserted for an end after a death; on an idle machine it takes 3 to 10 s."""
PATIENCE_S = 9
RAW = {
    "seed": 5,
    "data": {"batch": 8, "workers": 1},
    "input": {"size": 16},
    "backbone": {"name": "toys:small", "weights": "none"},
    "phases": {"each": {"lr": 0.01}, "feature_extraction": {"duration": 4000}, "fine_tuning": {"duration": 8000}},
    "evaluate": {"every": 2000},
    "checkpoint": {"every": 30},
    "track": {"every": 1},
    "world": {"timeout_minutes": PATIENCE_S / 60},
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards") / "s", classes=3, per_class={"train": 10, "val": 7}, size=24)


@pytest.fixture
def config(shards, tmp_path):
    data = {**RAW["data"], "train": str(shards / "train"), "val": str(shards / "val")}
    return write_config(tmp_path / "c.yaml", {**RAW, "run": str(tmp_path / "run"), "data": data})


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


class Plain:
    """Ranks started by hand, as `srun` and `mpirun` do: nobody ends them when one dies.

    Args:
        words: of the command, by rank where they differ.
        places: working folders by rank.
    """

    def __init__(self, config, *words, ranks=2, of_rank=None, paths=None, places=None) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        self.files = [config.parent / f"rank-{rank}.out" for rank in range(ranks)]
        self.ranks = []
        for rank, file in enumerate(self.files):
            world = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            env = environment(path=(paths or {}).get(rank, ""), MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **world)
            command = [sys.executable, "-m", "tlx", "train", config, *words, *(of_rank or {}).get(rank, ())]
            with file.open("w") as out:
                self.ranks.append(
                    subprocess.Popen(
                        [*map(str, command)], env=env, stdout=out, stderr=out, cwd=(places or {}).get(rank)
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        for process in self.ranks:
            process.kill()
            process.wait()

    def until_step(self, run, step) -> None:
        deadline = time.monotonic() + 240
        while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_bytes().count(b"\n") < step:
            assert all(p.poll() is None for p in self.ranks), self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.02)

    def ends(self, *, within: float, but=()) -> list[int]:
        """Exit codes of all ranks but those of `but`."""
        deadline = time.monotonic() + within
        others = [p for rank, p in enumerate(self.ranks) if rank not in but]
        while any(p.poll() is None for p in others):
            assert time.monotonic() < deadline, f"still there after {within} s:\n{self.text()}"
            time.sleep(0.05)
        return [p.returncode for p in others]

    def text(self, rank=None) -> str:
        return "\n".join(f.read_text()[-4000:] for i, f in enumerate(self.files) if rank in (None, i))


def name(rank, pid) -> str:
    return f"rank {rank} ({socket.gethostname()}, pid {pid})"


def took(record_property, what, since) -> None:
    record_property("figures", f"{what}: all ranks ended after {time.monotonic() - since:.1f} s")


# Deaths


@pytest.mark.parametrize(
    "dead", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow)], ids="rank{}".format
)
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
    with Plain(config, "backbone.name=toys:faulty", "backbone.args={how: sleep}") as plain:
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
    with Plain(config, "backbone.name=toys:faulty", "backbone.args={how: lock}") as plain:
        plain.until_step(run, 1)
        since = time.monotonic()
        assert plain.ends(within=PATIENCE_S + BOUND_S) == [1, 1], plain.text()
        took(record_property, f"rank 1 keeps the interpreter's lock, patience {PATIENCE_S} s", since)
        assert f"{name(1, plain.ranks[1].pid)} does not answer, since it was at step" in status(run)["message"]
        assert "in fail" in (run / "stacks" / "rank-1.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_is_named_with_stacks_of_the_others(config, run, stopped, record_property):
    with Plain(config) as plain:
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
    words = ("backbone.name=toys:faulty", "backbone.args={how: sleep, rank: 0}")
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
    with Plain(config, "phases.feature_extraction.duration=60", "phases.fine_tuning.duration=60") as plain:
        plain.until_step(run, 10)
        workers = [child for p in plain.ranks for child in psutil.Process(p.pid).children()]
        for signal_, pause in ((signal.SIGSTOP, PATIENCE_S + 4), (signal.SIGCONT, 0)):
            for process in [*plain.ranks, *workers]:
                os.kill(process.pid, signal_)
            time.sleep(pause)
        assert plain.ends(within=240) == [0, 0], plain.text()
        assert status(run)["status"] == "done"
        assert not (run / "stacks").exists()


# Differences


def test_other_settings_and_other_code_are_refused_before_anything_else(config, run, tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        shutil.copy(Path(__file__).parent / "toys.py", tmp_path / folder / "mynet.py")
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
    assert status(run)["status"] == "user-error"
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
