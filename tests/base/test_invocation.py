"""The command that is kept to reproduce a run: what a person typed, whoever launched the ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from commands import environment
from places import ROOT

from tlx.base import invocation
from tlx.base.invocation import command, reproducing

SCRIPT = """
import os
from pathlib import Path
from tlx.base.invocation import command
if os.environ.get("RANK", "0") == "0":
    print("kept:", command(Path("runs/x")), flush=True)
"""


def kept(words, program, **env):
    process = subprocess.run([*words, str(program), "train", "c.yaml", "seed=1", "a=b c"], env=environment(**env),
                             capture_output=True, text=True, timeout=120, check=False)  # fmt: skip
    assert process.returncode == 0, process.stderr
    return process.stdout.partition("kept: ")[2].strip()


@pytest.fixture
def program(tmp_path):
    """A program that is called `tlx` and tells what would be kept."""
    (tmp_path / "tlx").write_text(SCRIPT)
    return tmp_path / "tlx"


def test_the_command_alone(program):
    assert kept([sys.executable], program) == "tlx train c.yaml seed=1 'a=b c'"


@pytest.mark.slow
def test_under_torchrun_with_its_ranks(program):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    found = kept([sys.executable, *launcher], program)
    assert found == f"python {' '.join(launcher)} {program} train c.yaml seed=1 'a=b c'"


@pytest.mark.slow
def test_under_accelerate_with_its_file(program):
    launcher = [str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file", f"{ROOT}/launch/cpu.yaml"]
    found = kept(launcher, program)
    assert found == f"accelerate launch --config_file {ROOT}/launch/cpu.yaml {program} train c.yaml seed=1 'a=b c'"


OWN = ["/x/tlx/__main__.py", "train", "c.yaml"]


def test_rebuilt_where_no_process_above_tells(monkeypatch):
    monkeypatch.setattr(sys, "argv", OWN)
    assert command(Path("runs/x")) == "python -m tlx train c.yaml"
    ranks = {"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "2"}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    assert command(Path("runs/x")) == "torchrun --nnodes=2 --nproc-per-node=4 -m tlx train c.yaml"


def test_under_srun_without_a_launcher(monkeypatch):
    monkeypatch.setattr(sys, "argv", OWN)
    step = {"SLURM_SRUN_COMM_HOST": "10.0.0.1", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "8"}
    for name, value in {**step, "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert command(Path("runs/x")) == "srun --nodes=2 --ntasks=8 python -m tlx train c.yaml"


def test_from_python_the_call_with_the_complete_configuration():
    assert command(Path("runs/x")) == "tlx.train.command.train(tlx.plan.config.load('runs/x/config.yaml'), fresh=False)"


def test_an_extended_run_is_trained_again_from_its_own_configuration(monkeypatch):
    assert reproducing(Path("runs/x"), 4) == (
        "tlx.train.command.train(tlx.plan.config.load('runs/x/config.yaml', ['run=runs/x-again']))"
        "  # with OMP_NUM_THREADS=4"
    )
    monkeypatch.setattr(sys, "argv", [*OWN, "phases.a.duration=9", "--extend"])
    again = "train runs/x/config.yaml run=runs/x-again"
    assert reproducing(Path("runs/x"), 4) == f"OMP_NUM_THREADS=4 python -m tlx {again}"
    for name, value in {"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert reproducing(Path("runs/x"), 1) == f"OMP_NUM_THREADS=1 torchrun --nproc-per-node=2 -m tlx {again}"


def test_secrets_of_addresses_are_left_out(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/tlx", "train", "c.yaml", "data.train=https://me:pw@host/a?sig=b"])
    assert command(Path("r")) == "tlx train c.yaml data.train=https://host/a"


def test_the_interpreters_path_is_not_what_was_typed():
    assert invocation._typed(["/x/bin/python3", "/x/bin/torchrun", "-m", "tlx"]) == ["torchrun", "-m", "tlx"]
    assert invocation._typed(["/x/bin/python3.11", "-u", "-m", "tlx"]) == ["python", "-u", "-m", "tlx"]


@pytest.mark.parametrize(
    "words",
    [
        ["env", "WANDB_API_KEY=s3cret", "python", "-m", "tlx"],
        ["sudo", "KEY=s3cret", "tlx"],
        ["apptainer", "exec", "--env", "KEY=s3cret", "image", "torchrun", "-m", "tlx"],
        ["/x/python3", "wrapper.py", "s3cret", "tlx"],
    ],
)
def test_the_words_of_other_programs_are_not_kept(words):
    assert invocation._typed(words) is None


def test_a_program_that_runs_commands_is_left_out_and_secrets_of_launchers_too(program, tmp_path):
    # it stays above its command, as sudo and containers do
    above = tmp_path / "runs.py"
    above.write_text("import subprocess, sys; sys.exit(subprocess.call(sys.argv[3:]))")
    assert kept([sys.executable, above, "run", "KEY=s3cret", sys.executable], program) == (
        "tlx train c.yaml seed=1 'a=b c'"
    )
    launcher = ["torchrun", "--nproc-per-node=2", "--rdzv-conf", "token=s3cret", "--my-secret=s3cret", "--api_key"]
    assert invocation._masked([*launcher, "s3cret", "-m", "tlx"]) == [
        *("torchrun", "--nproc-per-node=2", "--rdzv-conf", "token=...", "--my-secret=...", "--api_key", "..."),
        *("-m", "tlx"),
    ]
