"""Training on one, two and three ranks under the real launcher: DESIGN's invariants 1 to 5 and 7."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from commands import environment
from images import make_folder
from places import SUPPORT
from ranks import SCENARIOS
from safetensors.torch import load_file

from tlx.data.build.write import BuildOptions, build_shards
from tlx.data.stream.order import share

WORLDS = (1, 2, pytest.param(3, marks=pytest.mark.slow))
EXACT = ("grouped", "grouped_accumulated", "fixed", "lone_sample", "weighted", "mixed", "contrast", "regularised")
"""No layer mixes samples and nothing is drawn per rank: the same run on any number of ranks, to rounding."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory, request):
    """Every scenario on the numbers of ranks that the chosen tests look at: OUT/<world>/<scenario>."""
    own = [item for item in request.session.items if item.path == Path(__file__)]
    worlds = sorted({1} | {item.callspec.params.get("world", 1) for item in own if hasattr(item, "callspec")})
    out = tmp_path_factory.mktemp("ranks")
    shards = out / "shards"
    pictures = out / "pictures"
    make_folder(pictures / "train", per_class=10, size=24)
    make_folder(pictures / "val", per_class=13, size=24, seed=1)
    for name in ("class0", "class2"):  # 37 in all
        (pictures / "val" / name / "0012.jpg").unlink()
    build_shards(str(pictures), shards, BuildOptions(shard_samples=11, jobs=0))
    env = environment()

    def launch(world: int) -> subprocess.CompletedProcess:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        command = [*(torchrun if world > 1 else [sys.executable]), "ranks.py", str(out / str(world)), str(shards)]
        return subprocess.run(command, cwd=SUPPORT, env=env, capture_output=True, text=True, timeout=400, check=False)

    with ThreadPoolExecutor() as pool:
        for world, done in zip(worlds, pool.map(launch, worlds), strict=True):
            assert done.returncode == 0, f"{world} ranks:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return out


def report(trained, world, name):
    return json.loads((trained / str(world) / name / "report.json").read_text())


def losses(trained, world, name):
    rows = map(json.loads, (trained / str(world) / name / "metrics.jsonl").read_text().splitlines())
    return [row["train/loss"] for row in rows if "train/lr_head" in row and "train/loss" in row]


def sizes(trained, world, name):
    rows = map(json.loads, (trained / str(world) / name / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k.startswith("update_ratio/") or k == "train/grad_norm"} for row in rows]


def weights(trained, world, name):
    return load_file(trained / str(world) / name / "checkpoints" / "latest" / "model.safetensors")


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("world", WORLDS)
def test_ranks_are_bit_equal_at_every_step_boundary_and_rates_are_the_plans(trained, world, name):
    seen = report(trained, world, name)
    assert len(seen["ranks_equal"]) >= 16
    assert all(seen["ranks_equal"])
    assert all(seen["rates_equal"])


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("world", WORLDS)
def test_what_is_frozen_is_bit_equal_through_a_phase_statistics_included(trained, world, name):
    seen = report(trained, world, name)
    assert all(seen["frozen_equal"])
    assert len(seen["frozen_equal"]) >= 12
    assert any(n.startswith("features.0") for n in seen["moved"])  # and it does thaw in the end


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("world", WORLDS[1:])
def test_any_number_of_ranks_makes_the_same_run(trained, world, name):
    assert losses(trained, world, name) == pytest.approx(losses(trained, 1, name), rel=2e-5)
    assert any(sizes(trained, world, name)), "there is nothing to compare"
    for several, alone in zip(sizes(trained, world, name), sizes(trained, 1, name), strict=True):
        assert several == pytest.approx(alone, rel=1e-3)
    one = weights(trained, 1, name)
    for key, tensor in weights(trained, world, name).items():
        assert (tensor - one[key]).abs().max() < 2e-4, key


@pytest.mark.parametrize("world", WORLDS)
def test_accumulation_makes_the_same_run(trained, world):
    assert losses(trained, world, "grouped_accumulated") == pytest.approx(losses(trained, 1, "grouped"), rel=2e-5)


@pytest.mark.parametrize("world", WORLDS)
def test_evaluating_saving_and_logging_at_other_intervals_changes_no_bit(trained, world):
    one, other = weights(trained, world, "plain"), weights(trained, world, "plain_other_intervals")
    assert all((one[key] == other[key]).all() for key in one)


@pytest.mark.parametrize("world", WORLDS)
def test_a_step_that_one_rank_spoils_is_skipped_by_all(trained, world):
    assert report(trained, world, "skipping")["result"]["nonfinite"] == 1
    assert all(t.isfinite().all() for t in weights(trained, world, "skipping").values())


@pytest.mark.parametrize("world", WORLDS)
def test_batches_that_weigh_nothing_move_nothing_and_divide_nothing(trained, world):
    rows = [
        json.loads(line) for line in (trained / str(world) / "weightless" / "metrics.jsonl").read_text().splitlines()
    ]
    steps = [row for row in rows if "train/lr_head" in row]
    weightless = [row["step"] for row in steps if "train/loss" not in row]
    assert len(steps) == 18
    assert 0 < len(weightless) < 18
    assert all(0 <= row["train/top1"] <= 1 for row in steps)
    assert losses(trained, world, "weightless") == pytest.approx(losses(trained, 1, "weightless"), rel=2e-5)
    assert all(t.isfinite().all() for t in weights(trained, world, "weightless").values())


@pytest.mark.parametrize("world", WORLDS)
def test_logits_that_are_not_finite_on_one_rank_are_counted_on_all(trained, world):
    last = report(trained, world, "weightless")["result"]["last"]
    batches = len(share(3, world, world - 1))  # of the last rank, each with a sample that is not finite
    assert (last["val/nonfinite"], last["val/samples"]) == (batches, 37)
    assert math.isnan(last["val/loss"])


@pytest.mark.parametrize("world", WORLDS)
def test_recomputing_blocks_changes_nothing(trained, world):
    one, other = weights(trained, world, "frozen"), weights(trained, world, "recomputed")
    assert one.keys() == other.keys()
    assert all((one[key] - other[key]).abs().max() < 1e-5 for key in one)  # norm statistics are updated once


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("world", WORLDS)
def test_every_validation_sample_counts_once(trained, world, name):
    last = report(trained, world, name)["result"]["last"]
    assert last["val/samples"] == 37
    told = last["val/top1"] * 37 * (2 if name in ("contrast", "regularised") else 1)  # of two views each
    assert math.isclose(told, round(told), abs_tol=1e-4)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("world", WORLDS[1:])
def test_evaluation_does_not_depend_on_ranks(trained, world, name):
    one, several = (report(trained, n, name)["result"]["last"] for n in (1, world))
    assert round(one["val/top1"] * 37) == round(several["val/top1"] * 37)
    assert several["val/loss"] == pytest.approx(one["val/loss"], rel=1e-4)
    assert "val/top5" not in one  # three classes


@pytest.mark.parametrize("world", WORLDS)
def test_every_training_sample_is_seen_once_an_epoch(trained, world):
    # 18 steps of 8, 4 to an epoch of 30: four whole epochs and two steps
    assert report(trained, world, "plain")["result"]["samples_seen"] == 4 * 30 + 2 * 8


@pytest.mark.parametrize("world", [2])
def test_the_moving_average_is_saved_evaluated_and_differs(trained, world):
    folder = trained / str(world) / "average"
    ema = load_file(folder / "checkpoints" / "latest" / "ema.safetensors")
    raw = weights(trained, world, "average")
    assert ema.keys() == raw.keys()
    assert any((ema[key] != raw[key]).any() for key in ema)
    assert "ema/val/top1" in report(trained, world, "average")["result"]["last"]
