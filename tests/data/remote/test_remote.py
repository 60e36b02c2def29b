"""Shards that come from elsewhere: the same samples, one download per node, whole or an error with words."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import torch
from commands import tlx, write_config
from images import all_bytes, index_shards, make_shards, make_target_shards
from shard_server import serve

from tlx.base.errors import TlxError, UserError
from tlx.base.inputs import InputSpec
from tlx.base.location import address, folder_name, scrubbed, shown
from tlx.base.locks import locked
from tlx.data.pixels.transforms import eval_transform
from tlx.data.remote import cache_room, prefetch, shard_cache
from tlx.data.remote import files as remote
from tlx.data.remote.cache_room import limit_of
from tlx.data.remote.files import IndexUnavailable, ShardUnavailable
from tlx.data.remote.shard_cache import CacheSpec
from tlx.data.shards import index_file
from tlx.data.shards.manifest import RECORD, Manifest, Shard, write_index
from tlx.data.shards.targets import Target
from tlx.data.stream.reader import ShardReader
from tlx.data.stream.stream import ShardStream, evaluation_batches
from tlx.plan.config import dump, parse
from tlx.train import data as feed

VIEW = eval_transform(InputSpec(size=(16, 16)))


@pytest.fixture
def server(folder):
    with serve(folder.parent) as running:
        yield running


@pytest.fixture
def cache(tmp_path):
    return CacheSpec(tmp_path / "cache")


def opened(server, cache):
    return Manifest.open(f"{server.url}/train", cache)


def without_hashes(folder):
    """As earlier versions wrote the index."""
    header = json.loads((folder / "index.json").read_text())
    for shard in header["shards"]:
        del shard["sha256"]
    (folder / "index.json").write_text(json.dumps({**header, "format": 1}, indent=1))


def change(tar, at=700):
    """Other bytes in a tar of the same length, in what fills its first label up to a block."""
    content = bytearray(tar.read_bytes())
    content[at : at + 50] = b"x" * 50
    tar.write_bytes(content)
    return bytes(content)


def waited(until, seconds=20.0):
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def python(code, *words):
    """A process of its own, with `cache` and `url` as it is told."""
    return subprocess.Popen(
        [sys.executable, "-c", dedent(code), *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


READ_ALL = """
    import sys, hashlib, pathlib
    from tlx.data.remote import files as remote
    from tlx.data.shards.manifest import Manifest
    from tlx.data.stream.reader import ShardReader
    from tlx.data.remote.shard_cache import CacheSpec
    url, folder, limit, step = sys.argv[1:]
    manifest = Manifest.open(url, CacheSpec(pathlib.Path(folder), int(limit) or None))
    reader, found = ShardReader(manifest), hashlib.sha256()
    order = list(range(len(manifest)))[:: int(step)]
    read = {i: reader.read(i) for i in order}
    for i in sorted(read):
        found.update(read[i])
    print(found.hexdigest())
"""


# The same data


def test_as_if_they_were_here(folder, server, cache):
    here, there = Manifest.open(folder), opened(server, cache)
    assert there.digest == here.digest
    assert there.classes == here.classes
    assert there.labels.tolist() == here.labels.tolist()
    assert all_bytes(there) == all_bytes(here)
    assert there.describe(20) == here.describe(20).replace(str(folder), f"{server.url}/train")
    assert (there.remote, here.remote, there.name, here.name) == (True, False, "train", "train")
    assert all(n == 1 for n in server.counts().values())
    assert len(server.asked) == 2 + len(here.shards)
    assert there.tar(2).read_bytes() == here.tar(2).read_bytes()
    all_bytes(opened(server, cache))
    assert server.counts() == {name: 1 + (name == "index.json") for name in server.counts()}


@pytest.mark.parametrize("workers", [0, 2])
def test_training_and_evaluation_see_the_same(folder, server, cache, workers):
    def seen(manifest):
        stream = ShardStream(manifest, batch=8, seed=3, transform=VIEW, window=2, workers=workers)
        batches = [*stream.batches(0, 10), *evaluation_batches(manifest, batch=7, transform=VIEW, workers=workers)]
        return [(b.ids.tolist(), b.images.clone()) for b in batches]

    here, there = seen(Manifest.open(folder)), seen(opened(server, cache))
    assert [ids for ids, _ in there] == [ids for ids, _ in here]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(here, there, strict=True))
    assert all(n == 1 for n in server.counts().values())


@pytest.mark.parametrize("protocol", ["memory", "file", "pipe", "pipeline"])
def test_other_protocols(folder, cache, protocol):
    import fsspec

    location = {
        "memory": "memory://bucket/train",
        "file": f"file://{folder}",
        "pipe": f"pipe:cat {folder}/{{}}",
        "pipeline": f"pipe:cat < {folder}/{{}} | (cat; sleep 0.01)",
    }[protocol]
    if protocol == "memory":
        system = fsspec.filesystem("memory")
        for file in folder.iterdir():
            system.pipe(f"/bucket/train/{file.name}", file.read_bytes())
    there = Manifest.open(location, cache)
    assert all_bytes(there) == all_bytes(Manifest.open(folder))
    assert f"{there.shards[0].name}: " in there.describe(0)
    if protocol == "file":
        (folder / there.shards[0].name).unlink()
        there.tar(0).unlink()
        with pytest.raises(ShardUnavailable, match=r"No such file"):
            ShardReader(there).read(0)


def test_handed_to_another_process_without_hashing_again(folder, server, cache, monkeypatch):
    here, there = Manifest.open(folder), opened(server, cache)
    monkeypatch.setattr(index_file, "sha256_of", None)
    monkeypatch.setattr(shard_cache, "sha256_of", None)
    for manifest in (here, there):
        text = pickle.dumps(ShardReader(manifest))
        assert len(text) < 1000
        again = pickle.loads(text)
        assert isinstance(again.manifest.records, np.memmap)
        assert again.read(33) == (ShardReader(manifest)).read(33)
    for path, manifest in ((folder, here), (there.path, there)):
        text = pickle.dumps(manifest)
        header = json.loads((path / "index.json").read_text())
        (path / "index.json").write_text(json.dumps(header, indent=2))
        with pytest.raises(TlxError, match="changed while it was in use"):
            pickle.loads(text)


# What can go wrong on the way


def test_asked_again_until_it_comes(server, cache, folder):
    server.failing, server.only = 3, ""
    assert len(opened(server, cache)) == 42
    server.failing, server.only = remote.TRIES - 1, ".tar"
    assert all_bytes(opened(server, cache)) == all_bytes(Manifest.open(folder))
    assert sorted(server.counts().values())[-2:] == [5, remote.TRIES]


def test_given_up_with_words(server, cache):
    manifest = opened(server, cache)
    server.failing = 1000
    with pytest.raises(ShardUnavailable) as caught:
        ShardReader(manifest).read(0)
    assert str(caught.value).startswith(
        f"{server.url}/train/000000.tar: cannot be fetched: the server says 503 Service Unavailable (8 attempts)\n  -> "
    )
    assert server.counts()["000000.tar"] == remote.TRIES
    assert not isinstance(caught.value, UserError)
    assert not [p for p in manifest.path.iterdir() if ".tar" in p.name]


def test_pauses_grow_and_are_not_alike(server, cache, monkeypatch):
    manifest = opened(server, cache)
    slept = []
    monkeypatch.setattr(remote, "PAUSE_S", 0.5)
    monkeypatch.setattr(remote.time, "sleep", slept.append)
    server.failing = 1000
    for shard in (0, 1):
        with pytest.raises(ShardUnavailable):
            manifest.tar(shard)
    first, second = slept[:7], slept[7:]
    assert first[0] == second[0] == 0
    for pauses in (first, second):
        assert all(2**n / 2 <= p <= 2**n / 2 + 0.5 for n, p in enumerate(pauses[1:], 1))
    assert first[1:] != second[1:]


def test_a_missing_shard_is_not_asked_for_twice_and_no_bad_sample(folder, server, cache):
    manifest = opened(server, cache)
    for name in [s.name for s in manifest.shards]:
        (folder / name).unlink()
    stream = ShardStream(manifest, batch=8, seed=3, transform=VIEW, skip_bad=True)
    with pytest.raises(ShardUnavailable, match="the server says 404 Not Found\n"):
        list(stream.batches(0, 1))
    with pytest.raises(ShardUnavailable):
        list(evaluation_batches(manifest, batch=8, transform=VIEW, skip_bad=True, workers=1))


def test_a_cut_body_goes_on_where_it_ended(folder, server, cache):
    manifest = opened(server, cache)
    server.cut = 3
    assert manifest.tar(0).read_bytes() == (folder / "000000.tar").read_bytes()
    size = manifest.shards[0].bytes
    starts = [int(r.strip("bytes=-") or 0) for path, r in server.asked if path.endswith("000000.tar")]
    assert starts == [0, size // 2, size - size // 4, size - size // 8]


def test_a_cut_body_begins_anew_where_it_has_to(folder, server, cache):
    without_hashes(folder)
    manifest = opened(server, cache)
    server.cut, server.ranges = 2, False
    assert manifest.tar(0).read_bytes() == (folder / "000000.tar").read_bytes()
    changed = bytearray((folder / "000001.tar").read_bytes())
    changed[600] ^= 1  # in the half that had come already
    server.cut, server.ranges = 1, True
    server.after_cut = lambda: (folder / "000001.tar").write_bytes(changed)
    found = manifest.tar(1).read_bytes()
    assert server.asked[-1][1] != ""  # it tried to go on, and was given all of the new one
    assert found == changed


@pytest.mark.parametrize("short", [100, -100])
def test_a_tar_of_another_length(server, cache, short):
    manifest = opened(server, cache)
    server.short = short
    size = manifest.shards[0].bytes
    with pytest.raises(ShardUnavailable, match=rf"it has {size - short} bytes there, and {size} in the index"):
        manifest.tar(0)
    assert server.counts()["000000.tar"] == 2
    assert not [p for p in manifest.path.iterdir() if ".tar" in p.name]


def test_another_version_is_not_joined_to_the_first_part(folder, server, cache):
    """By a server that knows Range, and not If-Range."""
    without_hashes(folder)
    manifest = opened(server, cache)
    server.if_range, server.cut, old = False, 1, (folder / "000000.tar").read_bytes()
    changed = bytes([*old[:600], old[600] ^ 1, *old[601:]])
    server.after_cut = lambda: (folder / "000000.tar").write_bytes(changed)
    assert manifest.tar(0).read_bytes() == changed


def test_attempts_that_bring_more_do_not_count(folder, server, cache, capsys):
    manifest = opened(server, cache)
    server.cut = 6  # each brings half of the rest
    with (folder.parent / "x").open("w+b") as file:
        came = remote.download(manifest._cache.location, "000000.tar", file, size=manifest.shards[0].bytes, tries=2)
    assert (came.bytes, came.sha256) == (manifest.shards[0].bytes, manifest.shards[0].sha256)
    assert capsys.readouterr().err == ""
    server.failing = 2
    manifest.tar(1)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"{server.url}/train/000001.tar: the server says 503 Service Unavailable; asking again in 0 s"


@pytest.mark.parametrize("url", ["http://", "http://[::1", "https:///train", "s3://"])
def test_what_is_no_url_is_not_asked(cache, url, monkeypatch):
    monkeypatch.setattr(remote.time, "sleep", None)
    with pytest.raises(UserError, match=r"not a URL"):
        Manifest.open(url, cache)
    with pytest.raises(IndexUnavailable, match=r"cannot be fetched: .*parse") as caught:
        Manifest.open("http://127.0.0.1:99999/train", cache)
    assert "attempts" not in str(caught.value)


def test_a_command_while_many_files_are_open(folder, cache):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2000:
        pytest.skip("no more than 1,024 files may be open here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (2000, hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        assert len(Manifest.open(f"pipe:cat {folder}/{{}}", cache)) == 42
    finally:
        for file in held:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_dead_server(cache):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/train"
        with pytest.raises(IndexUnavailable, match=r"cannot be fetched: .*Connection refused \(4 attempts\)"):
            Manifest.open(url, cache)


def test_a_silent_server(folder, server, cache, monkeypatch):
    manifest = opened(server, cache)
    monkeypatch.setattr(remote, "SILENT_S", 0.1)
    monkeypatch.setattr(remote, "TRIES", 2)
    monkeypatch.setattr(remote.download, "__kwdefaults__", {**remote.download.__kwdefaults__, "tries": 2})
    server.pause, server.pieces = 0.4, 2
    with pytest.raises(ShardUnavailable, match=r"[Rr]ead timed out"):
        manifest.tar(0)
    with pytest.raises(IndexUnavailable, match=r"silent for 0\.1 s"):
        Manifest.open("pipe:sleep 30; echo {}", cache)


def test_not_an_index(folder, server, cache, tmp_path):
    with pytest.raises(IndexUnavailable, match="404 Not Found"):
        Manifest.open(f"{server.url}/nowhere", cache)
    header = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(header | {"sha256": "0" * 64}))
    with pytest.raises(IndexUnavailable, match="another hash than the index says"):
        opened(server, cache)
    (folder / "index.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match="not an index of tlx"):
        opened(server, cache)
    (folder / "index.json").write_text("<!DOCTYPE html>\n<html>")
    with pytest.raises(IndexUnavailable, match="a web page came in its place, such as one to sign in"):
        opened(server, CacheSpec(cache.folder / "empty"))
    first = header["shards"][0]
    for odd in (
        {"classes": 5},
        {"classes": [1]},
        {"shards": {}},
        {"shards": [5]},
        {"shards": [first | {"samples": "x"}]},
        {"shards": [first | {"bytes": 1 << 70}]},
        {"shards": [{"name": "a.tar"}]},
        {"samples": "x"},
        {"sha256": 7},
        {"shards": [first | {"sha256": "0" * 63}]},
        {"shards": [first | {"sha256": 7}]},
    ):
        (folder / "index.json").write_text(json.dumps(header | odd))
        for location in (folder, f"{server.url}/train"):
            with pytest.raises(UserError, match=r"the index is damaged: index\.json lacks") as caught:
                Manifest.open(location, cache)
            assert f"tlx shards index {folder if location == folder else 'FOLDER'}" in caught.value.todo
    (folder / "index.json").write_text('{"format": 1}')
    with pytest.raises(UserError, match="damaged"):
        opened(server, cache)
    for name in ("a;touch x.tar", "-rf.tar", "$(x).tar", "a b.tar", "é.tar", "a::file.tar", "x\n.tar", "../a.tar"):
        header["shards"][0]["name"] = name
        (folder / "index.json").write_text(json.dumps(header))
        for location in (f"{server.url}/train", f"pipe:cat {folder}/{{}}"):
            with pytest.raises(UserError, match=r"not taken from afar|outside its folder"):
                Manifest.open(location, cache)


def test_commands_that_fail(folder, cache, capfd):
    with pytest.raises(UserError, match=r"needs \{\} where"):
        Manifest.open("pipe:cat index.json", cache)
    with pytest.raises(IndexUnavailable, match="ended with code 3"):
        Manifest.open("pipe:echo half; exit 3 # {}", cache)
    manifest = Manifest.open(f"pipe:test {{}} = 000001.tar && head -c 1000 {folder}/{{}} || cat {folder}/{{}}", cache)
    with pytest.raises(ShardUnavailable, match="1000 of"):
        manifest.tar(1)
    more = Manifest.open(f"pipe:cat {folder}/{{}}; case {{}} in *.tar) echo more;; esac", cache)
    with pytest.raises(ShardUnavailable, match=r"more came than the \d+ bytes"):
        more.tar(1)
    manifest.tar(0)


def test_protocols_that_are_not_there(cache):
    with pytest.raises(UserError, match=r'no protocol "htpp"; did you mean.*"http"'):
        Manifest.open("htpp://host/train", cache)
    with pytest.raises(UserError, match=r'package is missing.*s3fs[\s\S]*pip install "tlx\[remote\]"'):
        Manifest.open("s3://bucket/train", cache)


# Several processes


def test_one_download_for_all_processes(folder, server, cache):
    server.pause = 0.02
    running = [python(READ_ALL, f"{server.url}/train", cache.folder, 0, 1) for _ in range(3)]
    ended = [p.communicate(timeout=60) for p in running]
    assert len({out for out, _ in ended}) == 1, ended
    assert server.counts().pop("index.json") == 3
    assert {n for name, n in server.counts().items() if name != "index.json"} == {1}


def test_one_download_for_all_threads(server, cache):
    manifest = opened(server, cache)
    server.pause = 0.02
    manifest.ahead([0, 1])
    threads = [threading.Thread(target=manifest.tar, args=(s,)) for s in (0, 1, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [server.counts()[f"00000{s}.tar"] for s in (0, 1)] == [1, 1]


def test_what_came_just_now_is_not_fetched_again(server, cache, monkeypatch):
    """Another process is done after this one has looked, and before it has the lock."""
    manifest, other = opened(server, cache), opened(server, cache)

    def late(path):
        monkeypatch.undo()
        other.tar(0)
        return locked(path)

    monkeypatch.setattr(shard_cache, "locked", late)
    manifest.tar(0)
    assert server.counts()["000000.tar"] == 1
    assert not list(manifest.path.glob("*.part"))


BEGIN = """
    import os, pathlib, sys, time
    from tlx.data.shards.manifest import Manifest
    from tlx.data.remote.shard_cache import CacheSpec
    manifest = Manifest.open(sys.argv[1], CacheSpec(pathlib.Path(sys.argv[2])))
    manifest.ahead([0])
    while not list(manifest.path.glob("*.part")) or not list(manifest.path.glob("*.part"))[0].stat().st_size:
        time.sleep(0.01)
    child = os.fork() if sys.argv[3] == "fork" else None
    if child != 0:
        print(child, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("fork", ["fork", "alone"])
def test_a_killed_download_is_in_nobodys_way(folder, server, cache, fork):
    """Neither is a process that was forked during the download and lives on."""
    server.pause, server.pieces = 0.1, 100
    process = python(BEGIN, f"{server.url}/train", cache.folder, fork)
    child = process.stdout.readline().strip()
    try:
        process.kill()
        process.wait()
        assert process.returncode == -signal.SIGKILL
        server.pause = 0
        manifest = opened(server, cache)
        (part,) = manifest.path.glob("*.part")
        with locked(part, wait=False) as file:
            assert file is not None
        assert manifest.tar(0).read_bytes() == (folder / "000000.tar").read_bytes()
        assert not list(manifest.path.glob("*.part"))
    finally:
        if fork == "fork":
            os.kill(int(child), signal.SIGKILL)
        process.stdout.close()
        process.stderr.close()


def test_what_a_killed_download_left_is_removed(server, cache, monkeypatch):
    manifest = opened(server, cache)
    left = manifest.path / "0123456789ab-000004.tar.part"
    left.write_bytes(b"x" * 1000)
    with locked(manifest.path / "0123456789ab-000003.tar.part") as file:
        file.write(b"x")
        manifest.tar(0)
        assert not left.exists()
        assert (manifest.path / "0123456789ab-000003.tar.part").exists()
    part = Path(f"{manifest._here(1)}.part")
    part.write_bytes(b"x" * 1000)
    lengths = []
    monkeypatch.setattr(cache_room, "_free", lambda _: lengths.append(part.stat().st_size) or 10**9)
    manifest.tar(1)
    assert set(lengths) == {0}  # it takes no room from its own successor


# Room


def names(manifest):
    return sorted(p.name.partition("-")[2] for p in manifest.path.iterdir() if p.suffix == ".tar")


def spec_for(cache, manifest, shards):
    return CacheSpec(cache.folder, shards * max(s.bytes for s in manifest.shards))


def test_the_least_recently_used_leaves(folder, server, cache):
    manifest = opened(server, spec_for(cache, Manifest.open(folder), 3))
    for shard in (0, 1, 2):
        manifest.tar(shard)
    reader = ShardReader(manifest)
    first, first_of_one = reader.read(0), int(manifest.ends[0])
    reader.read(first_of_one)
    for shard in (2, 0, 3):
        manifest.tar(shard)
    assert names(manifest) == ["000000.tar", "000002.tar", "000003.tar"]
    expected = all_bytes(Manifest.open(folder))
    assert reader.read(first_of_one) == expected[first_of_one]  # removed, and still open
    assert reader.read(0) == first == expected[0]
    assert server.counts()["000001.tar"] == 1
    manifest.tar(1)
    assert server.counts()["000001.tar"] == 2
    assert names(manifest) == ["000000.tar", "000001.tar", "000003.tar"]


def test_nobody_elses_files_leave(folder, server, cache):
    """A cache in a folder with other things in it, in a place that looks like ours too."""
    others = [cache.folder / "a.tar", cache.folder / "mine-0123456789ab" / "0123456789ab-000000.tar"]
    spec = spec_for(cache, Manifest.open(folder), 1)
    manifest = opened(server, spec)
    others.append(manifest.path / "notes.tar")
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(spec.limit))
    assert all_bytes(manifest) == all_bytes(Manifest.open(folder))
    assert all(path.stat().st_size == spec.limit for path in others)
    assert len(list(manifest.path.glob("*-00000?.tar"))) == 1


def test_the_limit_is_on_all_folders_together(made, folder, server, cache):
    shutil.copytree(made / "val", folder.parent / "val")
    spec = spec_for(cache, Manifest.open(folder), 2)
    train, val = opened(server, spec), Manifest.open(f"{server.url}/val", spec)
    train.tar(0)
    train.tar(1)
    val.tar(0)
    assert train.path.parent == val.path.parent == cache.folder
    assert (names(train), names(val)) == (["000001.tar"], ["000000.tar"])


def test_processes_that_want_more_than_fits(folder, server, cache):
    """Three processes, in three orders, through a cache of two shards."""
    limit = spec_for(cache, Manifest.open(folder), 2).limit
    running = [python(READ_ALL, f"{server.url}/train", cache.folder, limit, step) for step in (1, -1, 1)]
    ended = [p.communicate(timeout=60) for p in running]
    assert len({out for out, _ in ended}) == 1, ended
    assert [p.returncode for p in running] == [0, 0, 0]
    manifest = opened(server, cache)
    assert sum(p.stat().st_size for p in manifest.path.glob("*.tar")) <= limit


def test_a_tar_that_leaves_before_it_is_opened(folder, server, cache, monkeypatch):
    manifest, leaving = opened(server, cache), [3]

    def gone(self, shard, own=Manifest.tar):
        path = own(self, shard)
        leaving[0] -= 1
        if leaving[0] >= 0:
            path.unlink()
        return path

    monkeypatch.setattr(Manifest, "tar", gone)
    assert ShardReader(manifest).read(0) == ShardReader(Manifest.open(folder)).read(0)
    leaving[0] = 1000
    with pytest.raises(ShardUnavailable, match=r"removed from the cache[\s\S]*data\.cache\.limit"):
        ShardReader(manifest).read(0)


def test_too_little_room(folder, server, cache, monkeypatch):
    size = Manifest.open(folder).shards[0].bytes
    manifest = opened(server, CacheSpec(cache.folder, size - 1))
    with pytest.raises(UserError, match=r"000000\.tar is .* MB long, more than data\.cache\.limit") as caught:
        ShardReader(manifest).read(0)
    assert "raise data.cache.limit" in caught.value.todo
    monkeypatch.setattr(cache_room, "_free", lambda _: size // 2)
    for spec in (cache, CacheSpec(cache.folder, 10 * size)):
        with pytest.raises(UserError, match=r"no room on the disk: .*000000\.tar needs .* MB") as caught:
            opened(server, spec).tar(0)
        assert "data.cache.folder" in caught.value.todo
    assert "000000.tar" not in server.counts()
    (cache.folder.parent / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written[\s\S]*data\.cache\.folder"):
        opened(server, CacheSpec(cache.folder.parent / "file"))


def test_a_disk_that_is_full_all_at_once(server, cache, monkeypatch):
    manifest = opened(server, cache)

    def full(*_words, **_named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(remote, "download", full)
    with pytest.raises(UserError, match="no room on the disk: No space left"):
        manifest.tar(0)
    assert not list(manifest.path.glob("*.part"))


# In the background


def test_ahead_in_order_and_not_too_far(folder, server, cache, monkeypatch):
    monkeypatch.setattr(prefetch, "THREADS", 1)
    here = Manifest.open(folder)
    here.ahead([0, 1])  # nothing to do
    manifest = opened(server, spec_for(cache, here, 4))
    manifest.ahead(np.array([4, 2, 0, 1, 3]))
    waited(lambda: names(manifest) == ["000002.tar", "000004.tar"])
    time.sleep(0.1)
    assert [path for path, _ in server.asked[2:]] == ["/train/000004.tar", "/train/000002.tar"]
    manifest.tar(4)
    waited(lambda: "000000.tar" in names(manifest))
    time.sleep(0.1)
    assert len(names(manifest)) == 3
    manifest.ahead([3])
    waited(lambda: "000003.tar" in names(manifest))
    assert "000001.tar" not in server.counts()
    assert len(all_bytes(manifest)) == 42


def test_ahead_after_a_failure(server, cache):
    manifest = opened(server, cache)
    server.failing = 1000
    manifest.ahead(range(5))
    waited(lambda: server.counts()["000000.tar"] == remote.TRIES)
    server.failing = 0
    manifest.ahead(range(5))
    waited(lambda: len(names(manifest)) == 5)


def test_ahead_when_the_room_cannot_be_told():
    fetched, broken = [], [True]

    def limit():
        if broken.pop() if broken else False:
            raise FileNotFoundError(2, "gone")
        return 1000

    def fetch(shard):
        fetched.append(shard.name)
        return Path("/nosuch")

    background, shards = prefetch.Ahead(fetch, limit), [prefetch.Wanted("a", 1, ""), prefetch.Wanted("b", 1, "")]
    for _ in range(2):
        background.go_on_with(shards)
        waited(lambda: background._threads == 0)
    assert sorted(fetched) == ["a", "b"]


# The cache and the world outside


def test_a_changed_index_is_fetched_and_with_it_what_changed(made, folder, server, cache):
    before = opened(server, cache)
    all_bytes(before)
    header = json.loads((folder / "index.json").read_text())
    records = np.load(folder / "index.npy")
    records["size"][0] -= 2  # a picture that is shorter by two bytes at its end, in a tar of the same length
    shards = [Shard(**s) for s in header["shards"]]
    write_index(folder, classes=header["classes"], shards=shards, records=records)
    after = opened(server, cache)
    assert after.digest != before.digest
    assert all_bytes(after) == all_bytes(Manifest.open(folder))
    assert server.counts()["index.npy"] == 2
    assert all(server.counts()[s.name] == 1 for s in shards)  # the bytes of the tars are the same
    without_hashes(folder)  # then they are known by where their pictures lie
    assert all_bytes(opened(server, cache)) == all_bytes(Manifest.open(folder))
    assert server.counts()["000000.tar"] == 2
    assert before.records["size"][0] == records["size"][0] + 2  # who has it open keeps it


def test_a_damaged_copy_is_fetched_anew(folder, server, cache):
    manifest = opened(server, cache)
    os.truncate(manifest.tar(0), 100)
    (manifest.path / "index.npy").write_bytes(b"damaged")
    again = opened(server, cache)
    assert all_bytes(again) == all_bytes(Manifest.open(folder))
    assert server.counts()["000000.tar"] == server.counts()["index.npy"] == 2


def test_without_network(folder, cache, capsys):
    with serve(folder.parent) as server:
        first = ShardReader(opened(server, cache)).read(0)
    manifest = opened(server, cache)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {server.url}/train: its index cannot be fetched (")
    assert line.endswith("the one in the cache is used")
    assert ShardReader(manifest).read(0) == first
    with pytest.raises(ShardUnavailable, match="Connection refused"):
        ShardReader(manifest).read(41)


def test_a_removed_folder_is_not_without_network(folder, server, cache):
    opened(server, cache)
    (folder / "index.json").unlink()
    with pytest.raises(IndexUnavailable, match="404"):
        opened(server, cache)


def test_credentials_go_to_the_server_and_nowhere_else(folder, server, cache, capsys):
    server.password = "open:sesame"
    secret = server.url.replace("://", "://ali:open%3Asesame@") + "/train?token=s3cr3t&sig=a%2Bb"
    manifest = Manifest.open(secret, cache)
    assert all_bytes(manifest) == all_bytes(Manifest.open(folder))
    assert all(path.endswith("?token=s3cr3t&sig=a%2Bb") for path, _ in server.asked)
    server.failing, said = 1000, []
    manifest.tar(0).unlink()
    with pytest.raises(ShardUnavailable) as caught:
        manifest.tar(0)
    said.append(str(caught.value))
    with pytest.raises(IndexUnavailable) as caught:
        Manifest.open(secret.replace("sesame", "nothing"), CacheSpec(cache.folder / "other"))
    said.append(str(caught.value))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        dead = secret.replace(server.url[-5:], str(taken.getsockname()[1]))
        with pytest.raises(IndexUnavailable) as caught:
            Manifest.open(dead, cache)
        said.append(str(caught.value))
    with pytest.raises(IndexUnavailable, match="parse") as caught:  # a client that quotes what it was given
        Manifest.open(secret.replace(server.url[-5:], "99999"), cache)
    said.append(str(caught.value))
    raw = {"run": "r", "data": {"train": secret, "batch": 2}, "backbone": {"name": "torchvision/resnet18"}}
    config = parse(raw)
    assert config.data.train == secret
    said += [dump(config), repr(manifest), manifest.describe(0), manifest.location]
    said += [path.read_text(errors="replace") for path in cache.folder.rglob("*") if path.is_file()]
    said += [str(path) for path in cache.folder.rglob("*")]
    for text in said:
        assert not [s for s in ("sesame", "nothing", "s3cr3t", "a%2Bb", "ali:") if s in text], text[:2000]
    assert f"train: {server.url}/train\n" in dump(config)
    # a link that was signed anew is the same folder
    assert folder_name(secret) != folder_name(secret.replace("/train", "/val"))
    assert folder_name(secret.replace("s3cr3t", "other")) == folder_name(secret)


def test_what_is_shown_of_locations():
    command = "pipe:TOKEN=abc curl -H secret https://me:pw@h/train/{}?k=v | gunzip"
    assert shown(command, "a.tar") == "pipe:curl ... https://h/train/a.tar"
    assert address(command, "a.tar") == "TOKEN=abc curl -H secret https://me:pw@h/train/a.tar?k=v | gunzip"
    assert shown("s3://b/k/", "a.tar") == "s3://b/k/a.tar"
    assert shown("data/train") == "data/train"
    assert address("https://h/a/?t=1", "x.tar") == "https://h/a/x.tar?t=1"
    assert folder_name("pipe:ssh a cat /d/{}") != folder_name("pipe:ssh b cat /d/{}")
    assert folder_name("https://host/data/train").startswith("host-data-train-")
    text = "GET /train/x.tar?k=hush failed at\n https://me:pass@h/train/x.tar?k=hush (user me, hush)"
    assert scrubbed(text, "https://me:pass@h/train?k=hush") == (
        "GET /train/x.tar failed at https://h/train/x.tar (user me, ***)"
    )


# Other bytes of the same length


def test_other_bytes_than_indexed_are_not_taken(folder, server, cache):
    manifest = opened(server, cache)
    expected = manifest.shards[0].sha256
    assert expected == hashlib.sha256((folder / "000000.tar").read_bytes()).hexdigest()
    found = hashlib.sha256(change(folder / "000000.tar")).hexdigest()
    with pytest.raises(ShardUnavailable) as caught:
        ShardReader(manifest).read(0)
    assert f"{server.url}/train/000000.tar: cannot be fetched: what came has another hash" in str(caught.value)
    assert f"SHA-256 {found}, expected {expected}" in str(caught.value)
    assert server.counts()["000000.tar"] == 2
    assert not [p for p in manifest.path.iterdir() if ".tar" in p.name]


def test_tars_that_were_replaced_and_indexed_again_are_fetched_anew(folder, server, cache):
    before = opened(server, cache)
    old = before.tar(0).read_bytes()
    before.tar(1)
    new = change(folder / "000000.tar")
    index_shards(folder, jobs=0)
    after = opened(server, cache)
    assert after.digest == before.digest  # places and labels are the same
    assert after.content != before.content
    assert after.tar(0).read_bytes() == new != old
    after.tar(1)
    assert (server.counts()["000000.tar"], server.counts()["000001.tar"]) == (2, 1)
    assert before.tar(0).read_bytes() == old  # who has the former one in use keeps it


def test_what_came_is_noted_beside_it(folder, server, cache):
    manifest = opened(server, cache)
    path = manifest.tar(0)
    noted = json.loads((path.parent / f".{path.name}.json").read_text())
    assert noted["sha256"] == manifest.shards[0].sha256
    assert noted["version"] == f'"{manifest.shards[0].sha256[:16]}"'  # what the server says
    assert abs(noted["checked"] - time.time()) < 60


def test_without_hashes_the_servers_version_decides(folder, server, cache):
    without_hashes(folder)
    first = opened(server, cache)
    for shard in (0, 1):
        first.tar(shard)
        first.tar(shard)
    assert [server.counts()[f"00000{s}.tar"] for s in (0, 1)] == [1, 1]  # nobody is asked again in one run
    new = change(folder / "000000.tar")
    again = opened(server, cache)
    assert again.digest == first.digest
    assert again.tar(0).read_bytes() == new
    assert again.tar(1).read_bytes() == (folder / "000001.tar").read_bytes()
    assert server.known == 1
    again.tar(1)
    assert pickle.loads(pickle.dumps(again)).tar(1).exists()  # nor by another process of it
    assert server.counts()["000001.tar"] == 2


def test_two_versions_are_not_mixed_in_one_run(folder, server, cache):
    """It was replaced while it had left the cache; or somebody else's start has brought the new one."""
    without_hashes(folder)
    runs = [opened(server, cache) for _ in range(2)]
    old = hashlib.sha256(runs[0].tar(0).read_bytes()).hexdigest()
    runs[1].tar(0)
    new = hashlib.sha256(change(folder / "000000.tar")).hexdigest()
    runs[0].tar(0).unlink()
    for run in runs:
        with pytest.raises(UserError, match=rf"train/000000\.tar: it was replaced .* SHA-256 {new}, before {old}"):
            run.tar(0)
    later = opened(server, cache)
    later.tar(0)
    with pytest.raises(UserError, match=f"SHA-256 {new}, before {old}"):
        runs[1].tar(0)
    assert later.tar(0).exists()


def test_without_hashes_and_without_network_the_cache_is_used(folder, cache, capsys):
    without_hashes(folder)
    with serve(folder.parent) as server:
        first = opened(server, cache)
        first.tar(0)
        second = opened(server, cache)
    assert ShardReader(second).read(0) == ShardReader(Manifest.open(folder)).read(0)
    assert "shards in the cache are used as they are" in capsys.readouterr().err
    assert opened(server, cache).tar(0).exists()  # not even its index is to be had


@pytest.mark.parametrize("protocol", ["memory", "stage", "pipe"])
def test_without_hashes_of_other_places(folder, cache, protocol):
    import fsspec

    without_hashes(folder)
    memory = fsspec.filesystem("memory")

    def put():
        for file in folder.iterdir():
            memory.pipe(f"/other/train/{file.name}", file.read_bytes())

    put()
    location = {"memory": "memory://other/train", "stage": folder, "pipe": f"pipe:cat {folder}/{{}}"}[protocol]
    spec = CacheSpec(cache.folder, stage=protocol == "stage")
    old = Manifest.open(location, spec).tar(0).read_bytes()
    new = change(folder / "000000.tar")
    put()
    # a command does not say which version it prints
    assert Manifest.open(location, spec).tar(0).read_bytes() == (old if protocol == "pipe" else new)


def test_a_cache_of_an_earlier_version_is_asked_about(folder, server, cache):
    without_hashes(folder)
    path = opened(server, cache).tar(0)
    (path.parent / f".{path.name}.json").unlink()
    new = change(folder / "000000.tar")
    assert opened(server, cache).tar(0).read_bytes() == new


# What is no file


def test_a_page_to_sign_in_is_told(folder, server, cache):
    manifest = opened(server, cache)
    server.page = b"<!DOCTYPE html>\n<html><head><title>Sign in to  Example</title></head>" + b" " * 5000
    told = r'a web page \("Sign in to Example"\) came in its place'
    with pytest.raises(ShardUnavailable, match=told + r", such as one to sign in.*netrc \(asked twice\)"):
        manifest.tar(0)
    server.login = "/login?next=secret"
    moved = rf", from {server.url}/login where it is redirected to,"
    with pytest.raises(ShardUnavailable, match=told + moved) as caught:
        manifest.tar(0)
    assert "secret" not in str(caught.value)
    server.only = ""
    with pytest.raises(IndexUnavailable, match=told):
        opened(server, CacheSpec(cache.folder / "other"))
    opened(server, cache)  # as without network
    server.login = "/train/index.json/"
    server.only = "index.json"
    with pytest.raises(IndexUnavailable, match="a web page"):
        opened(server, CacheSpec(cache.folder / "other"))
    server.login = f"{server.url}/train/index.json"  # which is another text than its path
    with pytest.raises(IndexUnavailable, match="redirected in circles, as by a page to sign in"):
        opened(server, CacheSpec(cache.folder / "other"))


def test_a_coding_that_nobody_asked_for_is_told(server, cache):
    manifest = opened(server, cache)
    server.coding = "gzip"
    with pytest.raises(ShardUnavailable, match=r"000000\.tar: .*compressed on the way \(Content-Encoding: gzip\)"):
        manifest.tar(0)
    assert server.counts()["000000.tar"] == 2
    server.coding = "identity"
    manifest.tar(0)


def test_a_compressed_tar_is_told(folder, server, cache):
    manifest = opened(server, cache)
    (folder / "000000.tar").write_bytes(gzip.compress((folder / "000000.tar").read_bytes()))
    with pytest.raises(ShardUnavailable, match=r"what came is compressed \(gzip\)"):
        manifest.tar(0)


def test_parts_that_were_not_asked_for_are_told(server, cache):
    manifest = opened(server, cache)
    server.unasked = True
    told = r"the server sent another part \(bytes 0-\d+/\d+\) than it was asked for, the whole"
    with pytest.raises(ShardUnavailable, match=told):
        manifest.tar(0)


def test_a_server_that_ignores_range_is_told(server, cache):
    manifest = opened(server, cache)
    server.ranges, server.cut = False, 1000
    with pytest.raises(ShardUnavailable, match=r"\(8 attempts\); the server ignores Range, so that every attempt"):
        manifest.tar(0)


# The configuration, and the whole


def config_of(data, **said):
    return parse(
        {
            "run": "r",
            "data": {"batch": 4, **data},
            "backbone": {"name": "timm/test_resnet", "weights": "none"},
            "phases": {"each": {"lr": 0.01, "duration": 1}},
            **said,
        }
    )


def test_places_in_the_configuration(tmp_path, monkeypatch):
    monkeypatch.setenv("TLX_CACHE", str(tmp_path / "c"))
    config = config_of({"train": "https://h//train/", "val": Path("shards//val/")})
    assert (config.data.train, config.data.val) == ("https://h//train/", "shards/val")
    assert feed.cache_of(config) == CacheSpec(tmp_path / "c", None)
    assert feed.cache_of(config_of({"train": "shards/train"})) is None
    said = config_of({"train": "pipe:cat {}", "cache": {"folder": "~/x", "limit": "200GB"}})
    assert feed.cache_of(said) == CacheSpec(Path.home() / "x", 200 * 10**9)
    assert parse(json.loads(said.model_dump_json())).data == said.data
    for limit in ("lots", 0, -1):
        with pytest.raises(UserError, match=r"data\.cache\.limit"):
            config_of({"train": "x", "cache": {"limit": limit}})


def test_a_plan_before_the_shards_can_be_reached(server, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TLX_CACHE", str(tmp_path / "c"))
    known = {"expected": {"classes": 3, "train": 42}}
    assert feed.count_samples(config_of({"train": f"{server.url}/train", **known})).note is None
    planned = feed.count_samples(config_of({"train": f"{server.url}/later?k=v", **known}))
    assert planned.note == f"note: no shards at {server.url}/later yet, planned with data.expected"
    (folder / "index.json").write_text("[]")
    with pytest.raises(UserError, match="damaged"):
        feed.count_samples(config_of({"train": f"{server.url}/train", **known}))


@pytest.mark.slow
def test_two_ranks_train_from_a_server(made, tmp_path):
    raw = {
        "data": {"train": str(made / "train"), "val": str(made / "val"), "batch": 6, "workers": 1, "window": 2},
        "input": {"size": 32},
        "backbone": {"name": "timm/test_resnet", "weights": "none"},
        "phases": {"each": {"lr": 0.01, "duration": 3}},
    }
    with serve(made) as server:
        results = []
        for run in ("here", "there"):
            if run == "there":
                raw["data"] |= {key: f"{server.url}/{key}" for key in ("train", "val")}
            config = write_config(tmp_path / f"{run}.yaml", {"run": str(tmp_path / run), **raw})
            done = tlx("train", config, ranks=2, TLX_CACHE=str(tmp_path / "cache"), is_forked=True)
            assert done.returncode == 0, done.stderr[-3000:]
            results.append(json.loads((tmp_path / run / "result.json").read_text()))
        assert results[0]["best"] == results[1]["best"]
        asked = [path for path, _ in server.asked if not path.endswith("index.json")]
        assert len(asked) == len(set(asked)) == 2 + len(list(made.glob("*/*.tar")))


# Many samples


def test_a_million_samples_are_mapped_and_not_copied(tmp_path):
    """1.3 million in 1,300 shards, in three processes: pages of the index are the files', none are anybody's own."""
    count, shards = 1_300_000, 1300
    records = np.zeros(count, RECORD)
    places = (np.arange(count) % 1000 + 1) * 512
    records["offset"], records["size"], records["label"] = places, 300, np.arange(count) % 1000
    for i in range(shards):
        (tmp_path / f"{i:06d}.tar").touch()
    write_index(
        tmp_path,
        classes=[str(i) for i in range(1000)],
        shards=[Shard(f"{i:06d}.tar", 1000, 513_000) for i in range(shards)],
        records=records,
    )
    code = """
        import pathlib, pickle, sys
        from tlx.data.shards.manifest import Manifest
        def private():
            sizes = [l.split() for l in pathlib.Path("/proc/self/smaps_rollup").read_text().splitlines()]
            return sum(int(s[1]) for s in sizes if s[0] == "Anonymous:") / 1024
        Manifest.open(sys.argv[2])
        before = private()
        manifest = Manifest.open(sys.argv[1])
        pickle.loads(pickle.dumps(manifest))
        assert manifest.counts().tolist() == [1300] * 1000
        assert manifest.shard_of(1_299_999) == 1299 and manifest.samples_per_shard is manifest.samples_per_shard
        maps = pathlib.Path("/proc/self/smaps").read_text().split("index.npy")[1:]
        assert maps and all("Private_Dirty:         0 kB" in m.partition("VmFlags")[0] for m in maps)
        print(private() - before)
    """
    small = make_shards(tmp_path / "small", per_class=1) / "train"
    running = [python(code, tmp_path, small) for _ in range(2)]
    for process in running:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert float(out) < 12  # MiB; the index is 20 of them


def test_shards_are_shown_and_checked_where_they_are(server, folder, tmp_path, monkeypatch):
    from tlx.data.shards.check import check_shards, describe_shards

    monkeypatch.setenv("TLX_CACHE", str(tmp_path / "cached"))
    url = f"{server.url}/train"
    assert describe_shards(url)["train"].counts == describe_shards(folder)["train"].counts
    assert not any(name.endswith(".tar") for name in server.counts())
    report = check_shards(url, jobs=0)
    assert report.good
    assert report.samples == len(Manifest.open(folder))
    Manifest.open(url).tar(1).unlink()
    (folder / "000001.tar").unlink()
    report = check_shards(url, jobs=0)
    assert report.stale == (f"{url}/000001.tar: cannot be fetched: the server says 404 Not Found",)
    assert not report.bad
    assert report.statistics["train"].samples == report.samples - Manifest.open(url).shards[1].samples


def test_a_window_that_the_cache_cannot_hold_is_refused_before_it_thrashes(server, folder, tmp_path):
    from tlx.plan.config import parse
    from tlx.train import data as feed

    sizes = sorted((s.bytes for s in Manifest.open(folder).shards), reverse=True)
    assert len(sizes) >= 3
    raw = {"run": "r", "backbone": {"name": "timm/resnet10t", "weights": "none"}}
    cache = {"folder": str(tmp_path / "kept"), "limit": sum(sizes[:3])}
    asked = {"train": f"{server.url}/train", "batch": 2, "cache": cache}
    with pytest.raises(UserError, match=rf"{len(sizes)} shards mix[\s\S]*data\.window=3,"):
        feed.open_sets(parse(raw | {"data": asked}))
    small = asked | {"cache": cache | {"limit": 10}, "window": 1, "parts": 2}
    with pytest.raises(UserError, match=r"data\.cache\.limit: the largest shard of .* MB long, .* holds 10 bytes"):
        feed.open_sets(parse(raw | {"data": small}))
    for more in ({"window": 3}, {"parts": 2}):
        assert feed.open_sets(parse(raw | {"data": asked | more})).train.remote


@pytest.mark.parametrize("staged", [False, True])
def test_targets_are_fetched_when_they_are_asked_for(tmp_path, cache, staged):
    here = make_target_shards(tmp_path / "elsewhere" / "train", samples=12, size=8)
    with serve(here.path.parent) as server:

        def there():
            if staged:
                return Manifest.open(here.path, CacheSpec(cache.folder, stage=True))
            return opened(server, cache)

        kept = there()
        assert (kept.digest, kept.targets) == (here.digest, here.targets)
        assert not (kept.path / "targets").exists()
        kept.values("age")
        assert [p.name for p in (kept.path / "targets").iterdir()] == ["age.npy"]
        for name in here.targets:
            assert np.array_equal(kept.values(name), here.values(name), equal_nan=name in ("age", "box"))
        assert kept.path != here.path
        assert pickle.loads(pickle.dumps(kept)).values("age").tolist()[0] == [0.0]
        # other values there: the cached ones are fetched anew
        write_index(
            here.path,
            classes=here.classes,
            shards=here.shards,
            records=np.array(here.records),
            targets=[(Target("age", "number"), np.full((12, 1), 7.0))],
        )
        assert there().values("age").tolist() == [[7.0]] * 12
        assert [p.name for p in (kept.path / "targets").iterdir()] == ["age.npy"]  # those of before have left
        (here.path / "targets/age.npy").write_bytes(b"other")
        assert there().values("age").tolist() == [[7.0]] * 12
        (kept.path / "targets/age.npy").unlink()
        again = there()
        with pytest.raises(IndexUnavailable, match=r"targets/age\.npy: "):
            again.values("age")


def test_arrays_of_targets_count_towards_the_limit(tmp_path, cache):
    """Six tars and an array of half a tar, in a cache of two: one and a half are left, so that there is one tar."""
    here = make_target_shards(tmp_path / "elsewhere" / "train", samples=12, shard_samples=2, size=8)
    largest = max(shard.bytes for shard in here.shards)
    width = largest // 2 // 4 // 12
    write_index(
        here.path,
        classes=here.classes,
        shards=here.shards,
        records=np.array(here.records),
        targets=[(Target("age", "number", width=width), np.ones((12, width)))],
    )
    spec = CacheSpec(cache.folder, 2 * largest, stage=True)
    kept = Manifest.open(here.path, spec)
    array = kept.path / "targets" / "age.npy"
    for asked, most in ((False, 2), (True, 1)):
        if asked:
            kept.values("age")
        assert limit_of(spec) == 2 * largest - (array.stat().st_size if asked else 0)
        for shard in range(6):
            kept.tar(shard)
            assert len(list(kept.path.glob("*.tar"))) <= most
        assert len(list(kept.path.glob("*.tar"))) == most
    free = CacheSpec(cache.folder, largest // 2 + 9, stage=True)
    with pytest.raises(UserError, match=r"more than data\.cache\.limit, .*, less what arrays of targets take"):
        Manifest.open(here.path, free).tar(0)
