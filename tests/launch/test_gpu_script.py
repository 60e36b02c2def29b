"""launch/gpu.sh without a GPU: every step runs at toy size, and what takes too long or fails is in the table."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from argparse import Namespace

import psutil
import pytest
from places import ROOT, TESTS

GPU = TESTS / "gpu"
SCRIPT = ROOT / "launch" / "gpu.sh"


@pytest.fixture
def runner(monkeypatch):
    monkeypatch.syspath_prepend(str(GPU))
    import run
    import steps

    yield Namespace(run=run, steps=steps)
    for name in ("run", "steps"):
        del sys.modules[name]


@pytest.fixture
def step(runner, tmp_path):
    """Makes a step of a program that is written here."""

    def step(program: str, limit_s: float = 20.0):
        file = tmp_path / "program.py"
        file.write_text(program)
        return runner.steps.Step("tests", "a step", "something", str(file.with_suffix("")), limit_s=limit_s)

    return step


ROW = """import json, sys
with open(sys.argv[sys.argv.index("--rows") + 1], "a") as file:
    file.write(json.dumps({"what": "a", "ok": True, "x": 0.123456}) + chr(10))
"""
SLEEPER = "import subprocess; child = subprocess.Popen(['sleep', '1234.5'])\n"


@pytest.mark.slow
def test_a_step_that_takes_too_long_is_cut_off_with_what_it_has_shown(runner, step, tmp_path):
    said = Namespace(out=tmp_path, dry=True)
    began = time.monotonic()
    result = runner.run.run(step(ROW + SLEEPER + "child.wait()", limit_s=1.0), said, left=100.0)
    assert time.monotonic() - began < 10
    assert (result.outcome, result.failed) == ("cut off", False)
    assert result.rows == [{"what": "a", "ok": True, "x": 0.123456}]
    left = [p for p in psutil.process_iter(["cmdline", "status"]) if "1234.5" in (p.info["cmdline"] or [])]
    assert not [p for p in left if p.info["status"] != psutil.STATUS_ZOMBIE]  # killed, and not yet waited for by init
    assert "a                                                          x 0.1235" in runner.run.text([result])


def test_a_step_that_does_not_fit_its_part_is_listed(runner, step, tmp_path):
    result = runner.run.run(step(ROW), Namespace(out=tmp_path, dry=True), left=3.0)
    assert result.rows == []
    assert runner.run.text([result]).splitlines()[0] == "tests: a step: did not fit"


def test_a_step_that_fails_shows_its_end_and_a_wrong_row_fails_the_whole(runner, step, tmp_path):
    said = Namespace(out=tmp_path, dry=True)
    result = runner.run.run(step("raise ValueError('no such device')"), said, left=100.0)
    assert (result.outcome, result.failed) == ("failed", True)
    assert "ValueError: no such device" in runner.run.text([result])
    wrong = runner.run.run(step(ROW.replace("True", "False")), said, left=100.0)
    assert (wrong.outcome, wrong.failed) == ("done", True)
    assert "steps: 1 done; rows that are not as they must be: 1" in runner.run.text([wrong])


def test_a_part_or_step_that_is_not_there_is_refused(runner, capsys):
    with pytest.raises(SystemExit) as caught:
        runner.run.chosen(runner.steps.steps(), ["speed:dta"])
    assert caught.value.code == 2
    said = "there is no speed:dta\n  -> one of speed:resnet50, speed:vit_b_16, speed:data"
    assert said in capsys.readouterr().err


def test_every_test_that_is_marked_gpu_has_a_step(runner):
    parts = [step.part for step in runner.steps.steps()]
    assert list(dict.fromkeys(parts)) == ["tests", "precision", "memory", "speed"]
    words: dict[str, list[str]] = {}
    for file, chosen in runner.steps.tests():
        words.setdefault(file, []).append(chosen)
    assert sorted(words) == runner.steps.files_of_tests()
    assert {"train/test_gpu.py", "models/test_norms.py"} < words.keys()
    for chosen in words.values():  # all of a file, or some and then the rest of it
        assert chosen == [""] or chosen[-1] == f"not ({' or '.join(chosen[:-1])})"


@pytest.mark.slow
@pytest.mark.parametrize("part", ["tests", "precision", "memory", "speed"])
def test_every_step_runs_at_toy_size(part, tmp_path):
    done = subprocess.run(
        [sys.executable, GPU / "run.py", "--dry", "--only", part, "--out", tmp_path, "--part-s", "900"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["dry"]
    assert {r["outcome"] for r in found["results"]} == {"done"}
    assert all(r["rows"] for r in found["results"])
    assert "A dry run on a CPU" in (tmp_path / "GPU.md").read_text()
