"""Every image a user has, through a whole stream, with the C decoder and without it."""

from __future__ import annotations

import io
import resource
import tarfile

import numpy as np
import pytest
from images import index_shards, make_folder, picture
from PIL import Image

from tlx.base.inputs import InputSpec
from tlx.data.build.write import BuildOptions, build_shards
from tlx.data.pixels import decode
from tlx.data.pixels import jpeg_region as regions
from tlx.data.pixels.crop_geometry import Draw
from tlx.data.pixels.fused_crop import Framed, show
from tlx.data.pixels.transforms import eval_transform, train_transform
from tlx.data.shards.manifest import Manifest
from tlx.data.stream.stream import ShardStream, evaluation_batches

SPEC = InputSpec(size=(32, 32))


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def sixteen(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


FILES = {
    "baseline.jpg": lambda i: saved(i, "JPEG", quality=95, subsampling=0),
    "420.jpeg": lambda i: saved(i, "JPEG", quality=95),
    "progressive.jpg": lambda i: saved(i, "JPEG", quality=95, progressive=True),
    "cmyk.jpg": lambda i: saved(i.convert("CMYK"), "JPEG", quality=95),
    "grey.jpg": lambda i: saved(i.convert("L"), "JPEG", quality=95),
    "plain.png": lambda i: saved(i, "PNG"),
    "palette.png": lambda i: saved(i.quantize(200), "PNG"),
    "alpha.png": lambda i: saved(i.convert("RGBA"), "PNG"),
    "sixteen.png": lambda i: saved(sixteen(i), "PNG"),
    "lossless.webp": lambda i: saved(i, "WEBP", lossless=True),
    "old.bmp": lambda i: saved(i, "BMP"),
    "scan.tiff": lambda i: saved(i, "TIFF"),
    "named.jpg": lambda i: saved(i, "PNG"),  # a PNG that is called .jpg
}


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> Manifest:
    """One picture in every format, and another as a second class."""
    place = tmp_path_factory.mktemp("formats")
    for label in (0, 1):
        image = picture(label, size=(60, 90), seed=4)
        (place / "pictures" / f"class{label}").mkdir(parents=True)
        for name, make in FILES.items():
            (place / "pictures" / f"class{label}" / name).write_bytes(make(image))
    build_shards(str(place / "pictures"), place / "shards", BuildOptions(val=0, jobs=0))
    return Manifest.open(place / "shards" / "train")


@pytest.fixture(params=["extension", "wheels", "pillow"])
def path(request, monkeypatch) -> str:
    """How JPEGs are decoded."""
    if request.param == "extension" and regions._jpeg is None:
        pytest.skip("tlx.data._jpeg is not built: no compiler or no libjpeg header")
    if request.param != "extension":
        monkeypatch.setattr(regions, "_jpeg", None)
    if request.param == "pillow":
        monkeypatch.setattr(decode, "torchvision_io", lambda: None)
    return str(request.param)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_format_shows_the_same_picture(everything, path, channels):
    spec = SPEC.for_channels(channels)
    [batch] = evaluation_batches(everything, batch=50, transform=eval_transform(spec), channels=channels)
    assert batch.images.shape == (26, channels, 32, 32)
    for label in (0, 1):
        own = batch.images[batch.labels == label].float()
        grey = own[:, :3].mean(1) if channels > 1 else own[:, 0]
        luma = picture(label, size=(60, 90), seed=4).convert("L").resize((54, 36), Image.Resampling.BILINEAR)
        wanted = np.asarray(luma.crop((11, 2, 43, 34)), np.float32)
        if channels == 1:
            assert np.abs(grey.numpy() - wanted).mean((1, 2)).max() < 8
        else:  # the colours of the one that is grey are its luma
            coloured = [own[i] for i in range(13) if np.abs(own[i, :3].numpy() - own[i, :1].numpy()).max() > 20]
            assert len(coloured) == 11
            assert max(float((c[:3] - coloured[0][:3]).abs().mean()) for c in coloured) < 8
        if channels == 4:
            assert (own[:, 3] == 255).all()
    view = train_transform([("random_resized_crop", {}), ("horizontal_flip", {})], spec)
    shown = next(ShardStream(everything, batch=26, seed=0, transform=view, channels=channels).batches(0, 1))
    assert shown.images.shape == (26, channels, 32, 32)
    assert not shown.bad


def test_extreme_sizes(tmp_path, path):
    folder = make_folder(tmp_path / "pictures", 2, 1)
    rng = np.random.default_rng(0)
    for name, (height, width) in {"dot": (1, 1), "wide": (30, 20_000), "tall": (20_000, 3), "line": (1, 500)}.items():
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        (folder / "class0" / f"{name}.jpg").write_bytes(saved(Image.fromarray(pixels), "JPEG"))
        (folder / "class1" / f"{name}.png").write_bytes(saved(Image.fromarray(pixels), "PNG"))
    build_shards(str(folder), tmp_path / "shards", BuildOptions(val=0, jobs=0))
    manifest = Manifest.open(tmp_path / "shards" / "train")
    [batch] = evaluation_batches(manifest, batch=50, transform=eval_transform(SPEC), skip_bad=True)
    assert len(batch.labels) == 10
    view = train_transform([("random_resized_crop", {}), ("horizontal_flip", {})], SPEC)
    for batch in ShardStream(manifest, batch=10, seed=0, transform=view, scaled=True).batches(0, 5):
        assert not batch.bad


def test_cut_off_files_are_bad_whatever_decodes_them(tmp_path, path):
    """Even those of which the missing part would not be shown; not those with something behind their end."""
    image = picture(0, size=256)
    whole = saved(image, "JPEG", quality=95)
    thumbnail = Image.Exif()
    exif = b"Exif\0\0" + thumbnail.tobytes()[6:] + saved(picture(1, size=16), "JPEG")  # an end marker inside
    cases = {
        "appended": (whole + b"something behind", True),
        "half": (whole[: len(whole) // 2], False),
        "unended": (whole[:-2], False),
        "thumbnail": (saved(image, "JPEG", quality=95, exif=exif)[:-300], False),
    }
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "0.tar", "w") as tar:
        for name, (data, _) in cases.items():
            for member, content in ((f"{name}.jpg", data), (f"{name}.cls", b"0" if name == "half" else b"1")):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    manifest = index_shards(tmp_path / "tars")["tars"]
    bad = [
        b.where.rpartition(" ")[2].removesuffix(".jpg")
        for batch in evaluation_batches(manifest, batch=2, transform=eval_transform(SPEC), skip_bad=True)
        for b in batch.bad
    ]
    assert sorted(bad) == sorted(name for name, (_, good) in cases.items() if not good), path


@pytest.mark.parametrize("shape", [(1, 40_000), (60_000, 1), (2, 30_000)])
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_thin_pictures_take_no_memory(shape, format, path):
    """Resized as a whole they would take gigabytes."""
    pixels = np.repeat(np.linspace(0, 255, max(shape)).astype(np.uint8), 3).reshape(-1, 3)
    pixels = pixels.reshape(*shape, 3) if 1 in shape else np.stack([pixels] * 2)
    data = saved(Image.fromarray(pixels), format, **({"quality": 95, "subsampling": 0} if format == "JPEG" else {}))
    view = eval_transform(InputSpec())
    assert isinstance(view, Framed)
    out, before = np.zeros((224, 224, 3), np.uint8), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if not regions.Regions(view.framing).show(data, 0, out):
        assert path != "extension" or format == "PNG"
        image = decode.decode(data)
        frame = view.framing(image.shape[-1], image.shape[-2], Draw(0))
        out = show(image, frame, bicubic=False).permute(1, 2, 0).numpy()
    assert np.abs(out.astype(float) - 127).max() < 4  # the middle of a ramp
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # KiB
