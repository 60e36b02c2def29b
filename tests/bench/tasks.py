"""Several targets of real photographs learned at once, beside one at a time.

``python tests/bench/tasks.py --photos FOLDER --weights FILE --out OUT [--seeds 0-4]`` builds shards of Oxford's 17
flowers and of ants and bees (FOLDER/17flowers/train/c1 ..., FOLDER/hymenoptera/train/ants ...), trains every row with
every seed, two at a time, and writes configs/TASKS.md. FILE is torchvision's mobilenet_v2. What is done is kept under
OUT: the same command goes on after an interruption, and of trained rows it writes the tables anew. ``--small`` tries
all parts and prints its tables. ``--pilot`` tries rates, with a seed of its own, and prints what validation says.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import hashlib
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from safetensors.torch import load_file

import tlx
from tlx.data.pixels.transforms import eval_transform
from tlx.data.shards.manifest import Manifest
from tlx.data.stream.sampling import Sampling
from tlx.data.stream.stream import evaluation_batches
from tlx.tasks import Ranks, TaskData, kinds, outputs_of
from tlx.tasks.classification import ClassificationMeter
from tlx.tasks.multilabel import MultiLabelMeter
from tlx.tasks.summaries import summaries
from tlx.train.components import backbone_of, task_of
from tlx.train.data import open_sets
from tlx.train.step import Normalise

RESULT = Path(__file__).parents[2] / "configs" / "TASKS.md"
PICTURES_SEED = 1000
"""Chooses pictures, and those whose targets are hidden: no seed of a training."""
RATES = (3e-3, 1e-3)
"""Of feature extraction and fine-tuning: the best of four by --pilot."""
PILOT_SEED = 100
Scores = NDArray[np.float64]

SPECIES = [  # of c1 to c17: colour of the flowers, looked at; botanical family
    ("daffodil", "yellow", "amaryllis"),
    ("snowdrop", "white", "amaryllis"),
    ("lily of the valley", "white", "asparagus"),
    ("bluebell", "purple", "asparagus"),
    ("crocus", "mixed", "iris"),  # purple, white and striped
    ("iris", "mixed", "iris"),
    ("tiger lily", "red", "lily"),
    ("tulip", "yellow", "lily"),  # the wild one
    ("fritillary", "red", "lily"),
    ("sunflower", "yellow", "daisy"),
    ("daisy", "white", "daisy"),
    ("coltsfoot", "yellow", "daisy"),
    ("dandelion", "yellow", "daisy"),
    ("cowslip", "yellow", "primrose"),
    ("buttercup", "yellow", "buttercup"),
    ("windflower", "white", "buttercup"),
    ("pansy", "purple", "violet"),
]
COLOUR = {name: colour for name, colour, _ in SPECIES}
COLOURS = sorted(set(COLOUR.values()))
TREES = {
    "two levels": {**dict.fromkeys(COLOUR, "flowers"), "ants": "insects", "bees": "insects"},
    "three levels": {
        **{name: f"flowers/{family} family" for name, _, family in SPECIES},
        "ants": "insects",
        "bees": "insects",
    },
}


@dataclass(frozen=True)
class Size:
    """How much is trained on, and for how long."""

    train: int = 20  # pictures a class
    val: int = 10
    epochs: tuple[int, int] = (6, 4)
    pixels: int = 96


@dataclass(frozen=True)
class Row:
    """What is trained with every seed.

    Attributes:
        shards: the name of the data.
        task: as in a configuration.
    """

    shards: str
    task: Mapping[str, Any]


def _class(target: str) -> dict[str, Any]:
    return {"name": "classification", "target": target}


def _both(weighting: str) -> dict[str, Any]:
    return {
        "name": "multitask",
        "tasks": {"species": _class("species"), "colour": _class("colour")},
        "weighting": weighting,
    }


def _hierarchical(tree: str) -> dict[str, Row]:
    named = {alpha: {"name": "hierarchical", "levels": TREES[tree], "alpha": alpha} for alpha in (0.1, 0.5)}
    return {f"{tree.split()[0]}-{alpha}": Row("joined", task) for alpha, task in named.items()}


ROWS = {
    "species": Row("flowers", _class("species")),
    "colour": Row("flowers", _class("colour")),
    "both-equal": Row("flowers", _both("equal")),
    "both-uncertainty": Row("flowers", _both("uncertainty")),
    "labels-bce": Row("flowers", {"name": "multilabel", "target": "labels"}),
    "labels-asymmetric": Row("flowers", {"name": "multilabel", "target": "labels", "loss": "asymmetric"}),
    "flat": Row("joined", {"name": "classification"}),
    **_hierarchical("two levels"),
}
MORE = {
    **_hierarchical("three levels"),
    "fewer-species": Row("fewer", _class("species")),
    "fewer-both": Row("fewer", _both("equal")),
}
"""Trained with --more: a third more time."""


# Pictures


def split(folders: Sequence[tuple[Path, Path]], size: Size) -> Iterator[tuple[int, str, Path]]:
    """(class, train or val or test, picture): some of a class's training folder each, all of its test folder."""
    for place, (train, test) in enumerate(folders):
        files = sorted(train.glob("*.jpg"))
        chosen = np.random.default_rng([PICTURES_SEED, place]).permutation(len(files))[: size.train + size.val]
        if len(chosen) < size.train + size.val:
            raise SystemExit(f"{train} has {len(files)} pictures, {size.train + size.val} are wanted")
        for i, at in enumerate(chosen):
            yield place, "train" if i < size.train else "val", files[at]
        yield from ((place, "test", file) for file in sorted(test.glob("*.jpg")))


def hidden(samples: int) -> set[int]:
    """A third of so many samples."""
    return set(np.random.default_rng(PICTURES_SEED).permutation(samples)[: samples // 3].tolist())


def write_tables(photos: Path, out: Path, size: Size) -> dict[str, Path]:
    """CSV files, by the name of the data. In `flowers` a third of the training pictures lack the colour (and labels of
    colour are unknown); in `fewer` a third lack the species."""
    flowers = [
        (photos / "17flowers/train" / f"c{i}", photos / "17flowers/test" / f"c{i}") for i in range(1, len(SPECIES) + 1)
    ]
    insects = [(photos / "hymenoptera/train" / name, photos / "hymenoptera/val" / name) for name in ("ants", "bees")]
    chosen = list(split(flowers, size))
    lacking = hidden(sum(part == "train" for _, part, _ in chosen))
    header, rows = ["path", "split", "species", "colour", "labels"], {"flowers": [], "fewer": []}
    seen = 0
    for place, part, file in chosen:
        species = SPECIES[place][0]
        colour, unknown = COLOUR[species], part == "train" and seen in lacking
        seen += part == "train"
        some = [f"?{name}" for name in COLOURS] if unknown else [colour]
        rows["flowers"].append([file, part, species, "" if unknown else colour, ";".join([species, *some])])
        rows["fewer"].append([file, part, "" if unknown else species, colour, ";".join([species, colour])])
    names = [name for name, _, _ in SPECIES] + ["ants", "bees"]
    joined = [[file, part, names[place]] for place, part, file in split([*flowers, *insects], size)]
    tables = {name: (header, own) for name, own in rows.items()} | {"joined": (["path", "split", "label"], joined)}
    for name, (head, lines) in tables.items():
        with (out / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([head, *lines])
    return {name: out / f"{name}.csv" for name in tables}


def build(photos: Path, out: Path, size: Size) -> None:
    """Shards of all data, once, by the command that users have."""
    for name, table in write_tables(photos, out, size).items():
        targets = [] if name == "joined" else ["--label-column", ""]
        targets += [] if name == "joined" else ["--target=species", "--target=colour", "--target=labels:labels"]
        words = ["shards", "build", table, out / "shards" / name, "--resize", 128, "--jobs", 1, *targets]
        subprocess.run([sys.executable, "-m", "tlx", *map(str, words)], check=True)


# Trainings


def configuration(row: Row, run: Path, weights: str, size: Size, seed: int) -> dict[str, Any]:
    shards, (first, second) = run.parents[1] / "shards" / row.shards, size.epochs
    return {
        "run": str(run),
        "seed": seed,
        "data": {"train": str(shards / "train"), "val": str(shards / "val"), "batch": 32, "workers": 0},
        "input": {"size": size.pixels},
        "backbone": {"name": "torchvision/mobilenet_v2", "weights": weights},
        "transforms": [{"name": "random_resized_crop", "scale": [0.35, 1]}, "horizontal_flip"],
        "task": dict(row.task),
        "phases": {
            "feature_extraction": {"duration": f"{first}ep", "lr": RATES[0], "curve": "cosine"},
            "fine_tuning": {"duration": f"{second}ep", "lr": RATES[1], "curve": "cosine", "warmup": "25%"},
        },
        "loop": {"channels_last": True},  # 1.7 times as fast on a CPU
        "evaluate": {"every": "2ep"},
        "checkpoint": {"keep": {"last": 1, "best": 1}},
        "track": {"report": False},
    }


def train_all(out: Path, made: Mapping[str, dict[str, Any]]) -> None:
    """Trains and scores what is not done yet, by name, in two processes with one thread each."""
    for folder in ("configs", "runs", "scores", "logs"):
        (out / folder).mkdir(exist_ok=True)
    left = [out / "configs" / f"{name}.yaml" for name in made if not (out / "scores" / f"{name}.npz").exists()]
    for file in left:
        file.write_text(yaml.safe_dump(made[file.stem], sort_keys=False), encoding="utf-8")
    env, children = {**os.environ, "OMP_NUM_THREADS": "1"}, []
    for i, own in enumerate(filter(None, (left[::2], left[1::2]))):
        with (out / "logs" / f"{i}.txt").open("a", encoding="utf-8") as log:
            command = [sys.executable, __file__, "--child", *map(str, own)]
            children.append(subprocess.Popen(command, stderr=log, env=env))
    codes = [child.wait() for child in children]
    if any(codes):
        raise SystemExit(f"a training failed: {out / 'logs'}; the same command goes on from there")


def train_and_score(file: Path) -> None:
    """A training, and the outputs of its best checkpoint for validation and test pictures."""
    start = time.monotonic()
    config = tlx.load_config(file)
    with contextlib.redirect_stdout(sys.stderr):
        tlx.fit(config)
    run = Path(config.run)
    task = task_of(config, open_sets(config).samples)
    backbone = backbone_of(config.untrained(), outputs_of(task))
    backbone.module.load_state_dict(load_file(run / "checkpoints/best/model.safetensors"))
    scores = {part: outputs(config, backbone, part) for part in ("val", "test")}
    best = json.loads((run / "result.json").read_text(encoding="utf-8"))["best"]
    seconds = time.monotonic() - start
    np.savez(
        run.parents[1] / "scores" / f"{run.name}.npz", about=json.dumps({"best": best, "seconds": seconds}), **scores
    )
    print(f"{run.name}: {seconds:.0f} s, best on validation {best['value']:.3f} at step {best['step']}", flush=True)


@torch.no_grad()
def outputs(config: tlx.Config, backbone: tlx.Backbone, part: str) -> Scores:
    """[samples, outputs], in the order of the index."""
    spec, net = config.input.over(backbone.input), backbone.module.eval()
    normalise = Normalise(spec, torch.device("cpu"), channels_last=False)
    shards = Manifest.open(Path(config.data.train).parent / part)
    batches = evaluation_batches(shards, batch=64, transform=eval_transform(spec), targets=list(shards.targets)[:1])
    return torch.cat([net(normalise(batch.images)) for batch in batches]).double().numpy()


# What the test pictures say. Every row goes through the same meters.


@dataclass(frozen=True)
class Judge:
    """Targets of a part (val, test) of some shards."""

    shards: Manifest

    @staticmethod
    def of(out: Path, name: str, part: str = "test") -> Judge:
        return Judge(Manifest.open(out / "shards" / name / part))

    def _measured(self, meter: Any, scores: Scores) -> dict[str, Any]:
        own = {name: torch.tensor(np.array(self.shards.values(name))) for name in self.shards.targets}
        own = {name: values.long() if values.dtype == torch.int32 else values for name, values in own.items()}
        meter.update(torch.from_numpy(scores), own, torch.arange(len(scores)))
        result: dict[str, Any] = meter.result()
        return result

    def classes(self, target: str) -> tuple[str, ...]:
        return self.shards.targets[target].classes

    def top1(self, target: str, scores: Scores) -> float:
        def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")

        device = torch.device("cpu")
        meter = ClassificationMeter(
            len(self.classes(target)), top_k=5, device=device, loss=loss, target=target, partial=True
        )
        return float(self._measured(meter, scores)["top1"])

    def labels(self, scores: Scores) -> dict[str, Any]:
        return self._measured(MultiLabelMeter("labels", Ranks()), scores)

    def tree(self, levels: Mapping[str, str], scores: Scores) -> dict[str, Any]:
        data = TaskData(summaries(self.shards, Sampling(), 0), len(self.shards), 5, lambda counts: None)  # type: ignore[arg-type, return-value]
        task = kinds.hierarchical(data, levels=dict(levels))
        assert tuple(task.outputs) == self.shards.classes
        return self._measured(task.meter(torch.device("cpu")), scores)


def softmax(scores: Scores) -> Scores:
    return torch.from_numpy(scores).softmax(1).numpy()


def logit(p: Scores) -> Scores:
    p = np.clip(p, 1e-300, 1 - 1e-16)
    return np.log(p) - np.log1p(-p)


def colour_of_species(judge: Judge, scores: Scores) -> Scores:
    """Logarithms of a colour's probability: that of all species of the colour."""
    species, colours = judge.classes("species"), judge.classes("colour")
    of = np.array([[COLOUR[name] == colour for colour in colours] for name in species], np.float64)
    return np.log(np.maximum(softmax(scores) @ of, 1e-300))


def as_labels(judge: Judge, species: Scores, colour: Scores) -> Scores:
    """Outputs of two classifications as those of labels: their probabilities, each by itself."""
    p = dict(zip(judge.classes("species"), softmax(species).T, strict=True))
    p |= dict(zip(judge.classes("colour"), softmax(colour).T, strict=True))
    return logit(np.stack([p[name] for name in judge.classes("labels")], 1))


def judged_labels(out: Path, scores: Mapping[str, Scores]) -> dict[str, float]:
    """Of test pictures; thresholds are those that make F1 highest on the validation pictures.

    Args:
        scores: of val and test.
    """
    judge, chosen = Judge.of(out, "flowers"), Judge.of(out, "flowers", "val").labels(scores["val"])["thresholds"]
    found, names = judge.labels(scores["test"]), judge.classes("labels")
    shift = logit(np.array([0.5 if threshold is None else threshold for threshold in chosen]))
    of_colour = np.array([name in COLOURS for name in names])
    precision = np.array(found["per_class"], np.float64)
    return {
        "mAP": found["map"],
        "mAP of species": float(precision[~of_colour].mean()),
        "mAP of colours": float(precision[of_colour].mean()),
        "F1 at 1/2": found["f1_macro"],
        "F1, chosen thresholds": judge.labels(scores["test"] - shift)["f1_macro"],
    }


# Tables

Found = dict[str, dict[str, list[float]]]
"""Row -> column -> a value for each seed."""


def read(out: Path, row: str, seed: int) -> dict[str, Scores]:
    with np.load(out / "scores" / f"{row}-seed{seed}.npz") as file:
        return {part: file[part] for part in ("val", "test")}


def gather(rows: Iterator[tuple[str, dict[str, float]]]) -> Found:
    found: Found = {}
    for row, values in rows:
        for column, value in values.items():
            found.setdefault(row, {}).setdefault(column, []).append(value)
    return found


def targets_table(out: Path, seeds: Sequence[int], shards: str, rows: Mapping[str, str]) -> Found:
    """Top-1 of species and colour; `rows`: what they are called -> trained row."""
    judge = Judge.of(out, shards)
    many = len(judge.classes("species"))

    def values() -> Iterator[tuple[str, dict[str, float]]]:
        for seed in seeds:
            scores = {called: read(out, row, seed)["test"] for called, row in rows.items()}
            for called, row in rows.items():
                task = (ROWS | MORE)[row].task
                parts = {"species": slice(0, many), "colour": slice(many, many + len(COLOURS))}
                if task["name"] == "classification":
                    parts = {task["target"]: slice(None)}
                yield called, {name: judge.top1(name, scores[called][:, columns]) for name, columns in parts.items()}
            alone = next(iter(rows))
            colour = colour_of_species(judge, scores[alone])
            yield f"{alone}, and the colour of that species", {"colour": judge.top1("colour", colour)}

    return gather(values())


def labels_table(out: Path, seeds: Sequence[int]) -> Found:
    judge = Judge.of(out, "flowers")
    many = len(judge.classes("species"))

    def values() -> Iterator[tuple[str, dict[str, float]]]:
        for seed in seeds:
            species, colour, both = (read(out, row, seed) for row in ("species", "colour", "both-equal"))
            single = {part: as_labels(judge, species[part], colour[part]) for part in species}
            yield "two single-task networks, softmax", judged_labels(out, single)
            halves = {p: as_labels(judge, s[:, :many], s[:, many : many + len(COLOURS)]) for p, s in both.items()}
            yield "multi-task, equal, softmax", judged_labels(out, halves)
            for loss in ("bce", "asymmetric"):
                yield f"multi-label, {loss}", judged_labels(out, read(out, f"labels-{loss}", seed))

    return gather(values())


def tree_table(out: Path, seeds: Sequence[int], tree: str) -> Found:
    judge, rows = Judge.of(out, "joined"), {"flat": "flat classification"}
    rows |= {f"{tree.split()[0]}-{alpha}": f"hierarchical, alpha {alpha}" for alpha in (0.1, 0.5)}
    columns = {"top1": "leaf", "level1_top1": "level 1", "level2_top1": "level 2", "distance": "distance"}
    columns = {key: name for key, name in columns.items() if tree == "three levels" or key != "level2_top1"}

    def values() -> Iterator[tuple[str, dict[str, float]]]:
        for seed in seeds:
            for row, called in rows.items():
                found = judge.tree(TREES[tree], read(out, row, seed)["test"])
                yield called, {name: found[key] for key, name in columns.items()}

    return gather(values())


T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""0.975 of Student's t for 1 to 9 degrees of freedom."""


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half of its 95 % interval."""
    if len(values) < 2:
        return float(np.mean(values)), math.nan
    quantile = T_QUANTILES[min(len(values) - 2, len(T_QUANTILES) - 1)]
    return float(np.mean(values)), float(quantile * np.std(values, ddof=1) / math.sqrt(len(values)))


def difference(rows: Found, row: str, column: str) -> tuple[float, float] | None:
    """From the first row that has the column, paired by seed: the mean, and half of its interval."""
    first = next(name for name, columns in rows.items() if column in columns)
    if first == row:
        return None
    return interval(np.subtract(rows[row][column], rows[first][column]).tolist())


def cell(rows: Found, row: str, column: str) -> str:
    """Percent, but for distances; bold where the interval of the difference leaves out 0."""
    if column not in rows[row]:
        return ""
    scale, digits = (1, 3) if column == "distance" else (100, 1)
    mean, half = interval(rows[row][column])
    text = f"{scale * mean:.{digits}f} ± {scale * half:.{digits}f}"
    beside = difference(rows, row, column)
    if beside is None:
        return text
    mean, half = beside
    said = f"{scale * mean:+.{digits}f} ± {scale * half:.{digits}f}"
    return f"{text} ({f'**{said}**' if abs(mean) > half else said})"


def table(rows: Found) -> str:
    columns = list(dict.fromkeys(column for values in rows.values() for column in values))
    lines = [["", *columns], ["---", *["--:"] * len(columns)]]
    lines += [[row, *(cell(rows, row, column) for column in columns)] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def told_apart(tables: Mapping[str, Found]) -> str:
    """Which differences have an interval without 0."""
    told, many = [], 0
    for name, rows in tables.items():
        for row, columns in rows.items():
            for column in columns:
                beside = difference(rows, row, column)
                many += beside is not None
                if beside is not None and abs(beside[0]) > beside[1]:
                    told.append(f"{name}, {row}: {column} {'higher' if beside[0] > 0 else 'lower'}")
    listed = "".join(f"- {line}\n" for line in told)
    return f"{len(told)} of the {many} differences have an interval that leaves out 0:\n\n{listed}"


# The report


def tables_of(out: Path, seeds: Sequence[int], more: bool) -> dict[str, tuple[str, Found]]:
    """By title: what is said of a table, and the table."""
    rows = {"species alone": "species", "colour alone": "colour"}
    rows |= {f"multi-task, {weighting}": f"both-{weighting}" for weighting in ("equal", "uncertainty")}
    tree = "Top-1 of leaves and levels; distance: the mean height of the lowest common ancestor, lower is better. "
    found = {
        "A third of the colours missing": (
            "Top-1. The last row takes no colour target: probabilities of species are summed by colour.",
            targets_table(out, seeds, "flowers", rows),
        ),
        "Species and colours as 22 labels": (
            "A third of the training pictures lack the colour. F1 is the mean over labels; thresholds are chosen on "
            "validation pictures.",
            labels_table(out, seeds),
        ),
        "Flowers and insects, a tree of two levels": (
            tree + "flowers/SPECIES, insects/ants, insects/bees.",
            tree_table(out, seeds, "two levels"),
        ),
    }
    if not more:
        return found
    fewer = {"species alone": "fewer-species", "multi-task, equal": "fewer-both"}
    return found | {
        "Flowers and insects, a tree of three levels": (
            tree
            + "flowers/FAMILY/SPECIES, insects/ants, insects/bees. The flat networks are those of the table above.",
            tree_table(out, seeds, "three levels"),
        ),
        "A third of the species missing": (
            "Top-1. Every training picture has its colour.",
            targets_table(out, seeds, "fewer", fewer),
        ),
    }


LIMITS = """
Intervals are over seeds of training (the head's first weights, the order, the crops), 95 % of Student's t; all seeds
see the same pictures, so they say nothing of other pictures. The test pictures are few: one flower is 0.4 points of
top-1. A colour follows from the species, and nothing was annotated picture by picture. Rates were chosen for species
alone, and for nothing else. About one in twenty differences leaves out 0 by chance.

Single-task checkpoints were chosen by top-1, multi-label ones by mAP, and the colour network saw two thirds of the
colours: a part of what multi-label is ahead by may be that. Insects are 40 of 380 training pictures and 153 of 425 test
pictures.
"""


def report(out: Path, options: argparse.Namespace, size: Size, seeds: Sequence[int]) -> str:
    tables = tables_of(out, seeds, options.more)
    parts = ["# Tasks on photographs\n", facts(out, options, size, seeds)]
    for title, (about, rows) in tables.items():
        parts += [f"## {title}\n", about + "\n", table(rows)]
    parts += ["## What the numbers say\n", told_apart({title: rows for title, (_, rows) in tables.items()})]
    parts += [LIMITS.lstrip(), "## Configurations\n", *configurations(size)]
    return "\n".join(parts)


def facts(out: Path, options: argparse.Namespace, size: Size, seeds: Sequence[int]) -> str:
    counts = {
        name: {part: len(Manifest.open(out / "shards" / name / part)) for part in ("train", "val", "test")}
        for name in ("flowers", "joined")
    }
    names = [f"{row}-seed{seed}" for row in ROWS | (MORE if options.more else {}) for seed in seeds]
    runs = [json.loads(str(np.load(out / "scores" / f"{name}.npz")["about"])) for name in names]
    early = sum(run["best"]["phase"] == "feature_extraction" for run in runs)
    data = "; ".join(
        f"{name}: {n['train']} pictures to train, {n['val']} to choose the checkpoint, {n['test']} to test"
        for name, n in counts.items()
    )
    colours = "; ".join(f"{c}: {', '.join(s for s, of in COLOUR.items() if of == c)}" for c in COLOURS)
    weights = Path(options.weights)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:12]
    return (
        f"{datetime.date.today():%-d %B %Y}; `{command(options)}`; tlx {tlx.__version__}, torch {version('torch')}, "
        f"torchvision {version('torchvision')}, Python {platform.python_version()}; {os.cpu_count()} CPU cores shared "
        f"with other work, two trainings at a time with one thread each, {len(runs)} trainings of "
        f"{np.median([run['seconds'] for run in runs]):.0f} s by the clock (the median).\n\n"
        f"Oxford's 17 flowers, and ants and bees of PyTorch's tutorial ({data}): {size.train} training pictures and "
        f"{size.val} for validation of each class, drawn once from the training folders; the test folders whole. "
        f"torchvision's mobilenet_v2 ({weights.name}, SHA-256 {digest}), {size.pixels} px, batch 32, "
        f"{size.epochs[0]} epochs of feature extraction at {RATES[0]:g} and {size.epochs[1]} of fine-tuning at "
        f"{RATES[1]:g} (chosen on validation, species alone, seed {PILOT_SEED}), seeds {shown(seeds)}, none left out. "
        f"The checkpoint is the best by the task's own metric on validation, every second epoch: in {early} of "
        f"{len(runs)} trainings one of feature extraction. All figures are of the test pictures, on which nothing was "
        "chosen. Mean ± half of the 95 % interval; in brackets the difference from the first row "
        "of the column, paired by seed, bold where its interval leaves out 0.\n\n"
        f"Colours: {colours}. A third of the training pictures, drawn once, lack the target that a table says.\n"
    )


def command(options: argparse.Namespace) -> str:
    """As anybody would type it: folders and files are his own."""
    words = ["python", "tests/bench/tasks.py", "--photos", "PHOTOS", "--weights", "WEIGHTS.safetensors"]
    return shlex.join(
        [*words, "--out", "OUT", "--seeds", options.seeds] + ["--small"] * options.small + ["--more"] * options.more
    )


def shown(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def configurations(size: Size) -> Iterator[str]:
    """Two of the files that were trained, without their places."""
    targets = "--target species --target colour --target labels:labels"
    yield f"Shards are built by `tlx shards build flowers.csv shards --label-column '' {targets}`.\n"
    for name in ("both-equal", "labels-asymmetric"):
        made = configuration(ROWS[name], Path("OUT/runs") / name, "WEIGHTS.safetensors", size, 0)
        yield f"`{name}`\n\n```yaml\n{yaml.safe_dump(made, sort_keys=False, default_flow_style=None, width=110)}```\n"


def pilot(out: Path, weights: str, size: Size) -> None:
    """Species alone, by rates: top-1 of the best checkpoint on validation."""
    made = {}
    for rates in [(a, b) for a in (3e-3, 1e-2) for b in (3e-4, 1e-3)]:
        name = f"pilot-{rates[0]:g}-{rates[1]:g}"
        made[name] = configuration(ROWS["species"], out / "runs" / name, weights, size, PILOT_SEED)
        for phase, lr in zip(made[name]["phases"].values(), rates, strict=True):
            phase["lr"] = lr
    train_all(out, made)
    for name in made:
        best = json.loads(str(np.load(out / "scores" / f"{name}.npz")["about"]))["best"]
        print(f"{name}: {best['value']:.4f}, step {best['step']}")


def seeds_of(text: str) -> list[int]:
    """Of ``0-4`` or ``0,2,5``."""
    first, dash, last = text.partition("-")
    return list(range(int(first), int(last) + 1)) if dash else [int(seed) for seed in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", default="0-4")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--more", action="store_true", help="a deeper tree, and missing species")
    parser.add_argument("--pilot", action="store_true")
    parser.add_argument("--child", type=Path, nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        for file in options.child:
            train_and_score(file)
        return
    if not (options.photos and options.weights and options.out):
        parser.error("--photos, --weights and --out are needed")
    size, seeds = Size(4, 2, (1, 1), 64) if options.small else Size(), seeds_of(options.seeds)
    out, weights = options.out.resolve(), str(options.weights.resolve())
    out.mkdir(parents=True, exist_ok=True)
    build(options.photos.resolve(), out, size)
    if options.pilot:
        pilot(out, weights, size)
        return
    rows = ROWS | (MORE if options.more else {})
    names = {f"{row}-seed{seed}": (row, seed) for row in rows for seed in seeds}
    train_all(out, {n: configuration(rows[row], out / "runs" / n, weights, size, s) for n, (row, s) in names.items()})
    text = report(out, options, size, seeds)
    if options.small:
        print(text)
    else:
        RESULT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
