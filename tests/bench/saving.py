"""What a checkpoint costs the step after which it is saved: none, in the step, beside training.

``OMP_NUM_THREADS=1 python tests/bench/saving.py [--model timm/resnet50] [--folder FOLDER]``. Weights and AdamW's state;
a step on random pictures is long enough for the disk to finish in between. The floor is the copy in memory.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from tlx import models
from tlx.runs.checkpoint import Checkpoints, Saver, Snapshot, optimizer_state, weights_of
from tlx.train.optim import adamw, parameter_groups

EVERY = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="timm/resnet50")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--size", type=int, default=96)
    said = parser.parse_args()
    backbone = models.load(said.model, classes=10, weights="none")
    net = backbone.module.train()
    optimizer = adamw(parameter_groups(net, backbone.layers, no_decay=[]))
    images = torch.randn(8, 3, said.size, said.size)

    def step() -> None:
        optimizer.zero_grad()
        net(images).square().mean().backward()
        optimizer.step()

    def snapshot() -> Snapshot:
        return Snapshot(weights_of(net), optimizer_state(optimizer), {"best": None, "progress": {"leaders": []}})

    step()
    with tempfile.TemporaryDirectory(dir=said.folder) as folder:
        started = time.perf_counter()
        whole = snapshot()
        copied = time.perf_counter() - started
        print(f"{said.model}, AdamW: {whole.bytes / 2**20:.0f} MiB; the copy in memory takes {copied:.3f} s")
        del whole
        for name in ("nothing saved", "in the step", "beside training"):
            place = Path(folder) / name
            beside = name == "beside training"
            saver = Saver(Checkpoints(place), lambda place=place: place, lambda: None, print, background=beside)
            others, saving = [], []
            for number in range(1, said.steps + 1):
                started = time.perf_counter()
                step()
                due = number % EVERY == 0
                if due and name != "nothing saved":
                    saver.save(number, snapshot())
                (saving if due else others).append(time.perf_counter() - started)
            saver.close()
            usual, with_save = statistics.median(others), statistics.median(saving)
            print(f"{name:>16}: {usual:.3f} s a step, {with_save:.3f} s with a checkpoint: {with_save - usual:+.3f} s")


if __name__ == "__main__":
    main()
