"""Nodes without internet: weights brought from where there is one, training without a route, W&B told later."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlparse

import pytest
import timm
import torch
from commands import command, environment, kill_all, rows, status, tlx, wait_for_step, write_config
from hub import serve
from images import make_shards
from networks import into_nothing, sent, without_route
from safetensors.torch import save
from wandb_server import served

from tlx.models.weights import local_weights as shelf

WEIGHTS = "timm/test_resnet.r160_in1k"
STEPS = 160
PROXIES = {name: "" for word in ("http", "https", "all") for name in (f"{word}_proxy", f"{word.upper()}_PROXY")}


def configure(folder: Path, steps: int = STEPS) -> Path:
    """A training with the default weights of a backbone, logged to W&B; nothing says whether there is a network."""
    shards = make_shards(folder / "s", classes=3, per_class={"train": 8, "val": 4}, size=24)
    raw = {
        "run": str(folder / "run"), "seed": 3, "input": {"size": 32}, "backbone": {"name": "timm/test_resnet"},
        "data": {"train": str(shards / "train"), "val": str(shards / "val"), "batch": 4, "workers": 0},
        "phases": {"each": {"lr": 0.01}, "feature_extraction": {"duration": 4}, "fine_tuning": {"duration": steps - 4}},
        "evaluate": {"every": 40}, "checkpoint": {"every": 40},
        "track": {"every": 1, "trackers": [{"name": "wandb", "args": {"project": "p"}}]},
    }  # fmt: skip
    return write_config(folder / "c.yaml", raw)


def fetch(folder: Path) -> Path:
    """On the login node: the weights, as files in a folder that jobs see."""
    torch.manual_seed(1)
    with serve() as hub:
        hub.put(WEIGHTS, "model.safetensors", save(dict(timm.create_model("test_resnet").state_dict())))
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "login"), "NO_PROXY": "127.0.0.1"}
        done = tlx("weights", "fetch", "timm/test_resnet", "--to", folder / "w", **env)
        assert done.returncode == 0, done.stderr
        assert hub.asked
    return folder / "w"


def job(folder: Path, **more: str) -> dict[str, str]:
    """The environment on a compute node: weights and a key, no cache of its own, and no word on the network."""
    return environment(
        **PROXIES, TLX_WEIGHTS=str(folder / "w"), HF_HOME=str(folder / "node"), TORCH_HOME=str(folder / "node"), **more
    )


def trained(words: Sequence[str], env: dict[str, str]) -> str:
    """What a training that comes to its end says."""
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.mark.slow
def test_offline_nothing_is_sent(tmp_path: Path) -> None:
    config, log = configure(tmp_path, 8), tmp_path / "packets"
    shelf.put(tmp_path / "w", WEIGHTS, dict(timm.create_model("test_resnet").state_dict()), {"tag": "r160_in1k"})
    env = job(tmp_path, WANDB_MODE="offline", WANDB_API_KEY="a" * 40)
    assert "warning" not in trained(into_nothing(log, *command("train", config)), env)
    assert sent(log) == []
    assert status(tmp_path / "run")["status"] == "done"
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["no route", "no answer"])
def test_from_the_login_node_and_back(tmp_path: Path, how: str, record_property) -> None:
    """Two ranks, stopped and started again, on a node that has a key for W&B and nobody to tell it to."""
    import wandb

    config, run, log = configure(tmp_path), tmp_path / "run", tmp_path / "packets"
    fetch(tmp_path)
    env = job(tmp_path, WANDB_API_KEY="a" * 40, RES_OPTIONS="timeout:1 attempts:1")  # see launch/README.md
    torchrun = command("train", config, ranks=2)
    words = without_route(*torchrun) if how == "no route" else into_nothing(log, *torchrun)
    asked = []
    since = time.monotonic()
    process = subprocess.Popen(
        words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        wait_for_step(process, run, 1)
        took = time.monotonic() - since
        wait_for_step(process, run, 50)
        (run / "stop").touch()
        said = process.communicate(timeout=120)[0]
    finally:
        kill_all(process)
    assert status(run)["status"] == "resumable", said
    first = status(run)["step"]
    assert 50 <= first < STEPS
    asked += [said]
    heard = sent(log) if how == "no answer" else []
    asked += [trained(words, env)]
    assert status(run)["status"] == "done"
    for said in asked:
        assert said.count("does not answer; this start is logged offline") == 1
        assert said.count("warning: W&B") == 1
    if how == "no answer":
        name = urlparse(wandb.Settings().base_url).hostname
        for packets in (heard, sent(log)):
            of_torch = [p for p in packets if p.endswith(".in-addr.arpa")]  # its store asks for the names of addresses
            assert set(packets) - set(of_torch) == {f"dns {name}"}
            assert len(packets) - len(of_torch) <= 4  # for IPv4 and IPv6, and once more where an answer is late
    record_property("figures", f"{how}: the first step of two ranks under torchrun after {took:.1f} s")

    logged = sorted({row["step"] for row in rows(run)})
    assert logged == list(range(1, STEPS + 1))
    with served() as server:
        synced = [tlx("track", "sync", run, **server.account) for _ in range(2)]
        assert [done.returncode for done in synced] == [0, 0], synced[0].stderr
        assert f"{STEPS} steps sent" in synced[0].stdout
        assert f"W&B has all up to step {STEPS}; nothing was sent" in synced[1].stdout
        (one,) = server.runs.values()
        assert one.name == status(run)["id"]
        assert one.steps == logged
        assert one.state == "finished"
        assert one.summary["finished"] is True
        assert [r["step"] for r in one.sent if "val/top1" in r] == [r["step"] for r in rows(run) if "val/top1" in r]


@pytest.mark.slow
@pytest.mark.parametrize("key", [False, True], ids=["no key", "a key"])
def test_one_question_at_most(tmp_path: Path, key: bool) -> None:
    """What a start without a word on the network tries: nothing without a key, else one connection to W&B's server."""
    config, log = configure(tmp_path, 8), tmp_path / "packets"
    fetch(tmp_path)
    env = job(tmp_path, WANDB_BASE_URL="http://192.0.2.1", NETRC=str(tmp_path / "netrc"))
    said = trained(into_nothing(log, *command("train", config)), env | ({"WANDB_API_KEY": "a" * 40} if key else {}))
    why = "W&B: http://192.0.2.1 does not answer" if key else "there is no key for Weights & Biases"
    assert f"warning: {why}; this start is logged offline" in said
    assert set(sent(log)) == ({"tcp 192.0.2.1:80"} if key else set())
    assert len(sent(log)) <= 3  # that of one connection, and again after a second


@pytest.mark.slow
def test_a_node_without_any_network_at_all(tmp_path: Path) -> None:
    """One process, not even a loopback."""
    config = configure(tmp_path, 8)
    fetch(tmp_path)
    said = trained(without_route(*command("train", config), loopback=False), job(tmp_path, WANDB_API_KEY="a" * 40))
    assert said.count("warning: ") == 1
    assert status(tmp_path / "run")["status"] == "done"


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    ["plan {config}", "plan {config} --measure", "models resnet50*", "models show timm/resnet50", "shards check {s}"],
)
def test_commands_that_ask_nobody(tmp_path: Path, words: str) -> None:
    config, log = configure(tmp_path, 8), tmp_path / "packets"
    fetch(tmp_path)
    said = [word.format(config=config, s=tmp_path / "s" / "train") for word in words.split()]
    trained(into_nothing(log, *command(*said)), job(tmp_path))
    assert sent(log) == []
