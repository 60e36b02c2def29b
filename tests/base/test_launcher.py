"""Who stands above a process: asked of it, and not concluded from variables that anybody may export."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from commands import environment, tlx

from tlx.base.errors import UserError
from tlx.base.launcher import Environment, is_accelerate, program

AGENT = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
ASK = (
    "import json; from tlx.base import launcher; e = launcher.environment(); "
    "print(json.dumps([e.launched, e.accelerate]))"
)


@pytest.mark.slow
def test_a_mistake_is_one_whatever_is_exported(tmp_path):
    """accelerate's variables stand in many people's environments; only accelerate itself swallows exit codes."""
    (tmp_path / "c.yaml").write_text("run: x")
    done = tlx("plan", tmp_path / "c.yaml", is_forked=True, ACCELERATE_MIXED_PRECISION="no", TORCHELASTIC_RUN_ID="x")
    assert (done.returncode, "data: missing" in done.stderr) == (2, True), done


def asked(*words, **env):
    """What a process says that these words have started, which get its command line as their last words."""
    command = [*words, sys.executable, "-c", ASK]
    done = subprocess.run(
        list(map(str, command)), env=environment(**env), capture_output=True, text=True, timeout=60, check=True
    )
    return json.loads(done.stdout)


def test_accelerate_above_is_found_and_nothing_else(tmp_path):
    """A stand-in of its script: it starts the words after its options, as accelerate's simple launcher does."""
    script = tmp_path / "accelerate"
    script.write_text("import subprocess, sys\nsys.exit(subprocess.run(sys.argv[4:]).returncode)")
    words = [sys.executable, script, "launch", "--config_file", "x"]
    told = {"ACCELERATE_MIXED_PRECISION": "no"}
    assert asked(**told) == [False, []]
    launched, found = asked(*words, **told)
    assert (launched, found[1:5]) == (True, [str(script), "launch", "--config_file", "x"])
    assert asked(*words, "timeout", "50", **told)[0] is True
    # accelerate has started a program, and that program has started this one: its exit code is for the program
    other = tmp_path / "sweep.py"
    other.write_text("import subprocess, sys\nsys.exit(subprocess.run(sys.argv[1:]).returncode)")
    assert asked(*words, sys.executable, other, **told) == [False, []]
    assert asked(sys.executable, other, **AGENT)[0] is True


@pytest.mark.parametrize(
    ("words", "is_it"),
    [
        (["/x/bin/accelerate", "launch", "a.py"], True),
        (["/x/python3.11", "/x/bin/accelerate", "launch", "-m", "tlx"], True),
        (["python", "-u", "-W", "ignore", "-m", "accelerate.commands.launch", "a.py"], True),
        (["python", "-m", "accelerate.commands.accelerate_cli", "launch", "a.py"], True),
        (["/x/bin/accelerate-launch", "a.py"], True),
        (["/x/bin/accelerate", "config"], False),
        (["python", "a.py", "accelerate", "launch"], False),
        (["bash", "-c", "accelerate launch -m tlx"], False),
        ([], False),
    ],
)
def test_the_words_of_accelerate_launch(words, is_it):
    assert is_accelerate(words) is is_it


def test_what_a_command_line_runs():
    assert program(["/x/python3", "-X", "dev", "-m", "tlx", "train"]) == ("tlx", ["train"])
    assert program(["python", "/x/tlx", "train"]) == ("tlx", ["train"])
    assert program(["/x/torchrun", "-m", "tlx"]) == ("torchrun", ["-m", "tlx"])
    assert program(["python"]) == ("python", [])


def test_a_rank_has_all_that_torchruns_agent_gives_it():
    assert Environment(AGENT).launched
    for name in AGENT:
        assert not Environment({key: value for key, value in AGENT.items() if key != name}).launched
    assert (Environment({"RANK": "7"}).rank, Environment({"RANK": "x"}).rank) == (7, 0)
    assert (Environment({}).size, Environment({"WORLD_SIZE": "4"}).size) == (1, 4)
    with pytest.raises(UserError, match=r"WORLD_SIZE: 'x' is no number\n  -> unset it"):
        _ = Environment({"WORLD_SIZE": "x"}).size
    job = {"SLURM_JOB_ID": "5", "SLURM_RESTART_COUNT": "0"}
    assert (Environment(job).job, Environment(job).requeued_job) == ("5", None)
    assert Environment({**job, "SLURM_RESTART_COUNT": "2"}).requeued_job == "5"


def test_what_a_job_that_is_submitted_from_here_gets():
    kept = {"HOME": "/h", "SLURM_CONF": "/s", "WANDB_PROJECT": "p", "TLX_WEIGHTS": "/w", "SBATCH_ACCOUNT": "a"}
    foreign = {
        "SLURM_JOB_ID": "5", "SLURM_ARRAY_JOB_ID": "3", "SLURM_MEM_PER_CPU": "100", "SLURM_RESTART_COUNT": "1",
        "PMI_RANK": "0", "GROUP_RANK": "0", "MASTER_ADDR": "n1", "TLX_RUN": "/r", "TLX_BEGAN": "9", **AGENT,
    }  # fmt: skip
    assert Environment({**kept, **foreign, "OMP_NUM_THREADS": "2"}).outside() == {**kept, "OMP_NUM_THREADS": "2"}
    ours = {"OMP_NUM_THREADS": "2", "TLX_THREADS": "2"}  # as slurm/train.sbatch has set it
    assert Environment({**kept, **ours}).outside() == kept


def test_the_environment_is_this_process_own(monkeypatch):
    from tlx.base import launcher

    monkeypatch.setenv("TLX_SOMETHING", "1")
    assert launcher.environment().variables == dict(os.environ)
    launcher.export("TLX_SOMETHING", "2", replace=False)
    assert os.environ["TLX_SOMETHING"] == "1"
    launcher.export("TLX_SOMETHING", "2")
    assert launcher.environment().get("TLX_SOMETHING") == "2"
    launcher.withdraw("TLX_SOMETHING")
    launcher.withdraw("TLX_SOMETHING")
    assert "TLX_SOMETHING" not in os.environ


def test_an_empty_variable_of_wandb_is_none(monkeypatch):
    """`export WANDB_MODE=` means "not set" to who writes it, and is an error to W&B."""
    from tlx.tracking.wandb_service import forget_empty_variables

    monkeypatch.setenv("WANDB_MODE", "")
    monkeypatch.setenv("WANDB_NAME", "mine")
    forget_empty_variables()
    assert ("WANDB_MODE" in os.environ, os.environ["WANDB_NAME"]) == (False, "mine")
