"""Backbones that train on several ranks: ``torchrun --nproc-per-node=2 ranks_backbones.py REPORT NAME...``

Every network takes two steps of feature extraction and two of fine-tuning on pictures that differ from rank to rank.
Rank 0 writes, as JSON, what was seen after each of the four steps.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from trainings import Training, config_of, moved, values

from tlx.ranks.collectives import World
from tlx.ranks.rendezvous import join_ranks

CASES: dict[str, dict[str, Any]] = {
    "torchvision/resnet18": {"size": 64},
    "timm/levit_128s": {},
    "trainings:forked": {"size": 64},
    "toys:assisted": {"size": 16},
    "torchvision/googlenet": {"size": 96},
    "torchvision/efficientnet_b0": {"size": 64},
    "torchvision/inception_v3": {},
    "timm/convit_tiny": {"args": {"img_size": 64, "drop_path_rate": 0.2}},
    "timm/convnext_zepto_rms": {"size": 64, "args": {"drop_path_rate": 0.2}},
    "timm/deit_tiny_distilled_patch16_224": {"args": {"img_size": 64, "drop_rate": 0.1}},
    "timm/gmlp_ti16_224": {"args": {"img_size": 64}},
    "timm/mobilenetv2_035": {"size": 64, "args": {"norm_layer": "evonormb0"}},
    "timm/mobilenetv3_small_050": {"size": 64},
    "timm/swin_tiny_patch4_window7_224": {"args": {"depths": [1, 1, 2, 1]}},
    "timm/test_maxvit": {},
    "timm/vit_tiny_patch16_224": {"args": {"img_size": 64, "drop_path_rate": 0.2}},
}
"""Auxiliary classifiers, dropout, statistics other than BatchNorm's, parameters that no gradient reaches ..."""

STEPS = 2


def train(name: str, world: World) -> list[dict[str, Any]]:
    case = CASES[name]
    config = config_of(name, batch=2 * world.size, steps=STEPS, args=case.get("args"))
    training = Training.of(config, world, size=case.get("size"))
    net = training.backbone.module
    world.broadcast([*net.parameters(), *net.buffers()])  # as a run starts
    seen = []
    for phase in training.plan.phases:
        phase_model = training.prepare_phase(phase)
        for step in range(phase.start, phase.stop):
            before = values(net)
            tally = training.step(phase_model, phase, step)
            finite = bool(torch.isfinite(tally).all()) and not tally[3]
            same = len(set(world.gather(state_hash(training)))) == 1
            seen.append({"phase": phase.name, "finite": finite, "equal": same, "moved": len(moved(net, before))})
    return seen


def state_hash(training: Training) -> str:
    """Of parameters, buffers and optimizer state, bit by bit."""
    optimizer = training.updater.optimizer
    named = dict(training.backbone.module.named_parameters())
    tensors = values(training.backbone.module)
    for name, parameter in named.items():
        state = optimizer.state.get(parameter, {})
        tensors |= {f"{name} {key}": t for key, t in state.items() if isinstance(t, torch.Tensor)}
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()


def main(report: Path, names: list[str]) -> None:
    world = join_ranks(config_of(names[0], batch=2))
    seen = {name: train(name, world) for name in names}
    if world.main:
        report.write_text(json.dumps(seen))
    world.barrier()
    world.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
