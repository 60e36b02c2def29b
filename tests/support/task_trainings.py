"""Trainings of every task that a test compares between numbers of ranks: one process, or N under the real launcher,
runs them all.

``main([OUT, SHARDS, NAME ...])``; each leaves its run folder in OUT/<name>, with its result.json.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from images import TARGETS, make_target_shards

from tlx.data.shards.targets import Target
from tlx.plan.config import Config, parse

TRAIN, VAL = 30, 14
"""Samples: the last batch of an epoch holds 6 of 8, and what a rank validates is no whole batch."""

PATHS = ("animal/cat", "animal/dog", "plant", "plant/rose/red")
"""Of a tree whose classes lie at several depths."""

COLOUR = {"name": "classification", "target": "colour"}
TASKS = {
    "species": "classification",
    "colour": COLOUR,
    "rare": {"name": "ordinal", "target": "rare", "order": ["low", "mid", "high"]},
    "tags": {"name": "multilabel", "loss": "asymmetric"},
    "box": {"name": "regression", "target": "box"},
}
SEVERAL = {"name": "multitask", "tasks": TASKS}
UNCERTAIN = {**SEVERAL, "weighting": "uncertainty"}
MIXED = {"mixup": 0.4, "cutmix": 1.0}

# Each says what differs from a plain training.
SCENARIOS: dict[str, dict[str, Any]] = {
    "classification": {"task": COLOUR, "objective": {"name": "cross_entropy", "class_weights": [1.0, 4.0, 0.5]}},
    "multilabel": {"task": {"name": "multilabel", "positive_weights": "balanced", "label_smoothing": 0.1}},
    "asymmetric": {"task": {"name": "multilabel", "loss": "asymmetric"}, "mix": MIXED},
    "regression": {"task": {"name": "regression", "target": "box", "loss": "huber"}},
    "regression_mixed": {"task": {"name": "regression", "target": "box"}, "mix": MIXED},
    "ordinal": {"task": {"name": "ordinal", "target": "colour", "order": ["red", "green", "blue"]}},
    "hierarchical": {"task": {"name": "hierarchical", "target": "path", "alpha": 0.4}},
    "equal": {"task": SEVERAL},
    "equal_accumulated": {"task": SEVERAL, "loop": {"micro_batch": 3}},
    "uncertain": {"task": UNCERTAIN, "loop": {"micro_batch": 3, "ema": {"decay": 0.8}}},
    "uncertain_mixed": {"task": UNCERTAIN, "mix": MIXED},
    "cached": {"task": SEVERAL, "transforms": [{"name": "resize", "size": [16, 16]}], "cache": {"mode": "exact"}},
    "episodic": {  # which has no predictions of pictures
        "task": {"name": "episodic", "width": 32, "ways": 2, "shots": 1, "queries": 1, "val_episodes": 60},
        "head": "features",
        "data": {"batch": 24},
    },
    "assisted": {
        "task": {**UNCERTAIN, "tasks": {**TASKS, "colour": {**COLOUR, "objective": "cross_entropy"}}},
        "backbone": {"name": "toys:assisted", "weights": "none"},
        "phases": {"each": {"lr": 0.02, "duration": "2ep", "norm": "norms_fixed"}},
    },
}


def make_shards(folder: Path) -> Path:
    """FOLDER/train and FOLDER/val with every kind of target, values missing, and one that most batches lack."""
    path, rare = Target("path", "class", PATHS), Target("rare", "class", ("low", "mid", "high"))
    for seed, (part, samples) in enumerate((("train", TRAIN), ("val", VAL))):
        i = np.arange(samples)
        of_path = np.where(i % 9 == 7, -1, (i * 3 + i // 4) % 4).astype(np.int32)
        of_rare = np.where(i % 10 == 3, i // 10 % 3, -1).astype(np.int32)
        targets = [*TARGETS, (path, of_path), (rare, of_rare)]
        make_target_shards(folder / part, targets, samples=samples, shard_samples=11, size=24, seed=seed)
    return folder


def raw_of(name: str, out: Path, shards: Path) -> dict[str, Any]:
    """Nothing that mixes samples or draws per rank: a head, then all of the network."""
    data = {"train": str(shards / "train"), "val": str(shards / "val"), "batch": 8, "workers": 0}
    plain = {
        "run": str(out / name),
        "seed": 3,
        "data": data,
        "input": {"size": 16},
        "backbone": {"name": "toys:small", "weights": "none", "args": {"norm": "group"}},
        "optimizer": {"name": "sgd", "momentum": 0.9},
        "phases": {"each": {"lr": 0.02, "duration": "2ep"}},
        "evaluate": {"batch": 4},
        "track": {"every": 1, "report": False},
        "world": {"device": "cpu"},
    }
    made = {**plain, **SCENARIOS[name]}
    made["data"] = {**data, **made["data"]}
    return {**made, "cache": {**made["cache"], "folder": str(out / "features")}} if "cache" in made else made


def config_of(name: str, out: Path, shards: Path) -> Config:
    return parse(raw_of(name, out, shards))


def main(words: Sequence[str]) -> None:
    from composed import claimed

    from tlx.ranks.rendezvous import join_ranks
    from tlx.runs.run_folder import RunFolder
    from tlx.train import command as training
    from tlx.train.loop import fit
    from tlx.train.result import result_of

    out, shards = Path(words[0]), Path(words[1])
    ranks = None
    for name in words[2:] or SCENARIOS:
        config = config_of(name, out, shards)
        ranks = join_ranks(config)
        folder = RunFolder(config.run)
        if ranks.main:
            claimed(folder, config)
        ranks.barrier()
        run = training.compose(config, ranks, folder, silent=True)
        fit(run)
        run.saver.close()
        run.stop.close()
        if ranks.main:
            (config.run / "result.json").write_text(json.dumps(result_of(run, finished=True)))
        folder.release()
    assert ranks is not None
    ranks.barrier()
    ranks.close()
