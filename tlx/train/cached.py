"""Which phases train from stored features of what is frozen, and the features themselves: computed once, by all ranks.

Nothing else changes: the plan, the order of samples, losses, metrics, evaluations and checkpoints are those of a phase
that computes from pictures.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tlx import __version__
from tlx.base.errors import UserError
from tlx.base.files import plain as plain_json
from tlx.data.pixels.jpeg_region import decoder
from tlx.data.shards.manifest import Manifest
from tlx.data.stream.batch_targets import values_of
from tlx.data.stream.loader import Work, load
from tlx.data.stream.reader import BadSample
from tlx.data.stream.stream import ShardStream
from tlx.features.cut import Cut, Rest, features_of, find_cut
from tlx.features.solve import solved_head
from tlx.features.store import FeatureStore, Layout, default_folder
from tlx.features.stored import StoredFeatures, ViewOfEpoch, unchanged
from tlx.plan.config import Config
from tlx.plan.feature_cache import why_not
from tlx.plan.plan import Phase
from tlx.ranks.together import by_main
from tlx.tasks.classification import Classification
from tlx.train.evaluation import Validation
from tlx.train.freeze import unfreeze
from tlx.train.run import Run

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_SAY_S = 10.0

Part = tuple[int, int]
"""A view and the number of a part."""
Shown = Iterator[tuple[Sequence[int], Tensor, Sequence[BadSample]]]
"""Of each part: the pictures that could be read, by place, their pixels, and those that could not."""


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


class Stopped(Exception):
    """A stop was asked for while features were computed."""


def input_of(run: Run, phase: Phase) -> PhaseInput:
    """Pictures; or stored features, where the configuration and the phase allow it. The choice stands in the
    checkpoint: a phase that is gone on with keeps it.

    Raises:
        Stopped: on all ranks.
    """
    pictures, begun = PhaseInput(run.stream, run.validation), run.progress.phases[phase.name]
    why = why_not(run.config, phase, run.plan.steps_per_epoch)
    if run.progress.step > phase.start and not begun.get("cache"):
        why = "it was begun from pictures"
    cut = None
    if why is None:
        unfreeze(run.net, phase, run.plan)
        height, width, channels = run.stream.loader.pictures.shape
        image = (channels, height, width)
        cut = find_cut(run.net, image, device=run.world.device, autocast=run.world.autocast)
        if len(set(run.world.gather(str(cut)))) > 1:
            cut, why = None, "ranks have found other cuts"
        elif cut is None:
            why = "there is no place below which nothing trains and nothing is drawn"
        elif run.ema is not None and _weights_digest(run.ema.module, cut.state) != _weights_digest(run.net, cut.state):
            cut, why = None, "the moving average's frozen layers differ from the network's"
    features = _from_features(run, phase, pictures, cut) if cut is not None else why
    if isinstance(features, PhaseInput):
        begun["cache"] = {"cut": str(cut), "mode": run.config.cache.mode, "views": run.config.cache.kept}
        return features
    begun["cache"] = None
    if run.config.cache.mode in ("exact", "views") or why is None:
        run.journal.note(f"cache: phase {phase.name} computes from pictures: {features}")
    return pictures


def _from_features(run: Run, phase: Phase, pictures: PhaseInput, cut: Cut) -> PhaseInput | str:
    """The phase's input from features, which are computed where they are not there; or why they cannot be."""
    wanted, stream, validation = run.config.cache, run.stream, run.validation
    store = _store(run, cut, stream.manifest, views=wanted.kept, drawn=True)
    why = _filled(run, phase, cut, store, functools.partial(_training_views, run, store.layout.part), "training")
    if why is not None:
        return why
    own = StoredFeatures(store, stream.manifest, ViewOfEpoch(wanted.kept, run.config.seed), cut.dtype)
    found = PhaseInput(stream.of(own), validation, cut)
    if validation is None:
        return found
    kept = _store(run, cut, validation.manifest, views=1, drawn=False)
    run.net.eval()  # as evaluations have it; a phase sets its modes afterwards
    why = _filled(run, phase, cut, kept, functools.partial(_validation_views, validation), "validation")
    if why is not None:
        return why
    of_validation = StoredFeatures(kept, validation.manifest, ViewOfEpoch(1, 0), cut.dtype)
    batches = functools.partial(validation.batches, stored=of_validation)
    return replace(found, validation=replace(validation, batches=batches, normalise=unchanged))


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
        is_drawn = config.cache.mode == "views" or config.data.sampling.limit is not None
        shown["seed"] = config.seed if is_drawn else None
    depends_on = {
        "format": 1,
        "cut": str(cut),
        "weights": _weights_digest(run.net, cut.state),
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


def _weights_digest(net: nn.Module, names: Sequence[str]) -> str:
    """Of the tensors that features depend on."""
    found, tensors = hashlib.sha256(), {**dict(net.named_parameters()), **dict(net.named_buffers())}
    for name in names:
        tensor = tensors.get(name)
        if tensor is None:  # a second name of one that counts already
            continue
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def solve_head(run: Run, source: PhaseInput) -> None:
    """The head's weights become those that fit the features of training pictures best, on all ranks, in the moving
    average too.

    Raises:
        UserError: there are no features at its input, or it is no linear layer for one classification.
    """
    task, cut, stream = run.task, source.cut, run.stream
    head = None if cut is None or cut.side != "input" else run.net.get_submodule(cut.path)
    is_linear = isinstance(head, nn.Linear) and isinstance(task, Classification) and len(task.heads) == 1
    if cut is None or not is_linear:
        what = "a head is solved from features at its input"
        what = what if cut is None else f"only a linear head of one class, and features are those of the {cut}"
        todo = "cache: {views: 4} (or exact, with transforms: []), head: linear, a first phase that trains the head"
        raise UserError(f"{what}; there is none here", where="head.init: solved", todo=todo)
    assert isinstance(head, nn.Linear)
    assert isinstance(task, Classification)

    def solve() -> None:
        features, labels, pictures = _all_features(source, task.target.name)
        began = time.monotonic()
        weight, bias, penalty = solved_head(features, labels, len(task.classes), pictures)
        with torch.no_grad():
            head.weight.copy_(weight)
            if head.bias is not None:
                head.bias.copy_(bias)
        took = time.monotonic() - began
        count = f"{len(features):,} views of {len(stream.manifest):,} pictures"
        run.journal.note(f"head: logistic regression on {count}, penalty {penalty:g}, {took:.1f} s")

    by_main(run.world, solve, faults=True)
    run.world.broadcast(list(head.parameters()))
    if run.ema is not None:
        run.ema.module.load_state_dict(run.net.state_dict())


def _all_features(source: PhaseInput, target: str) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 [n, width] of all views of pictures that have a class and can be read; their classes, their places."""
    stored = source.stream.stored
    assert isinstance(stored, StoredFeatures)
    store, manifest = stored.store, stored.manifest
    labels = torch.from_numpy(values_of(manifest, [target], np.arange(len(manifest)))[target].astype(np.int64))
    few = source.stream.loader.among
    if few is not None:
        labels[np.isin(np.arange(len(manifest)), few, invert=True)] = -1
    rows, classes, places = list[Tensor](), list[Tensor](), list[Tensor]()
    for view in range(store.layout.views):
        read = torch.tensor([(view, place) not in store.bad for place in range(len(manifest))])
        own = ((labels >= 0) & read).nonzero()[:, 0]
        rows.append(store.tensor(store.rows(view)[own.numpy()]).float())
        classes.append(labels[own])
        places.append(own)
    return torch.cat(rows), torch.cat(classes), torch.cat(places)


# Computing them


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


def _filled(
    run: Run, phase: Phase, cut: Cut, store: FeatureStore, shown: Callable[[Sequence[Part]], Shown], what: str
) -> str | None:
    """Computes what is missing, each rank its part; why it came to nothing, where it did: the same on every rank.

    Raises:
        Stopped: a stop was asked for.
    """
    world, layout = run.world, store.layout
    why: str | None = None
    try:
        if world.main:
            _refuse_large(run, store)
            store.make({"phase": phase.name, "cut": str(cut), "run": str(run.folder)}, run.config.cache.limit)
    except (UserError, OSError) as error:
        why = str(error)
    why = world.from_main(why)
    if why is not None:
        return why
    why = _checked(run, cut, store, shown) if world.main else None
    missing = world.from_main(store.missing(anew=True) if world.main else None)
    if why is not None:
        run.journal.note(why)
    size = f"{layout.bytes / 1e6:,.1f} MB in {store.folder}"
    about = f"{what} features of phase {phase.name}, {cut}, {layout.views} x {layout.samples:,}: {size}"
    if not missing:
        run.journal.note(f"cache: {about}, found")
        return _opened(run, store)
    run.journal.note(f"cache: computing {about}")
    began, stopped = time.monotonic(), False
    own = missing[world.rank * len(missing) // world.size : (world.rank + 1) * len(missing) // world.size]
    try:
        stopped = not _compute(run, cut, store, own, shown(own))
    except NotKept as error:
        why = str(error)
    ends: list[tuple[str | None, bool]] = world.gather((why, stopped))
    if any(stop for _, stop in ends):
        raise Stopped
    failed = [text for text, _ in ends if text is not None]
    if failed:
        return failed[0]
    why = _opened(run, store)
    if why is None:
        run.journal.note(f"cache: computed in {time.monotonic() - began:.1f} s")
    return why


class NotKept(Exception):
    """Features that cannot be stored, and why."""


def _refuse_large(run: Run, store: FeatureStore) -> None:
    """
    Raises:
        UserError: nobody has asked for features, and they are larger than the pictures.
    """
    pictures = sum(shard.bytes for shard in run.stream.manifest.shards)
    if run.config.cache.mode == "auto" and store.layout.bytes > max(pictures, 1 << 20):
        what = f"features take {store.layout.bytes / 1e6:,.0f} MB, and pictures {pictures / 1e6:,.0f} MB"
        raise UserError(what, todo="cache: exact keeps them all the same")


def _checked(run: Run, cut: Cut, store: FeatureStore, shown: Callable[[Sequence[Part]], Shown]) -> str | None:
    """Computes a part of what is there once more: where that is something else by now (code of one's own was changed,
    pictures without hashes), all of it counts as missing; a line about it then."""
    there = set(store.missing())
    first = next(((0, n) for n in range(store.layout.parts) if (0, n) not in there), None)
    if first is None:
        return None
    ids, images, _ = next(iter(shown([first])))
    if not len(ids):
        return None
    own = _features(run, cut, images, store.layout.part)[: len(ids)].to("cpu", store.layout.dtype).float()
    kept = store.tensor(store.rows(0)[list(ids)]).float()
    scale = float(own.abs().max()) or 1.0
    if float((own - kept).abs().max()) <= 2e-2 * scale:
        return None
    store.forget()
    return f"cache: features in {store.folder} are not what the network gives now, and are computed anew"


def _opened(run: Run, store: FeatureStore) -> str | None:
    """Maps the features on every rank; why that cannot be, the same on all."""
    why = None
    try:
        store.hold()
        store.rows(0)
        _ = store.bad
        if store.missing():
            why = f"{store.folder} is not the same folder on all machines; cache: {{folder: ...}} on a shared disk"
    except (OSError, ValueError) as error:
        why = f"{store.folder}: {error}"
    found: list[str | None] = run.world.gather(why)
    return next((text for text in found if text is not None), None)


def _features(run: Run, cut: Cut, images: Tensor, part: int) -> Tensor:
    with run.world.autocast():
        return features_of(run.net, cut, run.normalise(images.to(run.world.device), part))


def _compute(run: Run, cut: Cut, store: FeatureStore, own: Sequence[Part], shown: Shown) -> bool:
    """This rank's parts; false where a stop was asked for."""
    world, layout, said = run.world, store.layout, time.monotonic()
    for done, ((view, part), (ids, images, bad)) in enumerate(zip(own, shown, strict=True)):
        world.watch.beat("batch")
        places = layout.places(part)
        rows = torch.zeros(len(places), *layout.shape, dtype=layout.dtype)
        if len(ids):
            features = _features(run, cut, images, layout.part)[: len(ids)]
            rows[[place - places.start for place in ids]] = features.to("cpu", layout.dtype)
            if not rows.isfinite().all():
                raise NotKept(f"features are not finite in {str(layout.dtype).removeprefix('torch.')}")
        try:
            store.write(view, part, rows, {one.id: one.reason for one in bad})
        except OSError as error:
            raise NotKept(f"{store.folder}: {error.strerror or error}") from error
        if run.stop.asked(look=True):
            return False
        if world.main and time.monotonic() - said > _SAY_S:
            said = time.monotonic()
            run.journal.note(f"cache: {done + 1:,} of {len(own):,} parts of {layout.part} pictures")
    return True
