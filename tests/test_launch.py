"""Launchers: the ready accelerate configs give the world they name, and a launcher that lies is caught."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from commands import environment

from tlx.config import parse
from tlx.errors import UserError
from tlx.world import accelerate_conflicts, enter

ROOT = Path(__file__).parents[1]
SCRIPT = str(ROOT / "tests" / "world_size.py")


def launch(*words, **env):
    command = [sys.executable, "-m", "accelerate.commands.launch", *map(str, words), SCRIPT]
    env = {k: v for k, v in environment(**env).items() if k != "ACCELERATE_USE_CPU"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(*processes, timeout=150):
    return [p.communicate(timeout=timeout)[0] for p in processes]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("cpu", 2),
        pytest.param("one_gpu", 1, marks=pytest.mark.slow),
        pytest.param("one_node", 8, marks=pytest.mark.slow),
    ],
)
def test_a_ready_config_gives_the_world_it_names(name, size):
    file = ROOT / "launch" / f"{name}.yaml"
    assert yaml.safe_load(file.read_text())["num_processes"] == size
    process = launch("--config_file", file)
    (said,) = ended(process)
    assert process.returncode == 0, said
    assert all(f"rank {rank} of {size}" in said for rank in range(size))


@pytest.mark.slow
def test_several_nodes_meet():
    file = ROOT / "launch" / "several_nodes.yaml"
    assert yaml.safe_load(file.read_text())["num_processes"] == 16
    port = free_port()
    nodes = [
        launch("--config_file", file, "--num_processes", 2, "--machine_rank", rank, "--main_process_port", port)
        for rank in (0, 1)
    ]
    said = ended(*nodes)
    assert [f"rank {rank} of 2" in text for rank, text in enumerate(said)] == [True, True], said


@pytest.mark.slow
@pytest.mark.parametrize("words", [("--cpu", "--num_processes", "2"), ("--cpu", "--num_machines", "2")], ids=str)
def test_a_launcher_that_starts_fewer_processes_than_asked_is_caught(words):
    if "--num_machines" in words:
        words = (*words, "--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port()))
    process = launch(*words)
    (said,) = ended(process)
    assert process.returncode != 0
    assert "the launcher was asked for 2 processes and has started 1" in said
    assert "launch/README.md" in said


@pytest.mark.slow
def test_a_launch_config_that_starts_one_process_is_caught(tmp_path):
    raw = yaml.safe_load((ROOT / "launch" / "cpu.yaml").read_text()) | {"distributed_type": "MULTI_CPU"}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw))
    (said,) = ended(launch("--config_file", tmp_path / "c.yaml"))
    assert "the launcher was asked for 2 processes and has started 1" in said


def config(**over):
    return parse({"run": "x", "data": {"train": "x", "batch": 1}, "backbone": {"name": "toys:small"}, **over})


def test_another_number_of_ranks_than_expected_is_an_error(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match="expects 4 ranks, the launcher has started 1"):
        enter(config(world={"size": 4, "device": "cpu"}))


@pytest.mark.parametrize(
    ("env", "over", "message"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {}, r"bf16.*loop\.precision=fp32"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, {}, "accumulate over 4 steps"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {}, r"loop\.compile=false"),
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "FSDP is not supported"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "DeepSpeed is not supported"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, "Megatron"),
        ({"ACCELERATE_USE_XLA": "true"}, {}, "TPU"),
    ],
)
def test_conflicts_with_accelerates_settings_name_both(env, over, message):
    (problem,) = accelerate_conflicts(config(**over), env)
    import re

    assert re.search(message, problem)


def test_agreement_with_accelerate_is_no_conflict():
    env = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}
    assert accelerate_conflicts(config(loop={"precision": "bf16", "compile": True}), env) == []
    assert accelerate_conflicts(config(), {"ACCELERATE_MIXED_PRECISION": "no", **os.environ}) == []
