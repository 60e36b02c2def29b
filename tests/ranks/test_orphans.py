"""Ranks that are left alone: their launcher is gone, or another rank ended before all had met."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import pytest
import torch.distributed as dist
from commands import command, environment, kill_all, ranks_of, start, status, wait_for_step
from plain_ranks import Plain, took

import tlx.ranks.failure_detector
import tlx.ranks.watch
from tlx.ranks.state import Failure
from tlx.ranks.watch import Watch
from tlx.runs.processes import Early, Siblings, launcher_above
from tlx.runs.run_folder import RunFolder
from tlx.runs.stop import EarlySignals, StopRequest

WITHIN_S = 60
START = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1234"}


def until(true: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def has_begun(process, env) -> bool:
    """Whether it has come as far as its environment; its name is there before that can be read."""
    with contextlib.suppress(psutil.Error):
        return process.name() == "sleep" and process.environ().items() >= env.items()
    return False


@pytest.fixture
def sleeper():
    """Starts processes that do nothing, with an environment of theirs."""
    made = []

    def begin(**env):
        made.append(subprocess.Popen(["sleep", "600"], env={**os.environ, **env}))
        until(lambda: has_begun(psutil.Process(made[-1].pid), env))
        return made[-1]

    yield begin
    for process in made:
        process.kill()
        process.wait()


# Who is around

AGENT = """
import os, subprocess, sys
own = "from tlx.runs.processes import launcher_above as a; found = a(); print(found.pid if found else None)"
wrapped = ["bash", "-c", f'{sys.executable} -c "{own}"; true']
found = subprocess.run(wrapped, env={**os.environ, "TORCHELASTIC_RUN_ID": "7"}, capture_output=True, text=True)
print(os.getpid(), found.stdout, found.stderr)
"""


def test_the_launcher_is_found_above_a_shell_and_a_shell_is_none():
    env = {name: value for name, value in os.environ.items() if name not in ("TORCHELASTIC_RUN_ID", "SLURM_PROCID")}
    done = subprocess.run([sys.executable, "-c", AGENT], env=env, capture_output=True, text=True, check=True)
    agent, found = done.stdout.split()
    assert agent == found
    assert launcher_above({"RANK": "0", "WORLD_SIZE": "2"}) is None
    assert launcher_above({"ACCELERATE_MIXED_PRECISION": "no"}) is None  # exported, and no `accelerate launch` above


def test_ranks_beside_this_one_are_those_of_the_same_start(sleeper):
    one, other = sleeper(RANK="1", **START), sleeper(RANK="1", **{**START, "MASTER_PORT": "9"})
    siblings = Siblings.here({"RANK": "0", **START}, parent=psutil.Process())
    assert {rank: process.pid for rank, process in siblings.seen.items()} == {1: one.pid}
    assert siblings.gone() == {}
    other.kill()
    assert siblings.gone() == {}
    one.kill()  # nobody has waited for it
    until(siblings.gone)
    assert siblings.gone() == {1: one.pid}
    assert Siblings.here({}).seen == {}


def test_one_that_ended_before_it_could_be_told_apart_is_missed_while_not_all_have_come():
    ended = subprocess.Popen([sys.executable, "-c", "pass"])
    until(lambda: psutil.Process(ended.pid).status() == psutil.STATUS_ZOMBIE)
    siblings = Siblings.here({"RANK": "0", **START}, parent=psutil.Process())
    born = psutil.Process(ended.pid).create_time()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(psutil.Process, "create_time", lambda _: born)  # pytest is older than what it starts
        patched.setattr(psutil.Process, "name", lambda _: "python")
        assert siblings.nameless() == [ended.pid]
        assert Siblings.here({"RANK": "0", **START, "LOCAL_WORLD_SIZE": "1"}, parent=psutil.Process()).nameless() == []
        own = os.getpid()  # of another moment than the one that ended
        patched.setattr(psutil.Process, "create_time", lambda it: born - 600 if it.pid == own else born)
        assert siblings.nameless() == []
    ended.wait()


# What a watch makes of it


@pytest.fixture
def meeting(sleeper, tmp_path, monkeypatch):
    """A watch of rank 0 that has met nobody, rank 1 beside it; `ended` is what it would have ended this process for."""
    monkeypatch.setenv("TLX_VERDICT", str(tmp_path / "verdict"))
    other = sleeper(RANK="1", **START)
    early = Early(Siblings.here({"RANK": "0", **START}, parent=psutil.Process()), EarlySignals.heard())
    watch = Watch(RunFolder(tmp_path / "run"), patience_s=600, claimed=False, early=early)
    watch.ended = []
    watch._end = watch.ended.append
    watch.begin(0, 2)
    yield watch, other
    early.signals._came = False
    watch.close()


def test_a_rank_that_ends_before_all_have_met_is_named(meeting):
    watch, other = meeting
    other.kill()
    until(lambda: watch.ended)
    verdict = watch.ended[0]
    assert (verdict.kind, verdict.mute) == ("died", (1,))
    assert f"pid {other.pid}) died during start-up" in verdict.message


@pytest.mark.parametrize(("older_s", "is_taken"), [(59, True), (61, False)])
def test_the_verdict_of_an_earlier_start_is_not_taken_for_this_ones(tmp_path, monkeypatch, older_s, is_taken):
    """It is older than this process; a minute is for clocks that differ."""
    file = tmp_path / "verdict"
    monkeypatch.setenv("TLX_VERDICT", str(file))
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    file.write_text(json.dumps({"status": "fault", "message": "torchrun on n2 ended with code 1"}))
    then = psutil.Process().create_time() - older_s
    os.utime(file, (then, then))
    watch, ended = Watch(early=Early(Siblings.here({}), None)), []
    watch._end = ended.append
    watch.begin(0, 2)
    watch._since["noticed"] = -10.0
    watch._check_start(watch.state.read())
    watch.close()
    assert ended[:1] == ([Failure("failed", "torchrun on n2 ended with code 1")] if is_taken else [])


def test_a_launcher_that_ends_all_ranks_is_answered_though_the_main_thread_waits_in_c(meeting):
    watch, _ = meeting
    os.kill(os.getpid(), signal.SIGTERM)
    until(lambda: watch.ended)
    assert watch.ended[0].kind == "asked"


def test_once_ranks_have_joined_an_earlier_one_beside_is_of_no_matter(meeting):
    watch, other = meeting
    watch.start(dist.HashStore(), 0, 1)
    other.kill()
    other.wait()
    watch._since["noticed"] = -10.0
    watch._check_start(watch.state.read())
    assert watch.ended == []


def test_a_rank_that_joined_and_is_not_heard_of_has_died(monkeypatch):
    monkeypatch.setattr(tlx.ranks.failure_detector, "UNHEARD_S", 1.0)
    monkeypatch.setattr(Watch, "_leave_for", lambda *_: None)
    store = dist.TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False)
    watch = Watch(patience_s=600)
    watch.start(store, 0, 2)
    failure = watch.state.wait_for(lambda known: known.failure is not None, 30).failure
    watch.close()
    assert failure == Failure("died", "rank 1 sent no heartbeat after joining: it died during start-up", [1])


def test_a_launcher_that_dies_is_a_request_to_stop_and_then_the_end(sleeper, monkeypatch):
    monkeypatch.setattr(tlx.ranks.failure_detector, "ORPHAN_S", 2.5)
    launcher, asked, ended = sleeper(), [], []
    monkeypatch.setattr(tlx.ranks.watch, "launcher_above", lambda: psutil.Process(launcher.pid))
    watch = Watch(patience_s=600)
    watch._end, watch.asks_to_stop = ended.append, asked.append
    watch.start(None, 0, 1)
    time.sleep(1.5)
    assert asked == []
    launcher.kill()
    until(lambda: asked)
    assert ended == []
    until(lambda: ended)
    watch.close()
    assert len(asked) == 1
    assert f"process {launcher.pid} on " in asked[0]
    assert ended[0].kind == "launcher"


@pytest.mark.parametrize(
    ("kind", "code", "said"), [("hangs", 1, "fault"), ("refused", 2, "user-error"), ("asked", 75, "resumable")]
)
def test_the_end_of_a_process_needs_no_terminal(tmp_path, monkeypatch, kind, code, said):
    codes, closed = [], io.StringIO()
    closed.close()
    monkeypatch.setattr(tlx.ranks.watch.os, "_exit", codes.append)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    folder = RunFolder(tmp_path)
    folder.say("running")
    watch = Watch(folder, patience_s=600)
    with monkeypatch.context() as patched:
        for name in ("stderr", "__stderr__"):
            patched.setattr(sys, name, closed)
        try:
            watch._end(Failure(kind, "why"))
        finally:
            faulthandler.cancel_dump_traceback_later()
    assert codes == [code]
    assert (status(tmp_path)["status"], status(tmp_path)["message"]) == (said, "why")


# Real processes


def ended(ranks, record_property, what) -> None:
    since = time.monotonic()
    _, alive = psutil.wait_procs(ranks, WITHIN_S)
    assert not alive
    took(record_property, what, since)


def test_a_signal_after_the_meeting_and_before_training_is_a_request_to_stop(tmp_path):
    """Not the end of a process that nobody then speaks for."""
    former = signal.getsignal(signal.SIGTERM)
    watch = Watch(early=Early(Siblings.here({}), EarlySignals.heard()))
    os.kill(os.getpid(), signal.SIGTERM)
    stop = StopRequest(tmp_path, launched=True, early=watch.hand_over_signals())
    assert stop.reason == "SIGTERM"
    stop.close()
    assert signal.getsignal(signal.SIGTERM) is former
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.slow
def test_ranks_whose_torchrun_was_killed_save_and_end(config, run, record_property):
    process = start("train", config, ranks=2)
    try:
        wait_for_step(process, run, 10)
        ranks = ranks_of(process)
        os.kill(process.pid, signal.SIGKILL)
        ended(ranks, record_property, "torchrun killed")
        said = status(run)
        assert said["status"] == "fault"
        assert f"(process {process.pid} on " in said["message"]
        assert (run / "checkpoints" / "latest").resolve().name == f"step-{said['step']:08d}"
        assert said["step"] % 30  # not one that was due
    finally:
        kill_all(process)


@pytest.mark.slow
def test_a_lone_rank_whose_accelerate_was_killed_ends_too(config, run, record_property):
    words = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "tlx", "train", str(config)]
    process = subprocess.Popen(
        [sys.executable, *words], env=environment(), stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        until(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size > 0, 120)
        ranks = psutil.Process(process.pid).children()
        os.kill(process.pid, signal.SIGKILL)
        ended(ranks, record_property, "accelerate launch killed")
        assert status(run)["status"] == "fault"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("after_s", [0.3, 3.0, 6.0])
@pytest.mark.parametrize("dead", [0, 1])
def test_a_rank_that_is_killed_while_starting_does_not_leave_the_other(
    config,
    run,
    tmp_path,
    record_property,
    dead,
    after_s,
):
    verdict = tmp_path / "verdict"
    with Plain(config, env={"TLX_VERDICT": str(verdict)}) as plain:
        time.sleep(after_s)
        plain.ranks[dead].kill()
        since = time.monotonic()
        assert plain.ends(within=WITHIN_S, but=[dead]) == [1], plain.text()
        took(record_property, f"rank {dead} killed {after_s} s after its start", since)
        assert json.loads(verdict.read_text())["status"] == "fault"


@pytest.mark.slow
def test_a_rank_that_torchrun_loses_while_starting_leaves_a_verdict(config, run, tmp_path, record_property):
    verdict = tmp_path / "verdict"
    env, quiet = environment(TLX_VERDICT=str(verdict)), {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command("train", config, ranks=2), env=env, start_new_session=True, **quiet)
    try:
        until(lambda: len(psutil.Process(process.pid).children()) == 2, 60)
        ranks = sorted(psutil.Process(process.pid).children(), key=lambda child: child.pid)
        time.sleep(3)
        ranks[1].kill()
        ended(ranks[:1], record_property, "a rank killed while starting under torchrun")
        assert process.wait(60) == 1
        assert json.loads(verdict.read_text())["status"] in ("fault", "resumable")
        assert not run.exists()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_hang_right_after_the_claim_has_a_file_for_its_stacks(tmp_path):
    """The clock is set by who claims: the watch's own thread may never run again."""
    (tmp_path / "run").mkdir()
    stacks = tmp_path / "run" / "stacks" / "rank-0.txt"
    watch = Watch(RunFolder(tmp_path / "run"), patience_s=600, ends=False, claimed=False)
    watch.start(None, 0, 1)
    watch.claim()
    assert stacks.exists()
    watch.close()
    assert not stacks.parent.exists()
