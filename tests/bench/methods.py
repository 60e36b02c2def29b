"""What pretraining without labels is worth on digits: ``python tests/bench/methods.py OUT [--seeds 0,1,2]``.

scikit-learn's 1,797 scans: 1,297 without labels to pretrain on (100 of them to validate), 5 of each digit of these with
labels to learn from, 100 others to choose checkpoints by, 400 to test. Each configuration of configs/methods/ trains as
it is, for each seed, and hands over to transfer.yaml; so does the untrained network. Writes OUT/table.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import stats

from tlx import __version__
from tlx.data.build.write import BuildOptions, build_shards
from tlx.plan.config import load
from tlx.runs.run_files import test_values
from tlx.train.command import train

ROOT = Path(__file__).parents[2]
METHODS = ("none", "rotation", "patches", "jigsaw", "simclr", "vicreg")
FEW, CHOOSE, TEST = 5, 100, 400


def write_shards(out: Path) -> None:
    """Pictures and shards; what is there stays."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    test, choose, rest = np.split(order, [TEST, TEST + CHOOSE])
    few = np.concatenate([rest[digits.target[rest] == label][:FEW] for label in range(10)])
    splits = {"judged/train": test, "few/train": few, "few/val": choose, "unlabelled/train": rest}
    for name, chosen in splits.items():
        for i in chosen:
            label = "" if name.startswith("unlabelled") else f"digit-{digits.target[i]}/"
            path = out / "pictures" / name / f"{label}{i:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            scan = Image.fromarray((digits.images[i] * 255 / 16).astype(np.uint8))
            scan.resize((32, 32), Image.Resampling.BICUBIC).save(path)
    for name in ("judged", "few", "unlabelled"):
        labels = name != "unlabelled"
        val = None if name == "few" else 0 if labels else 100 / len(rest)
        source = out / "pictures" / name / ("" if labels else "train")
        build_shards(str(source), out / "shards" / name, BuildOptions(labels=labels, val=val, jobs=0))


def trained(config: str, out: Path, *words: str) -> tuple[dict[str, Any], float]:
    """The result of a training, and its seconds by the clock; one that is done is read."""
    text = (ROOT / "configs" / "methods" / f"{config}.yaml").read_text().replace("data/methods", str(out))
    file = out / f"{config}.yaml"
    file.write_text(text)
    begun = time.monotonic()
    return dict(train(load(file, ["track.report=false", *words]))), time.monotonic() - begun


def measured(method: str, out: Path, seed: int) -> dict[str, float]:
    run, weights, found = out / "runs" / f"{method}-{seed}", "none", {}
    if method != "none":
        result, seconds = trained(method, out, f"run={run}", f"seed={seed}")
        found = {"knn": 100 * float(result["best"]["value"]), "seconds": seconds}
        weights = str(run)
    tuned, _ = trained("transfer", out, f"run={run}-tuned", f"seed={seed}", f"backbone.weights={weights}")
    return {**found, "top1": 100 * (test_values(tuned)["top1"][0] or 0.0)}


def interval(values: list[float]) -> str:
    """The mean, and half of Student's 95 % interval."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.1f}"
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.1f} ± {half:.1f}"


def main() -> None:
    words = argparse.ArgumentParser()
    words.add_argument("out", type=Path)
    words.add_argument("--seeds", default="0,1,2")
    words.add_argument("--methods", default=",".join(METHODS))
    given = words.parse_args()
    out, seeds = given.out.resolve(), [int(seed) for seed in given.seeds.split(",")]
    write_shards(out)
    rows: dict[str, list[dict[str, float]]] = {}
    for method in given.methods.split(","):
        rows[method] = [measured(method, out, seed) for seed in seeds]
        print(method, json.dumps(rows[method]), flush=True)
    table = ["| pretraining | k-NN while pretraining | top-1 from 5 labels | minutes |", "| --- | --: | --: | --: |"]
    for method, found in rows.items():
        knn = interval([row["knn"] for row in found]) if "knn" in found[0] else ""
        minutes = f"{statistics.mean(row['seconds'] for row in found) / 60:.1f}" if "seconds" in found[0] else ""
        table.append(f"| {method} | {knn} | {interval([row['top1'] for row in found])} | {minutes} |")
    import torch

    versions = f"tlx {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    head = f"Seeds {', '.join(map(str, seeds))}; {versions}; one thread of a CPU shared with other work.\n"
    (out / "table.md").write_text("\n".join([head, *table, ""]))
    print((out / "table.md").read_text())


if __name__ == "__main__":
    main()
