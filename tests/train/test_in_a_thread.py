"""`tlx.train.command.train` from a thread that is not the main one, as in a notebook."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time

import pytest
from accelerate.state import AcceleratorState

import tlx.ranks.watch
import tlx.runs.stop
from tlx.base.errors import UserError
from tlx.plan.config import parse
from tlx.ranks.watch import Watch
from tlx.train import command as training


@pytest.fixture
def config(shards, tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)

    def config(**over):
        raw = {
            "run": str(tmp_path / "run"),
            "data": {"train": str(shards / "train"), "val": str(shards / "val"), "batch": 8, "workers": 1},
            "input": {"size": 16},
            "backbone": {"name": "toys:small", "weights": "none"},
            "phases": {"each": {"lr": 0.02, "duration": "2ep"}},
            "world": {"device": "cpu"},
            "track": {"every": 1, "report": False},
        }
        return parse({**raw, **over})

    return config


def in_a_thread(act):
    """What `act` gives or raises, in a worker thread."""
    ended = {}

    def work():
        try:
            ended["result"] = act()
        except BaseException as error:
            ended["error"] = error

    thread = threading.Thread(target=work)
    thread.start()
    return thread, ended


def test_a_training_in_a_thread_comes_to_its_end_and_signals_stay_as_they_are(config):
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    thread, ended = in_a_thread(lambda: training.train(config()))
    thread.join()
    assert ended["result"]["step"] == 12
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == handlers


def stopped_by_file(config, run):
    """What status.json says after a training in a thread that was stopped by the file once it had made a step."""
    size = (run / "metrics.jsonl").stat().st_size if run.exists() else 0
    thread, ended = in_a_thread(lambda: training.train(config))
    while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").stat().st_size <= size:
        assert thread.is_alive(), ended
        time.sleep(0.01)
    (run / "stop").touch()
    thread.join(120)
    assert ended == {"result": None}
    return json.loads((run / "status.json").read_text())


def test_a_file_stops_it_and_the_same_call_goes_on(config, tmp_path):
    run, longer = tmp_path / "run", config(phases={"each": {"lr": 0.02, "duration": "4000ep"}})
    said = stopped_by_file(longer, run)
    assert said["status"] == "resumable"
    assert said["why"] == f"stopped by the file {run / 'stop'}"
    assert 0 < said["step"] < 24_000
    assert stopped_by_file(longer, run)["step"] > said["step"]


def test_a_time_limit_counts_from_the_call_and_not_from_the_start_of_the_process(config, tmp_path, monkeypatch):
    monkeypatch.setattr(tlx.runs.stop, "_began", lambda launched: 0.0)  # a notebook's process is older than any limit
    thread, ended = in_a_thread(lambda: training.train(config(stop_after=3600)))
    thread.join()
    assert ended["result"]["step"] == 12
    longer = {"each": {"lr": 0.02, "duration": "4000ep"}}
    thread, ended = in_a_thread(lambda: training.train(config(stop_after=1, run=str(tmp_path / "b"), phases=longer)))
    thread.join(120)
    assert ended == {"result": None}
    assert "time limit" in json.loads((tmp_path / "b" / "status.json").read_text())["why"]


def test_where_an_event_loop_runs_and_mistakes_are_raised(config):
    async def cell():
        with pytest.raises(UserError, match="one of the two"):
            training.train(config(), fresh=True, extend=True)
        return training.train(config())

    thread, ended = in_a_thread(lambda: asyncio.run(cell()))
    thread.join()
    assert ended["result"]["finished"] is True


def test_the_next_training_of_a_process_may_have_another_precision(config, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)  # of tests before this one in the process
    for precision in ("fp32", "bf16"):
        said = config(run=str(tmp_path / precision), loop={"precision": precision})
        assert training.train(said)["step"] == 12


@pytest.mark.slow
def test_a_training_that_hangs_does_not_end_the_process_of_whoever_called_it(monkeypatch, capfd):
    exits = []
    monkeypatch.setattr(tlx.ranks.watch.os, "_exit", exits.append)
    watch = Watch(patience_s=1.5, ends=False)
    watch.start(None, 0, 1)
    watch.beat("step", 7)
    time.sleep(4)
    watch.close()
    assert exits == []
    told = capfd.readouterr().err
    assert told.count("hangs at step 7, in 'step'") == 1
    assert "no progress for 1.5 s" in told
