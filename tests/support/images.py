"""Real pictures and shards for tests, made quickly: a class is a colour and a stripe pattern, so it can be learnt."""

from __future__ import annotations

import colorsys
import io
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tlx.data.build.write import BuildOptions, build_shards
from tlx.data.shards.index import index_folder
from tlx.data.shards.manifest import Manifest
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


def png_chunk(name, body):
    return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")


def all_bytes(manifest):
    reader = ShardReader(manifest)
    return [reader.read(i) for i in range(len(manifest))]
