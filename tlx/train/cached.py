"""Which phases train from stored features of what is frozen, and the features themselves: computed once, by all ranks.

Nothing else changes: the plan, the order of samples, losses, metrics, evaluations and checkpoints are those of a phase
that computes from pictures.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import nn

from tlx import __version__
from tlx.base.files import plain as plain_json
from tlx.data.pixels.jpeg_region import decoder
from tlx.data.shards.manifest import Manifest
from tlx.data.stream.loader import Work, load
from tlx.data.stream.stream import ShardStream
from tlx.features.cut import Cut, Rest, find_cut
from tlx.features.digest import weights_digest
from tlx.features.store import FeatureStore, Layout, default_folder
from tlx.features.stored import StoredFeatures, ViewOfEpoch, unchanged
from tlx.plan.config import Config
from tlx.plan.feature_cache import why_not
from tlx.plan.plan import Phase
from tlx.train.evaluation import Validation
from tlx.train.filling import Filling, Kept, Part, Shown
from tlx.train.freeze import unfreeze
from tlx.train.run import Run

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class PhaseInput:
    """What a phase's batches hold, and where they enter the network.

    Attributes:
        stream, validation: of pictures, or of features at `cut`.
    """

    stream: ShardStream
    validation: Validation | None
    cut: Cut | None = None

    def network(self, net: nn.Module) -> nn.Module:
        """What takes them."""
        return net if self.cut is None else Rest(net, self.cut)


def input_of(run: Run, phase: Phase) -> PhaseInput:
    """Pictures; or stored features, where the configuration and the phase allow it. The choice stands in the
    checkpoint: a phase that is gone on with keeps it.

    Raises:
        Stopped: on all ranks.
    """
    pictures, begun = PhaseInput(run.stream, run.validation), run.progress.phases[phase.name]
    why = why_not(run.config, phase, run.plan.steps_per_epoch)
    before = begun.get("cache") if run.progress.step > phase.start else None
    if run.progress.step > phase.start and not before:
        why = "it was begun from pictures"
    cut = None
    if why is None:
        cut = cut_of(run, phase)
        if len(set(run.world.gather(str(cut)))) > 1:
            cut, why = None, "ranks have found other cuts"
        elif cut is None:
            why = "there is no place below which nothing trains and nothing is drawn"
        elif run.ema is not None and weights_digest(run.ema.module, cut.state) != weights_digest(run.net, cut.state):
            cut, why = None, "the moving average's frozen layers differ from the network's"
    features = _from_features(run, phase, pictures, cut) if cut is not None else why
    if isinstance(features, PhaseInput):
        if before and before["cut"] != str(cut):
            run.journal.note(f"cache: phase {phase.name} was begun at the {before['cut']}: equal within rounding")
        if run.config.loop.compile:
            run.journal.note(f"cache: phase {phase.name} trains from features and is not compiled")
        begun["cache"] = {"cut": str(cut), "mode": run.config.cache.mode, "views": run.config.cache.kept}
        return features
    begun["cache"] = None
    if run.config.cache.mode in ("exact", "views") or why is None:
        run.journal.note(f"cache: phase {phase.name} computes from pictures: {features}")
    return pictures


def _from_features(run: Run, phase: Phase, pictures: PhaseInput, cut: Cut) -> PhaseInput | str:
    """The phase's input from features, which are computed where they are not there; or why they cannot be."""
    own = training_features(run, phase, cut)
    if isinstance(own, str):
        return own
    found = PhaseInput(run.stream.of(own.held_on(run.world.device)), pictures.validation, cut)
    if pictures.validation is None:
        return found
    of_validation = evaluation_features(run, phase, cut, pictures.validation)
    if isinstance(of_validation, str):
        return of_validation
    batches = functools.partial(pictures.validation.batches, stored=of_validation.held_on(run.world.device))
    return replace(found, validation=replace(pictures.validation, batches=batches, normalise=unchanged))


def training_features(run: Run, phase: Phase, cut: Cut) -> StoredFeatures | str:
    """Of training pictures as training shows them, computed where they are not there; or why they cannot be.

    Raises:
        Stopped: on all ranks.
    """
    manifest, views = run.stream.manifest, run.config.cache.kept
    kept = _kept(run, phase, cut, manifest, views=views, drawn=True)
    shown = functools.partial(_training_views, run, kept[0].store.layout.part)
    why = Filling(run, phase, manifest, kept, shown, "training").done()
    return why or StoredFeatures(kept[0].store, manifest, ViewOfEpoch(views, run.config.seed), cut.dtype)


def evaluation_features(run: Run, phase: Phase, cut: Cut, validation: Validation) -> StoredFeatures | str:
    """Of pictures as evaluations show them, computed where they are not there; or why they cannot be. The network is
    left in evaluation mode: a phase sets its modes afterwards.

    Raises:
        Stopped: on all ranks.
    """
    manifest = validation.manifest
    kept = _kept(run, phase, cut, manifest, views=1, drawn=False)
    run.net.eval()
    shown = functools.partial(_validation_views, validation)
    what = "validation" if run.validation is not None and manifest is run.validation.manifest else "evaluation"
    why = Filling(run, phase, manifest, kept, shown, what).done()
    return why or StoredFeatures(kept[0].store, manifest, ViewOfEpoch(1, 0), cut.dtype)


def cut_of(run: Run, phase: Phase) -> Cut | None:
    """With gradients and modes as the phase has them, in which the network is left."""
    unfreeze(run.net, phase, run.plan)
    height, width, channels = run.stream.loader.pictures.shape
    return find_cut(run.net, (channels, height, width), device=run.world.device, autocast=run.world.autocast)


def _kept(run: Run, phase: Phase, cut: Cut, manifest: Manifest, *, views: int, drawn: bool) -> list[Kept]:
    """This phase's; where these have to be computed, those of later phases after it, which lie below."""
    kept = [Kept(cut, _store(run, cut, manifest, views=views, drawn=drawn))]
    if kept[0].store.whole:
        return kept
    for later in run.plan.phases:
        if later.start <= phase.start or why_not(run.config, later, run.plan.steps_per_epoch) is not None:
            continue
        below = cut_of(run, later)
        if below is not None and str(below) != str(cut) and set(below.state) <= set(cut.state):
            kept.append(Kept(below, _store(run, below, manifest, views=views, drawn=drawn)))
    unfreeze(run.net, phase, run.plan)
    distinct = {one.store.folder: one for one in reversed(kept)}
    return list(reversed(distinct.values()))


def _store(run: Run, cut: Cut, manifest: Manifest, *, views: int, drawn: bool) -> FeatureStore:
    """Where features belong that depend on all of this.

    Args:
        drawn: they are of training's view; else of evaluation's.
    """
    config, layout = run.config, Layout(views, len(manifest), cut.shape, _dtype(run.config, cut), run.validation_batch)
    shown: dict[str, Any] = {"input": run.identity["input"], "upright": config.data.exif_orientation}
    if drawn:
        parts = None if config.transforms is None else [part.model_dump(mode="json") for part in config.transforms]
        shown |= {"transforms": parts, "scaled": config.data.scaled_decoding, "limit": config.data.sampling.limit}
        if run.stream.sampling.without:
            shown["without"] = list(run.stream.sampling.without)
        is_drawn = config.cache.mode == "views" or config.data.sampling.limit is not None
        shown["seed"] = config.seed if is_drawn else None
    depends_on = {
        "format": 1,
        "cut": str(cut),
        "weights": weights_digest(run.net, cut.state),
        "network": [config.backbone.name, plain_json(config.backbone.model_dump(mode="json").get("args"))],
        "pictures": [manifest.digest, manifest.content],
        "shown": shown,
        "decoder": decoder(),
        "computed": [config.loop.precision, config.loop.channels_last, run.world.device.type, layout.part],
        "versions": {name: version(name) for name in ("torch", "torchvision", "timm", "numpy", "pillow")},
        "tlx": __version__,
    }
    return FeatureStore.of(config.cache.folder or default_folder(), plain_json(depends_on), layout)


def _dtype(config: Config, cut: Cut) -> torch.dtype:
    return cut.dtype if config.cache.dtype is None else _DTYPES[config.cache.dtype]


# Pictures of parts


def _training_views(run: Run, part: int, missing: Sequence[Part]) -> Shown:
    stream = run.stream
    loader, samples = stream.loader, len(stream.manifest)
    works = [Work(None, np.arange(n * part, min((n + 1) * part, samples)), view=view) for view, n in missing]
    if loader.among is not None:  # a few of each class: no others are ever shown
        works = [replace(work, ids=work.ids[np.isin(work.ids, loader.among)]) for work in works]
    tasks = (work for work in works if len(work.ids))
    made = load(loader, tasks, largest=part, workers=stream.workers, pin=stream.pin)
    for work in works:
        if not len(work.ids):
            yield (), torch.empty(0), ()
            continue
        loaded, images = next(made)
        yield loaded.ids, images, loaded.bad
        del images


def _validation_views(validation: Validation, missing: Sequence[Part]) -> Shown:
    for batch in validation.batches(numbers=[n for _, n in missing]):
        yield batch.ids.tolist(), batch.images, batch.bad
