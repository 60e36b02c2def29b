"""Run folders as `tlx train` leaves them, written by hand."""

from __future__ import annotations

import json
from pathlib import Path

from tlx.runs.metrics_file import MetricsFile

EPOCH = 4
TWO = (("feature_extraction", 2, "frozen"), ("fine_tuning", 3, "all"))
ACCURACIES = (0.30, 0.50, 0.45, 0.80, 0.70)


def write_run(
    folder: Path, *, phases=TWO, accuracies=ACCURACIES, ema: float | None = None, metric: str = "val/top1"
) -> Path:
    """An unfinished run: one accuracy per epoch done; `ema` is added to it for the moving average."""
    folder.mkdir(parents=True)
    starts = [sum(e for _, e, _ in phases[:i]) * EPOCH for i in range(len(phases))]
    mode = "min" if metric.endswith("loss") else "max"
    (folder / "config.yaml").write_text(f"run: {folder}\nevaluate: {{metric: {metric}, mode: {mode}}}\n")
    plan = {
        "steps": starts[-1] + phases[-1][1] * EPOCH,
        "steps_per_epoch": EPOCH,
        "samples": 30,
        "batch": 8,
        "phases": [
            {"name": name, "start": start, "stop": start + epochs * EPOCH, "epochs": float(epochs), "lr": 1e-2}
            | {"layers": {"stem": layer(backbone), "fc": layer("all")}, "warmup": 0, "settings": {}}
            for (name, epochs, backbone), start in zip(phases, starts, strict=True)
        ],
        "layers": [{"name": "stem", "role": "backbone"}, {"name": "fc", "role": "head"}],
        "warnings": [],
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "status.json").write_text(json.dumps({"status": "running"}))
    names = [name for name, epochs, _ in phases for _ in range(epochs)]
    file = MetricsFile(folder / "metrics.jsonl")
    for i, accuracy in enumerate(accuracies):
        row = {"epoch": i + 0.5, "phase": names[i], "train/loss": 1.5 / (i + 1), "train/top1": 0.6}
        file.append({"step": i * EPOCH + 2, **row, "train/lr_head": 0.01, "train/lr_lowest": 0.001})
        row |= {"step": (i + 1) * EPOCH, "epoch": i + 1.0}
        if accuracy is not None:
            row |= {"val/loss": 2 - accuracy, "val/top1": accuracy, "val/samples": 10}
            row |= {"ema/val/loss": 1.0, "ema/val/top1": accuracy + ema} if ema is not None else {}
        file.append(row)
    file.close()
    return folder


def layer(trains: str) -> dict[str, object]:
    return {"trains": trains, "trained": 0 if trains == "frozen" else 100, "lr": 0.0 if trains == "frozen" else 1e-2}


def finish(folder: Path, **over: object) -> Path:
    """Adds the result of a run of `TWO` and `ACCURACIES`."""
    own = {"val/loss": 1.2, "val/top1": 0.80, "val/per_class": [0.6, None, 1.0]}
    result = {
        "best": {"metric": "val/top1", "value": 0.80, "step": 16, "phase": "fine_tuning", "weights": "raw"},
        "phases": {
            "feature_extraction": {"start": 0, "stop": 8, "last": {"step": 8, "val/top1": 0.50}},
            "fine_tuning": {"start": 8, "stop": 20, "best": {"step": 16, "weights": "raw", **own}},
        },
        "classes": ["daisy", "fern", "rose"],
        "step": 20,
        "samples_seen": 12345,
        "wall_time_s": 3725.2,
        "unreadable": {"data/train/000003.tar: 12.jpg": "truncated"},
        "replaced": 7,
        "world": 2,
        "versions": {"torch": "9.9.9"},
        "command": "tlx train a.yaml",
    }
    (folder / "result.json").write_text(json.dumps(result | over))
    return folder


def write_done(
    folder: Path, *, seed: int, best: float, extraction: float = 0.5, config: str = "", val: str = "v", **over: object
) -> Path:
    """A finished run of `TWO` on validation data `val`: `extraction` is the best of the first phase, `best` of all.

    Args:
        config: further lines of config.yaml.
        over: keys of result.json.
    """
    write_run(folder, accuracies=(extraction - 0.1, extraction, best - 0.2, best - 0.1, best))
    with (folder / "config.yaml").open("a") as file:
        file.write(f"seed: {seed}\n{config}")
    (folder / "model.json").write_text(json.dumps({"provenance": {"train_shards": "t", "val_shards": val}}))
    own = {"step": 20, "weights": "raw", "val/top1": best}
    phases = {
        "feature_extraction": {"start": 0, "stop": 8, "best": {"step": 8, "weights": "raw", "val/top1": extraction}},
        "fine_tuning": {"start": 8, "stop": 20, "best": own},
    }
    chosen = {"metric": "val/top1", "value": best, "step": 20, "phase": "fine_tuning", "weights": "raw"}
    return finish(folder, **{"best": chosen, "phases": phases, **over})
