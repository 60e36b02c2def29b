"""Trainings that a test compares between numbers of ranks: one process, or N under the real launcher, runs them all.

``python tests/support/ranks.py OUT SHARDS`` (one rank) or ``torchrun --nproc-per-node=2 ... OUT SHARDS``. Each scenario
leaves its run folder in OUT/<name>, and rank 0 a report.json: what was watched at every step boundary.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch
from composed import claimed

import tlx.train.loop
from tlx.plan.config import parse
from tlx.ranks.rendezvous import join_ranks
from tlx.runs.run_folder import RunFolder
from tlx.train import command as training
from tlx.train.result import result_of

TWO_PHASES = {
    "each": {"lr": 0.02, "curve": "cosine", "layer_decay": {"name": "exponential", "factor": 0.5}},
    "feature_extraction": {"duration": 7},
    "fine_tuning": {"duration": 11},
}
SMALL = {"name": "toys:small", "weights": "none"}
GROUPED = {**SMALL, "args": {"norm": "group"}}
FIXED = {**TWO_PHASES, "each": {**TWO_PHASES["each"], "norm": "norms_fixed"}}
PROJECTION = {"name": "mlp", "hidden": [16]}
MOVING = {**TWO_PHASES, "each": {**TWO_PHASES["each"], "norm": "statistics_move"}}

# Each says what differs from a plain training: 30 samples, global batch 8, so that an epoch's last batch holds 6.
SCENARIOS: dict[str, dict] = {
    "plain": {"backbone": {**SMALL, "args": {"dropout": 0.1}}, "phases": MOVING},
    "plain_other_intervals": {
        "backbone": {**SMALL, "args": {"dropout": 0.1}},
        "phases": MOVING,
        "evaluate": {"every": 3},
        "checkpoint": {"every": 2},
        "track": {"every": 5, "report": False},
    },
    "frozen": {"backbone": SMALL, "phases": TWO_PHASES},
    "gradual": {
        "backbone": SMALL,
        "unfreeze": {"name": "gradual", "every": 4},
        "phases": {"each": {"lr": 0.02, "optimizer_state": "reset"}},
    },
    "refrozen": {
        "backbone": SMALL,
        "unfreeze": {
            "name": "explicit",
            "phases": [
                {"name": "everything", "layers": {"*": "all"}, "duration": 8},
                {"name": "head_again", "layers": {"head": "all", "features.1*": "norms"}, "duration": 10},
            ],
        },
        "phases": {"each": {"lr": 0.02}},
    },
    "grouped": {"backbone": GROUPED, "phases": TWO_PHASES},
    "grouped_accumulated": {"backbone": GROUPED, "phases": TWO_PHASES, "loop": {"micro_batch": 2}},
    "fixed": {"backbone": SMALL, "phases": FIXED, "optimizer": {"name": "sgd", "momentum": 0.9}},
    "lone_sample": {"backbone": GROUPED, "phases": TWO_PHASES, "data": {"batch": 29}},
    "weighted": {
        "backbone": GROUPED,
        "phases": TWO_PHASES,
        "objective": {"name": "cross_entropy", "class_weights": [1.0, 5.0, 0.25], "label_smoothing": 0.1},
    },
    "weightless": {  # batches of 3 without class 1 weigh nothing
        "backbone": GROUPED,
        "phases": TWO_PHASES,
        "data": {"batch": 3},
        "objective": {"name": "cross_entropy", "class_weights": [0.0, 2.0, 0.0]},
        "evaluate": {"batch": 13},  # three batches: every rank has one
    },
    "mixed": {"backbone": GROUPED, "phases": TWO_PHASES, "mix": {"mixup": 0.4, "cutmix": 1.0}},
    "contrast": {"backbone": GROUPED, "phases": TWO_PHASES, "task": "simclr", "head": PROJECTION},
    "regularised": {  # by SGD: Adam makes whole steps of gradients that are 0 but for rounding
        "backbone": GROUPED,
        "phases": {**TWO_PHASES, "each": {**TWO_PHASES["each"], "lr": 0.002}},
        "optimizer": "sgd",
        "task": {"name": "vicreg", "width": 16},
        "head": PROJECTION,
        "evaluate": {"probe": "DATA/val"},
    },
    "average": {"backbone": SMALL, "phases": TWO_PHASES, "loop": {"ema": {"decay": 0.8}, "clip": 0.5}},
    "skipping": {"backbone": SMALL, "phases": MOVING, "loop": {"nonfinite": "skip"}},
    "recomputed": {"backbone": SMALL, "phases": TWO_PHASES, "loop": {"gradient_checkpointing": True}},
}


def config_of(name: str, out: Path, shards: Path):
    said = SCENARIOS[name]
    data = {"train": str(shards / "train"), "val": str(shards / "val"), "batch": 8, "workers": 0}
    data |= said.get("data", {})
    usual = {"seed": 3, "input": {"size": 16}, "track": {"every": 1, "report": False}}
    raw = {"run": str(out / name), **usual, **said, "data": data}
    return parse(json.loads(json.dumps(raw).replace("DATA", str(shards))))


class Watcher:
    """Looks at every step boundary, in place of the loop's own step, which it calls."""

    def __init__(self, run, train_step) -> None:
        self.run, self.train_step = run, train_step
        self.report = {"ranks_equal": [], "rates_equal": [], "frozen_equal": []}
        self.before = copied(run)

    def __call__(self, run, phase, *given) -> bool:
        assert run is self.run
        stopping = self.train_step(run, phase, *given)
        self.report["ranks_equal"].append(len(set(run.world.gather(state_hash(run)))) == 1)
        rates = {g["layer"]: g["lr"] for g in run.optimizer.param_groups}
        layers = {y.name: y for y in run.plan.layers}
        wanted = {name: run.plan.lr(layers[name], run.progress.step - 1) for name in rates}
        self.report["rates_equal"].append(rates == wanted)
        now = copied(run)
        self.report["frozen_equal"].append(all(torch.equal(now[n], self.before[n]) for n in frozen(run, phase)))
        self.before = now
        return stopping


def spoil(run, step: int) -> None:
    """What a layer gives in one step is infinite, on this rank alone."""

    def infinite(module, args, output):
        return output * float("inf") if module.training and run.progress.step == step else None

    run.net.features[1][0].register_forward_hook(infinite)


def spoil_evaluation(run) -> None:
    """The logits of the first sample of an evaluation batch are NaN, on this rank alone."""

    def undefined(module, args, output):
        if not module.training:
            output[0] = float("nan")

    run.net.register_forward_hook(undefined)


def copied(run) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in run.net.state_dict().items()}


def frozen(run, phase) -> list[str]:
    """Parameters and buffers that a phase must not touch."""
    learning = {p.name for y in run.plan.layers for p in phase.trained(y)}
    moving = {n for y in run.plan.layers if phase.norm_state(y).statistics == "moving" for n in y.moving}
    buffers = {n for n, _ in run.net.named_buffers()}
    return [
        name
        for name in run.net.state_dict()
        if name not in learning and not (name in buffers and name.rpartition(".")[0] in moving)
    ]


def state_hash(run) -> str:
    """Of parameters, buffers, their moving average and optimizer state, bit by bit."""
    digest = hashlib.sha256()
    averaged = run.ema.module.state_dict() if run.ema else {}
    for name, tensor in [*run.net.state_dict().items(), *averaged.items()]:
        digest.update(name.encode() + tensor.numpy().tobytes())
    for group in run.optimizer.param_groups:
        for name, tensor in zip(group["names"], group["params"], strict=True):
            for key, value in sorted(run.optimizer.state.get(tensor, {}).items()):
                if isinstance(value, torch.Tensor):
                    digest.update(f"{name}{key}".encode() + value.numpy().tobytes())
    return digest.hexdigest()


def main(out: Path, shards: Path, names: list[str]) -> None:
    train_step = tlx.train.loop.train_step
    for name in names or list(SCENARIOS):
        config = config_of(name, out, shards)
        ranks = join_ranks(config)
        folder = RunFolder(config.run)
        if ranks.main:
            claimed(folder, config)
        ranks.barrier()
        run = training.compose(config, ranks, folder)
        if name == "skipping" and ranks.rank == ranks.size - 1:
            spoil(run, step=9)
        if name == "weightless" and ranks.rank == ranks.size - 1:
            spoil_evaluation(run)
        watcher = Watcher(run, train_step)
        initial = copied(run)
        tlx.train.loop.train_step = watcher
        tlx.train.loop.fit(run)
        run.saver.close()
        run.stop.close()
        moved = [n for n, t in run.net.state_dict().items() if not torch.equal(t, initial[n])]
        if ranks.main:
            report = {**watcher.report, "moved": moved, "result": result_of(run, finished=True)}
            (out / name / "report.json").write_text(json.dumps(report))
    ranks.barrier()
    ranks.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
