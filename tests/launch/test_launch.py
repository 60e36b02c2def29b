"""Launchers: the ready accelerate configs give the world they name, and a launcher that lies is caught."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from commands import environment, free_port
from composed import SMALLEST, smallest_config
from places import ROOT, SUPPORT

from tlx.base.errors import UserError
from tlx.ranks.accelerate_settings import Source, conflicts, option, promised
from tlx.ranks.rendezvous import join_ranks

SCRIPT = str(SUPPORT / "world_size.py")


def exported(content):
    """The environment that `accelerate launch` makes of a config file, as far as tlx compares it."""
    kind = content.get("distributed_type", "NO")
    env = {
        "ACCELERATE_MIXED_PRECISION": content.get("mixed_precision", "no"),
        "ACCELERATE_DYNAMO_BACKEND": content.get("dynamo_config", {}).get("dynamo_backend", "no"),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": str(content.get("gradient_accumulation_steps", 1)),
        "ACCELERATE_DISTRIBUTED_TYPE": kind,
    }
    return env | ({f"ACCELERATE_USE_{kind}": "true"} if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP") else {})


def launch(*words, **env):
    command = [sys.executable, "-m", "accelerate.commands.launch", *map(str, words), SCRIPT]
    env = {k: v for k, v in environment(**env).items() if k != "ACCELERATE_USE_CPU"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(*processes, timeout=150):
    return [p.communicate(timeout=timeout)[0] for p in processes]


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


def test_another_number_of_ranks_than_expected_is_an_error(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match="expects 4 ranks, the launcher has started 1"):
        join_ranks(smallest_config(world={"size": 4, "device": "cpu"}))


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
    (problem,) = conflicts(smallest_config(**over), env, Source())
    assert re.search(message, problem)


def test_agreement_with_accelerate_is_no_conflict():
    env = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}
    assert conflicts(smallest_config(loop={"precision": "bf16", "compile": True}), env, Source()) == []
    assert conflicts(smallest_config(), {"ACCELERATE_MIXED_PRECISION": "no", **os.environ}, Source()) == []


@pytest.mark.parametrize(
    ("content", "said", "never"),
    [
        (
            {"distributed_type": "FSDP", "num_processes": 8, "fsdp_config": {"fsdp_version": 2}},
            ["distributed_type: FSDP: FSDP is", "Set distributed_type: MULTI_GPU there, and remove fsdp_config"],
            "Unset",
        ),
        (
            {"distributed_type": "DEEPSPEED", "num_processes": 1, "deepspeed_config": {"zero_stage": 2}},
            ["DEEPSPEED: DeepSpeed is not supported", "Set distributed_type: 'NO' there, and remove deepspeed_config"],
            "Unset",
        ),
        (
            {"distributed_type": "NO", "mixed_precision": "fp8", "fp8_config": {"backend": "TE"}},
            ["mixed_precision: fp8, and", "fp32, bf16 or fp16", "mixed_precision: 'no' there and remove fp8_config"],
            "loop.precision=fp8",
        ),
        (
            {"distributed_type": "NO", "mixed_precision": "bf16"},
            ["mixed_precision: bf16, and the configuration says loop.precision=fp32", "or set loop.precision=bf16"],
            "unset",
        ),
        (
            {"distributed_type": "NO", "dynamo_config": {"dynamo_backend": "AOT_EAGER"}},
            ["dynamo_config.dynamo_backend: AOT_EAGER, and", "set dynamo_config.dynamo_backend: 'no' there"],
            "loop.compile=true, ",
        ),
        (
            {"distributed_type": "MEGATRON_LM", "num_processes": 2, "megatron_lm_config": {}},
            ["distributed_type: MEGATRON_LM: Megatron-LM is not supported"],
            "Unset",
        ),
        ({"distributed_type": "XLA"}, ["distributed_type: XLA: TPU is not supported"], "Distributed"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_a_conflict_names_the_key_of_accelerates_file(content, said, never):
    """And offers what tlx has: there is no fp8 here, and no other compiler than inductor."""
    file = Path("/home/me/.cache/huggingface/accelerate/default_config.yaml")
    (problem,) = conflicts(smallest_config(), exported(content), Source(["accelerate", "launch"], file, content))
    assert problem.startswith(f"{file}: ")
    for words in said:
        assert words in problem
    assert never not in problem


def test_an_option_of_the_command_line_is_named_before_the_file():
    words = ["accelerate", "launch", "--mixed_precision", "fp16", "--num-processes=2", "-m", "tlx", "--use_fsdp"]
    source = Source(words, Path("f.yaml"), {"mixed_precision": "bf16", "num_processes": 4})
    env = {"ACCELERATE_MIXED_PRECISION": "fp16", "ACCELERATE_USE_FSDP": "true"}
    fsdp, precision = conflicts(smallest_config(), env, source)
    assert precision.startswith("--mixed_precision fp16 of accelerate launch, and the configuration says")
    assert fsdp.startswith("ACCELERATE_USE_FSDP=true: ")  # a word of the program is none of accelerate's
    assert (option(words, "--num_processes"), option(words, "--use_fsdp")) == ("2", None)
    assert promised(source) == (2, " ".join(words[1:]))
    assert promised(Source(["accelerate", "launch"], Path("f.yaml"), source.content)) == (4, "f.yaml")
    assert promised(Source((), Path("f.yaml"), source.content)) is None


@pytest.mark.slow
def test_accelerates_own_file_is_named_by_a_training_under_it(tmp_path):
    """The real launcher, which says so by the same variables whoever has set them; under it a mistake exits 0."""
    raw = yaml.safe_load((ROOT / "launch" / "one_gpu.yaml").read_text())
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(raw | {"mixed_precision": "bf16", "use_cpu": True}))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(SMALLEST | {"run": str(tmp_path / "run")}))
    words = ["--config_file", tmp_path / "a.yaml", "-m", "tlx", "train", tmp_path / "c.yaml"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *map(str, words)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done
    assert f"{tmp_path / 'a.yaml'}: mixed_precision: bf16, and the configuration says loop.precision" in done.stderr
