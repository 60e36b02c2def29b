"""Real pictures and shards for tests, made quickly: a class is a colour and a stripe pattern, so it can be learnt."""

from __future__ import annotations

import colorsys
import hashlib
import io
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tlx.data.build.write import BuildOptions, build_shards
from tlx.data.shards.index import index_folder
from tlx.data.shards.manifest import RECORD, Manifest, Shard, write_index
from tlx.data.shards.targets import Target
from tlx.data.shards.tars import add_sample, read_members
from tlx.data.stream.reader import ShardReader


def picture(label: int, *, classes: int = 3, size: int | tuple[int, int] = 48, seed: int = 0) -> Image.Image:
    """One picture of a class; `size` is its side, or (height, width). The same arguments give the same pixels."""
    height, width = (size, size) if isinstance(size, int) else size
    rng = np.random.default_rng([seed, label])
    y, x = np.mgrid[0:height, 0:width]
    angle = np.pi * label / classes
    wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / 12 + rng.uniform(0, 6))
    colour = np.array(colorsys.hsv_to_rgb(label / classes, 0.7, rng.uniform(0.6, 1.0)))
    pixels = (0.7 + 0.3 * wave[..., None]) * colour * 255 + rng.normal(0, 12, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def index_shards(folder: Path, **options: object) -> dict[str, Manifest]:
    """The manifests alone of what `index_folder` indexes."""
    return index_folder(folder, **options).manifests


def encoded(image: Image.Image, format: str = "JPEG", **options: object) -> bytes:
    """The picture as a file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format, **({"quality": 92} if format == "JPEG" else {}) | options)
    return buffer.getvalue()


def make_folder(
    path: Path,
    classes: int = 3,
    per_class: int = 8,
    size: int | tuple[int, int] = 48,
    seed: int = 0,
    *,
    names: Sequence[str] | None = None,
    extension: str = "jpg",
) -> Path:
    """A folder per class (class0, class1 ... or `names`) with `per_class` pictures in each; jpg or png."""
    for label in range(classes):
        folder = Path(path) / (names[label] if names else f"class{label}")
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            image = picture(label, classes=classes, size=size, seed=seed * 100_000 + i)
            (folder / f"{i:04d}.{extension}").write_bytes(encoded(image, {"jpg": "JPEG", "png": "PNG"}[extension]))
    return Path(path)


def make_shards(
    path: Path,
    classes: int = 3,
    per_class: int | Mapping[str, int] = 8,
    size: int | tuple[int, int] = 48,
    seed: int = 0,
    *,
    shard_samples: int = 10,
    extension: str = "jpg",
) -> Path:
    """PATH/train and PATH/val (or the splits that `per_class` names), built from folders at PATH-pictures."""
    counts = per_class if isinstance(per_class, Mapping) else {"train": per_class, "val": max(per_class // 2, 1)}
    source = Path(f"{path}-pictures")
    for place, (split, count) in enumerate(counts.items()):
        make_folder(source / split, classes, count, size, 10 * seed + place, extension=extension)
    only = None if "val" in counts else 0.0
    build_shards(str(source), path, BuildOptions(val=only, shard_samples=shard_samples, jobs=0))
    return Path(path)


TARGETS = (
    Target("colour", "class", ("blue", "green", "red")),
    Target("tags", "labels", ("big", "old", "round", "wet")),
    Target("age", "number", width=1),
    Target("box", "number", width=4),
)


def target_values(target: Target, samples: int) -> np.ndarray:
    """Values for `samples` samples, some missing; sample i's are arithmetic on i."""
    i = np.arange(samples)
    if target.kind == "class":  # every fifth is missing
        return np.where(i % 5 == 4, -1, i % len(target.classes)).astype(np.int32)
    if target.kind == "labels":  # a quarter applies; every seventh is unknown
        cell = i[:, None] * 3 + np.arange(len(target.classes))
        return np.where(cell % 7 == 6, -1, cell % 4 == 0).astype(np.int8)
    values = i[:, None] / 4 + np.arange(target.width)
    values[i % 6 == 1] = np.nan
    return values.astype(np.float32)


def make_target_shards(
    folder: Path,
    targets: Sequence[Target | tuple[Target, np.ndarray]] = TARGETS,
    *,
    samples: int = 24,
    classes: int = 3,
    shard_samples: int = 10,
    size: int | tuple[int, int] = 32,
    seed: int = 0,
) -> Manifest:
    """One folder of indexed tars with targets: those of all kinds, or others, with values of `target_values` or given
    ones. Sample i is of class i % classes, and looks like it; with classes=0 there is no class."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    records, shards = np.zeros(samples, RECORD), []
    records["label"] = np.arange(samples) % classes if classes else -1
    for start in range(0, samples, shard_samples):
        own, path = range(start, min(start + shard_samples, samples)), folder / f"{len(shards):06d}.tar"
        with tarfile.open(path, "w") as tar:
            for i in own:
                image = encoded(picture(i % max(classes, 3), classes=max(classes, 3), size=size, seed=1000 * seed + i))
                add_sample(tar, f"{i:09d}", {"jpg": image} | ({"cls": b"%d" % (i % classes)} if classes else {}))
        pictures = [m for m in read_members(path).members if m.name.endswith(".jpg")]
        records["offset"][own.start : own.stop] = [m.offset_data for m in pictures]
        records["size"][own.start : own.stop] = [m.size for m in pictures]
        data = path.read_bytes()
        shards.append(Shard(path.name, len(own), len(data), hashlib.sha256(data).hexdigest()))
    given = [t if isinstance(t, tuple) else (t, target_values(t, samples)) for t in targets]
    names = [f"class{c}" for c in range(classes)]
    return write_index(folder, classes=names, shards=shards, records=records, targets=given)


def png_chunk(name, body):
    return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")


def all_bytes(manifest):
    reader = ShardReader(manifest)
    return [reader.read(i) for i in range(len(manifest))]
