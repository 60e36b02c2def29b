"""slurm/train.sbatch decides by the verdict of this start: here Slurm and the training are scripts of a few lines."""

from __future__ import annotations

import json
import subprocess

import pytest
from places import ROOT

SCRIPT = ROOT / "slurm" / "train.sbatch"
FAKES = {
    "srun": 'while [[ $1 == --* ]]; do shift; done; "$@"',
    "scontrol": '[ "$1 $2" != "show hostnames" ] || echo localhost; [ "$1" != requeue ] || touch "$RUN/../requeued"',
    "squeue": "echo RUNNING None",
    "sleep": "",
    "training": '[ "$1" != -c ] || exit 0\n'
    '[ -z "$SAYS" ] || echo "$SAYS" >"$TLX_VERDICT"; eval "${DOES:-}"; exit "$CODE"',
}


@pytest.fixture
def job(tmp_path):
    """Runs the script: its exit code, whether it requeues, and what the verdict's file says."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in FAKES.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    run = tmp_path / "run"

    def call(says="", code=0, **more):
        env = {
            "PATH": f"{programs}:/usr/bin:/bin", "PYTHON": str(programs / "training"), "LAUNCHER": "srun",
            "SAYS": json.dumps({"status": says}) if says else "", "CODE": str(code),
            "RUN": str(run), "TLX_RUN": str(run),
            "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1", "RANKS_PER_NODE": "1",
            "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", **more,
        }  # fmt: skip
        done = subprocess.run(["bash", str(SCRIPT), "c.yaml"], env=env, capture_output=True, text=True, check=False)
        verdict = run / "slurm" / "7-r0.verdict"
        requeued = (tmp_path / "requeued").exists()
        (tmp_path / "requeued").unlink(missing_ok=True)
        return done.returncode, requeued, verdict.read_text() if verdict.exists() else done.stdout

    return call


@pytest.mark.parametrize(
    ("says", "code", "ends", "comes_back"),
    [
        ("done", 0, 0, False),
        ("user-error", 0, 2, False),  # as a launcher tells it
        ("user-error", 2, 2, False),
        ("resumable", 0, 75, False),  # somebody wanted it to stop
        ("fault", 1, 1, True),
        ("running", 137, 1, True),  # it was killed
        ("", 137, 1, True),  # before it could say anything
        ("", 0, 2, False),  # nothing is said, and nothing was done
    ],
)
def test_a_job_ends_or_comes_back_by_the_verdict_of_its_own_start(job, tmp_path, says, code, ends, comes_back):
    run = tmp_path / "run"
    run.mkdir()
    (run / "status.json").write_text('{"status": "done"}')  # of an earlier start
    assert job(says, code)[:2] == (ends, comes_back)


def test_a_launcher_that_ended_without_a_word_has_one_written_for_it(job):
    verdict = json.loads(job("", 3)[2])
    assert verdict["status"] == "fault"
    assert verdict["message"].startswith("srun on ")
    assert verdict["message"].endswith(" ended with code 3")


def test_a_run_folder_that_is_gone_is_not_begun_anew(job):
    code, requeued, said = job("fault", 1, DOES='rm -r "$RUN"')
    assert (code, requeued) == (2, False)
    assert "is not what it was when this start began: not requeued" in said
