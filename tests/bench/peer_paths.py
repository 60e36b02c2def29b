"""One way from files to batches of 224 x 224, in one process: ``python tests/bench/peer_paths.py PEER WORK CELL...``.

A cell is SET:VIEW:WORKERS, such as small:train:0. For each a line of JSON is printed. All peers do the same: a random
part of 8 % to 100 % of the picture, resized to 224 and mirrored half of the time (train), or the short side resized to
256 and the middle (eval); all antialiased and bilinear where they can be told to be.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tlx.bench.clock import Watch

SIDE, BATCH = 224, 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Cell:
    """What is measured: a set of pictures under a folder, a view, and the number of workers."""

    work: Path
    set: str
    view: str
    workers: int

    @property
    def training(self) -> bool:
        return self.view == "train"

    @property
    def folder(self) -> str:
        return str(self.work / f"folder_{self.set}")

    @property
    def shards(self) -> Path:
        return self.work / f"shards_{self.set}" / "train"

    @property
    def tars(self) -> list[str]:
        return sorted(map(str, self.shards.glob("*.tar")))

    @property
    def count(self) -> int:
        return int(json.loads((self.shards / "index.json").read_text())["samples"])


# tlx


def tlx(cell: Cell, *, scaled: bool = True) -> Iterable[Any]:
    from tlx.bench.data import Setup, looks_of
    from tlx.data.shards.manifest import Manifest

    looks = looks_of(Manifest.open(cell.shards), Setup(scaled=scaled))
    look = next(look for look in looks if look.name == cell.view)
    return ((images,) for images in look.batches(batch=min(BATCH, cell.count), workers=cell.workers))


def tlx_full(cell: Cell) -> Iterable[Any]:
    return tlx(cell, scaled=False)


def tlx_wheels(cell: Cell) -> Iterable[Any]:
    from tlx.data.pixels import jpeg_region as regions

    regions._jpeg = None
    return tlx(cell)


def floor_c(cell: Cell) -> Iterable[Any]:
    """floor.c over bytes in memory: no tar, no labels, nothing random while it runs."""
    from tlx.bench.data import Setup, looks_of
    from tlx.data.pixels.crop_geometry import Draw
    from tlx.data.shards.manifest import Manifest
    from tlx.data.stream.reader import ShardReader

    looks = looks_of(Manifest.open(cell.shards), Setup())
    look = next(look for look in looks if look.name == cell.view)
    library = floor_library(cell.work)
    floor, width, height = library.floor_new(), ctypes.c_int(), ctypes.c_int()
    reader = ShardReader(look.manifest)
    pictures = [(reader.read(sample), look.key(sample)) for sample in range(cell.count)]
    boxes = np.empty((len(pictures), 4))
    for (data, key), box in zip(pictures, boxes, strict=True):
        library.floor_header(floor, data, len(data), ctypes.byref(width), ctypes.byref(height))
        (left, top, across, down), resized, window, _ = look.framing(width.value, height.value, Draw(key))
        sx, sy = across / resized[0], down / resized[1]
        box[:] = left + window[0] * sx, top + window[1] * sy, window[2] * sx, window[3] * sy
    count = len(pictures)
    data = (ctypes.c_char_p * count)(*(d for d, _ in pictures))
    lengths = (ctypes.c_size_t * count)(*(len(d) for d, _ in pictures))
    out = np.empty((SIDE, SIDE, 3), np.uint8)

    def batches() -> Iterator[Any]:
        for at in range(0, count, BATCH):
            some, size = min(BATCH, count - at), ctypes.sizeof(ctypes.c_void_p)
            failed = library.floor_many(
                floor, some, ctypes.byref(data, at * size), ctypes.byref(lengths, at * size),
                boxes[at:].ctypes.data_as(ctypes.c_void_p), SIDE, ctypes.c_double(2.0 if cell.training else 0.0),
                out.ctypes.data_as(ctypes.c_void_p),
            )  # fmt: skip
            if failed:
                raise RuntimeError(f"{failed} pictures failed")
            yield (np.broadcast_to(out, (some, *out.shape)),)

    return _Again(batches)


def floor_library(work: Path) -> ctypes.CDLL:
    """floor.c, compiled once."""
    built = work / "floor.so"
    if not built.exists() or built.stat().st_mtime < (HERE / "floor.c").stat().st_mtime:
        command = ["cc", "-O3", "-mavx2", "-shared", "-fPIC", "-o", str(built), str(HERE / "floor.c"), "-ljpeg", "-lm"]
        subprocess.run(command, check=True)
    library = ctypes.CDLL(str(built))
    library.floor_new.restype = ctypes.c_void_p
    pointer, number, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_double
    library.floor_header.argtypes = [pointer, ctypes.c_char_p, ctypes.c_size_t, pointer, pointer]
    library.floor_many.argtypes = [pointer, number, pointer, pointer, pointer, number, real, pointer]
    library.floor_one.argtypes = [pointer, ctypes.c_char_p, ctypes.c_size_t, pointer, number, real, pointer]
    return library


def floor_extension(cell: Cell) -> Iterable[Any]:
    """tlx's extension over bytes in memory, as `tlx bench data` measures its floor."""
    from tlx.bench.data import Setup, looks_of
    from tlx.bench.floor import prepare
    from tlx.data.shards.manifest import Manifest
    from tlx.data.stream.reader import ShardReader

    looks = looks_of(Manifest.open(cell.shards), Setup())
    look = next(look for look in looks if look.name == cell.view)
    reader = ShardReader(look.manifest)
    pictures = [(reader.read(sample), look.key(sample)) for sample in range(cell.count)]
    floors = [
        prepare(look.framing, pictures[at : at + BATCH], 3, upright=True, scaled=look.scaled)
        for at in range(0, len(pictures), BATCH)
    ]

    def batches() -> Iterator[Any]:
        for floor in floors:
            floor.resize()
            yield (np.empty((len(floor.cuts) + len(floor.wholes), 0)),)

    return _Again(batches)


@dataclass(frozen=True)
class _Again:
    """Something that can be iterated over more than once."""

    start: Callable[[], Iterator[Any]]

    def __iter__(self) -> Iterator[Any]:
        return self.start()


# torchvision


def v1(cell: Cell) -> Any:
    import torchvision.transforms as T

    first = (
        [T.RandomResizedCrop(SIDE), T.RandomHorizontalFlip()] if cell.training else [T.Resize(256), T.CenterCrop(SIDE)]
    )
    return T.Compose([*first, T.ToTensor(), T.Normalize(MEAN, STD)])


def v2(cell: Cell) -> Any:
    import torchvision.transforms.v2 as T

    if cell.training:
        return T.Compose([T.RandomResizedCrop(SIDE, antialias=True), T.RandomHorizontalFlip()])
    return T.Compose([T.Resize(256, antialias=True), T.CenterCrop(SIDE)])


def pixels(data: bytes) -> torch.Tensor:
    from torchvision.io import ImageReadMode, decode_jpeg

    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)


def one_thread(worker: int = 0) -> None:
    torch.set_num_threads(1)


def data_loader(dataset: Any, cell: Cell, **about: Any) -> Any:
    return torch.utils.data.DataLoader(
        dataset, batch_size=BATCH, num_workers=cell.workers, persistent_workers=cell.workers > 0,
        worker_init_fn=one_thread, **about,
    )  # fmt: skip


def torchvision_v1(cell: Cell) -> Iterable[Any]:
    from torchvision.datasets import ImageFolder

    return data_loader(ImageFolder(cell.folder, v1(cell)), cell, shuffle=True)


def torchvision_v2(cell: Cell) -> Iterable[Any]:
    from torchvision.datasets import ImageFolder

    folder = ImageFolder(cell.folder, v2(cell), loader=lambda file: pixels(Path(file).read_bytes()))
    return data_loader(folder, cell, shuffle=True)


# timm


def timm_loader(dataset: Any, cell: Cell) -> Iterable[Any]:
    from timm.data import create_loader

    return create_loader(
        dataset, (3, SIDE, SIDE), BATCH, is_training=cell.training, use_prefetcher=True, no_aug=False, re_prob=0.0,
        hflip=0.5, color_jitter=0, auto_augment=None, interpolation="bilinear", mean=MEAN, std=STD, crop_pct=0.875,
        num_workers=cell.workers, device=torch.device("cpu"), pin_memory=False, persistent_workers=cell.workers > 0,
    )  # fmt: skip


def timm_folder(cell: Cell) -> Iterable[Any]:
    from timm.data import create_dataset

    return timm_loader(create_dataset("", cell.folder, is_training=cell.training), cell)


def timm_tar(cell: Cell) -> Iterable[Any]:
    from timm.data import create_dataset

    folder = cell.work / f"timm_{cell.set}"
    tars = create_dataset("wds/x", str(folder), split="train", is_training=cell.training, batch_size=BATCH)
    return timm_loader(tars, cell)


def timm_tar_prepare(cell: Cell) -> None:
    folder = cell.work / f"timm_{cell.set}"
    folder.mkdir(exist_ok=True)
    for tar in cell.tars:
        if not (folder / Path(tar).name).exists():
            (folder / Path(tar).name).symlink_to(Path(tar).resolve())
    shards = json.loads((cell.shards / "index.json").read_text())["shards"]
    split = {
        "name": "train",
        "filenames": [s["name"] for s in shards],
        "shard_lengths": [s["samples"] for s in shards],
        "num_samples": cell.count,
    }
    (folder / "_info.json").write_text(json.dumps({"splits": {"train": split}}))


# webdataset


def webdataset_loader(cell: Cell, decoded: Callable[[Any], Any]) -> Iterable[Any]:
    import webdataset as wds

    tars = wds.WebDataset(cell.tars, shardshuffle=len(cell.tars), empty_check=False).shuffle(500)
    batches = decoded(tars).batched(
        BATCH, partial=True, collation_fn=lambda xs: (torch.stack([x[0] for x in xs]), torch.tensor([x[1] for x in xs]))
    )
    return wds.WebLoader(
        batches,
        batch_size=None,
        num_workers=cell.workers,
        persistent_workers=cell.workers > 0,
        worker_init_fn=one_thread,
    )


def webdataset_pil(cell: Cell) -> Iterable[Any]:
    transform = v1(cell)
    return webdataset_loader(
        cell, lambda tars: tars.decode("pilrgb").to_tuple("jpg", "cls").map_tuple(transform, lambda label: label)
    )


def webdataset_v2(cell: Cell) -> Iterable[Any]:
    transform = v2(cell)
    return webdataset_loader(
        cell, lambda tars: tars.to_tuple("jpg", "cls").map_tuple(lambda data: transform(pixels(data)), int)
    )


# DALI, FFCV, litdata, mosaicml-streaming


def dali(cell: Cell) -> Iterable[Any]:
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=BATCH, num_threads=max(cell.workers, 1), device_id=None, prefetch_queue_depth=2)
    def pipeline() -> Any:
        data, label = fn.readers.webdataset(
            paths=cell.tars, ext=["jpg", "cls"], missing_component_behavior="error", random_shuffle=True,
            initial_fill=500, name="tars",
        )  # fmt: skip
        if cell.training:
            images = fn.decoders.image_random_crop(
                data, device="cpu", output_type=types.RGB, random_area=[0.08, 1.0], random_aspect_ratio=[0.75, 4 / 3]
            )
            images = fn.resize(images, resize_x=SIDE, resize_y=SIDE, interp_type=types.INTERP_LINEAR, antialias=True)
        else:
            images = fn.decoders.image(data, device="cpu", output_type=types.RGB)
            images = fn.resize(images, resize_shorter=256, interp_type=types.INTERP_LINEAR, antialias=True)
        images = fn.crop_mirror_normalize(
            images, dtype=types.UINT8, output_layout="HWC", crop=(SIDE, SIDE), mean=[0.0], std=[1.0],
            mirror=fn.random.coin_flip(probability=0.5) if cell.training else 0,
        )  # fmt: skip
        return images, label

    made = pipeline()
    made.build()

    def batches() -> Iterator[Any]:
        for _ in range(-(-cell.count // BATCH)):
            yield (np.asarray(made.run()[0].as_tensor()),)

    return _Again(batches)


def ffcv(cell: Cell) -> Iterable[Any]:
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import CenterCropRGBImageDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, Squeeze, ToTensor, ToTorchImage

    decoder = RandomResizedCropRGBImageDecoder((SIDE, SIDE))
    first = (
        [decoder, RandomHorizontalFlip()] if cell.training else [CenterCropRGBImageDecoder((SIDE, SIDE), SIDE / 256)]
    )
    pipelines = {"image": [*first, ToTensor(), ToTorchImage()], "label": [IntDecoder(), ToTensor(), Squeeze()]}
    return Loader(
        str(cell.work / f"ffcv_{cell.set}.beton"), batch_size=BATCH, num_workers=max(cell.workers, 1),
        order=OrderOption.RANDOM, os_cache=True, drop_last=False, pipelines=pipelines,
    )  # fmt: skip


def ffcv_prepare(cell: Cell) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter
    from torchvision.datasets import ImageFolder

    out = cell.work / f"ffcv_{cell.set}.beton"
    if not out.exists():
        fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=90), "label": IntField()}
        DatasetWriter(str(out), fields, num_workers=1).from_indexed_dataset(ImageFolder(cell.folder))


def litdata(cell: Cell) -> Iterable[Any]:
    import litdata as L

    transform = v2(cell)

    class Pictures(L.StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            sample = super().__getitem__(index)
            return transform(pixels(sample["image"])), sample["label"]

    folder = str(cell.work / f"litdata_{cell.set}")
    return L.StreamingDataLoader(
        Pictures(folder, shuffle=True), batch_size=BATCH, num_workers=cell.workers, persistent_workers=cell.workers > 0
    )


def litdata_prepare(cell: Cell) -> None:
    import litdata as L
    from torchvision.datasets import ImageFolder

    out = cell.work / f"litdata_{cell.set}"
    if not out.exists():
        L.optimize(read_for_litdata, ImageFolder(cell.folder).samples, str(out), chunk_bytes="32MB", num_workers=1)


def read_for_litdata(sample: tuple[str, int]) -> dict[str, Any]:
    return {"image": Path(sample[0]).read_bytes(), "label": sample[1]}


def mosaic(cell: Cell) -> Iterable[Any]:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()  # what an ended process has left would be waited for
    transform = v1(cell)

    class Pictures(StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            sample = super().__getitem__(index)
            return transform(sample["image"].convert("RGB")), sample["label"]

    folder = str(cell.work / f"mosaic_{cell.set}")
    return data_loader(Pictures(local=folder, shuffle=True, batch_size=BATCH), cell)


def mosaic_prepare(cell: Cell) -> None:
    from streaming import MDSWriter
    from torchvision.datasets import ImageFolder

    out = cell.work / f"mosaic_{cell.set}"
    if not out.exists():
        with MDSWriter(out=str(out), columns={"image": "jpeg", "label": "int"}, size_limit=1 << 25) as writer:
            for file, label in ImageFolder(cell.folder).samples:
                writer.write({"image": Image.open(file), "label": label})  # an unread file's bytes stay as they are


@dataclass(frozen=True)
class Peer:
    """Attributes:
    label: for people.
    output: what a batch holds.
    module, package: what has to be importable, and its distribution.
    prepare: the set in the peer's own form.
    needs: other modules that are imported before anything is timed.
    """

    label: str
    output: str
    loader: Callable[[Cell], Iterable[Any]]
    module: str
    package: str
    prepare: Callable[[Cell], None] | None = None
    needs: tuple[str, ...] = ()


PEERS: dict[str, Peer] = {
    "floor-c": Peer("floor: `floor.c`, bytes in memory", "uint8", floor_c, "tlx.bench.data", "tlx"),
    "floor": Peer(
        "floor: tlx's extension, bytes in memory",
        "uint8",
        floor_extension,
        "tlx.bench.data",
        "tlx",
        needs=("tlx.data._jpeg",),
    ),
    "tlx": Peer("**tlx**, C extension", "uint8", tlx, "tlx.bench.data", "tlx", needs=("tlx.data._jpeg",)),
    "tlx-full": Peer(
        "**tlx**, `scaled_decoding: false`", "uint8", tlx_full, "tlx.bench.data", "tlx", needs=("tlx.data._jpeg",)
    ),
    "tlx-wheels": Peer("**tlx** without the extension", "uint8", tlx_wheels, "tlx.bench.data", "tlx"),
    "torchvision-v2": Peer("torchvision v2, ImageFolder", "uint8", torchvision_v2, "torchvision", "torchvision"),
    "webdataset-v2": Peer(
        "webdataset + torchvision v2", "uint8", webdataset_v2, "webdataset", "webdataset", needs=("torchvision",)
    ),
    "ffcv": Peer("FFCV, jpg mode", "uint8", ffcv, "ffcv.loader", "ffcv", ffcv_prepare),
    "dali": Peer("DALI on the CPU, webdataset reader", "uint8", dali, "nvidia.dali", "nvidia-dali-cuda120"),
    "litdata": Peer(
        "litdata + torchvision v2", "uint8", litdata, "litdata", "litdata", litdata_prepare, ("torchvision",)
    ),
    "timm-folder": Peer("timm's loader, folder", "uint8, then float32", timm_folder, "timm.data", "timm"),
    "timm-tar": Peer("timm's loader, tar", "uint8, then float32", timm_tar, "timm.data", "timm", timm_tar_prepare),
    "torchvision-v1": Peer("torchvision v1, ImageFolder", "float32", torchvision_v1, "torchvision", "torchvision"),
    "webdataset-pil": Peer(
        "webdataset + PIL + torchvision v1",
        "float32",
        webdataset_pil,
        "webdataset",
        "webdataset",
        needs=("torchvision",),
    ),
    "mosaic": Peer(
        "mosaicml-streaming + torchvision v1",
        "float32",
        mosaic,
        "streaming",
        "mosaicml-streaming",
        mosaic_prepare,
        ("torchvision",),
    ),
}


def measure(peer: Peer, cell: Cell, seconds: float) -> dict[str, Any]:
    """CPU milliseconds per image over the process tree, and images a second by the clock.

    Without workers, a stretch of time after a warm-up. With workers, whole epochs after one: a stretch that ends in
    their middle would leave out what they have begun.
    """
    began = time.perf_counter()
    loader = peer.loader(cell)
    batches = endless(loader, cell.count)
    next(batches)
    first = time.perf_counter() - began
    ended, until = False, time.perf_counter() + min(0.2, seconds / 2)
    while time.perf_counter() < until or (cell.workers and not ended):
        ended = not next(batches)
    watch, images, until = Watch(processes=True), 0, time.perf_counter() + seconds
    ended = False
    while time.perf_counter() < until or (cell.workers and not ended):
        some = next(batches)
        images, ended = images + some, not some
    spent = watch.read().per(images)
    return {"cpu_ms": 1e3 * spent.cpu, "images_per_s": 1 / spent.wall, "first_s": first}


def quality(cell: Cell, peer: Peer, most: int = 48) -> dict[str, float]:
    """How near tlx's pictures are to Pillow's: the whole picture decoded, the crop cut out, resized with antialiasing.

    Returns:
        PSNR in dB, mean and least.
    """
    from tlx.bench.data import Setup, looks_of
    from tlx.bench.parts import readable
    from tlx.data.pixels import jpeg_region as regions
    from tlx.data.pixels.crop_geometry import Draw
    from tlx.data.shards.manifest import Manifest

    if peer.loader is tlx_wheels:
        regions._jpeg = None
    looks = looks_of(Manifest.open(cell.shards), Setup(scaled=peer.loader is not tlx_full))
    look = next(look for look in looks if look.name == cell.view)
    pictures, found = look.pictures(), []
    out = np.empty((SIDE, SIDE, 3), np.uint8)
    samples, stored = readable(look, np.arange(min(cell.count, most)))
    for sample, (data, key) in zip(samples, stored, strict=True):
        pictures.show(sample, key, lambda key: None, out)
        image = Image.open(io.BytesIO(data)).convert("RGB")
        (left, top, width, height), resized, window, mirrored = look.framing(*image.size, Draw(key))
        image = image.crop((left, top, left + width, top + height)).resize(resized, Image.Resampling.BILINEAR)
        image = image.crop((window[0], window[1], window[0] + window[2], window[1] + window[3]))
        wanted = np.asarray(image)[:, ::-1] if mirrored else np.asarray(image)
        error = float(np.mean((out.astype(float) - wanted.astype(float)) ** 2))
        found.append(10 * np.log10(255**2 / error) if error else 99.0)
    return {"psnr_mean": float(np.mean(found)), "psnr_least": float(np.min(found))}


def endless(loader: Iterable[Any], count: int) -> Iterator[int]:
    """Sizes of batches, and a 0 after each epoch; of a loader that never ends, after `count` images."""
    seen = 0
    while True:
        began = seen
        for batch in loader:
            images = batch[0] if isinstance(batch, (tuple, list)) else batch["image"]
            size = len(images)
            del batch, images  # or the memory would be in use while the next one is made
            yield size
            seen += size
            if isinstance(loader, Iterator) and seen - began >= count:
                yield 0
                began = seen
        if seen == began:
            raise RuntimeError("there is no whole batch in an epoch")
        yield 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("work", type=Path)
    parser.add_argument("cells", nargs="+")
    parser.add_argument("--seconds", type=float, default=0.6)
    parser.add_argument("--prepare", action="store_true", help="make what the peer needs, once")
    parser.add_argument("--quality", action="store_true", help="compare tlx's pictures with Pillow's")
    asked = parser.parse_args()
    peer = PEERS[asked.peer]
    one_thread()
    for text in asked.cells:
        name, view, workers = text.split(":")
        cell, found = Cell(asked.work, name, view, int(workers)), {}
        try:
            for module in (peer.module, *peer.needs):
                importlib.import_module(module)
            if asked.prepare:
                if peer.prepare is not None:
                    peer.prepare(cell)
            else:
                found = quality(cell, peer) if asked.quality else measure(peer, cell, asked.seconds)
        except Exception as error:  # whatever a peer raises belongs into the table
            found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        print(json.dumps({"peer": asked.peer, "cell": text, **found}), flush=True)
    sys.stdout.flush()
    os._exit(0)  # some peers leave threads or processes behind that would have to be waited for


if __name__ == "__main__":
    main()
