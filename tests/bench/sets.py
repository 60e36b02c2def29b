"""The pictures that are measured: made ones like photographs, or a folder of real ones; as files and as shards.

A made picture is a sum of smooth fields, 1/f noise, gratings, shapes with hard edges, text and a camera's noise, of
which it draws its own amount, so that the lengths of the JPEGs spread as those of photographs do.
"""

from __future__ import annotations

import io
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from tlx.data.build.write import BuildOptions, build_shards

QUALITY = 90
CLASSES = 20
SIZES = {"small": (500, 375), "large": (1600, 1200)}


def make(work: Path, name: str, count: int, jobs: int) -> None:
    """WORK/folder_NAME with a folder per class, and WORK/shards_NAME/train; once."""
    folder = work / f"folder_{name}"
    wanted = [(i, *SIZES[name]) for i in range(count)]
    if not folder.exists():
        beside = work / f".folder_{name}.making"
        shutil.rmtree(beside, ignore_errors=True)
        with ProcessPoolExecutor(jobs) as pool:
            for (i, _, _), data in zip(wanted, pool.map(encoded, wanted, chunksize=4), strict=True):
                place = beside / f"c{i % CLASSES:02d}"
                place.mkdir(parents=True, exist_ok=True)
                (place / f"{i:06d}.jpg").write_bytes(data)
        beside.rename(folder)
    shards(work, name)


def adopt(work: Path, name: str, photos: Path) -> None:
    """The same from real pictures, a folder per class: copied, so that nothing is written beside them."""
    folder = work / f"folder_{name}"
    if not folder.exists():
        beside = work / f".folder_{name}.making"
        shutil.rmtree(beside, ignore_errors=True)
        for file in sorted(photos.glob("*/*.jp*g")):
            (beside / file.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, beside / file.parent.name / file.name)
        beside.rename(folder)
    shards(work, name)


def shards(work: Path, name: str) -> None:
    build_shards(
        str(work / f"folder_{name}"), work / f"shards_{name}", BuildOptions(val=0.0, shard_samples=250, jobs=0)
    )


def encoded(wanted: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    picture(*wanted).save(buffer, "JPEG", quality=QUALITY, subsampling="4:2:0")
    return buffer.getvalue()


def picture(seed: int, base_width: int, base_height: int) -> Image.Image:
    rng = np.random.default_rng([seed, base_width])
    factor = rng.uniform(0.9, 1.1)
    width, height = int(base_width * factor), int(base_height * factor)
    shape = rng.random()
    if shape < 0.25:
        width, height = height, width
    elif shape < 0.35:
        width = height = (width + height) // 2
    light = field(rng, height, width, rng.uniform(1.15, 1.55))
    base, amount = rng.uniform(60, 190, 3), rng.uniform(25, 55)
    pixels = np.empty((height, width, 3), np.float32)
    for c in range(3):
        pixels[..., c] = base[c] + amount * light + rng.uniform(8, 25) * field(rng, height, width, 2.0)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    for _ in range(rng.integers(1, 4)):
        angle, pitch = rng.uniform(0, np.pi), rng.uniform(0.02, 0.25) * (500 / base_width)
        cx, cy, spread = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0.08, 0.3) * width
        window = np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * spread * spread))
        wave = np.sin(2 * np.pi * pitch * (x * np.cos(angle) + y * np.sin(angle)))
        pixels += (rng.uniform(10, 35) * window * wave)[..., None]
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    shapes(rng, image, seed)
    noise = rng.uniform(2.0, 11.0)
    noisy = np.asarray(image).astype(np.float32)
    noisy += (rng.standard_normal((height, width)).astype(np.float32) * noise)[..., None]
    noisy += rng.standard_normal((height, width, 3)).astype(np.float32) * noise * 0.3
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def field(rng: np.random.Generator, height: int, width: int, beta: float) -> NDArray[np.float64]:
    """Noise whose amplitude falls with the frequency to the power `beta`, of mean 0 and deviation 1."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = 1.0 / max(height, width)
    shape = frequency.shape
    spectrum = (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)) / frequency**beta
    found = np.fft.irfft2(spectrum, s=(height, width))
    return (found - found.mean()) / found.std()


def shapes(rng: np.random.Generator, image: Image.Image, seed: int) -> None:
    draw, (width, height) = ImageDraw.Draw(image, "RGBA"), image.size
    for _ in range(rng.integers(2, 9)):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        across, down = rng.uniform(0.05, 0.4) * width, rng.uniform(0.05, 0.4) * height
        colour = (*(int(v) for v in rng.integers(0, 255, 3)), int(rng.integers(60, 220)))
        if rng.random() < 0.5:
            draw.ellipse([x - across / 2, y - down / 2, x + across / 2, y + down / 2], fill=colour)
        else:
            corners = [(x + rng.uniform(-across, across), y + rng.uniform(-down, down)) for _ in range(4)]
            draw.polygon(corners, fill=colour)
    if rng.random() < 0.3:
        font = ImageFont.load_default(size=int(rng.uniform(0.03, 0.09) * height))
        place = rng.uniform(0, width * 0.6), rng.uniform(0, height * 0.9)
        draw.text(place, f"Sample {seed} text", fill=tuple(int(v) for v in rng.integers(0, 255, 3)), font=font)
