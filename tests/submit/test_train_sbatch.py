"""slurm/train.sbatch with commands of Slurm that say what they are told to: which job it is, what may not heal, what is
another job's. What a real cluster does is in test_slurm.py."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from places import ROOT

FAKE = r"""#!/bin/bash
printf '%s\n' "$(printf '%q ' "${0##*/}" "$@")" >>"$FAKE/calls"
case "${0##*/} $*" in
"scontrol -d show job"*) cat "$FAKE/record" ;;
"scontrol show hostnames"*) echo localhost; echo localhost ;;
"scontrol requeue"*) exit 1 ;;
squeue*) echo RUNNING None ;;
"sbatch --test-only"*) echo "${REFUSES:-}" >&2; [ -z "${REFUSES:-}" ] ;;
sbatch*) env >"$FAKE/sbatch.env"; echo 77 ;;
sacct*) cat "$FAKE/accounts" 2>/dev/null ;;
srun*)
    env >"$FAKE/srun.env"
    while [[ $1 != --output=* ]]; do shift; done
    log=${1#--output=}
    eval "$STEP" ;;
esac
"""
RECORD = """\
JobId=5 JobName=tlx
   UserId=me(1) Requeue={requeue} Restarts={restarts} BatchFlag=1 {about}
   JOB_GRES=
     Nodes=localhost CPU_IDs=0-3 Mem=0 GRES={gres}
     Nodes=other CPU_IDs=0-3 Mem=0 GRES={other}

"""
OWN = {
    "SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_CPUS_PER_TASK": "16", "SLURM_JOB_CPUS_PER_NODE": "8,4(x2)",
}  # fmt: skip
OTHERS = {
    "SLURM_ARRAY_JOB_ID": "3", "SLURM_ARRAY_TASK_ID": "1", "SLURM_RESTART_COUNT": "4", "SLURM_GPUS_ON_NODE": "2",
    "SLURM_MEM_PER_CPU": "10", "SLURM_MEM_PER_NODE": "100", "SLURM_CPU_BIND": "mask_cpu:0x1", "SLURM_STEP_ID": "0",
    "SLURM_CPUS_PER_GPU": "4", "SLURM_GPUS_PER_TASK": "1", "SLURM_TRES_PER_TASK": "cpu=4", "SLURM_GPU_BIND": "single:1",
    "RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "3", "TLX_THREADS": "3",
}  # fmt: skip
"""What sbatch hands on where a job is submitted inside another one."""


class Job:
    """A start of the script, beside fakes of Slurm's commands."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "the run"
        (folder / "bin").mkdir()
        for name in ("scontrol", "squeue", "sbatch", "srun", "sacct"):
            (folder / "bin" / name).write_text(FAKE)
            (folder / "bin" / name).chmod(0o755)
        self.record()

    def record(
        self, *, restarts: int = 0, requeue: int = 1, gres: str = "", other: str | None = None, about: str = ""
    ) -> None:
        numbers = {"restarts": restarts, "requeue": requeue}
        text = RECORD.format(**numbers, gres=gres, other=gres if other is None else other, about=about)
        (self.folder / "record").write_text(text)

    def start(
        self, *words: str, step: str = "exit 1", script: Path = ROOT / "slurm" / "train.sbatch", **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Args: step: what srun does, in shell; $log is the pattern of the tasks' logs."""
        known = {"HOME": str(self.folder), "FAKE": str(self.folder), "STEP": step, "TLX_RUN": str(self.run)}
        path = f"{self.folder / 'bin'}:/usr/bin:/bin"
        return subprocess.run(
            ["bash", script, "c.yaml", *words],
            env={**known, "PATH": path, "PYTHON": sys.executable, **OWN, **env},
            cwd=self.folder, capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip

    def calls(self, name: str) -> list[str]:
        lines = (self.folder / "calls").read_text().splitlines()
        return [line.strip() for line in lines if line.startswith(f"{name} ")]

    def environment(self, name: str) -> dict[str, str]:
        lines = (self.folder / f"{name}.env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


def test_what_another_job_has_left_is_not_this_ones(job):
    """Submitted inside an array's element on GPUs, this job is none, and has two nodes of 4 and 8 CPUs without any."""
    job.record(requeue=0)
    done = job.start(**OTHERS)
    assert " job 5, start 1: localhost localhost, 1 ranks on each by torchrun" in done.stdout, done
    assert job.calls("scontrol")[-1] == "scontrol requeue 5"
    step = job.environment("srun")
    assert not {*OTHERS} - {"SLURM_RESTART_COUNT", "OMP_NUM_THREADS", "TLX_THREADS"} & {*step}, sorted(step)
    assert [step[name] for name in ("SLURM_RESTART_COUNT", "RANKS", "OMP_NUM_THREADS")] == ["0", "1", "4"]
    assert "--cpus-per-task=4" in job.calls("srun")[0]


def test_the_last_of_an_array_is_found_by_its_own_record(job):
    """Asked for the array's number, scontrol tells of all its jobs."""
    one = "JobId={} ArrayJobId=12 ArrayTaskId={} JobName=a\n   Requeue=0 Restarts={}\n\n"
    (job.folder / "record").write_text(one.format(13, 1, 9) + one.format(12, 2, 3))
    done = job.start(SLURM_JOB_ID="12", SLURM_ARRAY_JOB_ID="12", SLURM_ARRAY_TASK_ID="2")
    assert " job 12_2, start 4: " in done.stdout, done
    assert job.calls("scontrol")[-1] == "scontrol requeue 12_2"
    assert job.environment("srun")["SLURM_ARRAY_TASK_ID"] == "2"


def test_a_node_that_cannot_train_ends_the_job_at_once(job):
    """The other node's launcher would look for it for minutes, and so would three starts after this one."""
    began = time.monotonic()
    step = (
        'echo "error: n2: PYTHON=/x cannot train: No such file" >"${log//%n/1}"\n'
        'echo "srun: error: n2: task 1: Exited with exit code 95" >&2; exec sleep 60'
    )
    done = job.start(step=step)
    assert done.returncode == 2, done
    assert "error: n2: PYTHON=/x cannot train: No such file\n" in done.stdout
    assert "--exclude=NODE" in done.stderr
    assert not [call for call in job.calls("scontrol") if "requeue" in call]
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(("seen", "code", "requeues"), [("Exited with exit code 1", 2, 0), ("", 1, 1)])
def test_a_node_that_does_not_see_the_runs_folder_is_asked_again(job, seen, code, requeues):
    """srun says the same of a node that it cannot reach for a moment, and that is no mistake."""
    job.record(requeue=0)
    step = (
        f'if [[ $* == *"test -w"* ]]; then echo "srun: error: n2: task 0: {seen}" >&2; exit 1; fi\n'
        'echo "srun: error: task 1 launch failed: Slurmd could not connect IO" >&2; exec sleep 60'
    )
    done = job.start(step=step)
    assert done.returncode == code, done
    assert ("cannot write into" in done.stderr) is (code == 2)
    assert "--nodelist=localhost" in job.calls("srun")[-1]
    assert len([call for call in job.calls("scontrol") if "requeue" in call]) == requeues


@pytest.mark.parametrize(
    ("said", "heals"),
    [
        ("srun: fatal: --cpus-per-gpu is mutually exclusive with --cpus-per-task", False),
        ("srun: unrecognized option '--nonsense'", False),
        ("srun: error: Unable to create step for job 5: Requested node configuration is not available", False),
        ("srun: error: Unable to create step for job 5: Requested nodes are busy", True),
        ("srun: error: Unable to confirm allocation for job 5: Invalid job id specified", True),
    ],
)
def test_a_step_that_srun_refuses_is_not_tried_again(job, said, heals):
    job.record(requeue=0)
    done = job.start(step=f'echo "{said}" >&2; exit 1')
    assert said in done.stderr
    tried = [call for call in job.calls("scontrol") if "requeue" in call]
    assert (done.returncode, tried) == ((1, ["scontrol requeue 5"]) if heals else (2, []))


def test_a_task_that_has_begun_may_fail_with_such_words(job):
    job.record(requeue=0)
    done = job.start(step='touch "${log//%n/0}"; echo "srun: error: mutually exclusive" >&2; exit 1')
    assert done.returncode == 1
    assert job.calls("scontrol")[-1] == "scontrol requeue 5"


def test_where_slurm_does_not_requeue_the_next_job_is_queued(job):
    job.record(requeue=0, about=f"NumNodes=2 TresPerNode=gres:gpu:2 Comment=tlx:{job.run}")
    script = ROOT / "slurm" / "train.sbatch"
    queued = f"sbatch --parsable --dependency=afterany:5 {script} c.yaml seed=1"
    job.start("seed=1", "--fresh", CHAIN="yes", **OTHERS)
    assert job.calls("sbatch") == [f"{queued} --fresh"]  # it ended before it had begun anew
    (job.run / "slurm" / "5.fresh").touch()
    done = job.start("seed=1", "--fresh", CHAIN="yes", **OTHERS)
    assert "Slurm does not requeue this job; job 77 goes on in its place" in done.stdout, done
    assert job.calls("sbatch")[1:] == [queued]
    handed = job.environment("sbatch")
    assert handed["TLX_CHAIN"] == "5"
    assert not [name for name in handed if name.startswith("SLURM_")]
    assert "OMP_NUM_THREADS" not in handed
    # the starts without a new checkpoint are counted on from job to job
    (job.run / "slurm" / "1.tries").write_text("3")
    (job.run / "slurm" / "1.tries.nodes").write_text("n1\nn2\nn2\nn2\n")
    step = 'echo "srun: error: n2: task 1: Exited with exit code 1" >&2; exit 1'
    done = job.start(CHAIN="yes", TLX_CHAIN="1", MAX_TRIES="3", step=step)
    assert "4 starts in a row have brought no new checkpoint: not requeued" in done.stdout, done
    assert "the first node to fail, start by start: n2 n2 n2 n2. To leave one out: --exclude=NODE" in done.stdout
    assert len(job.calls("sbatch")) == 2


def test_a_successor_has_the_options_that_only_the_command_line_said(job):
    """Its header has those of the script; the other ones are known to Slurm alone, and what is lost is said at once."""
    about = (
        "Account=me QOS=(null) TimeLimit=1-06:00:00 Partition=gpu ReqNodeList=(null) ExcNodeList=n[7-8] NumNodes=4 "
        "CPUs/Task=96 MinMemoryNode=480G Features=a100&ib MailUser=me MailType=END,FAIL\n"
        "   TresPerNode=gres:gpu:a100:8,gres:nvme:1"
    )
    job.record(requeue=0, about=about)
    done = job.start("seed=1", CHAIN="yes")
    (call,) = job.calls("sbatch")
    own = "--nodes=4 --time=1-06:00:00 --partition=gpu --account=me --constraint=a100&ib --cpus-per-task=96 --mem=480G "
    own += "--exclude=n[7-8] --mail-user=me --mail-type=END,FAIL --gpus-per-node=a100:8 --gres=nvme:1 --no-requeue"
    script = str(ROOT / "slurm" / "train.sbatch")
    assert shlex.split(call) == [
        *("sbatch", "--parsable", "--dependency=afterany:5", *own.split(), script, "c.yaml", "seed=1")
    ]
    first = done.stdout.splitlines()[0]
    assert f"its successor is queued with {own}; any other option of sbatch's command line (--nice, " in first, done
    (job.folder / "accounts").write_text("sbatch --signal B:USR1@600 --exclusive slurm/train.sbatch c.yaml\n")
    out = "OverSubscribe=NO\n   StdErr=/a b5/e.log\n   StdIn=/dev/null\n   StdOut=/a b5/x-5.out"
    job.record(requeue=0, about=f"NumNodes=2 {out}")
    job.start(CHAIN="yes")
    assert shlex.split(job.calls("sbatch")[-1])[3:-2] == [
        *("--nodes=2", "--gpus-per-node=0", "--no-requeue", "--exclusive"),
        *("--output=/a b5/x-%j.out", "--error=/a b5/e.log", "--signal=B:USR1@600"),
    ]
    (job.folder / "accounts").unlink()
    job.record(requeue=0, about="NumNodes=2\n   StdErr=\n   StdOut=/a/5.out")
    job.start(CHAIN="yes")
    assert not [word for word in shlex.split(job.calls("sbatch")[-1]) if word.startswith("--error")]
    later = "NumNodes=2 MinMemoryCPU=2G MinMemoryNode=0 TresPerNode=gres/gpu"  # as a later Slurm says
    job.record(requeue=0, about=later)
    assert "is queued with --nodes=2 --mem-per-cpu=2G --gpus-per-node=1 --no-requeue; " in job.start(CHAIN="yes").stdout
    assert "is queued with" not in job.start(CHAIN="").stdout


@pytest.mark.parametrize(
    ("about", "own", "without_header"),
    [
        ("", "--gpus-per-node=0 ", ""),
        ("TresPerNode=gres:gpu:0", "--gpus-per-node=0 ", "--gpus-per-node=0 "),
        ("TresPerJob=gres:gpu:3", "--gpus=3 --gpus-per-node=0 ", "--gpus=3 "),
        (
            "TresPerJob=gres/gpu:8,gres/nvme:1 TresPerNode=gres/gpu:2",
            "--gpus-per-node=2 --gpus=8 ",
            "--gpus-per-node=2 --gpus=8 ",
        ),
        ("TresPerTask=gres:gpu:a100:1", "--gpus-per-task=a100:1 --gpus-per-node=0 ", "--gpus-per-task=a100:1 "),
        ("TresPerTask=cpu=4,gres/gpu=1", "--gpus-per-task=1 --gpus-per-node=0 ", "--gpus-per-task=1 "),
        ("MinMemoryNode=0 TresPerNode=gres:gpu:2", "--mem=0 --gpus-per-node=2 ", "--mem=0 --gpus-per-node=2 "),
        (
            "MinMemoryNode=0 MemPerTres=gres:gpu:10240 TresPerNode=gres:gpu:2",
            "--mem-per-gpu=10240 --gpus-per-node=2 ",
            "--mem-per-gpu=10240 --gpus-per-node=2 ",
        ),
    ],
)
def test_gpus_and_memory_of_a_successor_are_asked_for_as_they_were(job, about, own, without_header):
    """GPUs of each node that the header asks for are taken back where the command line has taken them back."""
    job.record(requeue=0, about=f"NumNodes=2 {about}")
    assert f"is queued with --nodes=2 {own}--no-requeue; " in job.start(CHAIN="yes").stdout
    script, real = job.folder / "own.sbatch", (ROOT / "slurm" / "train.sbatch").read_text()
    script.write_text(re.sub(r"(?m)^#SBATCH --gpus-per-node=.*\n", "", real))
    assert f"is queued with --nodes=2 {without_header}--no-requeue; " in job.start(CHAIN="yes", script=script).stdout


def test_nodes_with_unequal_gpus(job):
    job.record(gres="gpu:a100:2(IDX:0-1)", other="gpu:a100:1(IDX:0)", requeue=0)
    refused = job.start(LAUNCHER="accelerate", SLURM_GPUS_ON_NODE="2")
    assert refused.returncode == 2
    assert "2 1 GPUs of this job, and LAUNCHER=accelerate starts as many ranks on each" in refused.stderr
    done = job.start(SLURM_GPUS_ON_NODE="2")
    assert "2 ranks on each (as many as GPUs: 2 1) by torchrun" in done.stdout
    assert job.environment("srun")["OWN_RANKS"] == "yes"
    job.record(gres="gpu:2(IDX:0-1)", requeue=0)
    assert "2 ranks on each by accelerate" in job.start(LAUNCHER="accelerate", SLURM_GPUS_ON_NODE="2").stdout
    assert job.environment("srun")["OWN_RANKS"] == ""


def test_without_an_interpreter_the_job_says_so(job):
    done = job.start(TLX_RUN="", PYTHON="nowhere/python")
    assert done.returncode == 2
    assert "PYTHON=nowhere/python cannot train: " in done.stderr
    assert "bash launch/env.sh" in done.stderr
    (job.folder / "bare").write_text('#!/bin/sh\nexec python3 -S "$@"\n')  # one without site-packages
    (job.folder / "bare").chmod(0o755)
    assert "it has no t" in job.start(TLX_RUN="", PYTHON=str(job.folder / "bare")).stderr


def test_a_folder_that_slurm_cannot_open_files_in(job):
    done = job.start(TLX_RUN=str(job.folder / "100%"))
    assert (done.returncode, "Slurm cannot open files in a folder of this name" in done.stderr) == (2, True)
    (job.folder / "file").touch()
    done = job.start(TLX_RUN=str(job.folder / "file"))
    assert (done.returncode, "/file/slurm cannot be written" in done.stderr) == (2, True)
    assert not (job.folder / "srun.env").exists()


def test_headers_do_not_name_files_after_jobs():
    """A job's name with a slash would name a folder that is not there: Slurm fails the job, and nothing says why."""
    for name in ("train", "array", "shards"):
        (line,) = [
            line
            for line in (ROOT / "slurm" / f"{name}.sbatch").read_text().splitlines()
            if line.startswith("#SBATCH --output")
        ]
        assert "%x" not in line


def test_an_array_is_looked_at_by_one_command_and_handed_no_other_job(job):
    """Every value is checked, the folder is asked for once, and sbatch gets nothing of the job around."""
    python = job.folder / "python"
    python.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$*" >>"{job.folder}/asked"\n[ "$1" != -m ] || echo "{job.folder}/runs/a"\n'
    )
    python.chmod(0o755)
    config = f"{{run: {job.folder}/runs/a, data: {{train: x, batch: 8}}, backbone: {{name: 'toys:small'}}}}"
    (job.folder / "c.yaml").write_text(config)

    def submit(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
        path = f"{job.folder / 'bin'}:/usr/bin:/bin"
        return subprocess.run(
            ["bash", ROOT / "slurm" / "array.sbatch", *words],
            env={"PATH": path, "FAKE": str(job.folder), "PYTHON": str(python), **OWN, **OTHERS, "TLX_RUN": "/r", **env},
            cwd=job.folder, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    wrong = submit("--output=nowhere/%j", "c.yaml", "seed=0,1,2")
    assert (wrong.returncode, "there is no folder there that can be written" in wrong.stderr) == (2, True)
    done = submit("c.yaml", "seed=0,1,2", "data.batch=8")
    assert done.returncode == 0, done
    asked = (job.folder / "asked").read_text().splitlines()
    assert asked == ["-m tlx status --folder c.yaml data.batch=8 --each=seed=0 --each=seed=1 --each=seed=2"]
    handed = job.environment("sbatch")
    assert not {*OTHERS, *OWN, "TLX_RUN"} & {*handed}
    tried, array, report = job.calls("sbatch")
    assert tried.startswith("sbatch --test-only ")
    assert "warning" not in done.stderr
    assert f"--output={job.folder}/runs/a-sweep/slurm/%A_%a.out" in array
    assert "--dependency=afterany:77" in report
    twice = submit("c.yaml", "seed=10,010", PYTHON=sys.executable)
    assert (twice.returncode, twice.stderr) == (
        2,
        "error: seed=010 is the same as seed=10\n  -> leave one of them out\n",
    )
    assert len(job.calls("sbatch")) == 3
    done = submit("c.yaml", "seed=0,1", REFUSES="allocation failure: Requested node configuration is not available")
    assert "warning: no node that works now can take a training (1 GPU and 8 CPUs" in done.stderr
