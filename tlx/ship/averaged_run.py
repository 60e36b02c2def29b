"""The folder of a run whose weights are an average: all that a reader of runs needs, and nothing to train on."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tlx import __version__
from tlx.base.files import json_text, write_whole
from tlx.base.invocation import command, commit
from tlx.base.parsing import to_yaml
from tlx.data.pixels.jpeg_region import decoder
from tlx.runs.checkpoint import Checkpoints, Snapshot, read_state, weights_of
from tlx.runs.run_files import RunFiles, mapping
from tlx.runs.run_folder import AVERAGED, threads, versions
from tlx.tasks import Task
from tlx.use.description import FILE as MODEL
from tlx.use.description import ModelDescription
from tlx.use.model import Model

_STEP = 0
"""Of its only checkpoint: nothing was trained."""

_START = ("weights", "train_shards", "train_content")


@dataclass(frozen=True)
class AveragedRun:
    """Such a run, while it is written.

    Attributes:
        out: the folder that it will be.
        run, checkpoint: that the configuration and the network's identity are of: the best of those averaged.
        data: that was chosen on, which is its data.val.
        choice: what was averaged, how and why.
    """

    out: Path
    run: Path
    checkpoint: Path
    data: str
    choice: Mapping[str, Any]

    def describe(
        self, best: ModelDescription, others: Sequence[ModelDescription], task: Task, look: Mapping[str, Any]
    ) -> ModelDescription:
        """Of the average: built like the best one, with the metrics of its own evaluation and where it comes from.

        Args:
            others: all that were averaged.
        """
        starts = [{name: one.provenance.get(name) for name in _START} for one in others]
        shared = {name: value for name, value in starts[0].items() if all(one[name] == value for one in starts)}
        provenance = {
            "run": self.out.name,
            **shared,
            "val_shards": look["digest"],
            "tlx": __version__,
            "commit": commit(),
            AVERAGED: self.choice,
        }
        judged = replace(best, provenance=provenance, test={}, temperature=None).judged(row_of(look, task))
        return judged.at(_STEP)

    def write(self, folder: Path, model: Model, wall_time_s: float) -> Path:
        """All but what its evaluation brings.

        Returns:
            The file of weights.
        """
        folder.mkdir()
        state = read_state(self.checkpoint)
        config = {**RunFiles(self.run).config, "run": str(self.out)}
        config["data"] = {**mapping(config.get("data")), "val": self.data}
        write_whole(folder / "config.yaml", to_yaml(config))
        last = {f"val/{name}": value for name, value in model.description.metrics.items()}
        best = self._best(model.description)
        snapshot = Snapshot(
            model=weights_of(model.module),
            optimizer={},
            state={
                "step": _STEP,
                "best": best,
                "progress": {"step": _STEP, "best": best, "leaders": [], "last": {"step": _STEP, **last}, "phases": {}},
                "identity": state["identity"],
                "lists": state.get("lists", {}),
            },
            described={"model": json_text(model.description.data())},
        )
        path = Checkpoints(folder / "checkpoints").save(_STEP, snapshot)
        result = self._result(state, config, best, {"step": _STEP, **last}) | {"wall_time_s": wall_time_s}
        write_whole(folder / "result.json", json_text(result))
        taken = sum(one["taken"] for one in self.choice["ingredients"])
        status = {
            "status": "done",
            "step": _STEP,
            "steps": _STEP,
            "message": f"the average of {taken} models' weights, made by tlx soup",
            "id": secrets.token_hex(4),
            "time": self.choice["time"],
        }
        write_whole(folder / "status.json", json.dumps(status))
        return path / "model.safetensors"

    def _best(self, description: ModelDescription) -> dict[str, Any]:
        name, value = self.choice["metric"], self.choice["value"]
        loss = description.metrics.get("loss")
        return {
            "metric": f"val/{name}",
            "value": value,
            "loss": loss,
            "step": _STEP,
            "phase": AVERAGED,
            "weights": "raw",
        }

    def _result(
        self, state: Mapping[str, Any], config: Mapping[str, Any], best: Mapping[str, Any], last: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Of a training that is done, without steps."""
        return {
            "name": self.out.name,
            "finished": True,
            "step": _STEP,
            "best": best,
            "last": last,
            "test": None,
            "phases": {},
            "classes": state["identity"].get("classes", []),
            "headline": None,
            "lists": state.get("lists", {}),
            "samples_seen": 0,
            **dict.fromkeys(("replaced", "nonfinite", "overflows"), 0),
            "unreadable": {},
            "extended": [],
            "world": 1,
            "threads": threads(),
            "pretrained": mapping(config.get("backbone")).get("weights") != "none",
            "versions": versions(),
            "decoder": decoder(),
            "command": command(self.out),
            "reproduce": None,
            AVERAGED: self.choice,
        }

    def write_model(self, folder: Path, description: ModelDescription, temperature: float | None) -> None:
        write_whole(folder / MODEL, json_text(replace(description, temperature=temperature).data()))


def row_of(look: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """What an evaluation in training would have said: the task's metrics, the number of samples, lists."""
    row: dict[str, Any] = {name: of["value"] for name, of in look["metrics"].items() if name in task.metrics}
    row["samples"] = look["samples"]
    if "per_class" in look:
        recalls = zip(look["per_class"]["recall"], look["pictures"], strict=True)
        return {**row, "per_class": [recall if pictures else None for recall, pictures in recalls]}
    return {**row, **look["lists"]}
