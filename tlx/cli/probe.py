"""`tlx probe`: choose before you train."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tlx.base.errors import UserError
from tlx.base.terminal import hand_over, say
from tlx.cli.words import ConfigFile, Overrides, path

_RANGE = "LOW..HIGH:log/N, :lin/N, or a list such as 1e-4,1e-3"
_OUT = "Where the winner's configuration goes; by default CONFIG-probe.yaml, or the next free number."


def probe(
    config: ConfigFile,
    overrides: Overrides = None,
    lr: Annotated[str | None, typer.Option(metavar="RANGE", help=f"Rates: {_RANGE}.")] = None,
    weight_decay: Annotated[str | None, typer.Option(metavar="RANGE", help="Weight decays, likewise.")] = None,
    heads: Annotated[
        str | None, typer.Option(metavar="LIST", help="linear,cosine,mlp, or '[linear, {name: mlp, hidden: [256]}]'.")
    ] = None,
    c: Annotated[str | None, typer.Option("--c", metavar="RANGE", help="C of the logistic regression beside.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE.yaml", help=_OUT, parser=path)] = None,
    bootstrap: Annotated[int, typer.Option(min=0, help="Resamples for 95 % intervals; 0 for none.")] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, not a table.")] = False,
) -> None:
    """Choose before you train, on features that are computed once.

    Heads: a grid of rates, decays and kinds of heads, all at once.
    """
    from tlx.plan import config as configs

    words = list(overrides or ())
    wanted = configs.load(config, words)
    from tlx.probe import grid, grid_text, winner
    from tlx.probe.regression import CS

    file = winner.place(config, out)
    asked = grid.Wanted(
        heads=_heads(heads),
        lrs=numbers(lr, "--lr"),
        decays=numbers(weight_decay, "--weight-decay", least=0),
        cs=numbers(c, "--c") or CS,
        resamples=bootstrap,
    )
    found = grid.search(wanted, asked)
    about = [
        f"The best of a grid of heads, by tlx probe {config}: {found.winner.name},",
        f"{grid_text.percent(found.winner.accuracy)} on {found.judged_on}, which chose it;",
        f"{grid_text.percent(found.chosen)} where one half chooses and the other judges.",
    ]
    winner.write(file, (config, words), _member(found.winner), about)
    _tell(found, grid_text.text(found, file), as_json=as_json)


def _member(candidate: Any) -> Any:
    assert candidate.member is not None
    return candidate.member


def _tell(found: Any, text: str, *, as_json: bool) -> None:
    from tlx.base.files import json_text

    if as_json:
        hand_over(json_text(found.data()))
    else:
        say(text)


def numbers(text: str | None, option: str, *, least: float | None = None) -> Sequence[float]:
    """Numbers of ``1e-4..1e-1:log/7``, ``0..0.1:lin/3`` or ``1e-4,1e-3``, ascending; none where nothing is said.

    Args:
        least: the smallest that may be; by default above 0.

    Raises:
        UserError: they are no such numbers.
    """
    if text is None:
        return ()
    found = re.fullmatch(r"(?P<low>[^,]+?)\.\.(?P<high>[^,:]+):(?P<scale>log|lin)/(?P<count>[0-9]{1,4})", text.strip())
    values = [float(word) for word in text.split(",") if _is_number(word)] if found is None else []
    if found is not None and _is_number(found["low"]) and _is_number(found["high"]):
        values = _between(float(found["low"]), float(found["high"]), found["scale"], int(found["count"]))
    is_whole = found is not None or len(values) == len(text.split(","))
    if not values or not is_whole or min(values) < (least or 0) or (least is None and min(values) <= 0):
        low = "above 0" if least is None else f"from {least:g} on"
        raise UserError(f'"{text}" are no numbers {low}', where=option, todo=_RANGE)
    return sorted(set(values))


def _is_number(word: str) -> bool:
    try:
        return abs(float(word)) < float("inf")
    except ValueError:
        return False


def _between(low: float, high: float, scale: str, count: int) -> list[float]:
    if count < 1 or high < low or (scale == "log" and low <= 0) or (count == 1 and high != low):
        return []
    parts = [number / max(count - 1, 1) for number in range(count)]
    if scale == "lin":
        return [low + (high - low) * part for part in parts]
    return [float(f"{low * (high / low) ** part:.4g}") for part in parts]


def _heads(text: str | None) -> Sequence[Any]:
    if text is None:
        return ()
    from pydantic import ValidationError

    from tlx.base.parsing import from_word
    from tlx.plan.config import Part

    said = from_word(text) if text.lstrip()[:1] in ("[", "{") else text.split(",")
    try:
        return [Part.model_validate(one.strip() if isinstance(one, str) else one) for one in _listed(said)]
    except ValidationError as error:
        raise UserError(f'"{text}" are no heads', where="--heads", todo="linear,cosine,mlp") from error


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else [value]
