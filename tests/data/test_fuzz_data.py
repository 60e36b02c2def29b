"""Shards and pictures from strangers: read, or refused in words; nothing runs, nothing leaves its folder, no memory is
taken for what is only claimed."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import struct
import tarfile
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from images import encoded, index_shards, make_folder, make_shards, make_target_shards, picture, png_chunk
from mutations import GIB, apart, as_json, changed, kept, many, mutated, nested, odd, outcomes
from PIL import Image
from shard_server import serve

from tlx.base.errors import TlxError, UserError
from tlx.base.location import address
from tlx.cli import shards as cli_shards
from tlx.data.build.content import read as read_picture
from tlx.data.build.content import stored
from tlx.data.build.sources import Picture, Reading, Source
from tlx.data.build.write import BuildOptions, build_shards
from tlx.data.pixels.decode import DecodeError, decode
from tlx.data.remote.cache_room import CacheSpec
from tlx.data.shards.check import check_shards
from tlx.data.shards.examine import examine
from tlx.data.shards.index import scan_tar
from tlx.data.shards.labels import EXTENSIONS, LabelRule, TargetReader, label_of
from tlx.data.shards.manifest import RECORD, Manifest
from tlx.data.shards.tables import read_csv
from tlx.data.shards.target_summary import summarise_targets
from tlx.data.shards.target_values import array_of, names_and_widths, parse_specs
from tlx.data.shards.targets import Target
from tlx.data.stream.reader import ReadError, ShardReader


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = make_shards(
        tmp_path_factory.mktemp("good") / "s", per_class={"train": 4, "val": 2}, size=24, shard_samples=6
    )
    check_shards(folder, jobs=0)  # imports what a limit on memory would not let in
    return folder


@pytest.fixture
def train(built, tmp_path):
    return shutil.copytree(built / "train", tmp_path / "train")


def use(folder):
    """All that is done with an index: counts, places, bytes, names for messages."""
    manifest = Manifest.open(folder)
    reader = ShardReader(manifest)
    manifest.counts()
    for sample in {0, len(manifest) // 2, len(manifest) - 1} & set(range(len(manifest))):
        text = manifest.describe(sample)
        assert text.isprintable()
        with contextlib.suppress(ReadError):
            assert len(reader.read(sample)) == manifest.records["size"][sample]
    return manifest


def write_index(folder, header, records):
    """As a stranger would, who knows how to make the hash."""
    (folder / "index.npy").write_bytes(records)
    header = {**header, "sha256": hashlib.sha256(records).hexdigest()} if isinstance(header, dict) else header
    (folder / "index.json").write_bytes(header if isinstance(header, bytes) else as_json(header))


def parts(folder):
    return json.loads((folder / "index.json").read_bytes()), (folder / "index.npy").read_bytes()


def npy(records):
    buffer = io.BytesIO()
    np.save(buffer, records, allow_pickle=True)
    return buffer.getvalue()


# The index


@many(150, 1000)
def test_damaged_headers_of_an_index(train, count):
    header, records = parts(train)

    def try_all():
        rng = random.Random(1)

        def one(case):
            write_index(train, case, records)
            use(train)

        cases = ((changed(rng, header) if i % 2 else mutated(rng, as_json(header))) for i in range(count))
        return outcomes(cases, one)

    kept(apart(try_all, seconds=600))


@many(150, 1000)
def test_damaged_records_of_an_index(train, count):
    header, records = parts(train)

    def try_all():
        rng = random.Random(2)

        def one(case):
            write_index(train, header, case)
            use(train)

        return outcomes((mutated(rng, records, head=rng.choice((130, None))) for _ in range(count)), one)

    kept(apart(try_all, seconds=600))


def claims(shape, descr="[('offset', '<u8'), ('size', '<u4'), ('label', '<i4')]", order="False", more=b""):
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + more


@pytest.mark.parametrize(
    "records",
    [
        claims("(1000000000000000,)"),
        claims("(1000000000000000,)", more=b"\0" * 160),
        claims("(4611686018427387904,)", more=b"\0" * 160),
        claims("(-1,)", more=b"\0" * 160),
        claims("(3, 4)", more=b"\0" * 192),
        claims("(1,)", descr="'|V1000000000000000'"),
        claims("(1,)", descr="'|O'", more=b"cos\nsystem\n(S'touch ran'\ntR."),
        claims("(" * 4000),
        claims("9" * 9000),
        claims("(__import__('os').system('touch ran'),)", more=b"\0" * 160),
        b"\x93NUMPY\x03\x00" + struct.pack("<I", 2**32 - 1) + b"{",
        b"\x93NUMPY\x09\x09",
        b"cos\nsystem\n(S'touch ran'\ntR." + b"\0" * 200,
        b"",
    ],
    ids=range(14),
)
def test_records_that_claim_what_they_are_not(train, monkeypatch, records):
    monkeypatch.chdir(train)
    write_index(train, parts(train)[0], records)

    def one():
        with pytest.raises(UserError, match="index is damaged"):
            Manifest.open(train)

    apart(one)
    assert not (train / "ran").exists()


@pytest.mark.parametrize(
    "value",
    [
        {"offset": 2**63},
        {"offset": 2**64 - 1},
        {"offset": 0},
        {"offset": 100},
        {"offset": 2**50},
        {"offset": 2**63 - 1, "size": 2**32 - 1},
    ],
)
def test_places_outside_of_the_tar(train, value):
    header, _ = parts(train)
    records = np.array(Manifest.open(train).records)
    for name, number in value.items():
        records[name][0] = number
    for shard in header["shards"]:
        shard["bytes"] = 2**50
    write_index(train, header, npy(records))

    def one():
        with pytest.raises(UserError, match="at a place that is not in that tar"):
            use(train)

    apart(one)


def test_a_picture_that_is_longer_than_its_tar_is(train):
    """In an index that claims a longer tar."""
    header, _ = parts(train)
    records = np.array(Manifest.open(train).records)
    records["size"][0] = 2**32 - 1
    for shard in header["shards"]:
        shard["bytes"] = 2**50
    write_index(train, header, npy(records))

    def one():
        with pytest.raises(ReadError, match="truncated"):
            ShardReader(use(train)).read(0)

    apart(one)


def test_labels_out_of_range(train):
    for label in (-1, 3, 2**31 - 1, -(2**31)):
        records = np.array(Manifest.open(train).records)
        records["label"][3] = label
        header, before = parts(train)
        write_index(train, header, npy(records))
        with pytest.raises(UserError, match="labels without a class name"):
            Manifest.open(train)
        write_index(train, header, before)


NAMES = (
    "../000000.tar",
    "/etc/passwd",
    "a/b.tar",
    "..",
    ".",
    "",
    "pipe:touch ran",
    "pipe:touch ran;{}",
    "x\0.tar",
    "~",
    "-",
)
NAMES += (
    "http://127.0.0.1:1/x.tar",
    "file:///etc/passwd",
    "$(touch ran).tar",
    "`touch ran`",
    ";touch ran",
    "|touch ran",
)
NAMES += ("\x1b[31mx.tar", "\ud800.tar", "x" * 5000, "a\nb.tar", "C:\\x.tar", "%2e%2e%2fx")


@pytest.mark.parametrize("name", NAMES, ids=lambda n: ascii(n)[:20])
def test_names_of_shards_stay_names(train, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    header, records = parts(train)
    header["shards"][0]["name"] = name
    write_index(train, header, records)
    with pytest.raises(UserError) as error:
        Manifest.open(train)
    assert "\x1b" not in str(error.value)
    monkeypatch.setenv("TLX_CACHE", str(tmp_path / "cache"))
    with serve(train) as server:
        for location in (server.url, f"pipe:cat {train}/{{}}"):
            with pytest.raises(UserError):
                Manifest.open(location, CacheSpec(tmp_path / "cache")).tar(0)
    assert not list(tmp_path.rglob("ran"))
    assert {p.name for p in tmp_path.iterdir()} <= {"train", "cache"}


def test_a_tar_named_twice(train):
    header, records = parts(train)
    header["shards"][1]["name"] = header["shards"][0]["name"]
    write_index(train, header, records)
    with pytest.raises(UserError, match="names a tar twice"):
        Manifest.open(train)


def test_a_named_pipe_or_a_device_instead_of_a_tar(train):
    name = Manifest.open(train).shards[0].name
    (train / name).unlink()
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), os.mkdir):
        make(train / name)

        def one():
            manifest = use(train)
            with pytest.raises(ReadError):
                ShardReader(manifest).read(0)
            with pytest.raises(UserError, match="cannot be indexed"):
                index_shards(train, jobs=0)

        apart(one, seconds=20)
        (train / name).rmdir() if (train / name).is_dir() else (train / name).unlink()


@pytest.mark.parametrize("which", ["index.json", "index.npy"])
def test_a_server_that_sends_without_end(train, tmp_path, which):
    """One that would otherwise fill the memory, or the disk."""
    sent = []

    class Endless(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            if not self.path.endswith(which):
                self.wfile.write((train / self.path.lstrip("/")).read_bytes())
                return
            try:
                while sum(sent) < GIB:
                    sent.append(self.wfile.write(b"[" * (1 << 20)))
            except OSError:
                pass

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.raises(UserError, match=r"more than [\d,]+ bytes came"):
        Manifest.open(f"http://127.0.0.1:{server.server_address[1]}", CacheSpec(tmp_path / "cache"))
    server.shutdown()
    server.server_close()
    assert sum(sent) < GIB


@many(25, 133)
def test_damaged_indexes_from_a_server(train, tmp_path, monkeypatch, count):
    monkeypatch.setattr("tlx.data.remote.files.PAUSE_S", 0.0)
    header, records = parts(train)
    rng = random.Random(3)
    with serve(train) as server:

        def one(case):
            write_index(train, *case)
            manifest = Manifest.open(server.url, CacheSpec(tmp_path / "cache"))
            for sample in range(min(len(manifest), 2)):
                ShardReader(manifest).read(sample)
                manifest.describe(sample)

        cases = [(changed(rng, header), records) if i % 2 else (header, mutated(rng, records)) for i in range(count)]
        kept(outcomes(cases, one), "refused")
    kept_there = {p.relative_to(tmp_path / "cache").parts[0] for p in (tmp_path / "cache").rglob("*")}
    assert len(kept_there) <= 2  # the folder of this server, and the cache's own lock


# Where shards are


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.1:1/$(touch ran)",
        "http://127.0.0.1:1/;touch ran;",
        "http://127.0.0.1:1/`touch ran`?x=$(touch ran)",
        "http://$(touch ran)/x",
        "s3://bucket/$(touch ran)/{}",
        "file:///$(touch ran)/{}",
        "memory://x;touch ran",
        "$(touch ran)",
        "; touch ran; {}",
        "|touch ran",
        " pipe:touch ran {}",
        "PIPE:touch ran {}",
        "./pipe:touch ran {}",
        "http://127.0.0.1:1/pipe:touch ran {}",
        "file://x\0y",
        "x\0y",
    ],
)
def test_no_shell_from_locations(tmp_path, monkeypatch, location):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tlx.data.remote.files.PAUSE_S", 0.0)
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: pytest.fail("a command was started"))
    with pytest.raises(UserError):
        Manifest.open(location, CacheSpec(tmp_path / "cache"))
    assert {p.name for p in tmp_path.iterdir()} <= {"cache"}


def test_a_command_runs_only_where_the_user_names_it(built, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    location = f"pipe:touch {tmp_path}/ran; cat {built}/train/{{}}"
    assert len(Manifest.open(location, CacheSpec(tmp_path / "cache"))) == 12
    assert (tmp_path / "ran").exists()  # so this test would notice the others


@given(st.text(max_size=30))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_names_that_reach_a_shell_are_plain(name):
    try:
        command = address("pipe:cat {}", name)
    except UserError:
        return
    assert command == f"cat {name}"
    assert name.isascii()
    assert all(c.isalnum() or c in "._-" for c in name)
    assert name[0] not in ".-"


# Tars


def tar_bytes(format=tarfile.PAX_FORMAT, names=("a/0000", "a/0001", "b/0002"), **pax):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for i, name in enumerate(names):
            for extension, data in (("jpg", JPEG), ("cls", str(i % 2).encode())):
                info = tarfile.TarInfo(f"{name}.{extension}")
                info.size = len(data)
                info.pax_headers = {k: str(v) for k, v in pax.items()} if i == 1 and extension == "jpg" else {}
                tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


JPEG = encoded(picture(1, size=16))
LONG = "ß" * 90 + "/" + "x" * 120


@many(250, 2000)
def test_damaged_tars(built, tmp_path, count):
    folder = tmp_path / "d"
    folder.mkdir()
    bases = [
        tar_bytes(f, names) for f in (0, 1, 2) for names in (("a/0000", "a/0001"), (LONG + "0", LONG + "1"))[: 1 + f]
    ]
    bases += [tar_bytes(comment="x" * 200, size=len(JPEG))]

    def try_all():
        rng = random.Random(4)

        def one(data):
            (folder / "a.tar").write_bytes(data)
            for file in ("index.json", "index.npy"):
                (folder / file).unlink(missing_ok=True)
            index_shards(folder, labels=rng.choice((None, LabelRule("folder"))), jobs=0)
            use(folder)

        def case():
            data = bytearray(mutated(rng, rng.choice(bases)))
            for at in range(0, len(data) - 511, 512):  # a stranger also makes the checksum right
                if data[at + 257 : at + 262] == b"ustar" and rng.random() < 0.9:
                    data[at + 148 : at + 156] = b" " * 8
                    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
            return bytes(data)

        return outcomes((case() for _ in range(count)), one)

    kept(apart(try_all, memory=256 << 20, seconds=900))
    assert {p.name for p in tmp_path.iterdir()} == {"d"}
    assert {p.name for p in folder.iterdir()} <= {"a.tar", "index.json", "index.npy"}


def header_of(name, size, type=b"0", **fields):
    """A member's header with a size that need not be true."""
    info = tarfile.TarInfo(name)
    info.type = type
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    if size is not None:
        block[124:136] = b"%011o\0" % size if 0 <= size < 8**11 else size.to_bytes(12, "big", signed=True)
        if size >= 8**11:
            block[124] = 0x80
    for at, value in fields.values():
        block[at : at + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax_record(key, value):
    text = b" " + key + b"=" + value + b"\n"
    length = len(text) + 1
    while len(b"%d" % length) + len(text) != length:
        length += 1
    return b"%d" % length + text


def pax(type=b"x", size=None, **records):
    """Records before the next member; `size_of_member` is its size."""
    keys = {key: "size" if key == "size_of_member" else key.replace("_", ".") for key in records}
    body = b"".join(pax_record(keys[key].encode(), value) for key, value in records.items())
    return header_of("p", len(body) if size is None else size, type) + body + b"\0" * (-len(body) % 512)


PICTURE = (
    header_of("0.jpg", len(JPEG)) + JPEG + b"\0" * (-len(JPEG) % 512) + header_of("0.cls", 1) + b"0".ljust(512, b"\0")
)
END = b"\0" * 1024
HOSTILE = {
    "a member of 2 to the 60 bytes": header_of("0.jpg", 1 << 60) + JPEG,
    "a member of 2 to the 90 bytes": header_of("0.jpg", 1 << 90) + JPEG,
    "a member of negative length": header_of("0.jpg", -512) + PICTURE + END,
    "a loop by a negative length": PICTURE + header_of("x", -3 * 512) + END,
    "a loop by a negative length in pax": PICTURE + pax(size_of_member=b"-2560") + header_of("x", 0) + END,
    "a length in pax that is no number": pax(GNU_sparse_size=b"x", GNU_sparse_major=b"1", GNU_sparse_minor=b"0")
    + PICTURE
    + END,
    "sparse of pax 0.1": pax(GNU_sparse_map=b"a,b,c", GNU_sparse_size=b"9") + PICTURE + END,
    "sparse of pax 1.0, endless": pax(GNU_sparse_major=b"1", GNU_sparse_minor=b"0", GNU_sparse_realsize=b"%d" % 2**60)
    + header_of("0.jpg", 512)
    + b"9" * 512
    + END,
    "pax headers of 2 to the 60 bytes": pax(size=1 << 60) + PICTURE + END,
    "pax headers of 8 GB": pax(size=8**11 - 1) + PICTURE + END,
    "global headers of 1 GB": pax(b"g", size=1 << 30) + PICTURE + END,
    "a long name of 1 GB": header_of("n", 1 << 30, b"L") + b"x" * 512 + PICTURE + END,
    "a long name of 2 to the 60 bytes": header_of("n", 1 << 60, b"L") + b"x" * 512 + PICTURE + END,
    "pax headers in pax headers": pax(path=b"y") * 20_000 + PICTURE + END,
    "pax headers that take long to search": header_of("p", 512 * 2000, b"x") + b"1" * 512 * 2000 + PICTURE + END,
    "a length in pax of ten thousand digits": pax(size_of_member=b"9" * 10_000) + PICTURE + END,
    "sparse, old": header_of("0.jpg", 512, b"S", real=(483, b"77777777777\0")) + b"x" * 512 + PICTURE + END,
    "a name that is not UTF-8": header_of("0.jpg", 3).replace(b"0.jpg", b"\xff.jpg") + PICTURE,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tars(built, tmp_path, name):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.tar").write_bytes(HOSTILE[name])

    def one():
        with pytest.raises(UserError, match=r"cannot be indexed, \d+ problem"):
            index_shards(tmp_path / "d", jobs=0)

    apart(one, memory=256 << 20, seconds=20)
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["a.tar"]


@pytest.mark.parametrize(
    "type", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]
)
def test_members_that_are_no_files_are_no_samples(tmp_path, type):
    (tmp_path / "d").mkdir()
    link = tarfile.TarInfo("1.jpg")
    link.type, link.linkname = type, "/etc/passwd"
    (tmp_path / "d" / "a.tar").write_bytes(link.tobuf() + header_of("1.cls", 0) + PICTURE + END)
    with pytest.raises(UserError, match="no pictures among cls"):
        index_shards(tmp_path / "d", jobs=0)


def test_names_of_members_lead_nowhere(built, tmp_path):
    names = (
        "../../../evil/0",
        "/tmp/tlx-evil/1",
        "a/../../2",
        "C:\\3",
        "$(touch ran)4",
        "\x1b[31m5",
        "a\nb6",
        "-rf",
        "~/8",
    )
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.tar").write_bytes(tar_bytes(names=names))
    manifest = index_shards(tmp_path / "d", jobs=0)["d"]
    assert len(manifest) == len(names)
    for sample in range(len(manifest)):
        assert manifest.describe(sample).isprintable()
        assert ShardReader(manifest).read(sample) == JPEG
    assert check_shards(tmp_path / "d", jobs=0).good
    assert [p.name for p in tmp_path.iterdir()] == ["d"]
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == ["a.tar", "index.json", "index.npy"]
    assert not os.path.exists("/tmp/tlx-evil")


# Labels


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["label", "cls", "a", "a.b", "0", ""]), inner, max_size=3)
    ),
    max_leaves=8,
).map(as_json)
ODD = [as_json(odd(random.Random(i))) for i in range(40)] + [
    b"9" * 5000,
    b"[" * 10**5,
    b"\xff\xfe",
    b"NaN",
    b'{"a":' * 10**5,
]
ODD += [
    "٣٤".encode(),
    "²".encode(),
    b"1e3",
    b"-1",
    b"0x10",
    b"\0",
    b"2147483648",
    b'{"label": 1e400}',
    b"\xef\xbb\xbf1",
]


@given(
    st.sampled_from([LabelRule(), *(LabelRule(e) for e in EXTENSIONS), LabelRule("folder")])
    | st.text(max_size=12).filter(bool).map(lambda key: LabelRule("json", key)),
    st.sampled_from(EXTENSIONS),
    st.binary(max_size=30) | JSONS | st.sampled_from(ODD),
    st.text(max_size=12),
)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_anything_as_a_label(rule, extension, content, name):
    def one(_):
        label = label_of(rule, f"{name}.jpg", {"jpg": None, extension: None}, lambda _: content)
        assert label.isprintable()
        assert 0 < len(label) <= 1000

    outcomes([content], one, ValueError, TlxError)


def test_a_remembered_key_of_many_parts(train):
    """A stranger's index says where labels are; so many dots would take hours to follow."""
    header, records = parts(train)
    write_index(train, {**header, "labels": {"from": "json", "key": "." * 10**6}}, records)
    apart(lambda: index_shards(train, jobs=0), seconds=20)


# Targets


@pytest.fixture
def tagged(tmp_path):
    """Six samples with a target of each kind."""
    folder = make_target_shards(tmp_path / "tagged", samples=6, size=8).path
    return folder, {
        name: (folder / "targets" / f"{name}.npy").read_bytes() for name in ("colour", "tags", "age", "box")
    }


def use_targets(folder):
    manifest = Manifest.open(folder)
    for name, target in manifest.targets.items():
        assert len(manifest.values(name)) == len(manifest)
        assert target.name == name
    summarise_targets(manifest)


@many(100, 1000)
def test_damaged_targets_of_an_index(tagged, count):
    folder, arrays = tagged
    header = json.loads((folder / "index.json").read_bytes())

    def try_all():
        rng = random.Random(8)

        def one(case):
            (folder / "index.json").write_bytes(as_json(case))
            use_targets(folder)

        def other(case):
            name, content = case
            (folder / "targets" / f"{name}.npy").write_bytes(content)
            said = [
                t | ({"sha256": hashlib.sha256(content).hexdigest()} if t["name"] == name else {})
                for t in header["targets"]
            ]
            (folder / "index.json").write_bytes(as_json({**header, "targets": said}))
            try:
                use_targets(folder)
            finally:
                (folder / "targets" / f"{name}.npy").write_bytes(arrays[name])

        headers = [{**header, "targets": changed(rng, header["targets"])} for _ in range(count // 2)]
        names = [rng.choice(list(arrays)) for _ in range(count // 2)]
        mutations = [(name, mutated(rng, arrays[name], head=rng.choice((130, None)))) for name in names]
        return outcomes(headers, one) + outcomes(mutations, other)

    kept(apart(try_all, seconds=600))
    assert sorted(p.name for p in folder.parent.iterdir()) == ["tagged"]


@given(
    st.sampled_from(["a", "a:labels", "a:number", "a:number=a,0", "a:labels=a,cls", "a=a.b"]),
    st.binary(max_size=30) | JSONS | st.sampled_from(ODD),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_anything_as_a_target(target, content):
    reader = TargetReader(LabelRule.make(targets=[target]))

    def one(_):
        values = reader.read({"jpg": None, "json": None}, lambda _: content)
        names, widths = names_and_widths(values)
        assert all(name.isprintable() and 0 < len(name) <= 1000 for name in names)
        assert all(width > 0 for width in widths)
        made = Target("a", reader.rule.targets[0].kind, tuple(sorted(names)), max(widths, default=1))
        array = array_of(made, values)
        assert array is not None
        assert not np.isinf(array.astype(float)).any()

    outcomes([content], one, ValueError, TlxError)


def test_remembered_targets_of_a_stranger(train):
    header, records = parts(train)
    cases = (["a=" + "." * 10**6], ["a=" + "b," * 10**6], ["a:x"], "a", [3], 7, {"a": 1}, ["../a"], ['a="b\nc'])

    def one(targets):
        write_index(train, {**header, "labels": {"targets": targets}}, records)
        index_shards(train, jobs=0)

    kept(apart(lambda: outcomes(cases, one), seconds=20))


# Pictures


def pictures():
    image, grey = picture(1, size=40), picture(2, size=24).convert("L")
    made = {
        "png": encoded(image, "PNG"),
        "png-p": encoded(image.convert("P"), "PNG"),
        "png-la": encoded(grey.convert("LA"), "PNG"),
        "png-16": encoded(Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100), "PNG"),
        "gif": encoded(image, "GIF"),
        "gif-many": encoded(image, "GIF", save_all=True, append_images=[image.rotate(90)]),
        "bmp": encoded(image, "BMP"),
        "tiff": encoded(image, "TIFF"),
        "ppm": encoded(image, "PPM"),
        "jpeg": encoded(image),
        "jpeg-progressive": encoded(image, progressive=True),
        "jpeg-cmyk": encoded(image.convert("CMYK")),
        "webp": encoded(image, "WEBP"),
        "webp-lossless": encoded(image, "WEBP", lossless=True),
    }
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "tiff_ccitt"):
        one = image.convert("1") if compression == "tiff_ccitt" else image
        made[compression] = encoded(one, "TIFF", compression=None if compression == "tiff_ccitt" else compression)
    return made


def right_checksums(data):
    """Of a PNG's chunks, so that damage gets further."""
    out, at = bytearray(data[:8]), 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunk = data[at + 4 : at + 8 + length]
        out += data[at : at + 4] + chunk + zlib.crc32(chunk).to_bytes(4, "big")
        at += 12 + length
    return bytes(out)


def look(data):
    """All that is done with a stranger's picture."""
    good = decode(data)
    assert good.shape[0] == 3
    decode(data, 1)
    decode(data, 4, upright=False)
    examine(data, measured=True)
    stored(data, "png", resize=16, quality=90, rewrite=False, measured=False)
    return good


@many(25, 166)
def test_damaged_pictures(built, count):
    """`count` of each of nineteen kinds."""

    def try_all():
        rng = random.Random(5)
        total = None
        for name, data in pictures().items():
            assert look(data) is not None

            def case(name=name, data=data):
                damaged = mutated(rng, data, head=rng.choice((100, None)))
                return right_checksums(damaged) if name.startswith("png") and rng.random() < 0.7 else damaged

            seen = outcomes((case() for _ in range(count)), look, DecodeError)
            total = seen if total is None else total + seen
        return total

    # the largest that is taken has 179 million pixels, which may be there a few times while it is converted
    kept(apart(try_all, memory=4 * GIB, seconds=900))


def png(width, height, *more, bits=8, colour=2, rows=1000):
    start = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(b"\0" * rows * min(width, 10_000)))
    return b"\x89PNG\r\n\x1a\n" + start + b"".join(more) + pixels + png_chunk(b"IEND", b"")


def gif(width, height):
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", width, height, 0x80, 0, 0)
        + bytes(6)
        + b","
        + struct.pack("<HHHHB", 0, 0, width, height, 0)
        + b"\x02\x02D\x01\0;"
    )


def tiff(width, height):
    tags = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (273, 4, 1, 8),
        (278, 4, 1, height),
        (279, 4, 1, 100),
    ]
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(struct.pack("<HHII", *t) for t in tags) + bytes(4)


def bmp(width, height):
    return b"BM" + struct.pack("<IHHIIiiHHI", 99, 0, 0, 54, 40, width, height, 1, 24, 0) + bytes(20)


def webp(width, height):
    body = (
        b"VP8X"
        + struct.pack("<I", 10)
        + b"\x02\0\0\0"
        + (width - 1).to_bytes(3, "little")
        + (height - 1).to_bytes(3, "little")
    )
    body += b"ANIM" + struct.pack("<I", 6) + bytes(6)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


BOMBS = {
    "png": png(60_000, 60_000),
    "png of one row": png(2**31 - 1, 1),
    "png of bits": png(60_000, 60_000, bits=1, colour=0),
    "png with a profile": png(8, 8, png_chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(1 << 30), 9)), rows=100),
    "png with a text": png(8, 8, png_chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(1 << 28), 9)), rows=100),
    "gif": gif(65_535, 65_535),
    "bmp": bmp(60_000, 60_000),
    "bmp of negative height": bmp(60_000, -(2**31)),
    "tiff": tiff(60_000, 60_000),
    "tiff of 2 to the 64 pixels": tiff(2**32 - 1, 2**32 - 1),
    "ppm": b"P6\n60000 60000\n255\n",
    "ppm of many digits": b"P6\n" + b"9" * 5000 + b" 9\n255\n",
    "webp": webp(1 << 24, 1 << 24),
    "webp of the largest canvas": webp(16_383, 16_383),
    "jpeg": encoded(picture(1, size=16)).replace(b"\x00\x10\x00\x10\x03", b"\xff\xff\xff\xff\x03", 1),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_decompression_bombs_are_bad_samples(built, kind):
    data = BOMBS[kind]
    assert len(data) < 2_000_000

    def one():
        for channels in (1, 3, 4):
            with contextlib.suppress(DecodeError):
                assert max(decode(data, channels).shape) < 100
                assert "with a" in kind
        return outcomes([data], look, DecodeError)

    apart(one, memory=GIB, seconds=60)


def test_a_bomb_among_samples_is_one_bad_sample(built, tmp_path):
    (tmp_path / "d").mkdir()
    with tarfile.open(tmp_path / "d" / "a.tar", "w") as tar:
        for i, data in enumerate((JPEG, BOMBS["png"], JPEG)):
            for extension, content in (("png", data), ("cls", str(i % 2).encode())):
                info = tarfile.TarInfo(f"{i}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    index_shards(tmp_path / "d", jobs=0)
    report = apart(lambda: check_shards(tmp_path / "d", jobs=0))
    assert [(b.id, "decompression bomb" in b.reason) for b in report.bad] == [(1, True)]


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(ran) (w) file closefile showpage\n%%EOF\n"


def test_no_ghostscript_for_a_strangers_picture(built, tmp_path, monkeypatch):
    """Pillow starts `gs` for EPS, whatever the file is called."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tools / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    for work in (decode, examine, lambda data: stored(data, "jpg", resize=4, quality=90, rewrite=True, measured=True)):
        with pytest.raises(DecodeError):
            work(EPS)
    (tmp_path / "x.photo").write_bytes(EPS)
    with pytest.raises(DecodeError):
        read_picture(Source(("a",), {}), Picture("x", 0, str(tmp_path / "x.photo")))
    assert not (tmp_path / "ran").exists()


# Building


def test_what_is_no_file_among_pictures(built, tmp_path):
    source = make_folder(tmp_path / "p", 2, 3, size=16)
    os.mkfifo(source / "class0" / "pipe.jpg")
    (source / "class1" / "zero.jpg").symlink_to("/dev/zero")
    (source / "class1" / "gone.jpg").symlink_to(tmp_path / "gone")
    made = apart(lambda: build_shards(source, tmp_path / "s", BuildOptions(val=0.0, skip_bad=True, jobs=0)), seconds=60)
    said = {b.rpartition("/")[2].partition(":")[0]: b for b in made.bad if "gone" not in b}
    assert sorted(said) == ["pipe.jpg", "zero.jpg"]
    assert all(b.endswith("this is no file") for b in said.values())
    assert len(made.bad) == 3


@many(150, 1000)
def test_damaged_csv_files(built, tmp_path, count):
    reading = Reading(targets=parse_specs(["colour", "tags:labels", "pets:labels=cat,dog", "age:number=x,y"]))
    (tmp_path / "a.jpg").write_bytes(JPEG)
    (tmp_path / "b.jpg").write_bytes(JPEG)
    good = b'path,label,split\na.jpg,rose,train\n"b.jpg",7,val\n'
    tagged = b"path,label,colour,tags,cat,dog,x,y\na.jpg,rose,red,a;?b,1,0,1.5,2\nb.jpg,x,,?,,1,,\n"
    rng = random.Random(6)

    def one(data):
        (tmp_path / "x.csv").write_bytes(data)
        read_csv(tmp_path / "x.csv")

    def other(data):
        (tmp_path / "x.csv").write_bytes(data)
        read_csv(tmp_path / "x.csv", reading)

    kept(outcomes((mutated(rng, good) for _ in range(count)), one))
    kept(outcomes((mutated(rng, tagged) for _ in range(count)), other))


@pytest.mark.parametrize(
    "row", [b"a\0.jpg,x", b"x" * 5000 + b",x", b'"' + b"x" * 200_000 + b'",y', b"a.jpg," + b"9" * 5000]
)
def test_odd_rows_of_a_csv_file(tmp_path, row):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    (tmp_path / "x.csv").write_bytes(b"path,label\n" + row + b"\n")
    outcomes([row], lambda _: read_csv(tmp_path / "x.csv"))


@many(100, 666)
def test_damaged_notes_of_a_build(tmp_path, count):
    source = make_folder(tmp_path / "p", 2, 3, size=16)
    folder = tmp_path / "s"
    build_shards(source, folder, BuildOptions(val=0.0, jobs=0))
    good = json.loads((folder / "build.json").read_bytes())

    def try_all():
        rng = random.Random(7)

        def one(case):
            (folder / "build.json").write_bytes(case if isinstance(case, bytes) else as_json(case))
            with contextlib.redirect_stdout(io.StringIO()):
                cli_shards.show(str(folder))
                cli_shards.build(str(source), folder, val=0.0, jobs=0)

        cases = (changed(rng, good) if i % 4 else mutated(rng, as_json(good)) for i in range(count))
        return outcomes(cases, one)

    kept(apart(try_all, seconds=600))
    assert {p.name for p in tmp_path.iterdir()} == {"p", "s"}


def test_jsons_nested_without_end(train):
    for depth in (10**5, 900):
        (train / "index.json").write_bytes(b"[" * depth)
        with pytest.raises(UserError, match="not an index"):
            Manifest.open(train)
    (train / "index.json").write_bytes(b'{"format": 1, "classes": ' + b"9" * 10**6 + b"}")
    with pytest.raises(UserError, match="not an index"):
        Manifest.open(train)
    (train / "index.json").write_bytes(as_json({"format": nested(400)}))
    with pytest.raises(UserError, match="has format"):
        Manifest.open(train)
    assert scan_tar(train / "000000.tar").problems == ()
    assert RECORD.itemsize == 16
