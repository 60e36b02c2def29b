"""Precision, memory layout, compilation and launchers, on a CPU as far as it goes, and on a GPU where there is one."""

from __future__ import annotations

import json
import math

import pytest
import torch
from commands import rows, tlx, write_config
from images import make_shards
from safetensors.torch import load_file
from trainings import Training, alone, config_of

from tlx.train import components as parts
from tlx.train.step import prepare_phase

PHASES = {
    "each": {"lr": 0.01, "norm": "norms_fixed"},
    "feature_extraction": {"duration": "4ep"},
    "fine_tuning": {"duration": "8ep"},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("precision")
    shards = make_shards(folder / "shards", classes=3, per_class={"train": 16, "val": 8}, size=40)
    raw = {
        "run": "unset",
        "seed": 1,
        "data": {"train": str(shards / "train"), "val": str(shards / "val"), "batch": 16, "workers": 0},
        "input": {"size": 32},
        "backbone": {"name": "toys:small", "weights": "none"},
        "phases": PHASES,
        "track": {"every": 1, "report": False},
    }
    return write_config(folder / "c.yaml", raw)


def train(config, run, *words, ranks=1, **env):
    done = tlx("train", config, f"run={run}", *words, ranks=ranks, **env)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [row["train/loss"] for row in rows(run) if "train/lr_head" in row]
    assert len(losses) == 36
    assert all(math.isfinite(loss) for loss in losses)
    weights = load_file(run / "checkpoints" / "latest" / "model.safetensors")
    assert all(str(t.dtype) in ("torch.float32", "torch.int64") for t in weights.values())
    return losses, done


@pytest.fixture(scope="module")
def plain(config, tmp_path_factory):
    return train(config, tmp_path_factory.mktemp("plain") / "run")[0]


@pytest.mark.slow
def test_bf16_and_channels_last_come_near_fp32(config, plain, tmp_path):
    losses, _ = train(config, tmp_path / "run", "loop.precision=bf16", "loop.channels_last=true")
    assert losses == pytest.approx(plain, abs=0.05)
    assert losses != plain


@pytest.mark.slow
def test_compiled_training_crosses_a_phase_change(config, plain, tmp_path):
    losses, _ = train(config, tmp_path / "run", "loop.compile=true")
    assert losses == pytest.approx(plain, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiled_losses_are_those_of_eager_code(dropout, monkeypatch):
    """With dropout where it draws from torch's generator, as under `deterministic`: the numbers drawn alone differ."""
    import torch._inductor.config as inductor

    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda _: None)
    found = []
    for compiled in (False, True):
        loop = {"compile": compiled, "deterministic": True}
        config = config_of("toys:small", batch=8, steps=2, args={"dropout": dropout}, loop=loop)
        with inductor.patch(fallback_random=False):
            parts.seed_all(config)
            training, losses = Training.of(config, alone(), size=16), []
            net, plan, world = training.backbone.module, training.plan, training.updater.world
            for phase in plan.phases:
                phase_model = prepare_phase(net, phase, plan, world=world, compiled=compiled)
                losses += [training.step(phase_model, phase, s)[0].item() for s in range(phase.start, phase.stop)]
        found.append(losses)
    eager, compiled_losses = found
    assert compiled_losses == pytest.approx(eager, rel=1e-6)
    assert len(set(eager)) == 4


@pytest.mark.slow
def test_fp16_needs_a_gpu(config, tmp_path):
    refused = tlx("train", config, f"run={tmp_path / 'run'}", "loop.precision=fp16")
    assert refused.returncode == 2
    assert "fp16 needs a GPU" in refused.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("words", [["loop.precision=bf16"], ["loop.precision=fp16", "loop.clip=1.0"]], ids=str)
def test_reduced_precision_on_a_gpu(config, plain, tmp_path, words):
    losses, _ = train(config, tmp_path / "run", *words, "loop.channels_last=true", ACCELERATE_USE_CPU="false")
    assert losses == pytest.approx(plain, abs=0.1)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["nonfinite"] <= 5


@pytest.mark.gpu
def test_compiled_training_on_a_gpu_crosses_a_phase_change(config, plain, tmp_path):
    losses, _ = train(config, tmp_path / "run", "loop.compile=true", ACCELERATE_USE_CPU="false")
    assert losses == pytest.approx(plain, abs=1e-2)


@pytest.mark.gpu
def test_deterministic_training_on_a_gpu_repeats_its_bits(config, tmp_path):
    words = ["loop.deterministic=true", "loop.precision=bf16"]
    one, other = (train(config, tmp_path / n, *words, ACCELERATE_USE_CPU="false")[0] for n in ("a", "b"))
    assert one == other


@pytest.mark.gpu
def test_one_rank_over_nccl(config, plain, tmp_path):
    env = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29477"}
    losses, _ = train(config, tmp_path / "run", "world.backend=nccl", ACCELERATE_USE_CPU="false", **env)
    assert losses == pytest.approx(plain, abs=1e-2)


@pytest.mark.gpu
def test_two_ranks_on_one_gpu_over_gloo(config, plain, tmp_path):
    losses, _ = train(config, tmp_path / "run", "world.backend=gloo", ranks=2, ACCELERATE_USE_CPU="false")
    assert losses == pytest.approx(plain, abs=1e-2)
