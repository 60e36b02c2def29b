"""A dozen backbones on two ranks: bit-equal after every step, whatever is in them, and no rank waits for another."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import environment
from ranks_backbones import CASES, QUICK, STEPS

HERE = Path(__file__).parent


def launched(names: list[str], folder: Path) -> dict[str, list[dict]]:
    """What two ranks have seen, by network."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "ranks_backbones.py", str(folder / "report.json"), *names]
    done = subprocess.run(
        command, cwd=HERE, env=environment(), capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return launched(list(QUICK), tmp_path_factory.mktemp("quick"))


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    return launched([name for name in CASES if name not in QUICK], tmp_path_factory.mktemp("others"))


def check(steps: list[dict]) -> None:
    assert [step["phase"] for step in steps] == ["feature_extraction"] * STEPS + ["fine_tuning"] * STEPS
    assert all(step["equal"] for step in steps)
    assert all(step["finite"] for step in steps)
    assert all(step["moved"] for step in steps)


@pytest.mark.parametrize("name", QUICK)
def test_ranks_are_bit_equal_after_every_step(quick, name):
    check(quick[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in CASES if n not in QUICK])
def test_ranks_are_bit_equal_after_every_step_of_others(others, name):
    check(others[name])
