"""`tlx sweep --wandb` under a real agent: a folder for each trial; one that Hyperband ends is pruned, no fault."""

from __future__ import annotations

import pytest
import yaml
from commands import invoke, status, write_config
from composed import two_phases
from wandb_agent import wandb
from wandb_server import served


@pytest.mark.slow
def test_an_agent_trains_what_the_file_says_and_hyperband_ends_a_trial(shards, tmp_path):
    config, folder = write_config(tmp_path / "c.yaml", two_phases(shards, tmp_path / "run")), tmp_path / "run-sweep"
    made = invoke("sweep", config, "seed=3,4", "--sampler", "grid", "--wandb")
    assert made.exit_code == 0, made.exception
    with served() as server:
        begun = wandb(server, "sweep", "--project", "vision", str(folder / "wandb.yaml"), cwd=tmp_path)
        assert list(server.sweeps) == ["sweep1"], begun.stderr
        server.sweeps["sweep1"].ends_after = {0: 2.0}
        done = wandb(server, "agent", "me/vision/sweep1", cwd=tmp_path, TOYS_PACE="0.7")
        assert done.returncode == 0, done.stderr[-3000:]
        first, second = server.sweeps["sweep1"].trials
        assert sorted(path.name for path in (folder / "trials").iterdir()) == sorted((first, second))
        said = status(folder / "trials" / first)
        assert (said["status"], said["why"]) == ("pruned", "stopped at W&B"), (server.requests, done.stderr[-3000:])
        assert 0 < said["step"] < 12
        assert status(folder / "trials" / second)["status"] == "done"
        assert (server.runs[first].state, server.runs[first].preempting) == ("finished", False), (
            "nobody starts it again"
        )
        assert server.runs[second].state == "finished"
        assert yaml.safe_load((folder / "trials" / second / "config.yaml").read_text())["seed"] == 4
