"""`tlx probe`: choose before you train."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tlx.base.errors import UserError
from tlx.base.terminal import hand_over, say
from tlx.cli.words import ConfigFile, Overrides, path

if TYPE_CHECKING:
    from tlx.plan.config import Config
    from tlx.probe.grid import Wanted as GridWanted

_RANGE = "LOW..HIGH:log/N, :lin/N, or a list such as 1e-4,1e-3"
_OUT = (
    "Where the winner's configuration goes, by default CONFIG-probe.yaml or the next free number; of networks a .png."
)
_HEADS = "linear,cosine,mlp, or '[linear, {name: mlp, hidden: [256]}]'."
_BACKBONES = "NAME[=WEIGHTS], 'patterns*', or '[NAME, {name: ..., weights: FILE, args: {...}, input: {...}}]'."


def probe(
    config: ConfigFile,
    overrides: Overrides = None,
    lr: Annotated[str | None, typer.Option(metavar="RANGE", help=f"Rates: {_RANGE}.")] = None,
    weight_decay: Annotated[str | None, typer.Option(metavar="RANGE", help="Weight decays, likewise.")] = None,
    heads: Annotated[str | None, typer.Option(metavar="LIST", help=_HEADS)] = None,
    c: Annotated[str | None, typer.Option("--c", metavar="RANGE", help="C of the logistic regression beside.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help=_OUT, parser=path)] = None,
    backbones: Annotated[str | None, typer.Option(metavar="LIST", help=_BACKBONES)] = None,
    under: Annotated[str | None, typer.Option(metavar="COUNT", help="Backbones of at most so many parameters.")] = None,
    here: Annotated[bool, typer.Option("--here", help="Backbones whose weights are on this machine.")] = False,
    shots: Annotated[str | None, typer.Option(metavar="LIST", help="Few pictures: 1,5,10 of each class.")] = None,
    ways: Annotated[int, typer.Option(min=2, help="With --shots: classes of an episode.")] = 5,
    episodes: Annotated[int, typer.Option(min=2, help="With --shots: how many are drawn.")] = 600,
    queries: Annotated[int, typer.Option(min=1, help="With --shots: of each class, what judges.")] = 15,
    depths: Annotated[
        bool, typer.Option("--depths", help="Where to cut the network: a probe at several depths.")
    ] = False,
    forecast: Annotated[bool, typer.Option("--forecast", help="Whether fine-tuning will help: a short one.")] = False,
    epochs: Annotated[int, typer.Option(min=1, help="With --forecast: of each short fine-tune.")] = 3,
    bootstrap: Annotated[int, typer.Option(min=0, help="Resamples for 95 % intervals; 0 for none.")] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, not a table.")] = False,
) -> None:
    """Choose before you train, on features that are computed once.

    A grid of heads, all trained at once (--lr, --weight-decay, --heads); networks (--backbones, --under, --here); or
    what a few pictures are worth (--shots); where to cut a network (--depths), whether to fine-tune it (--forecast).
    """
    of_grid = {"--lr": lr, "--weight-decay": weight_decay, "--heads": heads, "--c": c}
    of_ranking = {"--backbones": backbones, "--under": under, "--here": here or None}
    others: dict[str, Mapping[str, Any]] = {"few pictures": {"--shots": shots}, "depths": {"--depths": depths or None}}
    others |= {"a forecast": {"--forecast": forecast or None}}
    kind = _kind({"a grid": of_grid, "a ranking": of_ranking, **others})
    from tlx.plan import config as configs

    words = list(overrides or ())
    wanted = configs.load(config, words)
    if kind == "few pictures":
        _tell(*_few(wanted, numbers(shots, "--shots"), ways, episodes, queries), as_json=as_json)
    elif kind == "depths":
        from tlx.probe import depths as places

        at = places.search(wanted, resamples=bootstrap)
        _tell(at, places.text(at), as_json=as_json)
    elif kind == "a forecast":
        from tlx.probe import forecast as short

        tuned = short.search(wanted, epochs=epochs, resamples=bootstrap)
        _tell(tuned, short.text(tuned), as_json=as_json)
    elif kind == "a ranking":
        _tell(*_ranking(wanted, (backbones, under), out, here=here, resamples=bootstrap), as_json=as_json)
    else:
        from tlx.probe import grid
        from tlx.probe.regression import CS

        asked = grid.Wanted(
            heads=_heads(heads),
            lrs=numbers(lr, "--lr"),
            decays=numbers(weight_decay, "--weight-decay", least=0),
            cs=numbers(c, "--c") or CS,
            resamples=bootstrap,
        )
        _tell(*_grid(wanted, asked, (config, words), out), as_json=as_json)


def _kind(options: Mapping[str, Mapping[str, Any]]) -> str:
    """What is asked for; a grid where nothing is."""
    said = {kind: [name for name, value in of.items() if value is not None] for kind, of in options.items()}
    kinds = [kind for kind, names in said.items() if names]
    if len(kinds) > 1:
        both = ", ".join(names[0] for kind, names in said.items() if kind in kinds)
        raise UserError(f"{' and '.join(kinds)} are asked for", where=both, todo="one at a time: features are kept")
    return kinds[0] if kinds else next(iter(options))


def _grid(config: Config, asked: GridWanted, source: tuple[Path, Sequence[str]], out: Path | None) -> tuple[Any, str]:
    from tlx.probe import grid, grid_text, winner

    file = winner.place(source[0], out)
    found = grid.search(config, asked)
    best = found.winner
    assert best.member is not None
    about = [
        f"The best of a grid of heads, by tlx probe {source[0]}: {best.name},",
        f"{grid_text.percent(best.accuracy)} on {found.judged_on}, which chose it;",
        f"{grid_text.percent(found.chosen)} where one half chooses and the other judges.",
    ]
    winner.write(file, source, best.member, about)
    return found, grid_text.text(found, file)


def _few(config: Config, shots: Sequence[float], ways: int, episodes: int, queries: int) -> tuple[Any, str]:
    from tlx.probe import episodes as few

    if any(count != int(count) for count in shots):
        raise UserError("shots are whole numbers", where="--shots", todo="--shots 1,5,10")
    found = few.search(config, few.Wanted([int(count) for count in shots], ways, episodes, queries))
    return found, few.text(found)


def _ranking(
    config: Config, which: tuple[str | None, str | None], out: Path | None, *, here: bool, resamples: int
) -> tuple[Any, str]:
    from tlx.base.files import write_whole
    from tlx.probe import ranking, ranking_text
    from tlx.probe.at_hand import asked

    if out is not None and (out.exists() or out.suffix.lower() != ".png"):
        what = "is there already, and stays as it is" if out.exists() else "is no .png"
        raise UserError(what, where=str(out), todo="--out another.png")
    found = ranking.search(config, asked(*which, here=here), resamples=resamples)
    if out is not None:
        write_whole(out, ranking_text.picture(found))
    return found, ranking_text.text(found) + (f"\n{out}" if out is not None else "")


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
    from tlx.plan.parts import Part

    said = from_word(text) if text.lstrip()[:1] in ("[", "{") else text.split(",")
    try:
        return [Part.model_validate(one.strip() if isinstance(one, str) else one) for one in _listed(said)]
    except ValidationError as error:
        raise UserError(f'"{text}" are no heads', where="--heads", todo="linear,cosine,mlp") from error


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else [value]
