"""The trained networks that `tlx soup` may average: what must be alike in them, and what they are judged by."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tlx.base.differences import differences
from tlx.base.errors import Problems, UserError
from tlx.base.location import place as place_of
from tlx.base.location import shown
from tlx.base.metrics import Metric
from tlx.base.terminal import remark, say
from tlx.data.shards.manifest import Manifest
from tlx.runs.run_files import RunFiles, mapping
from tlx.use.description import ModelDescription
from tlx.use.evaluate import hash_of, run_of
from tlx.use.load import Which, describe, find_weights

_TOLD = 8  # differences
_IN_TRAINING_ALONE = ("drop", "stochastic_depth", "learn_")
"""Arguments of networks and heads with one of these in their names draw or learn in training and are nothing in use."""


@dataclass(frozen=True)
class Ingredient:
    """A trained network that may go into the average.

    Attributes:
        place: as it was named.
        file: of its weights; a link to a run's best is followed once, and that may move on.
        run: that its file lies in; None for a file from elsewhere.
    """

    place: Path
    file: Path
    run: Path | None
    sha256: str
    description: ModelDescription

    @staticmethod
    def of(place: Path, which: Which, weights: str | None) -> Ingredient:
        """
        Raises:
            UserError: there is none, or it does not say what it is.
        """
        file = find_weights(place, which, weights)[0].resolve()
        return Ingredient(place, file, run_of(place), hash_of(file), describe(file))

    @property
    def config(self) -> dict[str, Any]:
        return RunFiles(self.run).config if self.run is not None else {}

    @property
    def is_checkpoint(self) -> bool:
        return self.run is not None and (self.file.parent / "state.json").is_file()

    def weights(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = load_file(self.file)
        return found


def refuse_unlike(ingredients: Sequence[Ingredient]) -> None:
    """
    Raises:
        UserError: fewer than two; the same weights twice; others than the first one's network, outputs or input.
    """
    if len(ingredients) < 2:
        raise UserError("an average is of two networks or more", where="tlx soup", todo="tlx soup RUN RUN ... OUT")
    first, seen, problems = ingredients[0], dict[str, Ingredient](), Problems()
    for one in ingredients:
        if (same := seen.setdefault(one.sha256, one)) is not one:
            problems.add(UserError(f"the same weights as those of {same.place}", where=str(one.place)))
        unlike = differences(_facts(first), _facts(one)) or differences(_shapes(first.file), _shapes(one.file))
        if unlike:
            what = f"it is not built like {first.place}, or means something else:"
            more = [f"... and {len(unlike) - _TOLD} more"] if len(unlike) > _TOLD else []
            problems.add(UserError("\n    ".join([what, *unlike[:_TOLD], *more]), where=str(one.place)))
    problems.refuse()


def _facts(one: Ingredient) -> dict[str, Any]:
    """All that must be the same for a mean of weights to have a meaning. Classes count with their order; how a loss was
    made does not, nor what draws in training alone."""
    said = one.description
    return {
        "network": said.backbone["name"],
        "args": _in_use(said.backbone.get("args") or {}),
        "head": _in_use(said.head),
        "task": {name: value for name, value in said.task.items() if name != "objective"},
        "outputs": list(said.outputs),
        "targets": {
            name: {
                "kind": of.target.kind,
                "classes": list(of.target.classes),
                "mean": list(of.mean),
                "std": list(of.std),
            }
            for name, of in said.targets.items()
        },
        "input": {name: _listed(value) for name, value in dataclasses.asdict(said.input).items()},
        "upright": said.upright,
    }


def _in_use(args: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is nothing to a network that is trained: what draws in training, how a head began."""
    aside = (name for name in args if name in ("init", "keep") or any(word in name for word in _IN_TRAINING_ALONE))
    return {name: args[name] for name in args.keys() - set(aside)}


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _shapes(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        slices = {name.replace(".", "/"): opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        return {name: f"{of.get_dtype()} {of.get_shape()}" for name, of in slices.items()}


def tell_other_starts(ingredients: Sequence[Ingredient]) -> None:
    """Averages are good where all come from one start (Wortsman et al., section 3; Neyshabur et al. 2020): what says
    otherwise is told, and validation decides."""
    starts = {str(one.description.provenance.get("weights")): one.place for one in ingredients}
    if len(starts) > 1:
        said = ", ".join(f"{place}: {start}" for start, place in starts.items())
        say(f"warning: trained from different weights, whose average may be none of anything: {said}", error=True)
    elif "none" in starts:
        say("warning: trained from random weights, each from its own unless the seed is the same", error=True)


def shared_validation(ingredients: Sequence[Ingredient]) -> str:
    """The validation data that all the runs name.

    Raises:
        UserError: none does; they name several.
    """
    named = {one.place: mapping(one.config.get("data")).get("val") for one in ingredients if one.run is not None}
    places = {place: str(place_of(location)) for place, location in named.items() if isinstance(location, str)}
    if not places:
        raise UserError("none of the runs has a data.val", where="tlx soup", todo="--data SHARDS|FOLDER")
    digests = {location: Manifest.open(location).digest for location in dict.fromkeys(places.values())}
    if len(set(digests.values())) > 1:
        said = ", ".join(f"{place}: {shown(location)}" for place, location in places.items())
        raise UserError(f"the runs were judged on different validation data ({said})", todo="--data SHARDS|FOLDER")
    data = next(iter(digests))
    remark(f"data: the runs' own data.val, {shown(data)}")
    return data


def tell_test(ingredients: Sequence[Ingredient], data: str) -> None:
    for one in ingredients:
        test = mapping(one.config.get("data")).get("test")
        if isinstance(test, str) and str(place_of(test)) == data:
            say(f"warning: {shown(data)} is data.test of {one.place}: chosen on it, it is no test any more", error=True)
            return


def shared_metric(ingredients: Sequence[Ingredient], default: str) -> str:
    """What all the runs have chosen their best by, without ``val/``.

    Args:
        default: where they do not say.

    Raises:
        UserError: they have chosen by several.
    """
    configs = [one.config for one in ingredients if one.run is not None]
    named = {str(mapping(config.get("evaluate")).get("metric") or f"val/{default}") for config in configs}
    if len(named) > 1:
        raise UserError(f"the runs have chosen by {' and '.join(sorted(named))}", where="--metric", todo="name one")
    return Metric.of(named.pop()).name.removeprefix("val/")
