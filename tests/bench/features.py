"""Head phases from stored features beside head phases from pictures: seconds, and accuracy over seeds.

``python tests/bench/features.py --shards FOLDER --weights FILE --out OUT [--seeds 0-4] [--epochs 16] [--tune 0]``
trains the head of timm's deit_tiny (FILE) on FOLDER/train and judges FOLDER/val, with the weights of the last step, so
that nothing is chosen by what is judged. Each row is trained with every seed, one after another; what is done is kept
under OUT. It prints a table in Markdown: mean over seeds with a 95 % interval (Student's t), and seconds of the first
seed, features included.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from tlx.plan.config import parse
from tlx.train.command import train

DRAWN = [{"name": "random_resized_crop", "scale": [0.35, 1]}, "horizontal_flip"]
PLAIN = [{"name": "resize", "size": [224, 224]}]
SOLVED = {"name": "linear", "init": "solved"}
ROWS: dict[str, dict[str, Any]] = {
    "pictures, drawn anew": {"transforms": DRAWN, "cache": "off"},
    "pictures, plain view": {"transforms": PLAIN, "cache": "off"},
    "features, exact, plain view": {"transforms": PLAIN, "cache": "exact"},
    "features, 1 view": {"transforms": DRAWN, "cache": {"views": 1}},
    "features, 4 views": {"transforms": DRAWN, "cache": {"views": 4}},
    "features, 16 views": {"transforms": DRAWN, "cache": {"views": 16}},
    "solved head, plain view, 1 step": {"transforms": PLAIN, "cache": "exact", "head": SOLVED, "steps": 1},
    "solved head, 4 views, 1 step": {"transforms": DRAWN, "cache": {"views": 4}, "head": SOLVED, "steps": 1},
}
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}


def raw_of(said: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    row = dict(ROWS[name])
    steps, place = row.pop("steps", None), said.out / f"{list(ROWS).index(name)}-{seed}"
    head = {"duration": steps or f"{said.epochs}ep", "lr": 1e-9 if steps else 3e-3, "curve": "cosine"}
    decay = {"name": "exponential", "factor": 0.75}
    tune = {"duration": f"{said.tune}ep", "lr": 3e-4, "curve": "cosine", "warmup": "10%", "layer_decay": decay}
    cache = {"mode": row["cache"]} if isinstance(row["cache"], str) else row["cache"]
    return {
        "run": str(place),
        "seed": seed,
        "data": {"train": str(said.shards / "train"), "val": str(said.shards / "val"), "batch": 32, "workers": 2},
        "backbone": {"name": "timm/deit_tiny_patch16_224", "weights": str(said.weights)},
        "unfreeze": "two_phase" if said.tune else "head_only",
        "phases": {"feature_extraction": head, **({"fine_tuning": tune} if said.tune else {})},
        "track": {"report": False},
        "evaluate": {"every": "1ep" if said.each_epoch else f"{said.epochs + said.tune}ep"},
        **row,
        "cache": {**cache, "folder": str(said.out / "features")},
    }


def trained(said: argparse.Namespace, name: str, seed: int) -> dict[str, float]:
    """val/top1 at the end, and the seconds of the whole training."""
    raw = raw_of(said, name, seed)
    kept = Path(raw["run"]) / "measured.json"
    if not kept.exists():
        shutil.rmtree(raw["run"], ignore_errors=True)
        shutil.rmtree(said.out / "features", ignore_errors=True)  # else a row would find another's
        began = time.monotonic()
        with contextlib.redirect_stdout(io.StringIO()):
            result = train(parse(raw))
        found = {"top1": result["last"]["val/top1"], "seconds": time.monotonic() - began}
        kept.write_text(json.dumps(found), encoding="utf-8")
    measured: dict[str, float] = json.loads(kept.read_text(encoding="utf-8"))
    return measured


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("shards", "weights", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--seeds", default="0-4")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--tune", type=int, default=0)
    parser.add_argument("--rows", default="")
    parser.add_argument("--once", dest="each_epoch", action="store_false", help="evaluate at the end alone")
    said = parser.parse_args()
    first, _, last = said.seeds.partition("-")
    seeds = range(int(first), int(last or first) + 1)
    print(f"| head phase of {said.epochs} epochs | top-1, % | seconds |\n|---|---|---|")
    for name in ROWS:
        if said.rows and name not in said.rows.split(";"):
            continue
        found = [trained(said, name, seed) for seed in seeds]
        values = [100 * one["top1"] for one in found]
        spread = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
        half = T_95.get(len(values), math.nan) * spread if spread else 0.0
        print(f"| {name} | {statistics.mean(values):.1f} +- {half:.1f} | {found[0]['seconds']:.1f} |", flush=True)


if __name__ == "__main__":
    main()
