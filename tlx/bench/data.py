"""`tlx bench data`: what pictures cost on this machine, beside the least possible, and how many workers a GPU needs."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tlx.base.errors import UserError
from tlx.base.inputs import InputSpec
from tlx.base.location import is_remote
from tlx.bench import parts, rates
from tlx.bench.floor import TODO
from tlx.bench.measured_view import MeasuredView
from tlx.bench.rates import Rate
from tlx.data.pixels import jpeg_region as regions
from tlx.data.pixels.transforms import eval_transform, train_transform
from tlx.data.shards.manifest import Manifest
from tlx.data.stream.order import EpochOrder, Ids, Shuffle
from tlx.train.data import DEFAULT_TRANSFORMS

if TYPE_CHECKING:
    from tlx.data.remote.shard_cache import CacheSpec
    from tlx.plan.config import Config

_WINDOW = 2  # shards that are fetched from afar for a measurement


@dataclass(frozen=True)
class Setup:
    """What is measured, and how: as a configuration says, or the usual transforms.

    Attributes:
        transforms: names and arguments, of training.
        window: how many shards mix.
    """

    spec: InputSpec = field(default_factory=InputSpec)
    transforms: Sequence[tuple[str, Mapping[str, Any]]] = tuple((p.name, p.args) for p in DEFAULT_TRANSFORMS)
    batch: int = 64
    seed: int = 0
    scaled: bool = True
    upright: bool = True
    window: int | None = None


@dataclass(frozen=True)
class View:
    """What was measured of one view."""

    parts: parts.Parts
    rates: Sequence[Rate]

    @property
    def ratio(self) -> float:
        """One image through the loader, to the floor."""
        return self.parts.whole.cpu / self.parts.floor.cpu

    @property
    def best(self) -> Rate:
        """The number of workers that gives the most images a second."""
        return max(self.rates, key=lambda rate: rate.images)

    @property
    def per_worker(self) -> float:
        """Images a second of one worker while as many work as were tried; without any, of this process."""
        return max(self.rates, key=lambda rate: rate.workers).per_worker

    def workers_for(self, images: float) -> int:
        """How many feed a GPU that trains so many images a second."""
        return math.ceil(images / self.per_worker)


@dataclass(frozen=True)
class Report:
    """Everything that `tlx bench data` found."""

    manifest: Manifest
    setup: Setup
    views: Mapping[str, View]
    gpus: Sequence[float]
    cores: int

    @property
    def extension(self) -> bool:
        return regions._jpeg is not None

    @property
    def data(self) -> dict[str, Any]:
        """Plain data, for JSON. Times per image are in milliseconds."""
        found = self.views["train"].parts
        return {
            "shards": {
                "location": self.manifest.location,
                "samples": len(self.manifest),
                "shards": len(self.manifest.shards),
                "bytes": sum(s.bytes for s in self.manifest.shards),
            },
            "decoder": {
                "name": regions.decoder(),
                "extension": self.extension,
                "todo": None if self.extension else TODO,
            },
            "images": {
                "measured": len(found.sizes),
                "width": fmean(w for w, _ in found.sizes),
                "height": fmean(h for _, h in found.sizes),
                "shown": math.prod(self.setup.spec.size),
                "bytes": found.bytes,
            },
            "batch": self.setup.batch,
            "cores": self.cores,
            "views": {name: _plain(view, self.gpus) for name, view in self.views.items()},
            "verdict": verdict(self),
        }


def _plain(view: View, gpus: Sequence[float]) -> dict[str, Any]:
    found = view.parts
    return {
        "cpu_ms": 1e3 * found.whole.cpu,
        "wall_ms": 1e3 * found.whole.wall,
        "floor": {"what": found.floor_is, "cpu_ms": 1e3 * found.floor.cpu, "wall_ms": 1e3 * found.floor.wall},
        "ratio": view.ratio,
        "rates": [
            {
                "workers": r.workers,
                "images_per_s": r.images,
                "images_per_s_per_worker": r.per_worker,
                "cpu_ms": 1e3 * r.cpu,
            }
            for r in view.rates
        ],
        "workers_for": [{"images_per_s": gpu, "workers": view.workers_for(gpu)} for gpu in gpus],
    }


def measure(
    manifest: Manifest, setup: Setup, *, workers: Sequence[int] | None, seconds: float, gpus: Sequence[float] = ()
) -> Report:
    """
    Args:
        workers: numbers of them to try; None is 0, 1 and powers of two up to the number of cores.
        seconds: about how long it takes.
        gpus: images a second that GPUs train, for which workers are counted.

    Raises:
        UserError: empty shards, no readable picture, transforms that do not fit together.
    """
    if not len(manifest):
        raise UserError("there is no sample in these shards", where=manifest.location)
    if setup.batch < 1 or seconds <= 0 or any(w < 0 for w in workers or ()) or any(gpu <= 0 for gpu in gpus):
        raise UserError("--batch is at least 1, --workers at least 0, --seconds and --gpu above 0")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    counts = sorted(set(workers)) if workers else rates.chosen_workers(cores)
    looks = looks_of(manifest, setup)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker, so that times of processors compare
    try:
        found = {look.name: parts.measure(look, seconds=0.45 * seconds / len(looks)) for look in looks}
        rated = rates.measure(looks, counts, batch=setup.batch, seconds=0.5 * seconds, pin=torch.cuda.is_available())
    finally:
        torch.set_num_threads(threads)
    views: dict[str, View] = {look.name: View(found[look.name], rated[look.name]) for look in looks}
    return Report(manifest, setup, views, tuple(gpus), cores)


def looks_of(manifest: Manifest, setup: Setup) -> list[MeasuredView]:
    """Training's and evaluation's view of the same shards."""
    window = min(setup.window or _WINDOW, _WINDOW) if manifest.remote else setup.window
    shown = _near(manifest, setup, window) if manifest.remote else np.arange(len(manifest), dtype=np.int64)
    train, evaluated = train_transform(setup.transforms, setup.spec), eval_transform(setup.spec)
    channels: Any = setup.spec.channels
    about = (setup.spec.size, shown, channels, setup.seed)
    return [
        MeasuredView("train", manifest, train, *about, setup.scaled, setup.upright, window),
        MeasuredView("eval", manifest, evaluated, *about, False, setup.upright, window),
    ]


def _near(manifest: Manifest, setup: Setup, window: int | None) -> Ids:
    """The samples of the shards that training reads first: no others are fetched for a measurement."""
    shards = EpochOrder(manifest.samples_per_shard, Shuffle(setup.seed, window), 0).shards_for(0, setup.batch)
    stops = manifest.ends
    return np.concatenate([np.arange(stops[s] - manifest.shards[s].samples, stops[s]) for s in shards])


def open_shards(location: str, cache: CacheSpec | None = None) -> Manifest:
    """A folder of shards, or the `train` of a folder of such folders; or a URL."""
    folder = Path(location)
    if not is_remote(location) and not (folder / "index.json").exists() and (folder / "train" / "index.json").exists():
        return Manifest.open(folder / "train", cache)
    return Manifest.open(location, cache)


def setup_of(config: Config) -> Setup:
    """What a configuration's training would show."""
    from tlx.train.components import backbone_of, unknown_outputs

    backbone = backbone_of(config, unknown_outputs(config), empty=True)
    wanted = config.transforms if config.transforms is not None else DEFAULT_TRANSFORMS
    return Setup(
        spec=config.input.over(backbone.input),
        transforms=tuple((p.name, p.args) for p in wanted),
        batch=config.data.batch,
        seed=config.seed,
        scaled=config.data.scaled_decoding,
        upright=config.data.exif_orientation,
        window=config.data.window,
    )


def verdict(report: Report) -> str:
    """One sentence: what bounds the speed of training's pictures, and what that is enough for."""
    view = report.views["train"]
    share = 1 / view.ratio
    if share > 0.5:
        bound = f"decode-bound: {share:.0%} of the time is the floor, one decode and resize"
    else:
        names = ", ".join(name for name, _ in report.setup.transforms)
        bound = (
            f"bound by what surrounds decoding: the floor is {share:.0%} of the time; the transforms are {names}; "
            "`py-spy record --native` tells which costs what"
        )
    return f"{bound}; {_enough(report, view)}; {_decoder(report)}"


def _enough(report: Report, view: View) -> str:
    if not report.gpus:
        return f"data.workers={view.best.workers} feeds a GPU that trains {view.best.images:,.0f} images/s"
    gpu, needed = report.gpus[0], view.workers_for(report.gpus[0])
    text = f"a GPU that trains {gpu:,.0f} images/s needs {needed} worker{'s' if needed > 1 else ''}"
    return text if needed <= report.cores else f"{text}, more than the {report.cores} cores here"


def _decoder(report: Report) -> str:
    if report.extension:
        return "the extension is in use" if report.views["train"].parts.regions else "the extension has nothing to do"
    return f"the extension is not in use: {TODO}"
