"""Shards built in parts, as by several machines: the same files as by one, whatever happens to a part."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import socket
import stat
import subprocess
import sys
import time

import pytest
from built import assert_same_files, names, options
from images import make_folder
from PIL import Image
from typer.testing import CliRunner

from tlx.base import locks
from tlx.base.errors import UserError
from tlx.cli.shards import shards
from tlx.data.build import build_folder, build_parts, write
from tlx.data.build.build_parts import Part, at_work_on
from tlx.data.build.datasets import read_items
from tlx.data.build.write import BuildOptions, build_part, build_shards
from tlx.data.shards.check import check_shards

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def whole(src, tmp_path):
    build_shards(str(src), tmp_path / "whole", options())
    return tmp_path / "whole"


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE", 0.3)
    monkeypatch.setattr(build_parts, "_PATIENCE_S", 0.3)
    monkeypatch.setattr(build_parts, "_LOOK_S", 0.01)


def tars(folder):
    return sorted(f"{p.parent.name}/{p.name}" for p in folder.glob("*/*.tar"))


@pytest.mark.parametrize("of", [1, 2, 3, 9])
def test_parts_make_what_one_build_makes(src, whole, tmp_path, of, monkeypatch):
    out, count = tmp_path / "out", len(tars(whole))
    for number in range(of, 0, -1):
        done = build_part(str(src), out, Part(number, of), options())
        assert done.shards == len(range(number - 1, count, of))
        assert (done.before, done.bad, done.already) == (0, (), False)
    assert tars(out) == tars(whole)
    assert "train/index.json" not in names(out)
    monkeypatch.setattr(write, "_stored", None)  # no picture is looked at again
    first = build_shards(str(src), out, options())
    assert not first.already
    assert_same_files(out, whole)
    assert build_part(str(src), out, Part(1, of), options()).already
    assert_same_files(out, whole)


def test_what_parts_found_is_in_the_whole(tmp_path):
    """Unreadable pictures, copies, and what pictures are like."""
    src = make_folder(tmp_path / "src", per_class=15, size=24)
    (src / "class1" / "0003.jpg").write_bytes(b"<html>")
    (src / "class2" / "0004.jpg").write_bytes((src / "class0" / "0005.jpg").read_bytes())
    wanted = options(skip_bad=True, shard_samples=4, resize=16)
    one = build_shards(str(src), tmp_path / "one", wanted)
    bad = [b for i in (1, 2, 3) for b in build_part(str(src), tmp_path / "out", Part(i, 3), wanted).bad]
    many = build_shards(str(src), tmp_path / "out", wanted)
    assert len(one.bad) == len(bad) == len(one.duplicates.groups) == 1
    assert (many.bad, many.duplicates, many.statistics) == (one.bad, one.duplicates, one.statistics)
    assert_same_files(tmp_path / "out", tmp_path / "one")


def test_parts_at_the_same_time(src, whole, tmp_path):
    """All begin at once, each with two processes of its own."""
    out = tmp_path / "out"
    parts = [FORK.Process(target=build_part, args=(str(src), out, Part(i, 3), options(jobs=2))) for i in (1, 2, 3)]
    for part in parts:
        part.start()
    for part in parts:
        part.join()
    assert [p.exitcode for p in parts] == [0, 0, 0]
    build_shards(str(src), out, options())
    assert_same_files(out, whole)


def slowly(src, out, part, jobs=0):
    plain = write._stored

    def slow(*given):
        time.sleep(0.01)
        return plain(*given)

    write._stored = slow
    build_part(str(src), out, part, options(shard_samples=3, jobs=jobs))


def test_a_part_killed_and_started_again(src, tmp_path):
    out, whole = tmp_path / "out", tmp_path / "whole"
    build_shards(str(src), whole, options(shard_samples=3))
    build_part(str(src), tmp_path / "second", Part(2, 2), options(shard_samples=3))
    second = set(tars(tmp_path / "second"))
    other = FORK.Process(target=slowly, args=(src, out, Part(1, 2)))
    killed = FORK.Process(target=slowly, args=(src, out, Part(2, 2)))
    other.start()
    killed.start()
    while not second & set(tars(out)):
        time.sleep(0.001)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    assert any(n.endswith(".tmp") for n in names(out))
    kept = {n: (out / n).stat().st_mtime_ns for n in tars(out)}
    again = build_part(str(src), out, Part(2, 2), options(shard_samples=3))
    assert 0 < again.before < again.shards
    other.join()
    assert other.exitcode == 0  # what it was writing was left alone
    assert {n: (out / n).stat().st_mtime_ns for n in kept} == kept
    build_shards(str(src), out, options(shard_samples=3))
    assert_same_files(out, whole)


def test_finished_too_early(src, whole, tmp_path, impatient):
    """What is missing is written, unless somebody is at it."""
    out = tmp_path / "out"
    build_part(str(src), out, Part(1, 3), options())
    with (
        at_work_on(out, Part(3, 3)),
        pytest.raises(
            UserError, match=rf"parts of this build are at work: part 3/3, process {os.getpid()} on [\s\S]*run this"
        ),
    ):
        build_shards(str(src), out, options())
    assert "train/index.json" not in names(out)
    build_shards(str(src), out, options())
    assert_same_files(out, whole)


def test_the_same_part_twice_at_the_same_time(src, whole, tmp_path, impatient):
    out = tmp_path / "out"
    build_part(str(src), out, Part(1, 2), options())
    with at_work_on(out, Part(2, 2)):
        with pytest.raises(UserError, match=rf"part 2/2 is being built already, by process {os.getpid()} on "):
            build_part(str(src), out, Part(2, 2), options())
        with pytest.raises(UserError, match=r"--part 2/4, while others build part 2/2 here"):
            build_part(str(src), out, Part(2, 4), options())
        assert build_part(str(src), out, Part(1, 2), options()).before == 3
    build_part(str(src), out, Part(2, 4), options())  # nobody is at work: another number of parts is as good
    build_shards(str(src), out, options())
    assert_same_files(out, whole)


def test_a_part_beside_a_whole_build(src, tmp_path, impatient):
    out = tmp_path / "out"
    out.mkdir()
    with (
        locks.locked_folder(out, "mine", todo=""),
        pytest.raises(UserError, match="another build is writing shards here"),
    ):
        build_part(str(src), out, Part(1, 2), options())


def test_other_options_or_pictures_in_one_part(src, tmp_path):
    out = tmp_path / "out"
    build_part(str(src), out, Part(1, 2), options())
    before = names(out)
    for settings, words in (({"resize": 12}, "resize: None there, 12 now"), ({"seed": 1}, "seed: 0 there, 1 now")):
        with pytest.raises(UserError, match=f"interrupted build of another request .*{words}"):
            build_part(str(src), out, Part(2, 2), options(**settings))
    build_part(str(src), out, Part(2, 2), options(jobs=2, skip_bad=True))  # these change nothing
    make_folder(src, per_class=16, size=24)
    with pytest.raises(UserError, match="the source has changed since parts of it were built here"):
        build_part(str(src), out, Part(1, 2), options())
    assert set(before) < set(names(out))


def test_unreadable_pictures_of_a_part(src, tmp_path):
    (src / "class1" / "0003.jpg").write_bytes(b"<html>")
    out, ended = tmp_path / "out", []
    for number in (1, 2):
        try:
            build_part(str(src), out, Part(number, 2), options())
        except UserError as error:
            ended.append(str(error))
    assert len(ended) == 1
    assert "1 unreadable picture:" in ended[0]
    with pytest.raises(UserError, match="1 unreadable picture:"):
        build_shards(str(src), out, options())
    build_shards(str(src), out, options(skip_bad=True))
    assert check_shards(out, jobs=0).good


def test_other_sources(src, tmp_path):
    rows = ["path,label", *(f"{p},{p.parent.name}" for p in sorted(src.rglob("*.jpg")))]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    pictures = [Image.new("L", (8, 8), i) for i in range(20)]
    items = {"train": [(p, i % 2) for i, p in enumerate(pictures)]}
    for source, name in ((str(tmp_path / "list.csv"), "csv"), (read_items(items, ["even", "odd"]), "items")):
        build_shards(source, tmp_path / f"{name}-one", options(shard_samples=4))
        for number in (1, 2):
            build_part(source, tmp_path / name, Part(number, 2), options(shard_samples=4))
        build_shards(source, tmp_path / name, options(shard_samples=4))
        assert_same_files(tmp_path / name, tmp_path / f"{name}-one")
    with pytest.raises(UserError, match=r"--download: every part would download[\s\S]*once before"):
        build_part("torchvision:CIFAR10", tmp_path / "x", Part(1, 2), BuildOptions(root="r", download=True))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("text", ["3", "0/2", "3/2", "a/b", "1/2/3", "-1/2", "1/0", "\u0661/2", "1/9999999"])
def test_parts_that_are_none(text):
    with pytest.raises(UserError, match="--part: "):
        Part.read(text)


@pytest.fixture
def no_locks(monkeypatch):
    def none(*given):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)


@pytest.mark.parametrize("jobs", [0, 2])
def test_a_part_twice_at_the_same_time_without_locks(src, tmp_path, no_locks, jobs):
    """The second begins while the first is in the middle of a shard, and leaves its file alone."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    build_shards(str(src), whole, options(shard_samples=3))
    first, second = (FORK.Process(target=slowly, args=(src, out, Part(1, 2), jobs)) for _ in range(2))
    first.start()
    while not list(out.glob("*/.0*.tar.*.tmp")):
        time.sleep(0.001)
    second.start()
    build_part(str(src), out, Part(2, 2), options(shard_samples=3))
    first.join()
    second.join()
    assert [first.exitcode, second.exitcode] == [0, 0]
    build_shards(str(src), out, options(shard_samples=3))
    assert_same_files(out, whole)


def test_a_build_finished_beside_a_part_without_locks(src, whole, tmp_path, no_locks, monkeypatch):
    """The notes that the part has written are gone when it looks."""
    out, plain = tmp_path / "out", write._write_all

    def finished(*given, **named):
        plain(*given, **named)
        monkeypatch.setattr(write, "_write_all", plain)
        build_shards(str(src), out, options())

    monkeypatch.setattr(write, "_write_all", finished)
    assert build_part(str(src), out, Part(1, 2), options()).already
    assert_same_files(out, whole)


def test_what_is_removed_of_files_that_others_were_writing(src, whole, tmp_path):
    out = tmp_path / "out"
    build_part(str(src), out, Part(1, 2), options())
    gone = FORK.Process(target=time.sleep, args=(0,))
    gone.start()
    gone.join()
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    here, parent = socket.gethostname(), os.getppid()

    def left(host, process, hours=0.0):
        path = out / "train" / f".000001.tar.{host}-{process}.tmp"
        path.write_bytes(b"x")
        os.utime(path, (time.time() - 3600 * hours,) * 2)
        return path

    kept = [left(here, parent), left("other.node-7", gone.pid), left("other", gone.pid, hours=0.9)]
    removed = [left(here, gone.pid), left(here, os.getpid()), left(here, zombie.pid), left(here, "9" * 9)]
    removed += [left("old.node-7", 1, hours=1.1)]
    build_part(str(src), out, Part(2, 2), options())
    assert [p.exists() for p in (*kept, *removed)] == [True] * 3 + [False] * 5
    build_shards(str(src), out, options())
    assert [p.exists() for p in kept] == [True] * 3
    zombie.wait()
    for path in kept:
        os.utime(path, (0, 0))
    assert build_shards(str(src), out, options()).already
    assert_same_files(out, whole)


def test_the_lock_is_of_a_file_that_is_there_and_open_for_writing(tmp_path, impatient, monkeypatch):
    """NFS has no other locks that reach other nodes; and who waited must not have that of a file that is gone."""
    opened, plain = [], fcntl.flock

    def flock(handle, how):
        if not opened:
            (tmp_path / ".lock").unlink()  # as by who held it until now
        if how != fcntl.LOCK_UN:
            mode = fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE
            opened.append((stat.S_ISREG(os.fstat(handle).st_mode), mode))
        return plain(handle, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with locks.locked_folder(tmp_path, "mine", todo=""):
        assert opened == [(True, os.O_RDWR)] * 2
        with pytest.raises(UserError, match="taken"), locks.locked_folder(tmp_path, "taken", todo=""):
            pass
        assert names(tmp_path) == [".lock"]
    assert names(tmp_path) == []


def test_a_build_that_begins_while_one_looks(src, tmp_path, monkeypatch):
    """build.json is not there, and a moment later it is: that is no folder of somebody else."""
    out = tmp_path / "out"
    build_part(str(src), out, Part(1, 2), options())
    reading, seen = build_folder.from_json, []

    def late(content):
        seen.append(content)
        if len(seen) == 1:
            raise FileNotFoundError
        return reading(content)

    monkeypatch.setattr(build_folder, "from_json", late)
    assert build_folder.state_of(out)["state"] == "building"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "build.json").symlink_to("nowhere")
    with pytest.raises(UserError, match="not empty"):
        build_folder.state_of(tmp_path / "other")


def test_the_command(src, whole, tmp_path):
    words = ["build", str(src), str(tmp_path / "out"), "--val", "0.2", "--shard-samples", "10", "--jobs", "1"]
    done = CliRunner().invoke(shards, [*words, "--part", "2/2"])
    assert done.exit_code == 0, done.output
    assert done.output.startswith("part 2/2: 18 samples in 2 shards; ")
    assert "the same command without --part finishes the build" in done.output
    assert "part 9/9: no shard left for it; " in CliRunner().invoke(shards, [*words, "--part", "9/9"]).output
    assert CliRunner().invoke(shards, words).exit_code == 0
    assert_same_files(tmp_path / "out", whole)
    assert "is finished, nothing done" in CliRunner().invoke(shards, [*words, "--part", "1/2"]).output
