"""A training goes on with the shards that it was trained on, or says which one is another: lengths, times, hashes."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import os
import shutil
import threading

import pytest
from commands import status, tlx, write_config
from composed import composer
from images import index_shards, make_shards
from trainings import alone

from tlx.base.errors import UserError
from tlx.data.pixels import transforms
from tlx.data.remote.shard_cache import CacheSpec
from tlx.data.shards import overlap
from tlx.data.shards.manifest import Manifest
from tlx.plan.config import parse
from tlx.ranks.collectives import World
from tlx.ranks.watch import Watch
from tlx.train import data as feed
from tlx.train import verification
from tlx.train.loop import fit
from tlx.train.resume import resume
from tlx.train.verification import FILE, record_of, verify


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """24 training pictures in three tars."""
    return make_shards(tmp_path_factory.mktemp("v") / "s", per_class={"train": 8, "val": 2}, size=16, shard_samples=8)


@pytest.fixture
def shards(made, tmp_path):
    return shutil.copytree(made, tmp_path / "shards")


@pytest.fixture
def run(tmp_path):
    """The folder of a run that was stopped."""
    folder = tmp_path / "run"
    (folder / "checkpoints" / "step-00000003").mkdir(parents=True)
    return folder


@pytest.fixture
def started(shards, run):
    """Starts: what is compared then, and what the next start will compare with."""

    def start(how="changed", cache=None):
        manifests = {"data.train": Manifest.open(shards / "train", cache)}
        verified = verify(how, run, alone(), manifests)
        (run / FILE).write_text(record_of(verified))
        return verified.notes

    return start


def change(tar, *, later=True):
    """50 other bytes; the hashes before and after. Also within the resolution of the file system's clock."""
    before = tar.stat()
    content = bytearray(tar.read_bytes())
    hashes = [hashlib.sha256(content).hexdigest()]
    content[2000:2050] = bytes(byte ^ 1 for byte in content[2000:2050])
    tar.write_bytes(content)
    hashes.append(hashlib.sha256(content).hexdigest())
    os.utime(tar, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9 * later))
    return hashes


def test_fifty_bytes_changed_while_a_run_was_stopped_are_refused(shards, started, run):
    assert started() == ()
    assert started() == ()
    before, after = change(shards / "train" / "000001.tar")
    for _ in range(2):  # what is refused is not what the next start compares with
        with pytest.raises(UserError) as caught:
            started()
        assert str(caught.value) == (
            "a shard is not what this run was trained on so far:\n"
            f"    {shards}/train/000001.tar: its bytes were changed: their SHA-256 is {after}, expected {before}\n"
            "  -> bring the former files back, or begin anew: another run folder, or --fresh"
        )
    assert started("lengths") == ()  # reads nothing, and leaves it to a later start
    with pytest.raises(UserError, match=f"{after}, expected {before}"):
        started()


def test_a_run_that_has_trained_nothing_takes_shards_as_they_are(shards, started, run):
    started()
    shutil.rmtree(run / "checkpoints")
    change(shards / "train" / "000001.tar")
    assert started() == ()


def test_the_same_bytes_at_another_time_are_the_same(shards, started, monkeypatch):
    """Touched, copied, or brought back; read once, and known by the time at the next start."""
    started()
    for tar in (shards / "train").glob("*.tar"):
        os.utime(tar, ns=(1, 1))
    assert started() == ()
    monkeypatch.setattr(verification, "read_and_compare", lambda *_: pytest.fail("read again"))
    assert started() == ()


def test_all_are_read_where_that_is_asked_for(shards, started, run):
    started("all")
    before, after = change(shards / "train" / "000000.tar", later=False)
    assert started() == ()  # it says that it is as old as before
    for resumed, told in ((True, "not what this run was trained on"), (False, "a shard is not what was indexed")):
        if not resumed:
            (run / "shards.json").unlink()
        with pytest.raises(UserError, match=told) as caught:
            started("all")
        assert f"000000.tar: its bytes were changed: their SHA-256 is {after}, expected {before}" in str(caught.value)


def test_other_bytes_that_were_indexed_are_refused_too(shards, started):
    started()
    before, after = change(shards / "train" / "000002.tar")
    index_shards(shards / "train", jobs=0)
    with pytest.raises(UserError, match=rf"000002\.tar: .* SHA-256 is {after}, expected {before} \(by the index\)"):
        started("lengths")


def test_an_index_without_hashes(shards, started, run):
    """The run was begun by an earlier version: it goes on, and so it does once hashes are added."""
    index_shards(shards / "train", hashes=False, jobs=0)
    assert started() == ()
    (note,) = started("all")
    assert note.startswith("WARNING: 3 shards have no hash in the index, so that changed bytes go unseen: ")
    os.utime(shards / "train" / "000001.tar", ns=(1, 1))
    (note,) = started()
    assert "1 shard has no hash in the index and was written since this run last started" in note
    assert note.endswith("000001.tar; tlx shards index adds them")
    index_shards(shards / "train", jobs=0)
    assert started() == ()
    before, after = change(shards / "train" / "000001.tar")
    index_shards(shards / "train", hashes=False, jobs=0)  # those that were seen count still
    with pytest.raises(UserError, match=f"{after}, expected {before}"):
        started()
    (run / "shards.json").unlink()
    assert started() == ()


@pytest.mark.parametrize("text", ["[", "{}", '{"format": 9}', '{"format": 1, "shards": {"data.train": {"x": {}}}}'])
def test_a_record_that_cannot_be_read_is_told(started, run, capsys, text):
    (run / "shards.json").write_text(text)
    assert started() == ()
    assert "shards.json cannot be read" in capsys.readouterr().err
    assert json.loads((run / "shards.json").read_text())["format"] == 1


def test_a_damaged_copy_in_the_cache_is_fetched_anew(shards, started, tmp_path):
    cache = CacheSpec(tmp_path / "cache", stage=True)
    staged = Manifest.open(shards / "train", cache)
    expected = staged.tar(0).read_bytes()
    started("all", cache)
    change(staged.tar(0))
    started("changed", cache)
    assert staged.tar(0).read_bytes() != expected
    assert started("all", cache) == ()
    assert staged.tar(0).read_bytes() == expected


def test_a_staged_shard_is_verified_on_the_way(shards, tmp_path):
    staged = Manifest.open(shards / "train", CacheSpec(tmp_path / "cache", stage=True))
    before, after = change(shards / "train" / "000000.tar")
    with pytest.raises(Exception, match=f"000000.tar: cannot be fetched: .* SHA-256 {after}, expected {before}"):
        staged.tar(0)


# Several ranks


@dataclasses.dataclass
class Rank:
    """As much of a world as comparing shards takes; a thread each."""

    rank: int
    everybody: list
    meeting: threading.Barrier
    watch: Watch = dataclasses.field(default_factory=Watch)

    @property
    def main(self):
        return self.rank == 0

    def gather(self, value):
        self.everybody[self.rank] = value
        self.meeting.wait(20)
        values = list(self.everybody)
        self.meeting.wait(20)
        return values

    def from_main(self, value):
        return self.gather(value)[0]


@pytest.fixture
def on_two_ranks(monkeypatch):
    """Does something on two ranks at once, each of a machine; the mistake that each has met."""

    def on_both(act, hosts):
        everybody, meeting, told = [None] * 2, threading.Barrier(2), [None] * 2

        def start(rank):
            try:
                act(Rank(rank, everybody, meeting))
            except UserError as error:
                told[rank] = str(error)

        monkeypatch.setattr(verification, "cores", lambda: 1)  # what a rank reads, it reads in its own thread
        monkeypatch.setattr(verification, "ROUND_S", -1.0)
        monkeypatch.setattr(verification.socket, "gethostname", lambda: hosts[int(threading.current_thread().name)])
        threads = [threading.Thread(target=start, args=(rank,), name=str(rank)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return told

    return on_both


@pytest.mark.parametrize(
    ("how", "hosts", "read"),
    [("all", ["a", "a"], [2, 2]), ("all", ["a", "b"], [4, 4]), ("changed", ["a", "b"], [1, 0])],
)
def test_the_ranks_of_a_machine_share_the_reading(shards, run, monkeypatch, on_two_ranks, how, hosts, read):
    """And all of them refuse what one of them has found; none waits long for another."""
    manifests = {f"data.{key}": Manifest.open(shards / key) for key in ("train", "val")}
    assert sum(len(m.shards) for m in manifests.values()) == 4
    (run / FILE).write_text(record_of(verify("changed", run, alone(), manifests)))
    change(shards / "train" / "000001.tar")
    done = collections.Counter()
    plain = verification.read_and_compare

    def counted(*given):
        done[int(threading.current_thread().name)] += 1
        return plain(*given)

    monkeypatch.setattr(verification, "read_and_compare", counted)
    told = on_two_ranks(lambda world: verify(how, run, world, manifests), hosts)
    assert told[0] == told[1]
    assert f"a shard is not what this run was trained on so far:\n    {shards}/train/000001.tar: " in told[0]
    assert [done[rank] for rank in range(2)] == read


def test_ranks_agree_on_reading_where_only_one_machines_index_has_hashes(shards, run, on_two_ranks):
    """The first one has nothing to read itself, and must not leave the other one waiting."""
    with_hashes = Manifest.open(shards / "train")
    before, after = change(shards / "train" / "000001.tar")
    index_shards(shards / "train", hashes=False, jobs=0)
    own = [Manifest.open(shards / "train"), with_hashes]
    told = on_two_ranks(lambda world: verify("all", run, world, {"data.train": own[world.rank]}), ["a", "b"])
    assert told[0] == told[1]
    assert f"000001.tar: its bytes were changed: their SHA-256 is {after}, expected {before}" in told[0]


# Lengths


def config_of(shards, tmp_path, **data):
    return parse(
        {
            "run": str(tmp_path / "run"),
            "backbone": {"name": "toys:small"},
            "data": {"train": str(shards / "train"), "val": str(shards / "val"), "batch": 4, **data},
            "phases": {"each": {"lr": 0.1, "duration": 2}},
        }
    )


@pytest.mark.parametrize("more", [-512, 512])
def test_tars_of_another_length_are_refused_before_anything_starts(shards, tmp_path, more):
    tar = shards / "val" / "000000.tar"
    size = tar.stat().st_size
    os.truncate(tar, size + more)
    (shards / "train" / "000002.tar").unlink()
    (shards / "train" / "000002.tar").symlink_to("nowhere")
    for look in (feed.open_sets, feed.count_samples):  # a training, and its plan
        with pytest.raises(UserError) as caught:
            look(config_of(shards, tmp_path))
        assert "2 tars are not as indexed: data.train: " in str(caught.value)
        assert f"{tar}: it has {size + more} bytes, and {size} in the index" in str(caught.value)
        assert "000002.tar: it cannot be read: No such file" in str(caught.value)
    (warning,) = feed.open_sets(config_of(shards, tmp_path, bad_samples=9)).warnings
    assert warning.startswith("2 tars are not as indexed, which data.bad_samples will count: data.train: ")


# In a training


@pytest.fixture
def compose(shards, tmp_path, monkeypatch):
    return composer(shards, tmp_path / "trained", monkeypatch)


def test_a_training_is_refused_and_goes_on_once_the_file_is_back(shards, compose, monkeypatch, tmp_path):
    training = compose()
    training.stop.asked = lambda *, look: training.progress.step >= 2
    fit(training)
    training.saver.settle()
    assert 0 < training.progress.step < training.plan.steps
    tar, kept = shards / "train" / "000001.tar", tmp_path / "kept.tar"
    shutil.copy(tar, kept)
    change(tar)
    with pytest.raises(UserError, match=r"000001\.tar: its bytes were changed"):
        compose()
    shutil.copy(kept, tar)
    again = compose()
    resume(again)
    assert again.progress.step == training.progress.step


def test_checkpoints_know_the_content(shards, compose):
    """Where the record of the run is lost."""
    training = compose()
    training.stop.asked = lambda *, look: training.progress.step >= 1
    fit(training)
    training.saver.settle()
    saved = training.identity
    assert saved["train_content"] == Manifest.open(shards / "train").content
    (training.folder / "shards.json").unlink()
    change(shards / "train" / "000001.tar")
    index_shards(shards / "train", jobs=0)
    with pytest.raises(UserError, match=r"another training:\n.*train_content: "):
        resume(compose())
    index_shards(shards / "train", hashes=False, jobs=0)  # nobody can tell
    (training.folder / "shards.json").unlink()
    resume(compose())


def test_pictures_are_compared_and_transforms_tried_once_by_one_rank(shards, compose, monkeypatch):
    counts = {"overlap": 0, "tried": 0}
    plain = {"overlap": overlap.shared_pictures, "tried": transforms._try_out}

    def counted(name):
        def call(*given):
            counts[name] += 1
            return plain[name](*given)

        return call

    monkeypatch.setattr(overlap, "shared_pictures", counted("overlap"))
    monkeypatch.setattr(transforms, "_try_out", counted("tried"))
    compose()
    assert counts == {"overlap": 1, "tried": 1}


def test_every_rank_has_the_verdict_of_rank_0(shards, tmp_path, monkeypatch):
    """Rank 1 reads no picture, and its plan warns of what rank 0 has found."""
    from tlx.runs.run_folder import RunFolder
    from tlx.train import build
    from tlx.train import command as training

    monkeypatch.setattr(overlap, "shared_pictures", lambda *_: pytest.fail("rank 1 has read pictures"))
    nothing, warned = (None, None, False), (("told by rank 0",), None, False)
    monkeypatch.setattr(World, "from_main", lambda self, given: warned if given == nothing else given)
    monkeypatch.setattr(training, "journal_of", lambda *_, **__: pytest.fail("rank 1 has no journal to begin"))
    sets = feed.open_sets(config_of(shards, tmp_path))
    assert dataclasses.replace(sets, warnings=("x",)).samples.warnings == ("x",)
    noticed = []
    plain = build.plan_of
    for module in (build, training):
        monkeypatch.setattr(module, "plan_of", lambda *given: noticed.append(given[2].warnings) or plain(*given))
    one = dataclasses.replace(alone(), rank=1, size=2)
    with pytest.raises(pytest.fail.Exception, match="journal"):
        training.compose(config_of(shards, tmp_path), one, RunFolder(tmp_path / "run"))
    assert set(noticed) == {("told by rank 0",)}


@pytest.mark.slow
def test_two_ranks_refuse_a_changed_shard_and_go_on_once_it_is_back(shards, tmp_path):
    data = {"train": str(shards / "train"), "val": str(shards / "val"), "batch": 8, "workers": 1}
    raw = {
        "run": str(tmp_path / "run"),
        "data": data,
        "input": {"size": 16},
        "backbone": {"name": "toys:small", "weights": "none"},
        "phases": {"each": {"lr": 0.01, "duration": 60}},
    }
    config = write_config(tmp_path / "c.yaml", raw, stop_after=1)
    tlx("train", config, ranks=2, is_forked=True)
    assert status(tmp_path / "run")["status"] == "resumable"
    tar = shards / "train" / "000001.tar"
    kept = tar.read_bytes()
    before, after = change(tar)
    verdict = tmp_path / "verdict"
    said = tlx("train", config, "stop_after=600", ranks=2, is_forked=True, TLX_VERDICT=str(verdict))
    assert said.returncode == 0  # of a launcher, which would start its ranks again
    assert said.stderr.count(f"{tar}: its bytes were changed: their SHA-256 is {after}, expected {before}") == 1
    assert json.loads(verdict.read_text())["status"] == "user-error"
    assert status(tmp_path / "run")["status"] == "resumable"  # a start that has claimed nothing leaves it
    tar.write_bytes(kept)
    said = tlx("train", config, "stop_after=600", "data.verify=all", ranks=2, is_forked=True)
    assert status(tmp_path / "run")["status"] == "done", said.stderr
