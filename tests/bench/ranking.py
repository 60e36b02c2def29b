"""How well `tlx probe --backbones` foretells the order of fine-tuned networks: Kendall's tau with an interval.

``python tests/bench/ranking.py --out OUT [--photos FOLDER --weights FOLDER] [--seeds 0-2] [--small]`` does all of it by
tlx's commands: six networks are trained on scikit-learn's digits 0 to 4 (a ResNet in three widths, for 1 and for 8
epochs), and ranked and fine-tuned on digits 5 to 9 with five labels a class, and, with FOLDER/17flowers/train/c1 ...,
FOLDER/17flowers/test/c1 ..., on flowers of 32 pixels. With --weights (deit_tiny_patch16_224.fp16.safetensors,
torchvision_mobilenet_v2.fp16.safetensors, timm_mobilenetv2_100_pad_same.fp16.safetensors) these three are, too, on the
flowers and on FOLDER/hymenoptera (train/ants, val/ants ...), at 128 pixels. Trainings run two at a time, one thread
each. What is done is kept under OUT: the same command goes on. It prints tables in Markdown. With everything, three
seeds take about half an hour on two idle cores (not measured); ``--small`` tries all parts in a few minutes.

Fine-tuning begins at the logistic regression on features (``head: {init: solved}``) and trains everything, plain views
shown. What ranks is compared with the mean accuracy over seeds on the same validation pictures. Intervals are 95 %,
by resampling these pictures and the seeds of the fine-tuned accuracies; scores stay as they are. The number of
parameters is there as the simplest of all forecasts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from scipy.stats import kendalltau

from tlx.runs.predictions import read

ROOT = Path(__file__).parents[2]
WIDTHS = {"narrow": [16, 32, 48, 64], "usual": [32, 64, 96, 128], "wide": [64, 128, 192, 256]}
LENGTHS = (1, 8)
SCORES = ("linear", "knn", "logme", "parameters")
REAL: dict[str, dict[str, Any]] = {
    "deit_tiny": {"name": "timm/deit_tiny_patch16_224", "weights": "deit_tiny_patch16_224.fp16.safetensors"},
    "mobilenet_v2": {"name": "torchvision/mobilenet_v2", "weights": "torchvision_mobilenet_v2.fp16.safetensors"},
    "mobilenetv2_100": {
        "name": "timm/mobilenetv2_100",
        "weights": "timm_mobilenetv2_100_pad_same.fp16.safetensors",
        "args": {"pad_type": "same"},
        "input": {"mean": [0.5] * 3, "std": [0.5] * 3},
    },
}


@dataclass(frozen=True)
class Target:
    """What networks are ranked on and fine-tuned for.

    Attributes:
        networks: by name, as `backbone` of a configuration, with `input` beside it.
        val: the part of the shards that judges.
        epochs: of fine-tuning.
    """

    name: str
    shards: Path
    val: str
    size: int
    epochs: int
    batch: int
    networks: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Bench:
    out: Path
    seeds: Sequence[int]
    small: bool

    def tlx(self, *words: object, into: Path | None = None) -> None:
        """A command of tlx; what it prints goes to a file, which is there once it has ended well."""
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TLX_FEATURES": str(self.out / "features")}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
        done = subprocess.run(
            [sys.executable, "-m", "tlx", *map(str, words)], env=env, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"tlx {' '.join(map(str, words))}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        if into is not None:
            into.write_text(done.stdout, encoding="utf-8")

    def build(self, pictures: Path, name: str) -> Path:
        place = self.out / "shards" / name
        if not place.exists():
            self.tlx("shards", "build", pictures, place)
        return place

    def configured(self, raw: Mapping[str, Any], name: str) -> Path:
        file = self.out / "configs" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(dict(raw)), encoding="utf-8")
        return file

    def digits(self) -> tuple[Path, Path]:
        """Shards of digits 0 to 4, and of 5 to 9."""
        pictures = self.out / "digits"
        if not pictures.exists():
            subprocess.run([sys.executable, str(ROOT / "launch" / "digits.py"), str(pictures)], check=True)
        return self.build(pictures / "source", "source"), self.build(pictures / "target", "target")

    def pretrained(self, source: Path, channels: Sequence[int], epochs: int, name: str) -> dict[str, Any]:
        """A network that has learned digits 0 to 4 for so many epochs."""
        raw = yaml.safe_load((ROOT / "configs" / "quickstart" / "pretrain.yaml").read_text(encoding="utf-8"))
        args = {**raw["backbone"]["args"], "channels": list(channels)}
        run = self.out / "pretrained" / name
        settings = {"duration": f"{epochs}ep", "lr": 2e-3, "curve": "cosine", "warmup": "10%"}
        raw |= {
            "run": str(run),
            "data": {"train": str(source / "train"), "val": str(source / "val"), "batch": 64, "workers": 0},
            "backbone": {**raw["backbone"], "args": args},
            "phases": {"pretraining": settings},
            "track": {"report": False},
        }
        self.tlx("train", self.configured(raw, f"pretrain-{name}"))
        weights = run / "checkpoints" / "best" / "model.safetensors"
        return {"name": raw["backbone"]["name"], "weights": str(weights), "args": args}

    def plain(self, target: Target) -> dict[str, Any]:
        """What ranking and fine-tuning have in common."""
        train, val = str(target.shards / "train"), str(target.shards / target.val)
        sampling = {"sampling": {"limit": 8}} if self.small and target.size > 32 else {}
        return {
            "data": {"train": train, "val": val, "batch": target.batch, "workers": 0, **sampling},
            "input": {"size": target.size},
            "transforms": [{"name": "resize", "size": [target.size, target.size]}],
            "cache": "exact",
            "track": {"report": False},
        }

    def ranked(self, target: Target) -> dict[str, dict[str, float]]:
        """Scores by network, as tlx probe --backbones gives them."""
        file = self.out / f"{target.name}.json"
        if not file.exists():
            first = dict(next(iter(target.networks.values())))
            first.pop("input", None)
            raw = self.plain(target) | {"run": str(self.out / "none"), "backbone": first}
            config = self.configured(raw, f"{target.name}-probe")
            asked = json.dumps([dict(said) for said in target.networks.values()])
            self.tlx("probe", config, "--backbones", asked, "--bootstrap", 0, "--json", into=file)
        rows = json.loads(file.read_text(encoding="utf-8"))["backbones"]
        found = {}
        for name, said in target.networks.items():
            [row] = [r for r in rows if (r["backbone"], r["weights"]) == (said["name"], said["weights"])]
            found[name] = {key: row[key]["value"] if isinstance(row[key], dict) else row[key] for key in SCORES}
        return found

    def tuned(self, target: Target, name: str, seed: int) -> NDArray[np.bool_]:
        """Fine-tunes a network; which validation pictures the last weights have right."""
        run = self.out / "tuned" / f"{target.name}-{name}-{seed}"
        backbone, raw = dict(target.networks[name]), self.plain(target)
        raw["input"] = raw["input"] | backbone.pop("input", {})
        raw |= {
            "run": str(run),
            "seed": seed,
            "backbone": backbone,
            "head": {"name": "linear", "init": "solved"},
            "phases": {
                "feature_extraction": {"duration": 1, "lr": 1e-9},
                "fine_tuning": {
                    "duration": f"{target.epochs}ep",
                    "lr": 3e-4,
                    "curve": "cosine",
                    "warmup": "10%",
                    "layer_decay": {"name": "exponential", "factor": 0.75},
                },
            },
            "data": {**raw["data"], "drop_last": True},
            "evaluate": {"every": f"{target.epochs}ep"},
            "checkpoint": {"every": f"{target.epochs}ep"},
        }
        self.tlx("train", self.configured(raw, run.name))
        told = read(run, "fine_tuning", "last")
        assert told is not None
        return told.parts[0].right


def targets_of(bench: Bench, photos: Path | None, weights: Path | None) -> list[Target]:
    source, digits = bench.digits()
    jobs = {f"{width}-{n}": (channels, n) for width, channels in WIDTHS.items() for n in LENGTHS}
    with ThreadPoolExecutor(2) as pool:
        made = pool.map(lambda job: bench.pretrained(source, *job[1], job[0]), jobs.items())
        own = dict(zip(jobs, made, strict=True))
    found = [Target("digits", digits, "val", 32, 15, 25, own)]
    if photos is None:
        return found
    flowers = bench.build(photos / "17flowers", "flowers")
    epochs = 1 if bench.small else 4
    found.append(Target("flowers-32px", flowers, "test", 32, epochs, 32, own))
    if weights is not None:
        real = {name: {**said, "weights": str(weights / said["weights"])} for name, said in REAL.items()}
        insects = bench.build(photos / "hymenoptera", "hymenoptera")
        size = 64 if bench.small else 128
        found += [Target("flowers", flowers, "test", size, epochs, 32, real)]
        found += [Target("hymenoptera", insects, "val", size, 2 * epochs, 32, real)]
    return found


def agreement(
    score: Sequence[float], right: Sequence[Sequence[NDArray[np.bool_]]], resamples: int = 2000
) -> tuple[float, float, float]:
    """Kendall's tau-b of a score and fine-tuned accuracies, and its 95 % interval by resampling pictures and seeds.

    Args:
        score: by network.
        right: by network and seed, bool [pictures], the same pictures.
    """
    hits = np.array([[np.asarray(one, dtype=np.float64) for one in seeds] for seeds in right])
    rng, found = np.random.default_rng(0), []
    for _ in range(resamples):
        pictures = rng.integers(hits.shape[2], size=hits.shape[2])
        seeds = rng.integers(hits.shape[1], size=(len(hits), hits.shape[1]))
        drawn = np.take_along_axis(hits[:, :, pictures].mean(2), seeds, 1)
        found.append(kendalltau(score, drawn.mean(1)).statistic)
    low, high = np.nanquantile(found, [0.025, 0.975])
    return float(kendalltau(score, hits.mean((1, 2))).statistic), float(low), float(high)


def tables(found: Mapping[str, tuple[dict[str, dict[str, float]], dict[str, list[NDArray[np.bool_]]]]]) -> str:
    """By target: scores and fine-tuned accuracies of every network; then how their orders agree."""
    lines = ["| target | network | fine-tuned, % | linear, % | k-NN, % | LogME | parameters |"]
    lines += ["|---|---|--:|--:|--:|--:|--:|"]
    for target, (scores, right) in found.items():
        for name, of in sorted(scores.items(), key=lambda one: -float(np.mean(right[one[0]]))):
            tuned = 100 * float(np.mean(right[name]))
            lines.append(
                f"| {target} | {name} | {tuned:.1f} | {100 * of['linear']:.1f} | {100 * of['knn']:.1f} "
                f"| {of['logme']:.3f} | {of['parameters'] / 1e6:.2f} M |"
            )
    lines += ["", "| Kendall's tau with the fine-tuned order | networks | linear | k-NN | LogME | parameters |"]
    lines += ["|---|--:|--:|--:|--:|--:|"]
    for target, (scores, right) in found.items():
        cells = []
        for key in SCORES:
            tau, low, high = agreement([of[key] for of in scores.values()], [right[name] for name in scores])
            cells.append(f"{tau:.2f} [{low:.2f}, {high:.2f}]")
        lines.append(f"| {target} | {len(scores)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--seeds", default="0-2")
    parser.add_argument("--small", action="store_true")
    said = parser.parse_args()
    first, _, last = said.seeds.partition("-")
    bench = Bench(said.out, range(int(first), int(last or first) + 1), said.small)
    bench.out.mkdir(parents=True, exist_ok=True)
    found = {}
    for target in targets_of(bench, said.photos, said.weights):
        scores = bench.ranked(target)
        jobs = [(target, name, seed) for name in target.networks for seed in bench.seeds]
        with ThreadPoolExecutor(2) as pool:
            told = list(pool.map(lambda job: bench.tuned(*job), jobs))
        right: dict[str, list[NDArray[np.bool_]]] = {name: [] for name in target.networks}
        for (_, name, _), one in zip(jobs, told, strict=True):
            right[name].append(one)
        found[target.name] = (scores, right)
        print(f"{target.name} is done", file=sys.stderr, flush=True)
    print(tables(found))


if __name__ == "__main__":
    main()
