"""kill -9 anywhere, requests to stop, other numbers of ranks: the same command again, and nothing is lost.

`survival.py` starts and compares, `kill_at.py` is how a process comes to die at an exact place.
"""

from __future__ import annotations

import collections
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import kill_at
import pytest
from commands import environment, last_step, rows, status, write_config
from images import make_folder, make_shards
from survival import Accident, Stage, Whole, befall, chain, differences

KILLS = 24
"""At least, in all chains of the slow tier."""
BUILDS = 3
RAW = {
    "seed": 5,
    "data": {"batch": 8, "workers": 1},
    "input": {"size": 16},
    "backbone": {"name": "toys:small", "weights": "none", "args": {"dropout": 0.1}},
    "mix": {"mixup": 0.4},
    "loop": {"ema": {"decay": 0.8}},
    "phases": {
        "each": {"lr": 0.02, "curve": "cosine", "norm": "statistics_move"},
        "feature_extraction": {"duration": {"max": 40, "metric": "val/loss", "patience": 2, "min_delta": 10.0}},
        "fine_tuning": {"duration": 44, "start_from": "best", "optimizer_state": "reset"},
    },
    "evaluate": {"every": 7},
    "checkpoint": {"every": 5, "keep": {"last": 2, "best": 1, "every": 20}},
    "track": {"every": 1, "report": False},
}
STEPS = 65
"""The first phase ends on its plateau, at step 21."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards") / "s", classes=3, per_class={"train": 10, "val": 4}, size=24)


@pytest.fixture(scope="module")
def stage(shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage")
    return Stage(folder / "logs", write_config(folder / "c.yaml", raw_for(shards)))


@pytest.fixture(scope="module")
def whole(stage, tmp_path_factory):
    return Whole.of(stage, tmp_path_factory.mktemp("whole") / "run")


def raw_for(shards, **over):
    data = {**RAW["data"], "train": str(shards / "train"), "val": str(shards / "val"), **over.pop("data", {})}
    return {**RAW, "run": "unset", **over, "data": data}


def test_every_place_of_an_accident_is_come_to(whole):
    assert {p: whole.counts[0][p] for p in kill_at.PLACES if not whole.counts[0][p]} == {}
    assert whole.counts[0]["tlx.train.step.Updater.update"] == whole.counts[1]["tlx.train.step.Updater.update"] == STEPS
    assert [row["step"] for row in rows(whole.run) if "train/lr_head" in row] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_killed_five_times_in_one_training(stage, whole, tmp_path):
    saves = whole.counts[0]["os.fsync"] // 6
    accidents = [
        Accident(after_s=0.2 * whole.seconds),
        Accident(kill=f"0:os.fsync:{saves}:group"),
        Accident(kill="0:torch.save:2:torn"),
        Accident(kill="1:tlx.train.evaluation.evaluate:3:rank"),
        Accident(kill="0:tlx.runs.metrics_file.MetricsFile.append:4:torn"),
    ]
    assert [befall(stage, tmp_path / "run", accident) for accident in accidents] == ["killed"] * 5
    stage.whole(tmp_path / "run")
    assert differences(tmp_path / "run", whole.run) == []
    assert [e for e in stage.endings if e] == []


@pytest.mark.slow
def test_torchrun_restarts_after_faults_and_not_after_a_requested_stop(stage, whole, tmp_path):
    run, words = tmp_path / "run", {"restarts": 3}
    kills = "0:tlx.train.step.Updater.update:9:rank,1:tlx.train.step.Exchange.post:11:rank,0:os.replace:9:rank"
    before = len(stage.told())
    stage.ended_well(stage.start(run, **words, KILL_AT=kills), restarted=True)
    assert stage.died(before)
    assert len(stage.told()) - before == 3
    assert status(run)["status"] == "done"
    assert differences(run, whole.run) == []
    stopped = tmp_path / "stopped"
    launch = stage.whole(stopped, **words, STOP_AT="0:30:file")
    assert status(stopped)["status"] == "resumable"
    assert 31 <= status(stopped)["step"] <= 32
    assert rows(stopped)[-1]["step"] == status(stopped)["step"]
    assert not (stopped / "stop").exists()
    assert len(launch.pids.read_text().splitlines()) == 2  # nobody was started again
    stage.whole(stopped)
    assert differences(stopped, whole.run, stops=True) == []
    assert [e for e in stage.endings if e] == []


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["1:17:SIGTERM", "0:40:SIGINT", "0:64:file"])
def test_all_ranks_stop_within_two_steps_of_a_request(stage, whole, asked, tmp_path):
    run = tmp_path / "run"
    stage.whole(run, restarts=2, STOP_AT=asked)
    at = int(asked.split(":")[1])  # the request falls into the update that ends with step at + 1
    assert at + 1 <= status(run)["step"] <= at + 2
    assert rows(run)[-1]["step"] == status(run)["step"]
    assert status(run)["status"] == ("done" if at + 1 == STEPS else "resumable")
    stage.whole(run)
    assert differences(run, whole.run, stops=True) == []
    assert [e for e in stage.endings if e] == []


@pytest.mark.slow
@pytest.mark.parametrize("forked", [True, False], ids=["forked", "by the command line"])
def test_a_signal_to_torchrun_itself_leaves_a_resumable_run(stage, whole, forked, tmp_path):
    run = tmp_path / "run"
    launch = stage.start(run, restarts=2, forked=forked, SLOW_S="0.1")
    while last_step(run) < 12:
        assert launch.running(), launch.said()[-3000:]
        time.sleep(0.02)
    os.kill(launch.pid, signal.SIGTERM)
    launch.code()
    assert status(run)["status"] == "resumable"
    assert rows(run)[-1]["step"] == status(run)["step"] < STEPS
    assert len(launch.pids.read_text().splitlines()) == 2
    stage.whole(run)
    assert differences(run, whole.run, stops=True) == []


@pytest.mark.slow
def test_a_second_signal_ends_at_once_and_what_is_saved_stays_whole(stage, whole, tmp_path):
    run = tmp_path / "run"
    launch = stage.start(run, STOP_AT="0:33:twice")
    assert launch.code() != 0
    assert last_step(run) == 33
    assert status(run)["status"] != "done"
    stage.whole(run)
    assert differences(run, whole.run) == []


@pytest.mark.slow
def test_a_time_limit_stops_and_the_next_start_goes_on(stage, whole, tmp_path):
    run = tmp_path / "run"
    seconds = 2 + whole.seconds / 2
    launch = stage.whole(run, f"stop_after={seconds:.0f}s", restarts=2, SLOW_S=str(whole.seconds / STEPS))
    assert status(run)["status"] == "resumable"
    assert 0 < status(run)["step"] < STEPS
    assert rows(run)[-1]["step"] == status(run)["step"]
    assert len(launch.pids.read_text().splitlines()) == 2
    stage.whole(run)
    assert differences(run, whole.run, stops=True) == []
    assert [e for e in stage.endings if e] == []


@pytest.mark.slow
def test_on_another_number_of_ranks_the_same_samples_in_the_same_order(shards, tmp_path):
    grouped = {"name": "toys:small", "weights": "none", "args": {"norm": "group"}}
    raw = raw_for(shards, backbone=grouped)
    raw["phases"] = {**raw["phases"], "each": {"lr": 0.02, "curve": "cosine"}}
    stage = Stage(tmp_path / "logs", write_config(tmp_path / "c.yaml", raw))
    orders = {}
    for name in ("alone", "elastic", "elastic_again"):
        (tmp_path / f"ids-{name}").mkdir()
    stage.whole(tmp_path / "alone", ranks=1, IDS_IN=str(tmp_path / "ids-alone"))
    ids = {"IDS_IN": str(tmp_path / "ids-elastic")}
    stage.whole(tmp_path / "elastic", ranks=2, STOP_AT="0:9:file", **ids)
    assert status(tmp_path / "elastic")["step"] == 10  # of 4 steps an epoch
    launch = stage.start(tmp_path / "elastic", ranks=1, KILL_AT="0:tlx.train.step.Updater.update:20:rank", **ids)
    assert launch.code() != 0
    stage.whole(tmp_path / "elastic", ranks=3, **ids)
    for name in ("alone", "elastic"):
        orders[name] = order_of(tmp_path / f"ids-{name}")
    assert sorted(orders["alone"]) == list(range(STEPS))
    assert orders["elastic"] == orders["alone"]
    assert {size for size, _ in worlds(tmp_path / "ids-elastic")} == {1, 2, 3}
    for one, other in zip(rows(tmp_path / "elastic"), rows(tmp_path / "alone"), strict=True):
        assert one.keys() == other.keys()
        assert all(one[k] == pytest.approx(other[k], rel=2e-3, abs=2e-4) for k in one if k.endswith("/loss"))
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in orders]
    assert results[0]["samples_seen"] == results[1]["samples_seen"]
    assert [e for e in stage.endings if e] == []


def order_of(folder):
    """The samples of every step in the order of ranks; a step that was taken again must have taken the same ones."""
    steps = collections.defaultdict(dict)
    for file in sorted(folder.iterdir()):
        for step, rank, size, ids in map(json.loads, file.read_text().splitlines()):
            steps[step].setdefault((size, file.name.split("-")[2]), {})[rank] = ids
    order = {}
    for file in sorted(folder.iterdir()):
        for step, _, size, _ in map(json.loads, file.read_text().splitlines()):
            shares = {}
            for (of, _), share in steps[step].items():
                if of == size:
                    shares |= share
            if len(shares) == size:
                samples = list(itertools.chain.from_iterable(shares[rank] for rank in range(size)))
                assert order.setdefault(step, samples) == samples, f"step {step}"
    return order


def worlds(folder):
    return {tuple(map(int, file.name.split("-")[:2])) for file in folder.iterdir()}


@pytest.mark.slow
def test_shards_whose_building_is_killed_anywhere(tmp_path, record_property):
    rng = random.Random(11)
    source = make_folder(tmp_path / "src", classes=3, per_class=60, size=32)
    words = ["shards", "build", str(source)]
    more = ["--val", "0.2", "--shard-samples", "10", "--jobs", "2"]

    def build(out, **env):
        command = [sys.executable, str(Path(kill_at.__file__)), *words, str(out), *more]
        return subprocess.run(command, env=environment(**env), capture_output=True, text=True, timeout=120, check=False)

    (tmp_path / "counts").mkdir()
    done = build(tmp_path / "whole", COUNT_IN=str(tmp_path / "counts"))
    assert done.returncode == 0, done.stderr
    counts = json.loads((tmp_path / "counts" / "0.json").read_text())
    places = [place for place in kill_at.FILES if counts.get(place)]
    assert len(places) >= 3, counts
    for turn in range(BUILDS):
        out, place = tmp_path / str(turn), places[turn % len(places)]
        accident = f"0:{place}:{rng.randint(1, counts[place])}:rank"
        assert build(out, KILL_AT=accident).returncode == -signal.SIGKILL, accident
        again = build(out)
        assert again.returncode == 0, f"after {accident}: {again.stderr}"
        assert content(out) == content(tmp_path / "whole"), accident
    record_property("figures", f"survival: {BUILDS} builds of shards killed, 0 differences")


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_random_kills(stage, whole, tmp_path, record_property):
    found, seed, started = [], 0, time.monotonic()
    stage.deaths.clear()
    while stage.deaths.total() < KILLS:
        seed += 1
        found += chain(stage, tmp_path / f"run{seed}", seed, whole, kills=7, by_command=0.1)
    bad = [e for e in stage.endings if e]
    figures = f"{stage.figures()}, {len(found)} differences, {seed} trainings, {time.monotonic() - started:.0f} s"
    record_property("figures", figures)
    (tmp_path / "figures").write_text(figures)
    assert not found, "\n".join(found)
    assert not bad, "\n".join(bad)
    assert len(stage.endings) >= KILLS // 2, figures
