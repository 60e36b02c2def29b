"""A training of 400 steps that commands are given, and whether two of them went the same, bit by bit."""

from __future__ import annotations

import json

import torch
from commands import rows
from safetensors.torch import load_file

RAW = {
    "seed": 5,
    "data": {"batch": 8, "workers": 1},
    "input": {"size": 16},
    "backbone": {"name": "toys:small", "weights": "none", "args": {"dropout": 0.1}},
    "phases": {
        "each": {"lr": 0.01, "curve": "cosine"},
        "feature_extraction": {"duration": 100},
        "fine_tuning": {"duration": 300},
    },
    "evaluate": {"every": 40},
    "checkpoint": {"every": 30},
    "track": {"every": 1, "report": False},
}


def raw_for(shards, run, **over):
    data = {**RAW["data"], "train": str(shards / "train"), "val": str(shards / "val"), **over.pop("data", {})}
    return {**RAW, "run": str(run), **over, "data": data}


def same_bits(a, b):
    for name in ("model.safetensors", "optimizer.pt"):
        one, other = (run / "checkpoints" / "latest" / name for run in (a, b))
        if name.endswith(".pt"):
            one, other = (torch.load(p, weights_only=True) for p in (one, other))
            one, other = ({f"{n}.{k}": v for n, s in o.items() for k, v in s.items()} for o in (one, other))
        else:
            one, other = load_file(one), load_file(other)
        assert one.keys() == other.keys()
        assert all(torch.equal(torch.as_tensor(one[k]), torch.as_tensor(other[k])) for k in one)
    assert rows(a) == rows(b)
    results = [json.loads((run / "result.json").read_text()) for run in (a, b)]
    assert results[0]["best"] == results[1]["best"]
    assert results[0]["samples_seen"] == results[1]["samples_seen"]
