"""`tlx predict`: the rows of `Model.predict` from whatever names pictures, in files that a kill does not cost."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import time

import pytest
import torch
from commands import command, environment, invoke, tlx
from composed import finished, raw_of
from images import make_folder, make_shards
from typer.testing import CliRunner

import tlx as package
import tlx.use.parted_file as parted
import tlx.use.predict as predicting
from tlx.base.errors import UserError
from tlx.cli.main import app
from tlx.ranks.sharing import Sharing
from tlx.use.forward import Answers, Forward
from tlx.use.inputs import listed, opened
from tlx.use.load import find_file
from tlx.use.parted_file import PartedFile
from tlx.use.predict import Options, Prediction
from tlx.use.row_text import RowText, flat


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("s") / "s", classes=3, per_class={"train": 8, "val": 5}, size=16)


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory):
    return finished(raw_of(shards, tmp_path_factory.mktemp("r") / "run"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("p"), classes=3, per_class=7, size=(30, 41), seed=7)


def told(*words, given=None):
    """Standard output of a command that ends well."""
    done = CliRunner().invoke(app, ["predict", *map(str, words), "--workers", "0"], input=given)
    if done.exception is not None:
        raise done.exception
    return done.stdout


def test_rows_are_those_of_python_in_every_format(run, photos, tmp_path):
    wanted = package.load(run).predict(photos)
    lines = told(run, photos, "--json")
    assert [json.loads(line) for line in lines.splitlines()] == wanted
    told(run, photos, "--out", tmp_path / "a.jsonl")
    assert (tmp_path / "a.jsonl").read_text() == lines
    told(run, photos, "--out", tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text() == told(run, photos)
    rows = list(csv.DictReader(io.StringIO(told(run, photos))))
    assert [row["file"] for row in rows] == sorted(map(str, photos.rglob("*.jpg")))
    assert [(row["label"], float(row["probability"])) for row in rows] == [
        (row["label"], row["probability"]) for row in wanted
    ]
    assert [row["label_3"] for row in rows] == [row["top"][2]["label"] for row in wanted]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", "a.jsonl"]


def test_pictures_are_named_in_many_ways(run, photos, tmp_path, shards):
    files = sorted(map(str, photos.rglob("*.jpg")))
    whole = told(run, photos)
    (tmp_path / "list.txt").write_text("\n".join(files) + "\n")
    zero = "\0".join([*files, ""])
    assert told(run, *files) == whole
    assert told(run, f"{photos}/*/*.jpg") == whole
    assert told(run, f"@{tmp_path}/list.txt") == whole
    assert told(run, "-", given="\n".join(files)) == told(run, "-", given=zero) == whole
    both = told(run, files[0], shards / "val", files[1]).splitlines()
    assert [line.partition(",")[0] for line in both[1:]] == [
        files[0],
        *(f"{shards}/val/000000.tar: {i:09d}.jpg" for i in range(8)),
        *(f"{shards}/val/000001.tar: {i:09d}.jpg" for i in range(8, 15)),
        files[1],
    ]


def test_a_folder_is_listed_in_the_order_of_names_without_what_systems_put_there(tmp_path):
    for name in ("b/1.jpg", "a/2.JPG", "a/1/3.png", "a.jpg", ".hidden/4.jpg", "a/._5.jpg", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert listed([str(tmp_path)]) == [[f"{tmp_path}/{n}" for n in ("a/1/3.png", "a/2.JPG", "a.jpg", "b/1.jpg")]]


def test_how_many_classes_and_none_of_them(run, photos):
    rows = package.load(run).predict(photos)
    least = sorted(row["probability"] for row in rows)[5]
    first, *lines = told(run, photos, "--top", 1, "--none-below", least).splitlines()
    assert first == "file,label,probability,error"
    wanted = [row["label"] if row["probability"] >= least else "" for row in rows]
    assert [line.split(",")[1] for line in lines] == wanted
    assert wanted.count("") == 5


def test_several_tasks_in_columns():
    ranking = [{"label": "red", "probability": 0.5}, {"label": "blue", "probability": 0.25}]
    row = {
        "file": "a.jpg",
        "tags/labels": ["old", "wet"],
        "tags/probabilities": {"old": 0.75, "wet": 0.625},
        "colour/label": "red",
        "colour/probability": 0.5,
        "colour/top": ranking,
    }
    assert flat(row) == {
        "file": "a.jpg",
        "tags/labels": "old;wet",
        "tags/probabilities/old": 0.75,
        "tags/probabilities/wet": 0.625,
        "colour/label": "red",
        "colour/probability": 0.5,
        "colour/label_2": "blue",
        "colour/probability_2": 0.25,
    }
    assert predicting._likely(row) == {"colour/label": "colour/probability"}
    levels = {"label": "animal/dog", "probability": 0.5, "level1": "animal", "level1_probability": 0.9}
    assert predicting._likely(levels) == {"label": "probability", "level1": "level1_probability"}
    text = RowText("csv", row)
    assert text.header == ",".join(flat(row)) + "\n"
    assert text.text([{"file": 'a,"b".jpg', "tags/labels": []}]) == '"a,""b"".jpg",,,,,,,\n'
    rows = csv.reader(io.StringIO(text.text([{"file": "a\rb.jpg"}, {"file": "c\nd.jpg"}]), newline=""))
    assert [row[0] for row in rows] == ["a\rb.jpg", "c\nd.jpg"]


# Bad pictures


def test_a_bad_picture_ends_it_or_gets_a_row_and_what_was_done_stays(run, photos, tmp_path):
    files = [*sorted(map(str, photos.rglob("*.jpg")))[:12], str(tmp_path / "bad.jpg")]
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    (tmp_path / "list").write_text("\n".join(files))
    out, words = tmp_path / "o.jsonl", (run, f"@{tmp_path}/list", "--batch", 2, "--out", tmp_path / "o.jsonl")
    with pytest.raises(UserError, match=r"bad\.jpg: not a picture.*\n.*--skip-bad"):
        told(*words)
    assert not out.exists()
    assert len([*tmp_path.glob("o.jsonl.parts/*.part")]) == 6
    done = invoke("predict", *words, "--workers", 0, "--skip-bad")
    assert "going on, 6 of 7 parts are there" in done.stderr
    assert f"skipped: {files[-1]}: not a picture" in done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["file"] for row in rows] == files
    assert ["error" in row for row in rows] == [False] * 12 + [True]
    assert not list(tmp_path.glob("*.parts"))


# A kill


class Killed(BaseException):
    pass


def test_the_same_command_goes_on_and_another_is_refused(run, photos, tmp_path, monkeypatch):
    whole, out = told(run, photos, "--batch", 2), tmp_path / "o.csv"
    write, written = parted.write_whole, []

    def one_less(path, content):
        if len(written) == 4:
            raise Killed
        written.append(path.name)
        write(path, content)

    monkeypatch.setattr(parted, "write_whole", one_less)
    with pytest.raises(Killed):
        told(run, photos, "--batch", 2, "--out", out)
    assert written == ["begun.json", "000000.part", "000001.part", "000002.part"]
    monkeypatch.setattr(parted, "write_whole", write)
    for words, what in (
        ((run, photos, "--batch", 3), "batch"),
        ((run, photos / "class0", "--batch", 2), "pictures"),
        ((run, photos, "--batch", 2, "--top", 2), "top, columns"),
    ):
        with pytest.raises(UserError, match=f"o.csv.parts: it was begun with other {what}\n"):
            told(*words, "--out", out)
    done = invoke("predict", run, photos, "--batch", 2, "--workers", 0, "--out", out)
    assert "going on, 3 of 11 parts are there" in done.stderr
    assert out.read_text() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["o.csv"]


def test_only_its_own_leftovers_are_swept(tmp_path):
    for name in (".[ab].csv.host-1.tmp", ".a.csv.host-2.tmp"):
        (tmp_path / name).touch()
    PartedFile(None, tmp_path / "[ab].csv").sweep()
    assert [p.name for p in tmp_path.iterdir()] == [".a.csv.host-2.tmp"]


def test_several_ranks_write_the_same_file(run, photos, shards, tmp_path):
    model, weights = package.load(run), find_file(run, "best")[0]
    words = [str(photos), str(shards / "val")]
    for ranks in (1, 2, 3):
        out = tmp_path / f"{ranks}.csv"
        work = Prediction(model, opened(listed(words)), Options(out, batch=4, workers=0), weights)
        file, parts = PartedFile(work, out), work.asked.parts(ranks)
        file.folder.mkdir()
        for rank in reversed(range(ranks)):
            own = range(len(parts))[rank::ranks]
            file.compute(parts, own, Sharing(rank, ranks, torch.device("cpu"), False))
        file.join(parts)
    assert (tmp_path / "1.csv").read_text() == told(run, *words, "--batch", 4)
    assert len({(tmp_path / f"{ranks}.csv").read_bytes() for ranks in (1, 2, 3)}) == 1


@pytest.mark.slow
def test_after_kill_9_on_two_ranks(run, tmp_path):
    photos = make_folder(tmp_path / "p", classes=3, per_class=400, size=64)
    words, out = ("predict", run, photos, "--batch", "4", "--workers", "1"), tmp_path / "o.csv"
    env = environment()
    process = subprocess.Popen(command(*words, "--out", out, ranks=2), env=env, start_new_session=True)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("o.csv.parts/*.part"))) < 5:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for child in (tmp_path / "o.csv.parts").glob("*.part"):
        assert child.read_text().endswith("\n")
    time.sleep(1)  # torchrun's ranks end with it, and their workers
    done = tlx(*words, "--out", out, is_forked=True)
    assert "going on" in done.stderr, done.stderr
    assert out.read_text() == tlx(*words, is_forked=True).stdout
    assert not list(tmp_path.glob(".o.csv*"))
    other = tmp_path / "other.csv"
    tlx(*words, "--out", other, ranks=2, is_forked=True)
    assert other.read_bytes() == out.read_bytes()


# Mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("gone", "PHOTOS"), "gone: there is no such file or folder"),
        (("EMPTY", "PHOTOS"), "neither a run's folder nor a checkpoint"),
        (("DAMAGED", "PHOTOS"), "no file of weights"),
        (("RUN", "EMPTY"), "there are no pictures in this folder"),
        (("RUN", "SHARDS"), r"no pictures in this folder\n  -> these are shards: name .*train or .*val"),
        (("RUN", "PHOTOS/class7"), "class7: there is no such file or folder; did you mean"),
        (("RUN", "PHOTOS/*.gif"), "no picture has such a name"),
        (("RUN", "https://host/a.JPG?size=2"), r"of a folder of shards, not of a picture\n  -> download it"),
        (("RUN", "@gone.txt"), "the list cannot be read: No such file"),
        (("RUN", "PHOTOS", "--out", "o.txt"), "names no format\n  -> end it in .csv, .jsonl or .parquet"),
        (("RUN", "PHOTOS", "--out", "a.csv", "--json"), "--json is for standard output"),
        (("RUN", "PHOTOS", "--out", "DAMAGED/o.csv"), "cannot be written: Not a directory"),
        (("RUN", "PHOTOS", "--out", "THERE"), "it is there already\n"),
        (("RUN", "PHOTOS", "--out", "gone/p.csv"), "gone: there is no such folder\n"),
        (("RUN", "PHOTOS", "--out", "/proc/p.csv"), "/proc: cannot be written: "),
        (("RUN", "PHOTOS", "--which", "first"), "is no checkpoint"),
        (("RUN", "PHOTOS", "--device", "tpu7"), "torch cannot compute there"),
    ],
)
def test_a_mistake_is_told(run, photos, shards, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged.safetensors").write_bytes(b"nothing")
    (tmp_path / "there.csv").write_text("mine")
    names = {"RUN": run, "PHOTOS": photos, "SHARDS": shards, "EMPTY": "empty", "THERE": "there.csv"}
    names["DAMAGED"] = "damaged.safetensors"
    for name, path in names.items():
        words = [word.replace(name, str(path)) for word in words]
    with pytest.raises(UserError, match=message):
        told(*words)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged.safetensors", "empty", "there.csv"]


def test_parquet_without_pyarrow_is_told(run, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(predicting.format_of.__globals__["importlib"].util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pyarrow, which is not installed\n  -> pip install .tlx\[parquet\]"):
        told(run, photos, "--out", tmp_path / "a.parquet")


def test_parquet(run, photos, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    told(run, photos, "--out", tmp_path / "a.parquet")
    table = parquet.read_table(tmp_path / "a.parquet")
    assert table.column("probability").to_pylist() == [r["probability"] for r in package.load(run).predict(photos)]


def test_parquet_of_a_name_that_is_not_utf_8(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    text = RowText("parquet", {"file": "", "labels": [""], "probability": 0.5})
    (tmp_path / "part").write_text(text.text([{"file": os.fsdecode(b"caf\xe9.jpg"), "labels": ["a", "b"]}]))
    with (tmp_path / "a.parquet").open("wb") as out:
        text.join([tmp_path / "part"], out)
    (row,) = parquet.read_table(tmp_path / "a.parquet").to_pylist()
    assert row == {"file": r"caf\udce9.jpg", "labels": "a;b", "probability": None}


def test_every_kind_of_pictures_decides_for_itself_how_many_processes_decode(run, photos, monkeypatch):
    seen = []

    def answers(self, source, *, workers, batches, **_):
        seen.append(workers)
        yield from (Answers(torch.zeros(0), torch.zeros(0, 3)) for _ in batches)

    monkeypatch.setattr(Forward, "answers", answers)
    one, many = str(next(photos.rglob("*.jpg"))), str(photos)
    sources = [*opened(listed([one])), *opened(listed([many]))]
    work = Prediction(package.load(run), sources, Options(batch=1), find_file(run, "best")[0])
    list(work.batches(work.asked.parts(1)))
    assert seen == [0, 2]
