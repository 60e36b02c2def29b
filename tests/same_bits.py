"""Whether two versions of tlx train the same, bit by bit: ``python tests/same_bits.py WORK OTHER [OTHER_TESTS]``.

OTHER is the other version's interpreter (``/path/.venv/bin/python``), OTHER_TESTS the folder of its `toys` (by
default beside its environment). Each scenario is trained by both as a command of its own; compared are weights, their
moving average, the optimizer's state, every row but for its times, and the best evaluations. Exit code 1: they differ.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SUPPORT = Path(__file__).resolve().parent / "support"
TWO = {"each": {"lr": 0.02, "curve": "cosine", "layer_decay": {"name": "exponential", "factor": 0.5}, "duration": 7}}
DROPOUT = {"name": "toys:small", "weights": "none", "args": {"dropout": 0.1}}
SCENARIOS: dict[str, dict[str, Any]] = {
    "average": {
        "backbone": DROPOUT,
        "phases": {**TWO, "fine_tuning": {"norm": "statistics_move"}},
        "loop": {"ema": {"decay": 0.8}, "clip": 0.5, "nonfinite": "skip", "micro_batch": 3},
        "mix": {"mixup": 0.4, "cutmix": 1.0},
        "evaluate": {"every": 2, "patience": 2},
    },
    "from_best": {
        "backbone": DROPOUT,
        "unfreeze": {"name": "gradual", "every": 4},
        "phases": {"each": {"lr": 0.05, "optimizer_state": "reset", "start_from": "best"}},
        "optimizer": {"name": "sgd", "momentum": 0.9},
        "evaluate": {"every": 3},
        "checkpoint": {"every": 5, "background": False},
    },
}


def train(python: str, tests: Path, work: Path, name: str, shards: Path) -> dict[str, str]:
    """Trains a scenario by an interpreter's tlx; digests of what came of it, by what it is."""
    run = work / name
    data = {"train": str(shards / "train"), "val": str(shards / "val"), "batch": 8, "workers": 0}
    raw = {"seed": 3, "input": {"size": 16}, "track": {"every": 1, "report": False}, "world": {"device": "cpu"}}
    work.mkdir(parents=True, exist_ok=True)
    file = work / f"{name}.yaml"
    file.write_text(json.dumps({**raw, **SCENARIOS[name], "data": data, "run": str(run)}))
    env = {**os.environ, "PYTHONPATH": str(tests), "OMP_NUM_THREADS": "1"}
    command = [python, "-m", "tlx", "train", str(file), "--fresh"]
    subprocess.run(command, env=env, cwd=work, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in row.items() if not key.startswith(("time/", "memory/"))} for row in rows]
    result = json.loads((run / "result.json").read_text())
    parts = {"rows": kept, "result": {key: result[key] for key in ("step", "best", "last", "phases", "samples_seen")}}
    found = {what: hashlib.sha256(json.dumps(part).encode()).hexdigest() for what, part in parts.items()}
    latest = run / "checkpoints" / "latest"
    for weights in sorted(latest.glob("*.safetensors")):
        found[weights.name] = hashlib.sha256(weights.read_bytes()).hexdigest()
    return found | {"optimizer.pt": _of_optimizer(latest / "optimizer.pt")}


def place_of(python: str, work: Path) -> str:
    """Where an interpreter's tlx lies; asked outside of a checkout, whose tlx would come before the installed one."""
    ask = [python, "-c", "import tlx; print(tlx.__file__)"]
    return subprocess.run(ask, cwd=work, check=True, capture_output=True, text=True).stdout.strip()


def _of_optimizer(file: Path) -> str:
    import torch

    digest = hashlib.sha256()
    for name, state in sorted(torch.load(file, weights_only=True).items()):
        for key, value in sorted(state.items()):
            said = value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode()
            digest.update(f"{name} {key}".encode() + said)
    return digest.hexdigest()


def main(work: Path, other: str, tests: Path) -> int:
    sys.path.insert(0, str(SUPPORT))
    from images import make_shards

    work = work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    places = [place_of(python, work) for python in (sys.executable, other)]
    if places[0] == places[1]:
        sys.exit(f"error: both have the same tlx, {places[0]}\n  -> give the interpreter of another version")
    print(f"own    {places[0]}\nother  {places[1]}")
    shards = work / "shards"
    if not shards.exists():
        make_shards(shards, classes=3, per_class={"train": 10, "val": 4}, size=20)
    differ = 0
    for name in SCENARIOS:
        own = train(sys.executable, SUPPORT, work / "own", name, shards)
        theirs = train(other, tests, work / "other", name, shards)
        for what in sorted(own.keys() | theirs.keys()):
            same = own.get(what) == theirs.get(what)
            differ += not same
            print(f"{name:<10} {what:<18} {'same' if same else 'DIFFERS'} {(own.get(what) or '-')[:16]}")
    return int(differ > 0)


if __name__ == "__main__":
    interpreter = Path(sys.argv[2])
    folder = Path(sys.argv[3]) if len(sys.argv) > 3 else interpreter.parents[2] / "tests" / "support"
    folder = folder if folder.exists() else folder.parent  # before it was there
    sys.exit(main(Path(sys.argv[1]), os.path.abspath(interpreter), folder.resolve()))
