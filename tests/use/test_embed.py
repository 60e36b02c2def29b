"""`tlx embed`: the vectors that a head takes, in every format, on any number of ranks, and on after a kill."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from commands import invoke, tlx
from composed import finished, raw_of
from images import make_folder
from torch import nn
from typer.testing import CliRunner

import tlx as package
import tlx.use.parted_file as parted
from tlx import models
from tlx.base.errors import UserError
from tlx.cli.main import app
from tlx.data.shards.manifest import Manifest
from tlx.data.stream.randomness import own_randomness
from tlx.ranks.sharing import Sharing
from tlx.use.embed import Embedding, Options
from tlx.use.embedder import EmbedderOptions, embedder_of
from tlx.use.inputs import listed, opened
from tlx.use.parted_file import PartedFile
from tlx.use.vector_file import Embeddings


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory):
    return finished(raw_of(shards, tmp_path_factory.mktemp("r") / "run"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("p"), classes=3, per_class=5, size=(30, 41), seed=7)


def embed(*words):
    """A command that ends well; what its file holds."""
    done = CliRunner().invoke(app, ["embed", *map(str, words), "--workers", "0"])
    if done.exception is not None:
        raise done.exception
    return Embeddings.read(words[words.index("--out") + 1])


def unchanged(name):
    """The backbone that `embedder_of` takes apart."""
    with own_randomness() as seed:
        seed(0)
        return models.load(name, classes=2, weights="none").module.eval()


# What the vectors are


@pytest.mark.parametrize(
    "name", ["test_vit", "test_resnet", pytest.param("deit_tiny_distilled_patch16_224", marks=pytest.mark.slow)]
)
def test_of_timm_they_are_what_goes_into_the_head(name):
    embedder, net = embedder_of(f"timm/{name}", EmbedderOptions("best", "none")), unchanged(f"timm/{name}")
    pixels = torch.randint(0, 256, (2, 3, *embedder.forward.input.size), dtype=torch.uint8)
    with torch.inference_mode():
        shown = embedder.forward._normalise(pixels)
        wanted = net.forward_head(net.forward_features(shown), pre_logits=True)
    wanted = wanted if not isinstance(wanted, tuple) else (wanted[0] + wanted[1]) / 2
    torch.testing.assert_close(embedder.forward.outputs(pixels, batch=2), wanted, rtol=1e-5, atol=1e-5)
    assert embedder.width == wanted.shape[1]


@pytest.mark.parametrize(
    ("name", "head"),
    [("shufflenet_v2_x0_5", "fc"), pytest.param("mobilenet_v3_small", "classifier.3", marks=pytest.mark.slow)],
)
def test_of_torchvision_they_are_what_a_hook_before_the_head_sees(name, head):
    embedder, net = (
        embedder_of(f"torchvision/{name}", EmbedderOptions("best", "none")),
        unchanged(f"torchvision/{name}"),
    )
    seen = []
    net.get_submodule(head).register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    pixels = torch.randint(0, 256, (2, 3, *embedder.forward.input.size), dtype=torch.uint8)
    with torch.inference_mode():
        net(embedder.forward._normalise(pixels))
    torch.testing.assert_close(embedder.forward.outputs(pixels, batch=2), seen[0], rtol=1e-5, atol=1e-5)


def test_of_a_run_the_head_makes_its_outputs_of_them(run, photos, tmp_path):
    found = embed(run, photos, "--out", tmp_path / "a.npy")
    model = package.load(run)
    outputs = model.module.fc(torch.from_numpy(np.array(found.vectors)))
    said = [row["probability"] for row in model.predict(photos)]
    assert outputs.softmax(1).amax(1).tolist() == pytest.approx(said, rel=1e-5)
    assert found.files == sorted(map(str, photos.rglob("*.jpg")))
    assert found.labels == [None] * 15


@pytest.mark.parametrize("head", ["concat_pool", pytest.param("attention_pool", marks=pytest.mark.slow)])
def test_what_a_head_pools_is_averaged(shards, tmp_path, head):
    run = finished(raw_of(shards, tmp_path / "run", head=head, phases={"each": {"lr": 0.02, "duration": 1}}))
    embedder, seen = embedder_of(str(run), EmbedderOptions()), []
    net = package.load(run).module
    net.features.register_forward_hook(lambda _module, _args, output: seen.append(output))
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    with torch.inference_mode():
        net(embedder.forward._normalise(pixels))
    torch.testing.assert_close(embedder.forward.outputs(pixels, batch=2), seen[0].mean((2, 3)))


def test_another_layer(run, photos, tmp_path):
    found = embed(run, photos, "--layer", "features.1", "--out", tmp_path / "a.npy")
    net, seen = package.load(run), []
    net.module.features[1].register_forward_hook(lambda _module, _args, output: seen.append(output.mean((2, 3))))
    net.predict(photos, batch=15)
    np.testing.assert_allclose(found.vectors, seen[0], rtol=1e-5, atol=1e-6)


def test_channels_last_maps_and_tokens_are_averaged_over_positions():
    from tlx.base.inputs import InputSpec
    from tlx.use.embedder import Vectors

    pooled = Vectors(nn.Identity(), None, InputSpec(size=(32, 64)))._pooled
    maps = torch.rand(2, 5, 3, 6)
    assert torch.equal(pooled(maps), maps.mean((2, 3)))
    assert torch.equal(pooled(maps.permute(0, 2, 3, 1)), maps.permute(0, 2, 3, 1).mean((1, 2)))
    assert torch.equal(pooled(maps[:, :, 0]), maps[:, :, 0].mean(1))
    with pytest.raises(UserError, match=r"it gives a tensor of shape \(3,\)"):
        pooled(torch.rand(3))


# Files


def test_every_format_holds_the_same(run, shards, photos, tmp_path):
    pytest.importorskip("pyarrow")
    words = (run, shards / "val", photos, "--label-by-folder", "--batch", 4, "--out")
    first = embed(*words, tmp_path / "a.npy")
    manifest = Manifest.open(shards / "val")
    of_shards = [manifest.classes[label] for label in manifest.labels]
    assert first.labels == [*of_shards, *sorted(f"class{i}" for i in range(3) for _ in range(5))]
    assert first.files[:1] == [manifest.describe(0)]
    assert isinstance(first.vectors, np.memmap)
    for ending in ("parquet", "npz", "csv"):
        other = embed(*words, tmp_path / f"a.{ending}")
        assert (list(other.files), list(other.labels)) == (first.files, first.labels)
        np.testing.assert_array_equal(other.vectors, first.vectors)
    assert Embeddings.read(tmp_path / "a.parquet").about["layer"] == "input of the head"
    names = {"a.npy", "a.npy.rows.jsonl", "a.parquet", "a.npz", "a.csv"}
    assert {p.name for p in tmp_path.iterdir()} == names


def test_half_precision_and_length_one(run, photos, tmp_path):
    pytest.importorskip("pyarrow")
    whole = embed(run, photos, "--out", tmp_path / "a.npy").vectors
    for ending in ("npy", "parquet"):
        half = embed(run, photos, "--dtype", "float16", "--normalise", "--out", tmp_path / f"b.{ending}").vectors
        assert half.dtype == np.float16
        np.testing.assert_array_equal(half, (whole / np.linalg.norm(whole, axis=1)[:, None]).astype(np.float16))


def test_a_number_that_half_precision_does_not_hold_is_told(run, photos, tmp_path):
    embedder = embedder_of(str(run), EmbedderOptions())
    embedder.forward.module.net.features[2].register_forward_hook(lambda _module, _args, output: output * 1e9)
    sources = opened(listed([str(photos)]))
    work = Embedding(embedder, sources, Options(tmp_path / "a.npy", dtype="float16", workers=0))
    with pytest.raises(UserError, match=r"jpg: its vector is not finite in float16\n  -> --dtype float32"):
        list(work.batches(work.asked.parts(1)))


def test_a_picture_that_cannot_be_read(run, photos, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no picture")
    words = (run, *sorted(photos.rglob("*.jpg"))[:2], bad, "--out", tmp_path / "a.npy")
    with pytest.raises(UserError, match=r"bad\.jpg: not a picture"):
        embed(*words)
    found = embed(*words, "--skip-bad")
    assert np.isnan(found.vectors).all(1).tolist() == [False, False, True]
    rows = [json.loads(line) for line in (tmp_path / "a.npy.rows.jsonl").read_text().splitlines()]
    assert rows[2]["file"] == str(bad)
    assert "not a picture" in rows[2]["error"]


# A kill, and ranks


class Killed(BaseException):
    pass


@pytest.mark.parametrize("ending", ["npy", pytest.param("npz", marks=pytest.mark.slow)])
def test_the_same_command_goes_on_and_another_is_refused(run, photos, tmp_path, monkeypatch, ending):
    whole, out = tmp_path / f"whole.{ending}", tmp_path / f"o.{ending}"
    embed(run, photos, "--batch", 2, "--out", whole)
    write, written = parted.write_whole, []

    def one_less(path, content):
        if len(written) == 4:
            raise Killed
        written.append(path.name)
        write(path, content)

    monkeypatch.setattr(parted, "write_whole", one_less)
    with pytest.raises(Killed):
        embed(run, photos, "--batch", 2, "--out", out)
    monkeypatch.setattr(parted, "write_whole", write)
    for words, what in (
        (("--batch", 3), "batch"),
        (("--batch", 2, "--normalise"), "normalised"),
        (("--batch", 2, "--dtype", "float16"), "dtype"),
        (("--batch", 2, "--layer", "features"), "layer"),
    ):
        with pytest.raises(UserError, match=f"o.{ending}.parts: it was begun with other {what}\n"):
            embed(run, photos, *words, "--out", out)
    done = invoke("embed", run, photos, "--batch", 2, "--workers", 0, "--out", out)
    assert "going on, 3 of 8 parts are there" in done.stderr
    assert out.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob("*.parts"))


def test_several_ranks_write_the_same_file(run, photos, shards, tmp_path):
    embedder = embedder_of(str(run), EmbedderOptions())
    for ranks in (1, 3):
        out = tmp_path / f"{ranks}.parquet"
        work = Embedding(embedder, opened(listed([str(photos), str(shards / "val")])), Options(out, batch=4, workers=0))
        file, parts = PartedFile(work, out), work.asked.parts(ranks)
        file.folder.mkdir()
        for rank in reversed(range(ranks)):
            own = range(len(parts))[rank::ranks]
            file.compute(parts, own, Sharing(rank, ranks, torch.device("cpu"), False))
        file.join(parts)
    one, three = (Embeddings.read(tmp_path / f"{ranks}.parquet") for ranks in (1, 3))
    np.testing.assert_array_equal(one.vectors, three.vectors)
    assert one.files == three.files


@pytest.mark.slow
def test_two_ranks_write_the_file_of_one(run, photos, tmp_path):
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}.npy"
        done = tlx("embed", run, photos, "--batch", 2, "--out", out, ranks=ranks, is_forked=True)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "1.npy").read_bytes() == (tmp_path / "2.npy").read_bytes()


# Mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("gone", "PHOTOS"), r"there is no such file or folder, and .*"),
        (("timm/resnet5O", "PHOTOS"), "did you mean"),
        (("RUN", "PHOTOS", "--weights", "none"), "a run has weights of its own"),
        (("RUN", "PHOTOS", "--layer", "feature.1"), "there is no module .*; did you mean"),
        (("RUN", "PHOTOS", "--dtype", "float61"), "did you mean .float16"),
        (("RUN", "EMPTY"), "there are no pictures in this folder"),
        (("RUN", "PHOTOS", "--out", "o.txt"), r"names no format\n  -> end it in .parquet, .npy, .npz or .csv"),
        (("RUN", "PHOTOS", "--out", "there.npy"), "there.npy.rows.jsonl: it is there already"),
    ],
)
def test_a_mistake_is_told(run, photos, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "there.npy.rows.jsonl").write_text("mine")
    names = {"RUN": str(run), "PHOTOS": str(photos), "EMPTY": "empty"}
    words = [names.get(word, word) for word in words]
    words = words if "--out" in words else [*words, "--out", "o.npy"]
    with pytest.raises(UserError, match=message):
        embed(*words)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "there.npy.rows.jsonl"]
