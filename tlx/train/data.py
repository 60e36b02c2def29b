"""From a configuration to shards, and from shards to batches."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tlx.base.errors import UserError
from tlx.base.location import is_remote, shown
from tlx.data.remote.files import IndexUnavailable
from tlx.data.shards.manifest import Manifest
from tlx.data.stream.order import share
from tlx.data.stream.sampling import Sampling
from tlx.data.stream.sampling import targets as epoch_targets
from tlx.plan.config import Config, Expected, Mixing, Part
from tlx.tasks import TargetSummary, Task
from tlx.tasks.summaries import of_classes, summaries

if TYPE_CHECKING:
    from tlx.data.remote.shard_cache import CacheSpec
    from tlx.ranks.collectives import World

TOO_GOOD = "pictures that are trained on do not measure the training; its metrics will look too good"
_NAMED = 5  # tars in a message
DEFAULT_TRANSFORMS = [Part(name="random_resized_crop"), Part(name="horizontal_flip")]


@dataclass(frozen=True)
class Samples:
    """What is known about the data before a pixel is read.

    Attributes:
        train: samples of a training epoch, repeated ones counted again.
        counts: the same by class; of shards that are not built yet, as if their classes were of one size.
        names: of the classes; of shards that are not built yet, numbers.
        targets: what there is to learn, by name.
        note: where the numbers are from, if not from the shards, and what an epoch leaves out or repeats.
        warnings: what about the data was probably unintended.
    """

    classes: int
    train: int
    counts: tuple[int, ...]
    names: tuple[str, ...]
    targets: Mapping[str, TargetSummary] = field(default_factory=dict)
    note: str | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Datasets:
    """Opened shards, and which of their samples make an epoch.

    Attributes:
        warnings: what about the shards was probably unintended, as far as somebody has looked.
    """

    train: Manifest
    val: Manifest | None
    sampling: Sampling
    seed: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def manifests(self) -> dict[str, Manifest]:
        """By the key that names them in the configuration."""
        return {"data.train": self.train, **({"data.val": self.val} if self.val is not None else {})}

    @property
    def samples_per_epoch(self) -> int:
        return self.samples.train

    @functools.cached_property
    def samples(self) -> Samples:
        """Of an epoch that is trained on."""
        from tlx.data.stream.stream import epoch_counts, epoch_length

        counts = epoch_counts(self.train, self.sampling)
        return Samples(
            classes=len(self.train.classes),
            train=epoch_length(self.train, self.sampling),
            counts=tuple(counts.tolist()),
            names=tuple(self.train.classes),
            targets=summaries(self.train, self.sampling, self.seed),
            note=_of_epoch(self.sampling, counts.tolist(), len(self.train)),
            warnings=self.warnings,
        )


def warnings_of(sets: Datasets) -> tuple[str, ...]:
    """What about the shards was probably unintended. Reads some pictures, so that one rank does it for all."""
    same = _same_data(sets.train, sets.val)
    return (*sets.warnings, same) if same else sets.warnings


def _of_epoch(sampling: Sampling, counts: Sequence[int], held: int) -> str | None:
    """What an epoch shows, where it is not every sample once."""
    if sampling == Sampling():
        return None
    present = [n for n in counts if n]
    each = f"{min(present)}" if min(present) == max(present) else f"{min(present)} to {max(present)}"
    return f"note: data.sampling makes an epoch of {sum(counts)} samples out of {held}, {each} of each class"


def _same_data(train: Manifest, val: Manifest | None) -> str | None:
    """A sentence, where validation has pictures that are trained on."""
    from tlx.data.shards.overlap import shared_pictures, shared_shards

    if val is None:
        return None
    if count := shared_shards(train, val):
        return f"{count} of the {len(val.shards)} shards of data.val are shards of data.train, too: {TOO_GOOD}"
    count, looked = shared_pictures(train, val)
    if not count:
        return None
    return f"{count} of {looked} pictures of data.val that were looked at are in data.train, too: {TOO_GOOD}"


def known_names(config: Config, samples: Samples | None, task: Task | None) -> Sequence[str] | None:
    """Of the outputs; None of shards that are not built yet, whose classes have numbers alone."""
    if samples is None or (config.data.expected and samples.names == tuple(map(str, range(samples.classes)))):
        return None
    return task.outputs if task is not None else None


def count_samples(config: Config) -> Samples:
    """From the shards; where they are not built yet, from `data.expected`."""
    try:
        sets = open_sets(config, staged=False)
        return replace(sets, warnings=warnings_of(sets)).samples
    except UserError as error:
        expected, where = config.data.expected, config.data.train
        absent = isinstance(error, IndexUnavailable) if is_remote(where) else not Path(where).exists()
        if expected is None or not absent:
            raise
        return _expected(config, expected)


def _expected(config: Config, expected: Expected) -> Samples:
    note = f"note: no shards at {shown(config.data.train)} yet, planned with data.expected"
    if config.data.sampling.method == "repeat_factors":
        note += "; repeated samples are not counted, since that takes the sizes of classes"
    even = np.array([len(share(expected.train, expected.classes, c)) for c in range(expected.classes)])
    counts = tuple(epoch_targets(Sampling(limit=config.data.sampling.limit), even).tolist())
    same = [f"data.val is data.train: {TOO_GOOD}"] if config.data.val == config.data.train else []
    names = tuple(map(str, range(expected.classes)))
    targets = of_classes(counts, names)
    return Samples(expected.classes, sum(counts), counts, names, targets, note=note, warnings=tuple(same))


def open_sets(config: Config, *, staged: bool = True) -> Datasets:
    """Opens the shards and compares them with each other and with what is expected.

    Args:
        staged: with `data.cache.stage`, folders are read through the cache; else where they lie, and nothing is copied.

    Raises:
        UserError: missing or empty shards, one class, other classes in validation, other counts than expected, tars of
            another length than indexed.
    """
    cache = cache_of(config)
    if cache is not None and not staged:
        cache = replace(cache, stage=False)
    train = Manifest.open(config.data.train, cache)
    val = Manifest.open(config.data.val, cache) if config.data.val else None
    if len(train.classes) == 1:
        raise UserError(f"only one class: {', '.join(train.classes)}", where=train.location, todo="add a second one")
    for manifest, key in ((train, "data.train"), (val, "data.val")):
        if manifest is not None and len(manifest) == 0:
            raise UserError("there is no sample in these shards", where=f"{key}={manifest.location}")
    if val is not None:
        _check_same_targets(train, val)
    _check_expected(config, train, val)
    # what a node's own disk holds is not known elsewhere, only what may be taken of it
    if cache is not None and (train.remote or (config.data.cache.stage and cache.limit is not None)):
        for manifest in (train, val):
            if manifest is not None:
                _check_largest(manifest, cache)
        _check_window(config, train, cache)
    sets = Datasets(train, val, config.data.sampling.made(), config.seed)
    return replace(sets, warnings=_check_lengths(config, sets.manifests))


def _check_same_targets(train: Manifest, val: Manifest) -> None:
    if val.classes != train.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise UserError(
            f"training shards have {len(train.classes)} classes, validation shards {len(val.classes)}"
            + (f"; only on one side: {', '.join(odd[:8])}" if odd else "; their order differs"),
            where=f"{train.location} and {val.location}",
            todo="build both with one `tlx shards build`; or, of tars made elsewhere, index with one list of classes: "
            f"tlx shards index {val.location} --classes {train.location}",
        )
    differ = sorted(
        name for name in train.targets.keys() | val.targets if train.targets.get(name) != val.targets.get(name)
    )
    if differ:
        raise UserError(
            f"training and validation shards have other targets, or other classes of them: {', '.join(differ)}",
            where=f"{train.location} and {val.location}",
            todo="build both with one `tlx shards build`; or, of tars made elsewhere, index with one list of classes: "
            f"tlx shards index {val.location} --target-classes {differ[0]}={train.location}",
        )


def _check_lengths(config: Config, manifests: Mapping[str, Manifest]) -> tuple[str, ...]:
    """Warnings, where unreadable samples are allowed; else tars that are too short or too long are an error."""
    from tlx.data.shards.verify import wrong_lengths

    wrong = [f"{key}: {line}" for key, manifest in manifests.items() for line in wrong_lengths(manifest)]
    if not wrong:
        return ()
    listed = "; ".join(wrong[:_NAMED]) + (f"; and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else "")
    count = "a tar is" if len(wrong) == 1 else f"{len(wrong)} tars are"
    if config.data.bad_samples != "error":
        return (f"{count} not as indexed, which data.bad_samples will count: {listed}",)
    raise UserError(
        f"{count} not as indexed: {listed}",
        where="shards",
        todo="bring the former files back, or index them as they are: tlx shards index FOLDER",
    )


def cache_of(config: Config) -> CacheSpec | None:
    """Where shards from elsewhere are kept; None where there are none."""
    said = config.data.cache
    if not said.stage and not any(is_remote(where) for where in (config.data.train, config.data.val) if where):
        return None
    from tlx.data.remote.shard_cache import CacheSpec, default_folder

    return CacheSpec(said.folder or default_folder(), said.limit, said.stage)


def _check_largest(manifest: Manifest, cache: CacheSpec) -> None:
    from tlx.data.remote.cache_room import in_words, limit_of

    largest, limit = max(shard.bytes for shard in manifest.shards), limit_of(cache)
    if largest > limit:
        said = cache.limit is not None
        raise UserError(
            f"the largest shard of {shown(manifest.location)} is {in_words(largest)} long, "
            f"and the cache holds {in_words(limit)}",
            where="data.cache.limit" if said else str(cache.folder),
            todo="a larger data.cache.limit" if said else "data.cache.folder on a disk with more room",
        )


def _check_window(config: Config, train: Manifest, cache: CacheSpec) -> None:
    """A window of shards is read at random: those that the cache cannot hold would be fetched for every few samples."""
    from tlx.data.remote.cache_room import in_words, limit_of

    sizes = sorted((shard.bytes for shard in train.shards), reverse=True)
    window, limit, parts = min(config.data.window or len(sizes), len(sizes)), limit_of(cache), config.data.parts
    needed = sum(sizes[:window]) // parts
    if needed > limit:
        fits = sum(total <= limit * parts for total in itertools.accumulate(sizes))
        raise UserError(
            f"{window} shards mix, up to {in_words(needed)} of them on a node, and the cache holds {in_words(limit)}:"
            " they would be fetched again and again",
            where="data.window" if config.data.window else "data.window (all shards by default)",
            todo=f"data.window={fits}, a larger data.cache.limit, or data.parts set to the number of nodes",
        )


def _check_expected(config: Config, train: Manifest, val: Manifest | None) -> None:
    expected = config.data.expected
    if expected is None:
        return
    found = {"classes": len(train.classes), "train": len(train), "val": len(val) if val is not None else None}
    for name, count in found.items():
        wanted = getattr(expected, name)
        if wanted is not None and count is not None and wanted != count:
            raise UserError(
                f"the shards hold {count}, the configuration expects {wanted}",
                where=f"data.expected.{name}",
                todo="correct data.expected or data.train; `tlx shards show` prints what is there",
            )


def view_of(config: Config, spec: Any) -> Any:
    """The training view of a picture.

    Raises:
        UserError: transforms that fail, or do not give the input's size.
    """
    from tlx.data.pixels.transforms import train_transform

    parts = config.transforms if config.transforms is not None else DEFAULT_TRANSFORMS
    return train_transform([(p.name, p.args) for p in parts], spec)


def stream_of(config: Config, manifest: Manifest, spec: Any, world: World, task: Task, view: Any) -> Any:
    """Training batches.

    Args:
        task: what is learned: whose targets they have, and what samples weigh.
        view: of a picture, as `view_of` gives it.
    """
    from tlx.data.stream.stream import ShardStream

    return ShardStream(
        manifest,
        batch=config.data.batch,
        seed=config.seed,
        transform=view,
        channels=spec.channels,
        drop_last=config.data.drop_last,
        window=config.data.window,
        parts=config.data.parts,
        sampling=config.data.sampling.made(),
        rank=world.rank,
        world=world.size,
        micro_batch=config.loop.micro_batch,
        workers=config.data.workers,
        targets=tuple(task.targets),
        weigh=task.weights,
        mix=mixing_of(config.mix),
        skip_bad=True,  # judged by the loop, over all ranks
        upright=config.data.exif_orientation,
        scaled=config.data.scaled_decoding,
        pin=world.cuda,
    )


def mixing_of(mix: Mixing | None) -> Any:
    from tlx.data.stream.mix import MixSpec

    if mix is None or not (mix.mixup or mix.cutmix):
        return None
    return MixSpec(mixup=mix.mixup, cutmix=mix.cutmix, prob=mix.prob, switch_prob=mix.switch_prob)
