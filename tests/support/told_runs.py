"""Run folders with predictions, written by hand: what a network that is right so often would have told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from written_runs import finish, write_run

from tlx.data.shards.manifest import Manifest
from tlx.runs.predictions import Part, Predictions, write
from tlx.tasks.told import About


def classified(names, truth, *, right: float = 0.8, seed: int = 0, task: str = "", kind: str = "class") -> Part:
    """Mistakes are of the next class; the network is as sure as it is right, and a little surer."""
    rng = np.random.default_rng(seed)
    truth, classes = np.asarray(truth, np.int32), len(names)
    hit = rng.random(len(truth)) < right
    told = np.where(hit | (truth < 0), truth, (truth + 1) % classes).clip(min=0).astype(np.int32)
    sure = rng.uniform(0.5, 1.0, len(truth))
    p = np.full((len(truth), classes), 0.0)
    p[np.arange(len(truth)), told] = sure
    p[np.arange(len(truth)), (told + 1) % classes] = 1 - sure
    return Part(
        About(kind, tuple(names), "label", task),
        {"truth": truth, "told": told, "probabilities": p.astype(np.float16)},
    )


def labelled(names, count: int, *, task: str = "", seed: int = 0) -> Part:
    rng = np.random.default_rng(seed)
    truth = (rng.random((count, len(names))) < 0.3).astype(np.int8)
    truth[0, 0] = -1
    p = np.clip(np.where(truth == 1, 0.75, 0.25) + rng.normal(0, 0.2, truth.shape), 0, 1)
    return Part(About("labels", tuple(names), "tags", task), {"truth": truth, "probabilities": p.astype(np.float16)})


def numbered(names, count: int, *, task: str = "", seed: int = 0) -> Part:
    rng = np.random.default_rng(seed)
    truth = rng.normal(20, 5, (count, len(names))).astype(np.float32)
    truth[1, 0] = np.nan
    told = np.nan_to_num(truth, nan=20) + rng.normal(0, 1, truth.shape).astype(np.float32)
    return Part(About("number", tuple(names), "size", task), {"truth": truth, "told": told.astype(np.float32)})


def told_run(folder: Path, parts, *, val: Path | None = None, before=None, **over) -> Path:
    """A finished run whose best evaluation, of fine_tuning, told this, and that of feature_extraction `before`."""
    run = finish(write_run(folder), **over)
    count = len(parts[0].truth)
    digest, content = (m.digest, m.content) if val is not None and (m := Manifest.open(val)) else ("d", None)
    result = json.loads((run / "result.json").read_text())
    result["phases"]["feature_extraction"]["best"] = {"step": 8, "weights": "raw", "val/top1": 0.5}
    (run / "result.json").write_text(json.dumps(result))
    with (run / "config.yaml").open("a") as file:
        file.write(f"data: {{train: {val or 'x'}, val: {val or 'none'}}}\nbackbone: {{name: toys:small, weights: x}}\n")
    for phase, step, of in (("fine_tuning", 16, parts), ("feature_extraction", 8, before)):
        if of is not None:
            about = (phase, "best", step, "raw", digest, content, count)
            write(run, Predictions(*about, {"val/top1": 0.8}, np.arange(count), tuple(of)))
    return run
