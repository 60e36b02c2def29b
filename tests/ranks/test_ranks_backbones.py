"""A dozen backbones on two ranks: bit-equal after every step, whatever is in them, and no rank waits for another."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import environment
from places import SUPPORT
from ranks_backbones import CASES, STEPS


def launched(names: list[str], folder: Path) -> dict[str, list[dict]]:
    """What two ranks have seen, by network."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "ranks_backbones.py", str(folder / "report.json"), *names]
    done = subprocess.run(
        command, cwd=SUPPORT, env=environment(), capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    return launched(list(CASES), tmp_path_factory.mktemp("reports"))


def check(steps: list[dict]) -> None:
    assert [step["phase"] for step in steps] == ["feature_extraction"] * STEPS + ["fine_tuning"] * STEPS
    assert all(step["equal"] for step in steps)
    assert all(step["finite"] for step in steps)
    assert all(step["moved"] for step in steps)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_ranks_are_bit_equal_after_every_step(reports, name):
    check(reports[name])
