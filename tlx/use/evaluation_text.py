"""An evaluation as a table of at most 80 columns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from tlx.base.terminal import escaped

_CLASSES = 30  # rows; of more classes, the worst
_CONFUSIONS = 10
_LINE = 78
_COLUMNS = {"precision": "precision", "recall": "recall", "f1": "F1", "auroc": "AUROC", "average_precision": "AP"}
_TITLES = {
    "loss": "loss (cross-entropy)",
    "precision": "precision, macro",
    "f1": "F1, macro",
    "balanced_accuracy": "balanced accuracy",
    "auroc": "AUROC, one against rest",
    "average_precision": "average precision, macro",
    "ece": "ECE",
    "brier": "Brier score",
    "loss_scaled": "loss, scaled",
    "ece_scaled": "ECE, scaled",
    "brier_scaled": "Brier score, scaled",
}


def table(look: Mapping[str, Any]) -> str:
    return "\n".join(_lines(look))


def _lines(look: Mapping[str, Any]) -> Iterator[str]:
    skipped = f", {len(look['skipped'])} more could not be read" if look["skipped"] else ""
    yield _end(f"{look['samples']:,} pictures{skipped}: ", look["data"])
    step = look["weights"].get("step")
    tta = ", mirrored too" if look["tta"] else ""
    yield _end(f"weights{f' of step {step}' if step is not None else ''}{tta}: ", look["weights"]["file"])
    yield ""
    yield from _metrics(look)
    if "per_class" in look:
        yield from _calibration(look)
        yield from _by_class(look)
        yield from _confusions(look)
    for name, values in look.get("lists", {}).items():
        yield from ("", f"{name}:")
        yield from _listed(look["names"].get(name) or [str(i) for i in range(len(values))], values)
    if "recorded" in look:
        times = "the first look" if look["look"] == 1 else f"look {look['look']}"
        yield from ("", f"{times} at these data, recorded in", _end("  ", look["recorded"]))
    if "report" in look:
        yield _end("report: ", look["report"])


def _metrics(look: Mapping[str, Any]) -> Iterator[str]:
    resamples = look["bootstrap"]["resamples"]
    yield f"{'':<28}{'value':>12}" + (f"   95 % of {resamples:,} resamples" if resamples else "")
    order = [name for name in ("loss", *(n for n in look["metrics"] if n != "loss")) if name in look["metrics"]]
    classified, fewer = "per_class" in look, set[int]()
    for name in order:
        of, title = look["metrics"][name], _TITLES.get(name, name) if classified else name
        between = f"   {_number(of['low'])} to {_number(of['high'])}" if resamples else ""
        if resamples and (drawn := of.get("resamples") or resamples) < resamples:
            fewer.add(drawn)
            between += " *"
        yield f"  {_cut(title, 26):<26}{_number(of['value']):>12}{between}"
    if fewer:
        counts = ", ".join(f"{drawn:,}" for drawn in sorted(fewer))
        yield f"  * of {counts} resamples: with so many pictures and classes these take long"


def _calibration(look: Mapping[str, Any]) -> Iterator[str]:
    scaling = look["temperature"]
    if scaling is None:
        return
    yield ""
    yield f"temperature {_number(scaling['temperature'])}, fitted on {scaling['samples']:,} pictures of"
    yield _end("  ", scaling["data"])
    if scaling["judged"]:
        yield "  These are the pictures judged here: what is scaled is flattered."


def _by_class(look: Mapping[str, Any]) -> Iterator[str]:
    classes, pictures, values = look["classes"], look["pictures"], look["per_class"]
    there = [i for i in range(len(classes)) if pictures[i]]
    shown = sorted(there, key=lambda i: (values["f1"][i], i))[:_CLASSES] if len(there) > _CLASSES else there
    yield ""
    yield _row("class", "pictures", list(_COLUMNS.values()))
    for i in shown:
        yield _row(classes[i], f"{pictures[i]:,}", [_short(values[name][i]) for name in _COLUMNS])
    if len(there) > _CLASSES:
        yield f"  ... the {_CLASSES} of {len(there)} classes with the lowest F1"


def _row(name: str, pictures: str, cells: list[str]) -> str:
    return f"{_cut(name, 24):<24} {pictures:>8}{cells[0]:>10}" + "".join(f"{cell:>9}" for cell in cells[1:])


def _confusions(look: Mapping[str, Any]) -> Iterator[str]:
    if not look["confusions"]:
        return
    yield from ("", "largest confusions")
    for one in look["confusions"][:_CONFUSIONS]:
        share = f"{one['pictures']:,} of {one['of']:,}"
        yield f"  {share:>17}  {_cut(one['true'], 26)} told as {_cut(one['told'], 26)}"


def _listed(names: list[str], values: list[Any]) -> Iterator[str]:
    for name, value in list(zip(names, values, strict=False))[:_CLASSES]:
        yield f"  {_cut(name, 38):<38}{_number(value) if isinstance(value, float) else str(value):>12}"


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"


def _short(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def _end(before: str, path: str) -> str:
    """A line with a path, of which the end tells most."""
    said = escaped(path)
    room = _LINE - len(before)
    return before + (said if len(said) <= room else f"...{said[3 - room :]}")


def _cut(text: object, most: int = _LINE) -> str:
    said = escaped(text)
    return said if len(said) <= most else f"{said[: most - 3]}..."
