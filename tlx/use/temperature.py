"""Temperatures that were fitted for a run's weights: ``RUN/temperature.json``; that of the best also in model.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tlx.base.files import json_text, write_whole
from tlx.runs.run_files import RunFiles, mapping, number, whole, within
from tlx.use.description import FILE as MODEL
from tlx.use.load import find_file

FILE = "temperature.json"


def kept(run: Path, weights: str, tta: str | None) -> dict[str, Any] | None:
    """What was fitted for weights with this hash, asked in this way; None where there is nothing that can be used."""
    return next((of for of in _all(run) if (of["weights"], of["tta"]) == (weights, tta)), None)


def keep(run: Path, found: Mapping[str, Any]) -> None:
    others = [of for of in _all(run) if (of["weights"], of["tta"]) != (found["weights"], found["tta"])]
    write_whole(run / FILE, json_text({"temperatures": [*others, found]}))


def tell_model(run: Path, weights: Path, step: int | None, temperature: float) -> None:
    """Writes it into model.json, where that is of these weights."""
    said = RunFiles(run).read(MODEL)
    if step is None or mapping(said.get("provenance")).get("step") != step or said.get("temperature") == temperature:
        return
    if find_file(run, "best")[0].resolve() == weights.resolve():
        write_whole(run / MODEL, json_text({**said, "temperature": temperature}))


def _all(run: Path) -> list[dict[str, Any]]:
    return [of for of in within(RunFiles(run).read(FILE), "temperatures") if _is_whole(of)]


def _is_whole(of: Mapping[str, Any]) -> bool:
    texts = all(isinstance(of.get(name), str) for name in ("weights", "data", "digest"))
    numbers = number(of.get("temperature")) > 0 and (whole(of.get("samples")) or 0) > 0
    return texts and numbers and of.get("tta", "") in (None, "flip")
