"""The same sweep for W&B: its YAML, for `wandb sweep`; agents then start `tlx train` for each trial."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from typing import Any

from tlx.base.metrics import Metric
from tlx.base.parsing import from_word, to_yaml
from tlx.sweep.grammar import Dimension, Range
from tlx.sweep.spec import BASE, TRIALS, Spec

FILE = "wandb.yaml"

_METHODS = {"tpe": "bayes", "random": "random", "grid": "grid"}
_ETA = 3


def wandb_yaml(spec: Spec, *, python: str | None = None) -> str:
    """The sweep's configuration (https://docs.wandb.ai/models/sweeps/sweep-config-keys).

    `{trial}` in `run` is the id that the agent gives to a trial. The metric is that of evaluations, once a row: by its
    rows Hyperband counts (Li et al. 2018). What early_terminate has stopped is pruned: saved, exit code 0.

    Args:
        python: the interpreter that agents start; by default the one that runs here.
    """
    run = f"{spec.folder / TRIALS}/{{trial}}"
    command: list[str] = [python or sys.executable, "-m", "tlx", "train", str(spec.folder / BASE), *spec.fixed]
    command += [f"run={run}", "data.test=null"]
    if not any(word.startswith("track.trackers") for word in spec.fixed) and "wandb" not in spec.text:
        command.append("track.trackers=[wandb]")
    raw: dict[str, Any] = {
        "name": spec.name,
        "program": "tlx",
        "method": _METHODS[spec.sampler],
        "metric": {"name": spec.metric, "goal": "maximize" if Metric.of(spec.metric).higher_is_better else "minimize"},
        "run_cap": spec.trials,
        "parameters": {dimension.key: _parameter(dimension) for dimension in spec.space},
        "command": [*command, "${args_no_hyphens}"],
    }
    if spec.pruner != "none" and spec.evaluations > 1:
        raw["early_terminate"] = {"type": "hyperband", "min_iter": max(1, spec.evaluations // _ETA**2), "eta": _ETA}
    head = "# wandb sweep --project NAME FILE prints the `wandb agent` to start, on as many machines as you like\n"
    return head + to_yaml(raw)


def _parameter(dimension: Dimension) -> dict[str, Any]:
    if not isinstance(dimension, Range):
        return {"values": [_value(word) for word in dimension.values]}
    if dimension.unit:  # W&B draws numbers, and a length is none
        places = [dimension.at(i) for i in range(dimension.count)] if dimension.count else list(_spread(dimension))
        return {"values": [dimension.word(value).partition("=")[2] for value in places]}
    low, high = dimension.ends
    if dimension.whole:
        bounds: dict[str, Any] = {"min": int(low), "max": int(high)}
        if dimension.log:
            return {"distribution": "q_log_uniform_values", "q": 1, **bounds}
        if dimension.step not in (None, 1):
            return {"values": [int(dimension.at(i)) for i in range(dimension.count or 0)]}
        return {"distribution": "int_uniform", **bounds}
    if dimension.step is not None:
        return {
            "values": [float(dimension.word(dimension.at(i)).partition("=")[2]) for i in range(dimension.count or 0)]
        }
    return {"distribution": "log_uniform_values" if dimension.log else "uniform", "min": low, "max": high}


def _spread(dimension: Range) -> Iterator[float]:
    """Eleven numbers from end to end."""
    for i in range(11):
        part = i / 10
        if dimension.log:
            yield float(f"{dimension.low * (dimension.high / dimension.low) ** part:.4g}")
        else:
            yield float(f"{dimension.low + part * (dimension.high - dimension.low):.4g}")


def _value(word: str) -> Any:
    """A choice as W&B's agent hands it on, by Python's str(): numbers and truths stay, all else is the word itself."""
    value = from_word(word)
    return value if isinstance(value, bool | int | float) else word


def commands(spec: Spec) -> str:
    """What to do with the file."""
    file = shlex.quote(str(spec.folder / FILE))
    return f"{file}\n  -> wandb sweep --project NAME {file}; then the `wandb agent` that it prints, on each machine"
