"""From a configuration to shards, and from shards to batches."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tlx.base import plug
from tlx.base.errors import Problems, UserError, did_you_mean
from tlx.base.inputs import TRAINING_VIEW
from tlx.base.location import is_remote, shown
from tlx.data.remote.files import IndexUnavailable
from tlx.data.shards.manifest import Manifest
from tlx.data.shards.targets import LABEL, Target
from tlx.data.stream.order import share
from tlx.data.stream.sampling import Sampling
from tlx.data.stream.sampling import targets as epoch_targets
from tlx.plan.config import Config
from tlx.plan.data_config import Expected, Mixing
from tlx.plan.parts import Part
from tlx.tasks import TargetSummary, Task, scale_of, views_of
from tlx.tasks.summaries import expected_targets, summaries
from tlx.train.composed_batches import note_of, sampling_of

if TYPE_CHECKING:
    from tlx.data.remote.shard_cache import CacheSpec
    from tlx.ranks.collectives import World

TOO_GOOD = "pictures that are trained on do not measure the training; its metrics will look too good"
CHOSEN_BY = "pictures that choose the weights do not test them; the test's metrics will look too good"
_NAMED = 5  # tars in a message
DEFAULT_TRANSFORMS = [Part(name=name) for name in TRAINING_VIEW]


@dataclass(frozen=True)
class Samples:
    """What is known about the data before a pixel is read.

    Attributes:
        train: samples of a training epoch, repeated ones counted again.
        counts: the same by class; of shards that are not built yet, as if their classes were of one size.
        names: of the classes; of shards that are not built yet, numbers.
        targets: what there is to learn, by name.
        val, test: the same of the validation and test shards; None where there are none, or they are not built yet.
        note: where the numbers are from, if not from the shards, and what an epoch leaves out or repeats.
        warnings: what about the data was probably unintended.
        expected: there are no shards yet, and these are what `data.expected` says.
    """

    classes: int
    train: int
    counts: tuple[int, ...]
    names: tuple[str, ...]
    targets: Mapping[str, TargetSummary] = field(default_factory=dict)
    note: str | None = None
    warnings: tuple[str, ...] = ()
    val: Mapping[str, TargetSummary] | None = None
    test: Mapping[str, TargetSummary] | None = None
    expected: bool = False


@dataclass(frozen=True)
class Datasets:
    """Opened shards, and which of their samples make an epoch.

    Attributes:
        warnings: what about the shards was probably unintended, as far as somebody has looked.
        probe, probe_val: labelled pictures of `evaluate.probe`.
    """

    train: Manifest
    val: Manifest | None
    sampling: Sampling
    seed: int = 0
    warnings: tuple[str, ...] = ()
    test: Manifest | None = None
    probe: Manifest | None = None
    probe_val: Manifest | None = None

    @property
    def manifests(self) -> dict[str, Manifest]:
        """By the key that names them in the configuration."""
        named = {"data.train": self.train, "data.val": self.val, "data.test": self.test}
        named |= {"evaluate.probe.train": self.probe, "evaluate.probe.val": self.probe_val}
        return {key: manifest for key, manifest in named.items() if manifest is not None}

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
            note="\n".join(
                filter(None, (_of_epoch(self.sampling, counts.tolist(), len(self.train)), _of_test(self.test)))
            )
            or None,
            warnings=self.warnings,
            val=summaries(self.val, Sampling(), self.seed) if self.val is not None else None,
            test=summaries(self.test, Sampling(), self.seed) if self.test is not None else None,
        )


def warnings_of(sets: Datasets) -> tuple[str, ...]:
    """What about the shards was probably unintended. Reads some pictures, so that one rank does it for all."""
    of, pairs = sets.manifests, (("data.val", "data.train"), ("data.test", "data.train"), ("data.test", "data.val"))
    same = [_same_data(pair, of[pair[0]], of[pair[1]]) for pair in pairs if of.keys() >= set(pair)]
    return (*sets.warnings, *filter(None, same))


def _of_epoch(sampling: Sampling, counts: Sequence[int], held: int) -> str | None:
    """What an epoch shows, where it is not every sample once."""
    if sampling == Sampling():
        return None
    if sampling.episodes is not None:
        return note_of(sampling.episodes, counts)
    present = [n for n in counts if n]
    each = f"{min(present)}" if min(present) == max(present) else f"{min(present)} to {max(present)}"
    by, of = "data.sampling", "of each class"
    if sampling.without:
        of = f"of each of {len(present)} classes; none of the {len(sampling.without)} unseen ones (task.unseen)"
        by = "task.unseen" if replace(sampling, without=()) == Sampling() else "data.sampling with task.unseen"
    return f"note: {by} makes an epoch of {sum(counts)} samples out of {held}, {each} {of}"


def _of_test(test: Manifest | None) -> str | None:
    return f"data.test: {len(test):,} samples, judged once, at the end" if test is not None else None


def _same_data(keys: tuple[str, str], held_out: Manifest, seen: Manifest) -> str | None:
    """A sentence, where pictures that measure are among those that are trained on, or that choose the weights."""
    from tlx.data.shards.overlap import shared_pictures, shared_shards

    own, other = keys
    why = TOO_GOOD if other == "data.train" else CHOSEN_BY
    if count := shared_shards(seen, held_out):
        return f"{count} of the {len(held_out.shards)} shards of {own} are shards of {other}, too: {why}"
    count, looked = shared_pictures(seen, held_out)
    if not count:
        return None
    return f"{count} of {looked} pictures of {own} that were looked at are in {other}, too: {why}"


def known_names(config: Config, samples: Samples | None, task: Task | None) -> Sequence[str] | None:
    """Of the outputs; None of shards that are not built yet, where only the number of classes is expected."""
    if samples is None or task is None:
        return None
    if samples.expected and not all(_is_named(config, target) for target in task.targets.values()):
        return None
    return task.outputs


def known_scale(samples: Samples | None, task: Task | None) -> dict[str, Any] | None:
    """See :class:`tlx.tasks.Task`; None of shards that are not built yet."""
    return scale_of(task) if samples is not None and not samples.expected and task is not None else None


def _is_named(config: Config, target: Target) -> bool:
    """Whether `data.expected` names a target's classes, where it has any."""
    expected = config.data.expected
    assert expected is not None
    classes = expected.classes if target.name == LABEL else expected.targets[target.name].classes
    return target.kind == "number" or not isinstance(classes, int)


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
    names = _names(expected.classes)
    even = np.array([len(share(expected.train, len(names), c)) for c in range(len(names))], dtype=np.int64)
    if isinstance(expected.classes, int) and hasattr(plug.find("task", config.task.name), "leaves_out"):
        what, todo = f"task {config.task.name} has to know the classes", "name them in their order"
        raise UserError(what, where="data.expected.classes", todo=todo)
    only = sampling_of(config, names, even) if expected.classes is not None else Sampling()
    limited = only if config.composes_batches else Sampling(limit=only.limit, without=only.without)
    counts = tuple(epoch_targets(limited, even).tolist())
    same = [f"data.val is data.train: {TOO_GOOD}"] if config.data.val == config.data.train else []
    samples = sum(counts) if names else expected.train
    others = [Target(n, t.kind, _names(t.classes), t.width) for n, t in expected.targets.items()]
    targets = expected_targets(counts, names, others, samples)
    return Samples(len(names), samples, counts, names, targets, note=note, warnings=tuple(same), expected=True)


def _names(classes: int | Sequence[str] | None) -> tuple[str, ...]:
    """Of classes; numbers where only how many is known."""
    return tuple(map(str, range(classes))) if isinstance(classes, int) else tuple(classes or ())


def open_sets(config: Config, *, staged: bool = True) -> Datasets:
    """Opens the shards and compares them with each other and with what is expected.

    Args:
        staged: with `data.cache.stage`, folders are read through the cache; else where they lie, and nothing is copied.

    Raises:
        UserError: missing or empty shards, other classes in validation or test, other counts than expected, tars of
            another length than indexed.
    """
    cache = cache_of(config)
    if cache is not None and not staged:
        cache = replace(cache, stage=False)
    train = Manifest.open(config.data.train, cache)
    val = Manifest.open(config.data.val, cache) if config.data.val else None
    test = Manifest.open(config.data.test, cache) if config.data.test else None
    labelled = [
        Manifest.open(place, cache) if place else None
        for place in ((config.evaluate.probe.train, config.evaluate.probe.val) if config.evaluate.probe else ("", ""))
    ]
    sets = Datasets(
        train, val, sampling_of(config, tuple(train.classes), train.counts()), config.seed, (), test, *labelled
    )
    for key, manifest in sets.manifests.items():
        if len(manifest) == 0:
            raise UserError("there is no sample in these shards", where=f"{key}={manifest.location}")
    for kind, other in (("validation", val), ("test", test)):
        if other is not None and train.targets and not config.draws_targets:
            _check_same_classes(train, other, kind)
    _check_probe(sets)
    _check_expected(config, sets)
    # what a node's own disk holds is not known elsewhere, only what may be taken of it
    if cache is not None and (train.remote or (config.data.cache.stage and cache.limit is not None)):
        for manifest in sets.manifests.values():
            _check_largest(manifest, cache)
        _check_window(config, train, cache)
    return replace(sets, warnings=_check_lengths(config, sets.manifests))


def _check_same_classes(train: Manifest, other: Manifest, kind: str) -> None:
    if other.classes != train.classes:
        odd = sorted(set(train.classes) ^ set(other.classes))
        raise UserError(
            f"training shards have {len(train.classes)} classes, {kind} shards {len(other.classes)}"
            + (f"; only on one side: {', '.join(odd[:8])}" if odd else "; their order differs"),
            where=f"{train.location} and {other.location}",
            todo="build both with one `tlx shards build`; or, of tars made elsewhere, index with one list of classes: "
            f"tlx shards index {other.location} --classes {train.location}",
        )


def _check_probe(sets: Datasets) -> None:
    if sets.probe is None:
        return
    if len(sets.probe.classes) < 2:
        what = "these shards have no class" if not sets.probe.classes else "these shards have one class"
        todo = "shards of pictures with labels, a few of each class: tlx shards build"
        raise UserError(f"{what}, which neighbours are to tell", where="evaluate.probe.train", todo=todo)
    if sets.probe_val is not None:
        _check_same_classes(sets.probe, sets.probe_val, "the probe's validation")


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


def check_targets(samples: Samples, task: Task) -> None:
    """Whether the shards hold what a task is to learn, and validation and test shards the same of it; other targets,
    which any may have, make no difference.

    Raises:
        UserError: a target that is not there, or that no training sample has; one that validation or test shards lack,
            or have with other classes.
    """
    found = Problems()
    for name, target in task.targets.items():
        own = samples.targets.get(name)
        if own is None and name != LABEL:
            found.add(
                UserError(f'there is no target "{name}"{did_you_mean(name, samples.targets)}', where="data.train")
            )
            continue
        if own is not None and not own.samples:
            what = f'no training sample has a value of target "{name}"'
            todo = "look at the source of the target, or leave it out of the task"
            found.add(UserError(what, where="data.train", todo=todo))
        for kind, key, held_out in (("validation", "data.val", samples.val), ("test", "data.test", samples.test)):
            if held_out is not None and (odd := _other_target(target, held_out, kind)):
                found.add(UserError(odd, where=key, todo=_to_agree(target, held_out, kind)))
            elif held_out is not None and (refuse := getattr(task, "refuse_held_out", None)) is not None:
                found.of(functools.partial(refuse, held_out[name], key))
    found.refuse()


def _to_agree(target: Target, held_out: Mapping[str, TargetSummary], kind: str) -> str:
    """How validation or test shards get the same target."""
    option, folder = f"--target {target.name}:{target.kind}=KEY", "VAL" if kind == "validation" else "TEST"
    if target.name in held_out and held_out[target.name].target.kind == target.kind != "number":
        option = f"--target-classes {target.name}=TRAIN"
    return f"build both with one `tlx shards build`; or, of tars made elsewhere: tlx shards index {folder} {option}"


def _other_target(target: Target, held_out: Mapping[str, TargetSummary], kind: str) -> str | None:
    """In what validation or test shards differ in a target."""
    if target.name not in held_out:
        return f'{kind} shards have no target "{target.name}"; they have {", ".join(held_out) or "none"}'
    other = held_out[target.name].target
    if other == target:
        return None
    if other.kind != target.kind or other.width != target.width:
        what = (f"{t.kind}" + (f" of width {t.width}" if t.kind == "number" else "") for t in (target, other))
        return f'target "{target.name}" is of kind ' + f" in training shards, and in {kind} shards ".join(what)
    odd = sorted(set(target.classes) ^ set(other.classes))
    return (
        f'target "{target.name}" has {len(target.classes)} classes in training shards, and {len(other.classes)} in '
        f"{kind} shards" + (f"; only on one side: {', '.join(odd[:8])}" if odd else "; their order differs")
    )


def cache_of(config: Config) -> CacheSpec | None:
    """Where shards from elsewhere are kept; None where there are none."""
    said, places = config.data.cache, (config.data.train, config.data.val, config.data.test)
    if not said.stage and not any(map(is_remote, filter(None, places))):
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


def _check_expected(config: Config, sets: Datasets) -> None:
    expected, train = config.data.expected, sets.train
    if expected is None:
        return
    found: dict[str, tuple[object, object]] = {
        "classes": _compared(train.classes, expected.classes),
        "train": (len(train), expected.train),
        "val": (len(sets.val) if sets.val is not None else expected.val, expected.val),
        "test": (len(sets.test) if sets.test is not None else expected.test, expected.test),
    }
    for name, wanted in expected.targets.items():
        target = train.targets.get(name)
        kind, classes, width = (target.kind, target.classes, target.width) if target is not None else ("none", (), 0)
        found[f"targets.{name}.kind"] = (kind, wanted.kind)
        if wanted.kind == "number":
            found[f"targets.{name}.width"] = (width, wanted.width)
        else:
            found[f"targets.{name}.classes"] = _compared(classes, wanted.classes)
    for key, (held, said) in found.items():
        if said is not None and held != said:
            raise UserError(
                f"the shards hold {held}, the configuration expects {said}",
                where=f"data.expected.{key}",
                todo="correct data.expected or data.train; `tlx shards show` prints what is there",
            )


def _compared(classes: Sequence[str], expected: int | Sequence[str] | None) -> tuple[object, object]:
    """What there is and what is expected, in the words that the configuration has for it."""
    if expected is None or isinstance(expected, int):
        return len(classes), expected
    return ", ".join(classes), ", ".join(expected)


def view_of(config: Config, spec: Any) -> Any:
    """The training view of a picture: the configuration's transforms; where it says none, those of its task, or a
    random part, flipped or not.

    Raises:
        UserError: transforms that fail, or do not give the input's size.
    """
    from tlx.data.pixels.transforms import train_transform

    usual = getattr(plug.find("task", config.task.name), "transforms", [(p.name, p.args) for p in DEFAULT_TRANSFORMS])
    parts = usual if config.transforms is None else [(p.name, p.args) for p in config.transforms]
    return train_transform(parts, spec)


def training_view(task: Task, view: Any, spec: Any) -> Any:
    """What a sample is shown as in training; `view` is the configuration's, which makes one picture.

    Raises:
        UserError: the task does not give pictures of the input's size.
    """
    from tlx.data.stream.views import shown_as

    views = views_of(task)
    return view if views is None else shown_as(views, view, spec)


def evaluation_view(config: Config, task: Task, spec: Any) -> Any:
    """The same in evaluations."""
    from tlx.data.pixels.transforms import eval_transform
    from tlx.data.stream.views import shown_as

    views, plain = views_of(task), eval_transform(spec)
    if views is None:
        return plain
    return shown_as(views, plain if views.evaluated_plainly else view_of(config, spec), spec)


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
        transform=training_view(task, view, spec),
        channels=spec.channels,
        drop_last=config.data.drop_last,
        window=config.data.window,
        parts=config.data.parts,
        sampling=sampling_of(config, tuple(manifest.classes), manifest.counts()),
        rank=world.rank,
        world=world.size,
        micro_batch=config.loop.micro_batch,
        workers=config.data.workers,
        targets=tuple(task.targets),
        weigh=task.weights,
        mix=mixing_of(config.mix),
        views=views_of(task),
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
