"""Shards in a folder, copied to a disk of this machine: once per node, and nothing else is different."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
from collections import Counter

import pytest
import torch
from command_runs import raw_for, same_bits
from commands import start, status, tlx, wait_for_step, write_config
from images import all_bytes, encoded, index_shards, picture

from tlx.base.errors import ConfigError, UserError
from tlx.base.inputs import InputSpec
from tlx.data.build.write import BuildOptions, build_shards
from tlx.data.pixels.transforms import eval_transform
from tlx.data.remote import files as remote
from tlx.data.remote.files import ShardUnavailable
from tlx.data.remote.shard_cache import CacheSpec
from tlx.data.shards.manifest import Manifest
from tlx.data.stream.reader import ShardReader
from tlx.data.stream.stream import ShardStream, evaluation_batches
from tlx.plan.config import parse
from tlx.plan.data_config import CacheConfig
from tlx.train import data as feed

VIEW = eval_transform(InputSpec(size=(16, 16)))


@pytest.fixture
def stage(tmp_path):
    return CacheSpec(tmp_path / "local", stage=True)


@pytest.fixture
def copied(monkeypatch):
    """How often each file was read from where it lies, in this process."""
    counts: Counter[str] = Counter()
    plain = remote._of_folder

    def counted(path, begun):
        counts[path.name] += 1
        return plain(path, begun)

    monkeypatch.setattr(remote, "_of_folder", counted)
    return counts


def tars(spec):
    return sorted(p.name.partition("-")[2] for p in spec.folder.glob("*/*.tar"))


def test_the_same_data_under_the_same_names(folder, stage, copied):
    here, staged = Manifest.open(folder), Manifest.open(folder, stage)
    assert (staged.digest, staged.location, staged.name) == (here.digest, here.location, here.name)
    assert tars(stage) == []  # nothing before it is needed
    assert all_bytes(staged) == all_bytes(here)
    assert [staged.describe(i) for i in (0, 20)] == [here.describe(i) for i in (0, 20)]
    assert tars(stage) == sorted(s.name for s in here.shards)
    assert all_bytes(Manifest.open(os.path.relpath(folder), stage)) == all_bytes(here)
    assert set(copied.values()) == {1}
    assert len(copied) == 1 + len(here.shards)  # index.npy and the tars
    assert not Manifest.open(folder, CacheSpec(stage.folder)).remote


@pytest.mark.parametrize("hashes", [True, False])
def test_shards_that_were_built_anew_are_copied_anew(tmp_path, stage, hashes):
    """Pictures of one size, without compression: the former tars, of the same names, lengths and layout, would do."""
    pictures, out = tmp_path / "pictures", tmp_path / "out"
    for place in range(24):
        file = pictures / f"c{place % 3}" / f"{place}.bmp"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(picture(place % 3, size=16, seed=place), "BMP"))
    seen = []
    for seed in (0, 1):
        shutil.rmtree(out, ignore_errors=True)
        build_shards(str(pictures), out, BuildOptions(val=0.0, seed=seed, shard_samples=9, jobs=1))
        here = index_shards(out / "train", hashes=hashes, jobs=0)["train"]
        staged = Manifest.open(out / "train", stage)
        assert all_bytes(staged) == all_bytes(here)
        seen.append(([(s.name, s.bytes) for s in here.shards], here.records["offset"].tolist(), all_bytes(here)))
    assert seen[0][:2] == seen[1][:2]
    assert seen[0][2] != seen[1][2]
    shutil.rmtree(out)
    assert all_bytes(pickle.loads(pickle.dumps(Manifest.open(out / "train", stage)))) == seen[1][2]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_batches(folder, stage, workers):
    def seen(manifest):
        stream = ShardStream(manifest, batch=8, seed=3, transform=VIEW, window=2, workers=workers)
        batches = [*stream.batches(0, 10), *evaluation_batches(manifest, batch=7, transform=VIEW, workers=workers)]
        return [(b.ids.tolist(), b.images.clone()) for b in batches]

    here, staged = seen(Manifest.open(folder)), seen(Manifest.open(folder, stage))
    assert [ids for ids, _ in staged] == [ids for ids, _ in here]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(here, staged, strict=True))


def test_processes_copy_once(folder, stage, tmp_path, monkeypatch):
    plain, log = remote._of_folder, tmp_path / "log"

    def told(path, begun):
        with log.open("a") as file:
            file.write(f"{path.name}\n")
        return plain(path, begun)

    monkeypatch.setattr(remote, "_of_folder", told)
    expected = all_bytes(Manifest.open(folder))
    start = multiprocessing.get_context("fork")
    processes = [start.Process(target=read_all, args=(folder, stage, expected)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes] == [0, 0, 0]
    assert sorted(log.read_text().split()) == sorted(["index.npy", *(f"00000{i}.tar" for i in range(5))])


def read_all(folder, spec, expected):
    manifest = Manifest.open(folder, spec)
    manifest.ahead(range(len(manifest.shards)))
    assert all_bytes(manifest) == expected


def test_a_node_takes_only_its_part(folder, stage):
    manifest = Manifest.open(folder, stage)
    stream = ShardStream(manifest, batch=8, seed=3, transform=VIEW, parts=2, rank=1, world=2)
    list(stream.batches(0, stream.steps_per_epoch))
    assert 0 < len(tars(stage)) < len(manifest.shards)


def test_the_source_may_vanish(folder, stage, capsys):
    before = Manifest.open(folder, stage)
    found = all_bytes(before)
    for shard in before.shards:
        (folder / shard.name).unlink()
    assert all_bytes(Manifest.open(folder, stage)) == found  # the index is there, and the tars are here
    shutil.rmtree(folder)
    assert all_bytes(pickle.loads(pickle.dumps(before))) == found
    capsys.readouterr()
    again = Manifest.open(folder, stage)
    assert "the one in the cache is used" in capsys.readouterr().err
    assert (all_bytes(again), again.digest) == (found, before.digest)
    with pytest.raises(UserError, match="no such folder"):
        Manifest.open(folder.parent / "other", stage)


def test_a_shard_that_is_missing_or_of_another_length(folder, stage, copied):
    manifest = Manifest.open(folder, stage)
    names = [s.name for s in manifest.shards]
    (folder / names[0]).unlink()
    with pytest.raises(ShardUnavailable, match=rf"{folder}/{names[0]}: cannot be fetched: No such file"):
        ShardReader(manifest).read(0)
    assert copied[names[0]] == 1  # one who is not there is not asked again
    with pytest.raises(UserError, match=rf"1 of 5 tars are missing: {names[0]}"):
        Manifest.open(folder, stage)
    size = manifest.shards[1].bytes
    for length in (size - 512, size + 512):
        os.truncate(folder / names[1], length)
        with pytest.raises(ShardUnavailable, match=rf"it has {length} bytes there, and {size} in the index"):
            manifest.tar(1)
    (folder / names[2]).unlink()
    os.mkfifo(folder / names[2])
    with pytest.raises(ShardUnavailable, match="this is no file"):
        manifest.tar(2)
    assert tars(stage) == []


def test_folders_that_cannot_be_staged_say_what_they_are(folder, stage):
    with pytest.raises(UserError, match="holds splits: train"):
        Manifest.open(folder.parent, stage)
    (folder / "index.npy").write_bytes(b"half")
    with pytest.raises(UserError, match=r"index\.npy: what came has another hash"):
        Manifest.open(folder, stage)


def test_tars_of_any_name(folder, stage):
    """A name that would not be put into a URL or a shell."""
    header = json.loads((folder / "index.json").read_text())
    odd = "my tar; $(x)\n\u00e9.tar"
    (folder / header["shards"][0]["name"]).rename(folder / odd)
    header["shards"][0]["name"] = odd
    (folder / "index.json").write_text(json.dumps(header))
    staged = Manifest.open(folder, CacheSpec(stage.folder, max(s["bytes"] for s in header["shards"]), stage=True))
    assert all_bytes(staged) == all_bytes(Manifest.open(folder))
    assert len(list(stage.folder.glob("*/*.tar"))) == 1  # it has left again, too


def config_of(folder, **data):
    return parse(
        {
            "run": "x",
            "backbone": {"name": "timm/test_resnet", "weights": "none"},
            "data": {"train": str(folder), "batch": 8, **data},
        }
    )


def test_configured(made, tmp_path):
    local, wanted = tmp_path / "local", {"folder": str(tmp_path / "local"), "stage": True}
    assert feed.cache_of(config_of(made / "train", cache=wanted)) == CacheSpec(local, stage=True)
    with pytest.raises(ConfigError, match=r"data\.cache: .*stage needs `folder`"):
        config_of(made / "train", cache={"stage": True})
    assert not CacheConfig().stage
    config = config_of(made / "train", val=str(made / "val"), cache=wanted)
    plain = config_of(made / "train", val=str(made / "val"))
    assert feed.count_samples(config) == feed.count_samples(plain)
    assert not local.exists()  # a plan copies nothing
    staged, here = feed.open_sets(config), feed.open_sets(plain)
    assert (staged.train.remote, staged.val.remote, here.train.remote) == (True, True, False)


def test_too_small_a_limit(made, tmp_path):
    sizes = [s.bytes for s in Manifest.open(made / "train").shards]
    local = tmp_path / "local"
    for limit, words in ((max(sizes) - 1, "the largest shard"), (sum(sizes) - 1, "5 shards mix")):
        config = config_of(made / "train", cache={"folder": str(local), "stage": True, "limit": limit})
        for look in (feed.count_samples, feed.open_sets):
            with pytest.raises(UserError, match=words):
                look(config)


@pytest.mark.slow
def test_a_training_staged_or_not_or_first_one_and_then_the_other(made, tmp_path):
    """Two ranks through one folder; stopped in the middle, and gone on with the other way."""
    local = tmp_path / "local"
    staging = [f"data.cache.folder={local}", "data.cache.stage=true"]

    def config(name):
        return write_config(tmp_path / f"{name}.yaml", raw_for(made, tmp_path / name, data={"drop_last": True}))

    def train(name, *words):
        done = tlx("train", config(name), *words, ranks=2, is_forked=True)
        assert status(tmp_path / name)["status"] == "done", done.stdout + done.stderr

    train("plain")
    train("staged", *staging)
    assert tars(CacheSpec(local)) == sorted(p.name for p in made.glob("*/*.tar"))
    same_bits(tmp_path / "staged", tmp_path / "plain")
    for name, first, then in (("on", [], staging), ("off", staging, [])):
        process = start("train", config(name), *first, ranks=2)
        wait_for_step(process, tmp_path / name, 30)
        (tmp_path / name / "stop").touch()
        said = process.communicate()[0]
        assert status(tmp_path / name)["status"] == "resumable", said
        train(name, *then)
        same_bits(tmp_path / name, tmp_path / "plain")
