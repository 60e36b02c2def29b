"""How fast training is on the device: ``speed.py loop NETWORK [--compile]``, ``speed.py data x``."""

from __future__ import annotations

import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rows import Setting, setting_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from training import shards as small_shards

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import sets

from tlx import models
from tlx.bench import data as data_bench
from tlx.bench import train as train_bench
from tlx.data.shards.manifest import Manifest
from tlx.plan.config import Config, parse

ROUNDS = 9
STEPS = 63
PICTURES = 2048


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def photographs(setting: Setting) -> Path:
    """Shards of made pictures like photographs, 500 x 375; made once."""
    if setting.dry:
        return small_shards(setting) / "train"
    sets.make(setting.work, "small", PICTURES, cores())
    return setting.work / "shards_small" / "train"


def config_of(setting: Setting, name: str, *, compiled: bool) -> Config:
    raw: dict[str, Any] = {
        "run": "unused",
        "data": {
            "train": str(photographs(setting)),
            "batch": 8 if setting.dry else 128,
            "workers": min(cores() - 1, 16),
        },
        "backbone": {"name": "toys:small" if setting.dry else f"torchvision/{name}", "weights": "none"},
        "unfreeze": "all",
        "phases": {"each": {"lr": 1e-3, "duration": "60ep", "norm": "statistics_move"}},
        "loop": {"precision": "bf16", "channels_last": True, "compile": compiled, "fit_micro_batch": "never"},
        "world": {"device": setting.device.type},
    }
    if setting.dry:
        raw["input"] = {"size": 32}
        raw["data"]["workers"] = 1
    return parse(raw)


def loop(setting: Setting, name: str, *, compiled: bool) -> None:
    """The loop beside a bare one in paired rounds; against shards; its share of what the device multiplies."""
    config = config_of(setting, name, compiled=compiled)
    found = train_bench.measure(config, steps=ROUNDS if setting.dry else STEPS, rounds=ROUNDS)
    low, high = found.interval or (None, None)
    label = f"{name}{', compiled' if compiled else ''}"
    rate = found.batch / found.resident
    setting.row(f"{label}: the loop over a bare one", ok=None if setting.dry else low is not None and low <= 0.01,
                overhead=found.overhead, low=low, high=high, pictures_per_s=rate)  # fmt: skip
    setting.row(f"{label}: from shards, {found.workers} workers", ok=None, pictures_per_s=found.batch / found.shards,
                waiting=found.waiting)  # fmt: skip
    each, most = operations(setting, name), matrix_rate(setting)
    setting.row(f"{label}: arithmetic", ok=None, tflops=each * rate / 1e12, measured_tflops=most / 1e12,
                share=each * rate / most)  # fmt: skip


def operations(setting: Setting, name: str) -> float:
    """Floating-point operations of a picture's training step, forward and backward, as torch counts them."""
    net = models.load("toys:small" if setting.dry else f"torchvision/{name}", classes=10, weights="none").module
    images = torch.randn(2, 3, *((32, 32) if setting.dry else (224, 224)))
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):  # whose products are all counted
        net.train()(images).sum().backward()
    return counter.get_total_flops() / len(images)


def matrix_rate(setting: Setting) -> float:
    """Operations a second of large products of random bf16 matrices: ten in a row, the median of ten rounds."""
    side, device = 256 if setting.dry else 8192, setting.device
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(13):
        settle(device)
        began = time.perf_counter()
        for _ in range(10):
            a @ b
        settle(device)
        seconds.append((time.perf_counter() - began) / 10)
    return 2 * side**3 / statistics.median(seconds[3:])


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def data(setting: Setting) -> None:
    """Training pictures a second of one core, from shards to the device's door."""
    manifest = Manifest.open(str(photographs(setting)))
    setup = data_bench.Setup(batch=8 if setting.dry else 128)
    seconds = 1.0 if setting.dry else 25.0
    workers = [0] if setting.dry else sorted({1, 8, cores()})
    found = data_bench.measure(manifest, setup, workers=workers, seconds=seconds)
    for rate in found.views["train"].rates:
        setting.row(f"{rate.workers} workers", ok=None, pictures_per_s=rate.images, of_a_core=1 / rate.cpu)


def main() -> None:
    setting, said = setting_of(["what", "network"], compile=True)
    data(setting) if said.what == "data" else loop(setting, said.network, compiled=said.compile)


if __name__ == "__main__":
    main()
