"""`tlx probe CONFIG --forecast`: whether fine-tuning will help, and how much to freeze: a short fine-tune of the upper
layers, from stored features of what is below them, against the probe that it begins with."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tlx.base.durations import Duration
from tlx.base.errors import UserError
from tlx.base.terminal import drawn, say, tables, width
from tlx.features.cut import Rest
from tlx.features.stored import StoredFeatures
from tlx.plan.config import Config
from tlx.plan.parts import Part
from tlx.probe.choice import RESAMPLES, Judged, means
from tlx.probe.features import Probed, composed, features_of_head, shown_plainly
from tlx.probe.grid_text import percent
from tlx.probe.regression import CS, Regression, fit
from tlx.train.cached import cut_of, evaluation_features
from tlx.train.run import Run
from tlx.train.step import by_step, prepare_phase, set_rates
from tlx.use.judged import Interval

SHARES = (0.25, 0.5)
"""Of the network's depths, that train in a short fine-tune."""

EPOCHS = 3


@dataclass(frozen=True)
class Tuned:
    """A short fine-tune.

    Attributes:
        depths: that train, of `of`, beside the head; 0 is the probe.
        gain: by how much it is more right than the probe, on the same pictures.
        seconds: it took, features aside.
    """

    depths: int
    of: int
    accuracy: Interval
    gain: Interval
    seconds: float

    def data(self) -> dict[str, Any]:
        return {
            "depths": self.depths,
            "of": self.of,
            "accuracy": self.accuracy.data(),
            "gain": self.gain.data(),
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class Found:
    """The probe, then fine-tunes, less and less frozen."""

    rows: Sequence[Tuned]
    epochs: int
    lr: float
    seed: int
    judged_on: str

    @property
    def verdict(self) -> str:
        """In words."""
        sure = [one for one in self.rows[1:] if one.gain.low > 0]
        if sure:
            best = max(sure, key=lambda one: one.gain.value)
            return f"fine-tuning is likely to help: train the upper {best.depths} of {best.of} depths, or more"
        if all(one.gain.high < 0 for one in self.rows[1:]):
            return "so short a fine-tune at this rate does harm: a lower rate, more epochs, or the head alone"
        return "these pictures do not tell whether fine-tuning will help: the head alone is as good so far"

    def data(self) -> dict[str, Any]:
        return {
            "judged_on": self.judged_on,
            "epochs": self.epochs,
            "lr": self.lr,
            "seed": self.seed,
            "verdict": self.verdict,
            "rows": [one.data() for one in self.rows],
        }


def search(config: Config, *, epochs: int = EPOCHS, resamples: int = RESAMPLES) -> Found:
    """
    Raises:
        UserError: whatever keeps a training from beginning; no validation pictures; a head that is not linear.
    """
    if config.head.name != "linear":
        raise UserError("a forecast begins with a linear probe", where="head", todo="head=linear")
    phase = _last(config)
    with composed(config) as run:
        if run.validation is None:
            raise UserError("a forecast is judged on validation pictures", where="data.val", todo="set data.val")
        own = features_of_head(run, plain=True)
        table, judging = own.training_table(), own.validation_table()
        assert judging is not None
        many = len({layer.depth for layer in run.plan.layers if layer.role != "head"})
        start = fit(table, len(own.classes), CS, config.seed)
        _refuse_other_heads(own)
    logits, spent = [start.logits(judging.rows)], [0.0]
    counts = sorted({max(1, min(round(share * many), many)) for share in SHARES})
    settings = config.settings(phase).model_copy(
        update={"duration": Duration(epochs, "ep"), "start_from": "last", "before": {}, "optimizer_state": "keep"}
    )
    for count in counts:
        say(f"fine-tuning the upper {count} of {many} depths, {epochs} epochs", error=True)
        over = {"unfreeze": Part(name="last_n", args={"n": count}), "phases": {f"last_{count}": settings}}
        with composed(config, **over) as run:
            began, found = _tuned(run, start)
        logits.append(found[judging.pictures].double())
        spent.append(time.monotonic() - began)
    judged = Judged.of(logits, judging.labels)
    gains = means((judged.hits.double() - judged.hits[:1].double()).contiguous(), resamples)
    accuracies = judged.accuracies(resamples)
    rows = [
        Tuned(count, many, accuracy, gain, seconds)
        for count, accuracy, gain, seconds in zip([0, *counts], accuracies, gains, spent, strict=True)
    ]
    return Found(rows, epochs, settings.lr or math.nan, config.seed, f"{len(judging.labels):,} pictures of data.val")


def _last(config: Config) -> str:
    """The phase whose rates fine-tuning has."""
    return [*(name for name in config.phase_names if name != "each"), "each"][-2 if len(config.phase_names) > 1 else 0]


def _refuse_other_heads(own: Probed) -> None:
    head = own.run.net.get_submodule(own.cut.path)
    if not isinstance(_linear(head, own.run), nn.Linear):
        raise UserError("the classifier is no linear layer", where=own.run.config.backbone.name)


def _linear(at: nn.Module, run: Run) -> nn.Module | None:
    """The head's own layer: dropout may come before it."""
    modules = dict(run.net.named_modules())
    inside = [modules[name] for name in run.plan.layers.head.modules]
    return next((one for one in [at, *inside] if isinstance(one, nn.Linear)), None)


def _tuned(run: Run, start: Regression) -> tuple[float, Tensor]:
    """When training began; logits [pictures of validation, classes] after it."""
    phase = run.plan.phases[0]
    cut = cut_of(run, phase)
    assert run.validation is not None
    if cut is None:
        raise UserError("no place was found below which nothing trains", where=run.config.backbone.name)
    head = _linear(run.net, run)
    assert isinstance(head, nn.Linear)
    weight = start.weight / start.scale.deviation
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(start.bias - weight @ start.scale.mean)
    stored = _known(evaluation_features(run, phase, cut, shown_plainly(run)))
    val = _known(evaluation_features(run, phase, cut, run.validation))
    stream, began = run.stream.of(stored), time.monotonic()
    model = prepare_phase(run.net, phase, run.plan, world=run.world, compiled=False, cut=cut)
    for step, micros in by_step(_on_device(stream.batches(phase.start, phase.stop), run)):
        set_rates(run.optimizer, phase, step)
        run.updater.update(model, step, micros)
    rest, rows = Rest(run.net, cut).eval(), val.held_in(torch.device("cpu")).held
    assert rows is not None
    with torch.no_grad(), run.world.autocast():
        parts = torch.split(rows[0].to(cut.dtype), run.validation.batch)
        logits = [rest(part.to(run.world.device)).float().cpu() for part in parts]
    return began, torch.cat(logits)


def _known(found: StoredFeatures | str) -> StoredFeatures:
    if isinstance(found, str):
        raise UserError(found, where="features", todo="cache: {folder: PLACE, limit: 500GB}")
    return found


def _on_device(batches: Iterator[Any], run: Run) -> Iterator[Any]:
    for batch in batches:
        yield batch.to(run.world.device)


def text(found: Found) -> str:
    """A table for people."""
    names = ["head alone (probe)"] + [f"upper {one.depths} of {one.of} depths" for one in found.rows[1:]]
    gains = [""] + [percent(one.gain).replace(" %", "") for one in found.rows[1:]]
    columns = {
        "accuracy, %": [percent(one.accuracy).replace(" %", "") for one in found.rows],
        "gain, points": gains,
        "seconds": [f"{one.seconds:.0f}" for one in found.rows],
    }
    title = f"{found.epochs} epochs at {found.lr:.3g}, plainly shown, judged on {found.judged_on}"
    return "\n".join(
        [
            drawn(*tables(title, {"what trains": names}, columns, width(), more=title)),
            f"{found.verdict}.",
            "Gains: over the probe on the same pictures, 95 % by resampling them; one seed, few epochs, plain crops:",
            "a whole training may gain more, and differs between seeds. A hint, not a measurement of that training.",
        ]
    )
