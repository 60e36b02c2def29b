"""What the head of a configuration sees of its pictures: read from the store of trainings, computed where it is not
there."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from tlx.base.errors import UserError
from tlx.base.launcher import environment
from tlx.base.terminal import say
from tlx.data.stream.batch_targets import values_of
from tlx.features.cut import Cut, Rest
from tlx.features.knn import Table
from tlx.features.stored import StoredFeatures
from tlx.plan.config import Config
from tlx.plan.data_config import FeatureCacheConfig
from tlx.plan.feature_cache import is_deterministic
from tlx.plan.parts import Part
from tlx.plan.plan import Phase
from tlx.ranks.rendezvous import join_ranks
from tlx.runs.run_folder import RunFolder
from tlx.tasks.classification import Classification
from tlx.train import command as training
from tlx.train.cached import cut_of, evaluation_features, training_features
from tlx.train.evaluation import Validation
from tlx.train.run import Run

_AT_ONCE = 256  # pictures through what follows a cut
_SHARE = 4  # of free memory, that features may take


@dataclass(frozen=True)
class Probed:
    """A network, its pictures and their features.

    Attributes:
        run: composed, never begun.
        phase: that trains the head alone.
        train, val: features [samples, width] at the head's input.
        shown: how the training pictures were shown, in words.
    """

    run: Run
    phase: Phase
    cut: Cut
    train: StoredFeatures
    val: StoredFeatures | None
    shown: str

    @property
    def task(self) -> Classification:
        assert isinstance(self.run.task, Classification)
        return self.run.task

    @property
    def classes(self) -> tuple[str, ...]:
        return self.task.classes

    @property
    def width(self) -> int:
        """Of the features at the head's input."""
        return self.train.held.shape[-1] if self.train.held is not None else self.train.store.layout.shape[0]

    def training_table(self) -> Table:
        """All views of the pictures that an epoch may show."""
        return _table(self.train, self.task.target.name, self.run.stream.loader.among)

    def validation_table(self) -> Table | None:
        return None if self.val is None else _table(self.val, self.task.target.name)


@contextmanager
def probed(config: Config, *, plain: bool) -> Iterator[Probed]:
    """The features of a configuration.

    Args:
        plain: of training pictures as evaluations show them; else as training would, where it would keep that: views
            (``cache: {views: 4}``), or transforms that always show the same.

    Raises:
        UserError: as :func:`composed`; see :func:`features_of_head`.
    """
    with composed(config) as run:
        yield features_of_head(run, plain=plain)


@contextmanager
def composed(config: Config, **over: Any) -> Iterator[Run]:
    """A training of the head alone as this configuration has it, composed and not begun: nothing is written into its
    folder.

    Args:
        over: keys of the configuration that are to be others.

    Raises:
        UserError: whatever keeps a training from beginning; another task than one class; several processes.
    """
    if environment().size > 1:
        raise UserError("tlx probe is one process", todo="start it without a launcher")
    with tempfile.TemporaryDirectory(prefix="tlx-probe-") as folder:
        own = alone(config, Path(folder) / "run").model_copy(update=over)
        run = training.compose(own, join_ranks(own), RunFolder(own.run), silent=True)
        run.stop.close()
        run.journal.console.note = _told  # type: ignore[method-assign]
        try:
            if not isinstance(run.task, Classification) or len(run.task.heads) != 1:
                what = "a probe is of one class for each picture"
                raise UserError(
                    what, where=f"task {config.task.name}", todo="task: {name: classification, target: ...}"
                )
            yield run
        finally:
            run.saver.close()
            run.journal.finish({})


def _told(text: str) -> None:
    """Only what takes long, or changes something."""
    if "computing" in text or not text.startswith("cache: "):
        say(text, error=True)


def alone(config: Config, folder: Path) -> Config:
    """The same with the head alone, which trains as it would in the first phase."""
    first = next((name for name in config.phase_names if name != "each"), "each")
    changes = {
        "run": folder,
        "unfreeze": Part(name="head_only"),
        "phases": {
            "feature_extraction": config.settings(first).model_copy(update={"start_from": "last", "before": {}})
        },
        "further": {},
        "mix": None,
        "head": Part(name=config.head.name, args=config.head_args),
        "cache": _kept(config),
        "loop": config.loop.model_copy(update={"ema": None, "compile": False, "fit_micro_batch": "never"}),
        "track": config.track.model_copy(update={"trackers": []}),
        "data": config.data.model_copy(update={"verify": "lengths", "test": None}),
        "evaluate": config.evaluate.model_copy(update={"patience": None}),
        "world": config.world.model_copy(update={"size": None}),
    }
    return config.model_copy(update=changes)


def _kept(config: Config) -> FeatureCacheConfig:
    """Whatever is asked for is kept: nothing here is worth its while only for a training."""
    return config.cache if config.cache.mode == "views" else config.cache.model_copy(update={"mode": "exact"})


def features_of_head(run: Run, *, plain: bool) -> Probed:
    """
    Raises:
        UserError: the network has no place where its features could be kept, or they cannot be.
    """
    phase = run.plan.phases[0]
    cut = cut_of(run, phase)
    if cut is None:
        what = "no place was found below which nothing trains and nothing is drawn"
        raise UserError(what, where=run.config.backbone.name)
    is_drawn = run.config.cache.mode != "views" and not is_deterministic(run.config)
    if plain or is_drawn:
        found = evaluation_features(run, phase, cut, shown_plainly(run))
    else:
        found = training_features(run, phase, cut)
    views = run.config.cache.kept
    shown = (
        "as evaluations show them" if plain or is_drawn else f"{views} view{'s' if views > 1 else ''} as in training"
    )
    train = _entered(run, cut, _known(found))
    val = None
    if run.validation is not None:
        val = _entered(run, cut, _known(evaluation_features(run, phase, cut, run.validation)))
    return Probed(run, phase, cut, train, val, shown)


def shown_plainly(run: Run) -> Validation:
    """What an evaluation of the training pictures takes."""
    data = run.config.data.model_copy(update={"val": run.config.data.train})
    config = run.config.model_copy(update={"data": data})
    found = training.validation_of(config, run.stream.manifest, run.description.input, run.updater)
    assert found is not None
    return found


def _known(found: StoredFeatures | str) -> StoredFeatures:
    if isinstance(found, str):
        raise UserError(found, where="features", todo="cache: {folder: PLACE, limit: 500GB}")
    return found


def _entered(run: Run, cut: Cut, stored: StoredFeatures) -> StoredFeatures:
    """In memory where there is room, as the head's own input [views, samples, width]."""
    fits = stored.store.layout.bytes < psutil.virtual_memory().available / _SHARE
    if len(cut.shape) == 1:
        return stored.held_in(torch.device("cpu")) if fits and not stored.store.bad else stored
    if not fits or stored.store.bad:
        what = f"features at the {cut} have to be in memory, all of them readable"
        raise UserError(what, where=run.config.backbone.name, todo="fewer pictures (data.sampling.limit)")
    layout = stored.store.layout
    rows = [_through(run, cut, stored.store.tensor(np.array(stored.store.rows(v)))) for v in range(layout.views)]
    return replace(stored, held=torch.stack(rows), dtype=torch.float32)


@torch.no_grad()
def _through(run: Run, cut: Cut, features: Tensor) -> Tensor:
    """What reaches the head of features [n, ...]: [n, width]."""
    rest, device, seen = Rest(run.net, cut), run.world.device, list[Tensor]()
    modules = dict(run.net.named_modules())
    first: list[nn.Module] = [modules[name] for name in run.plan.layers.head.modules]
    rest.eval()

    def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if len(seen) == done:
            seen.append(args[0].flatten(1).float().cpu())

    hooks = [module.register_forward_pre_hook(keep) for module in first]
    try:
        for done, part in enumerate(torch.split(features, _AT_ONCE)):  # noqa: B007  # of keep
            rest(part.to(device, cut.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(seen)


def _table(stored: StoredFeatures, target: str, among: np.ndarray | None = None) -> Table:  # type: ignore[type-arg]
    manifest, store = stored.manifest, stored.store
    labels = torch.from_numpy(values_of(manifest, [target], np.arange(len(manifest)))[target].astype(np.int64))
    known = labels >= 0
    if among is not None:
        known &= torch.from_numpy(np.isin(np.arange(len(manifest)), among))
    rows, places = list[Tensor](), list[Tensor]()
    for view in range(store.layout.views):
        read = torch.tensor([(view, place) not in store.bad for place in range(len(manifest))])
        own = (known & read).nonzero()[:, 0]
        of_view = stored.held[view][own] if stored.held is not None else store.tensor(store.rows(view)[own.numpy()])
        rows.append(of_view.float())
        places.append(own)
    pictures = torch.cat(places)
    return Table(torch.cat(rows), labels[pictures], pictures)
