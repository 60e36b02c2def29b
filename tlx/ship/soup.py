"""`tlx soup`: the average of several models' weights (Wortsman et al. 2022, arXiv:2203.05482), chosen on validation.

``uniform`` averages all of them. ``greedy`` is the paper's recipe 1: in the order of each one's metric, the best first,
one is taken in where the metric of the average with it is not worse than without; so the result is not worse than the
best of them on these data. ``wise-ft`` (Wortsman et al. 2022, arXiv:2109.01903) goes from a zero-shot network to the
one that was fine-tuned from it, and stays where the metric is best: (1 - alpha) of the one and alpha of the other, the
paper's 0.5 of equals. Every network is judged as `tlx evaluate` judges it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tlx.base.errors import UserError, did_you_mean
from tlx.base.inputs import TRAINING_VIEW
from tlx.base.location import place as place_of
from tlx.base.metrics import Metric
from tlx.base.terminal import remark, say
from tlx.data.pixels.transforms import View, train_transform
from tlx.data.shards.manifest import Manifest
from tlx.ranks.collectives import World
from tlx.ranks.sharing import join_sharing
from tlx.runs.run_files import mapping
from tlx.ship.average import WeightAverage, estimate_statistics, interpolated
from tlx.ship.averaged_run import AveragedRun
from tlx.ship.ingredients import (
    Ingredient,
    refuse_unlike,
    shared_metric,
    shared_validation,
    tell_other_starts,
    tell_test,
)
from tlx.ship.placed import placed, refuse_place
from tlx.use.description import ModelDescription
from tlx.use.evaluate import Look, hash_of
from tlx.use.evaluate import Options as Judging
from tlx.use.judged import LOWER
from tlx.use.judged_data import Reading
from tlx.use.load import Which, load, task_of
from tlx.use.model import Model

Method = Literal["greedy", "uniform", "wise-ft"]

ALPHAS = tuple(n / 10 for n in range(11))
"""Tried by ``wise-ft``."""

_PICTURES = 2048  # training pictures that statistics of norms are estimated on, at most: they are in memory


@dataclass(frozen=True)
class Options:
    """What is asked for.

    Attributes:
        data: shards or a folder to choose on; None: the validation data that all runs name.
        metric: to choose by; None: what all the runs have chosen their best by.
        weights: those of a checkpoint, in place of those that were the best.
        bootstrap: resamples for the result's interval; 0 for none.
        alpha: of ``wise-ft``; None: the best of :data:`ALPHAS`.
    """

    method: Method = "greedy"
    data: str | None = None
    metric: str | None = None
    weights: Literal["raw", "ema"] | None = None
    bootstrap: int = 1000
    reading: Reading = field(default_factory=Reading)
    alpha: float | None = None


@dataclass
class Judged:
    """An ingredient, judged.

    Attributes:
        value: of the metric, alone; `look`: the whole evaluation.
        together: of the average of those taken before and this one; None where it was not asked, or is it alone.
    """

    of: Ingredient
    value: float
    look: Mapping[str, Any]
    together: float | None = None
    taken: bool = False

    def data(self) -> dict[str, Any]:
        step = self.of.description.provenance.get("step")
        about = {"name": str(self.of.place), "file": str(self.of.file), "sha256": self.of.sha256, "step": step}
        return {**about, "value": self.value, "together": self.together, "taken": self.taken}


def soup(
    places: Sequence[Path],
    out: Path,
    options: Options,
    *,
    which: Which = "best",
    device: str | None = None,
    trusted: bool = False,
) -> dict[str, Any]:
    """Averages trained networks into the folder of a run. One process does it.

    Returns:
        What was judged and taken.

    Raises:
        UserError: fewer than two networks, the same one twice, networks that are not built alike or not for the same
            outputs, several validation data, a metric that is not there; something lies at `out`.
    """
    refuse_place(out)
    ingredients = [Ingredient.of(place, which, options.weights) for place in places]
    refuse_unlike(ingredients)
    _refuse_alpha(options, len(ingredients))
    base = next((one for one in ingredients if one.is_checkpoint), None)
    if base is None:
        what = "none of these files lies in a run, whose configuration the result would have"
        raise UserError(what, where=str(places[0]), todo="name at least one run by its folder")
    tell_other_starts(ingredients)
    world = join_sharing()
    try:
        if world.size > 1:
            raise UserError("one process averages and judges", where="tlx soup", todo="start it without a launcher")
        data = str(place_of(options.data)) if options.data is not None else shared_validation(ingredients)
        model = load(base.file, device=device or str(world.device), trusted=trusted)
        model = replace(model, task=task_of(model.description))  # what is chosen on validation is chosen anew
        metric = options.metric or shared_metric(ingredients, model.task.metric)
        tell_test(ingredients, data)
        making = Making(ingredients, model, base, data, metric, options, world)
        with placed(out) as work:
            return making.made(work / out.name, out)
    finally:
        world.close()


def _refuse_alpha(options: Options, count: int) -> None:
    """
    Raises:
        UserError: an alpha that is no share, or of another method; not two networks.
    """
    if options.method != "wise-ft":
        if options.alpha is not None:
            raise UserError("alpha is of --method wise-ft", where="--alpha", todo="leave it out")
        return
    if count != 2:
        what = f"wise-ft goes from one network to another, and these are {count}"
        raise UserError(what, where="--method wise-ft", todo="tlx soup --method wise-ft ZERO_SHOT FINE_TUNED OUT")
    if options.alpha is not None and not 0 <= options.alpha <= 1:
        raise UserError(f"{options.alpha:g} is no share of the fine-tuned network", where="--alpha", todo="0 to 1")


@dataclass(frozen=True)
class Making:
    """One soup.

    Attributes:
        model: whose network takes one set of weights after the other.
        base: whose training shards statistics of norms are estimated on, and whose configuration is taken where the
            best is a file from elsewhere.
        data: that is chosen on.
    """

    ingredients: Sequence[Ingredient]
    model: Model
    base: Ingredient
    data: str
    metric: str
    options: Options
    world: World

    def made(self, folder: Path, out: Path) -> dict[str, Any]:
        """The run, in a folder that will be called `out`."""
        began = time.monotonic()
        judged = self._judged()
        methods = {"greedy": self._greedy, "uniform": self._uniform, "wise-ft": self._between}
        tried: list[dict[str, float]] = []
        average, look = methods[self.options.method](judged, tried)
        choice = self._choice(judged, look, self._put(average)) | ({"alphas": tried} if tried else {})
        del average
        taken = [one.of for one in judged if one.taken]
        best = next((one for one in taken if one.is_checkpoint), self.base)
        assert best.run is not None
        run = AveragedRun(out, best.run, best.file.parent, self.data, choice)
        description = run.describe(best.description, [one.description for one in taken], self.model.task, look)
        file = run.write(folder, replace(self.model, description=description), time.monotonic() - began)
        return {"out": str(out), **choice, **self._last_look(run, folder, file)}

    # Judging

    def _judged(self) -> list[Judged]:
        """Each alone, the best first; of equals, the one that was named first."""
        judged = []
        for one in self.ingredients:
            self.model.module.load_state_dict(one.weights())
            try:
                look = self._look(one.description)
            except UserError as error:
                raise UserError(f"{one.place}: {error.what}", where=error.where, todo=error.todo) from error
            judged.append(Judged(one, self._value(look), look))
            remark(f"{one.place}: {self.metric} {judged[-1].value:.4f}")
        return sorted(judged, key=lambda one: -one.value if self._higher else one.value)

    def _look(self, description: ModelDescription) -> Mapping[str, Any]:
        """At the network as it is now, as `tlx evaluate` judges; recorded nowhere."""
        judging = Judging(self.data, None, 0, self.options.reading)
        look = Look(replace(self.model, description=description), self.base.file, "", None, judging, self.world)
        return look.taken(look.opened())

    def _value(self, look: Mapping[str, Any]) -> float:
        """
        Raises:
            UserError: there is no such metric, or it has no value.
        """
        metrics = look["metrics"]
        if self.metric not in metrics:
            what = f'"{self.metric}" is no metric of this task{did_you_mean(self.metric, metrics)}'
            raise UserError(what, where="--metric")
        value = float(metrics[self.metric]["value"])
        if not math.isfinite(value):
            raise UserError(
                f"{self.metric} has no value on these pictures", where=look["data"], todo="--metric, --data"
            )
        return value

    @cached_property
    def _higher(self) -> bool:
        """Whether a higher value is better; of what the task does not know, such as ECE, `tlx evaluate` does."""
        known: bool | None = self.model.task.metrics.get(self.metric)
        return self.metric not in LOWER and Metric(self.metric).higher_is_better if known is None else known

    # Averaging

    def _greedy(
        self, judged: Sequence[Judged], _tried: list[dict[str, float]]
    ) -> tuple[WeightAverage, Mapping[str, Any]]:
        first, *others = judged
        average, look, first.taken = WeightAverage(), first.look, True
        average.take(first.of.weights())
        for one in others:
            weights = one.of.weights()
            self._put(average, weights)
            new = self._look(first.of.description)
            before, one.together = self._value(look), self._value(new)
            one.taken = one.together >= before if self._higher else one.together <= before
            verb = "taken" if one.taken else "left out"
            remark(f"with {one.of.place}: {self.metric} {one.together:.4f}, {verb}")
            if one.taken:
                average.take(weights)
                look = new
        return average, look

    def _between(
        self, judged: Sequence[Judged], tried: list[dict[str, float]]
    ) -> tuple[WeightAverage, Mapping[str, Any]]:
        """WiSE-FT; `tried` gets each alpha and its value, the chosen one first."""
        first, second = (next(one for one in judged if one.of is of) for of in self.ingredients)
        ends = first.of.weights(), second.of.weights()
        looks: dict[float, Mapping[str, Any]] = {}
        for alpha in ALPHAS if self.options.alpha is None else (self.options.alpha,):
            self._put(interpolated(*ends, alpha))
            looks[alpha] = self._look(judged[0].of.description)
            remark(f"alpha {alpha:g}: {self.metric} {self._value(looks[alpha]):.4f}")
        sign = 1.0 if self._higher else -1.0
        alpha = max(looks, key=lambda one: (sign * self._value(looks[one]), -abs(one - 0.5)))
        first.taken, second.taken = alpha < 1, alpha > 0
        tried += [
            {"alpha": one, "value": self._value(looks[one])} for one in sorted(looks, key=lambda a: (a != alpha, a))
        ]
        return interpolated(*ends, alpha), looks[alpha]

    def _uniform(
        self, judged: Sequence[Judged], _tried: list[dict[str, float]]
    ) -> tuple[WeightAverage, Mapping[str, Any]]:
        average = WeightAverage()
        for one in judged:
            average.take(one.of.weights())
            one.taken = True
        self._put(average)
        return average, self._look(judged[0].of.description)

    def _put(self, average: WeightAverage, further: Mapping[str, Tensor] | None = None) -> dict[str, int]:
        """Gives the network an average; how many of its norms have statistics that differ between the networks, and on
        how many pictures these were estimated anew."""
        norms = average.write_to(self.model.module, further)
        pixels = self._pixels if norms else None
        pictures = 0 if pixels is None else estimate_statistics(self.model, norms, pixels)
        return {"norms": len(norms), "pictures": pictures}

    @cached_property
    def _pixels(self) -> Tensor | None:
        """Training pictures as training shows them, but for mixing; None where they are not there."""
        named = mapping(self.base.config.get("data")).get("train")
        try:
            if not isinstance(named, str):
                raise UserError("the run names no training data")
            source = Manifest.open(str(place_of(named)))
            places = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[:_PICTURES]
            view, workers = _training_view(self.base, self.model), self.options.reading.workers
            pixels = self.model.forward.pixels(source, places.sort().values, workers=workers, view=view)[1]
            if len(pixels) < 2:
                raise UserError("there are no pictures to estimate them on", where=source.location)
        except UserError as error:
            what = "statistics of norms (BatchNorm) are the mean of the runs', which are not those of the average"
            say(f"note: {what}: {error}", error=True)
            return None
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
        return pixels[order]

    # What is kept

    def _choice(
        self, judged: Sequence[Judged], look: Mapping[str, Any], statistics: Mapping[str, int]
    ) -> dict[str, Any]:
        """What was averaged, and on what the choice was made, so that nobody takes these data for a test."""
        return {
            "method": self.options.method,
            "metric": self.metric,
            "higher_is_better": self._higher,
            "value": self._value(look),
            "chosen_on": {name: look[name] for name in ("data", "digest", "samples")},
            "time": look["time"],
            "command": look["command"],
            "statistics": dict(statistics),
            "ingredients": [one.data() for one in judged],
        }

    def _last_look(self, run: AveragedRun, folder: Path, file: Path) -> dict[str, Any]:
        """At what lies on the disk, with intervals and a temperature, recorded in the run."""
        model = load(file, device=str(self.model.device), trusted=True)
        named, sha256 = run.out / "checkpoints" / "best" / file.name, hash_of(file)
        judging = Judging(self.data, None, self.options.bootstrap, self.options.reading)
        last = Look(model, named, sha256, folder, judging, self.world)
        look = last.taken(last.opened())
        run.write_model(folder, model.description, mapping(look.get("temperature")).get("temperature"))
        return {"weights": {"file": str(named), "sha256": sha256}, "soup": look["metrics"][self.metric]}


def _training_view(base: Ingredient, model: Model) -> View:
    said = base.config.get("transforms")
    parts = [
        {"name": part} if isinstance(part, str) else dict(part) for part in (TRAINING_VIEW if said is None else said)
    ]
    return train_transform([(part.pop("name"), part) for part in parts], model.description.input)
