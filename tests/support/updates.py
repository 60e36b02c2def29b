"""An updater and a phase of the small network, without a training around them; the optimizers' settings."""

from __future__ import annotations

import torch
from trainings import alone

from tlx import models
from tlx.data.pixels.normalise import Normalise
from tlx.data.shards.targets import Target
from tlx.plan.config import parse
from tlx.plan.plan import Plan
from tlx.tasks.classification import Classification
from tlx.tasks.objectives import cross_entropy
from tlx.train.optim import parameter_groups
from tlx.train.step import Updater, prepare_phase, set_rates


def phase_model(optimizer_class, **options):
    torch.manual_seed(0)
    backbone = models.load("toys:small", classes=3, weights="none")
    phases = {"each": {"lr": 0.1, "duration": "1ep"}}
    data = {"train": "x", "batch": 4}
    config = parse({"run": "x", "data": data, "backbone": {"name": "toys:small"}, "phases": phases, "unfreeze": "all"})
    plan = Plan.make(config, backbone.layers, samples=8)
    world = alone()
    groups = parameter_groups(backbone.module, backbone.layers, no_decay=[])
    optimizer = optimizer_class(groups, **options)
    set_rates(optimizer, plan.phases[0], 0)
    normalise = Normalise(backbone.input, world.device, channels_last=False)
    updater = Updater(optimizer, classifying(cross_entropy([1, 1, 1])), normalise, world, seed=0)
    return updater, prepare_phase(backbone.module, plan.phases[0], plan, world=world, compiled=False)


def batch(labels=(0, 1, 2, 0)):
    from tlx.data.stream.stream import Batch

    images = torch.randint(
        0, 255, (len(labels), 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    own, ids = torch.tensor(labels), torch.arange(len(labels))
    return Batch(0, 0, 1, images, own, ids, total=float(len(labels)), targets={"label": own})


def classifying(objective, classes=3, *, top_k=5):
    """The task of one class per picture, with this objective."""
    return Classification(Target("label", "class", tuple(map(str, range(classes)))), top_k, objective)


OPTIONS = {
    "adamw": {"weight_decay": 0.05},
    "adam": {"weight_decay": 0.01},
    "sgd": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "rmsprop": {"alpha": 0.9, "momentum": 0.9, "weight_decay": 0.01, "eps": 1e-3},
}
TORCHS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD, "rmsprop": torch.optim.RMSprop}
