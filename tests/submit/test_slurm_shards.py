"""slurm/shards.sbatch on a real cluster of two nodes: an array builds, one of it is requeued, a last job finishes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from textwrap import dedent

import pytest
import slurm_cluster
from built import assert_same_files
from images import make_folder
from places import ROOT

from tlx.data.build.write import BuildOptions, build_shards

SCRIPT = ROOT / "slurm" / "shards.sbatch"
REASON = slurm_cluster.absent()
pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

# what a job starts in place of python: the same, with time for something to happen to it
SLOW = """
    import sys, time
    from tlx.cli import main as cli
    from tlx.data.build import write
    plain = write._stored
    def slow(*given):
        time.sleep(0.02)
        return plain(*given)
    write._stored = slow
    sys.argv = ["tlx", *sys.argv[3:]]
    sys.exit(cli.main())
"""


@pytest.fixture
def submit(cluster, tmp_path):
    """Runs the script as on a login node, for three parts of four CPUs each; the numbers of both jobs."""
    (tmp_path / "slow.py").write_text(dedent(SLOW))
    python = f"{sys.executable} {tmp_path / 'slow.py'}"

    def call(*words):
        env = {**os.environ, **cluster.environment, "PYTHON": python, "SBATCH_OPTIONS": "--cpus-per-task=4"}
        command = ["bash", SCRIPT, "--parts", "3", *words, "--jobs", "1"]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
        said = re.match(r"parts:  job (\d+), .*\nfinish: job (\d+), ", done.stdout)
        assert said, done.stdout
        return said.groups()

    return call


def said(folder):
    return "".join(f"{p.name}:\n{p.read_text()}" for p in sorted(folder.glob("shards-*.out")))


def test_an_array_of_which_one_part_is_requeued(cluster, submit, tmp_path, record_property):
    src, out, began = make_folder(tmp_path / "src", per_class=200, size=24), tmp_path / "out", time.monotonic()
    array, finish = submit("src", "out", "--val", "0.2", "--shard-samples", "10")
    while not (out / "train" / "000007.tar").exists():  # the third of part 2
        assert cluster.job(f"{array}_2")["JobState"] in ("PENDING", "RUNNING"), said(tmp_path)
        assert time.monotonic() < began + 120, said(tmp_path)
        time.sleep(0.02)
    made = (out / "train" / "000007.tar").stat().st_mtime_ns
    assert not (out / "train" / "000046.tar").exists()  # its last one
    cluster.call("scontrol", "requeue", f"{array}_2")
    job = cluster.ended(f"{array}_2")
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), said(tmp_path)
    assert cluster.ended(finish)["JobState"] == "COMPLETED", said(tmp_path)
    again = (tmp_path / f"shards-{array}_2.out").read_text()
    assert "start 2: --part 2/3" in again
    assert re.search(r"part 2/3: 200 samples in 20 shards, \d+ of them there before", again)
    assert (out / "train" / "000007.tar").stat().st_mtime_ns == made
    assert all(f" on {name}" in said(tmp_path) for name in cluster.names)
    build_shards(str(src), tmp_path / "one", BuildOptions(val=0.2, shard_samples=10, jobs=2))
    assert_same_files(out, tmp_path / "one")
    record_property("figures", f"slurm: shards by an array of 3, one requeued: {time.monotonic() - began:.0f} s")


def test_after_a_part_that_failed_the_last_job_does_not_run(cluster, submit, tmp_path):
    src = make_folder(tmp_path / "src", per_class=10, size=24)
    (src / "class1" / "0003.jpg").write_bytes(b"<html>")
    _, finish = submit(src, "out", "--val", "0.2", "--shard-samples", "5")
    assert cluster.ended(finish)["JobState"] == "CANCELLED"
    assert "1 unreadable picture:" in said(tmp_path)
    assert not (tmp_path / "out" / "train" / "index.json").exists()
    _, finish = submit(src, "out", "--val", "0.2", "--shard-samples", "5", "--skip-bad")
    assert cluster.ended(finish)["JobState"] == "COMPLETED", said(tmp_path)
    build_shards(str(src), tmp_path / "one", BuildOptions(val=0.2, shard_samples=5, jobs=0, skip_bad=True))
    assert_same_files(tmp_path / "out", tmp_path / "one")


@pytest.mark.parametrize(
    "words", [[], ["SRC", "OUT"], ["--parts", "0", "SRC", "OUT"], ["--parts", "3", "nowhere", "OUT"]]
)
def test_what_is_not_submitted(cluster, tmp_path, words):
    env = {**os.environ, **cluster.environment}
    done = subprocess.run(["bash", SCRIPT, *words], env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
