"""`tlx evaluate`: the numbers of training and scikit-learn, on any number of ranks; what is kept of a look."""

from __future__ import annotations

import csv
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import invoke, tlx
from composed import finished, raw_of
from images import make_folder, make_shards, make_target_shards
from simulated_ranks import on_ranks
from sklearn import metrics as sk

import tlx as package
import tlx.use.evaluate as evaluating
from tlx.base.errors import UserError
from tlx.data.stream.file_list import FileList
from tlx.data.stream.reader import BadSample
from tlx.use.evaluation_text import table
from tlx.use.inputs import digest
from tlx.use.judged_data import Reading, data_of, scored

ARGUMENTS = ("--workers", "0", "--batch", "4", "--bootstrap", "50")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("s") / "s", classes=3, per_class={"train": 8, "val": 5}, size=16)


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory):
    """A network that has learned little."""
    phases = {"each": {"lr": 0.002, "duration": "1ep"}}
    return finished(raw_of(shards, tmp_path_factory.mktemp("r") / "run", phases=phases))


@pytest.fixture
def run(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run", symlinks=True))


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """Reports are drawn where a test looks at them."""
    drawn = evaluating.report_look
    monkeypatch.setattr(evaluating, "report_look", lambda *about, **took: "not drawn")
    return drawn


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("p"), classes=3, per_class=7, size=(30, 41), seed=7)


def looked(run, *words):
    done = invoke("evaluate", run, *words, *ARGUMENTS, "--json")
    if done.exception is not None:
        raise done.exception
    return json.loads(done.stdout)


def test_by_default_the_runs_own_validation_with_the_numbers_of_training(run):
    look = looked(run)
    result = json.loads((run / "result.json").read_text())
    told = next(p["best"] for p in result["phases"].values() if p["best"]["step"] == result["best"]["step"])
    assert look["metrics"]["top1"]["value"] == pytest.approx(told["val/top1"], abs=1e-6)
    assert look["metrics"]["loss"]["value"] == pytest.approx(told["val/loss"], rel=1e-5)
    assert look["temperature"]["judged"] is True
    done = invoke("evaluate", run, *ARGUMENTS)
    assert "data: the run's own data.val, " in done.stderr
    assert "what is scaled is flattered" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_numbers_are_scikit_learns_of_the_predictions_file(run, photos, tmp_path):
    look = looked(run, "--data", photos, "--out", tmp_path / "p.csv")
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    assert [row["file"] for row in rows] == sorted(map(str, photos.rglob("*.jpg")))
    assert [row["label"] for row in rows] == [Path(row["file"]).parent.name for row in rows]
    names = look["classes"]
    p = np.array([[float(row[f"probabilities/{name}"]) for name in names] for row in rows])
    y, told = np.array([names.index(r["label"]) for r in rows]), np.array([names.index(r["predicted"]) for r in rows])
    wanted = {
        "loss": sk.log_loss(y, p),
        "top1": sk.accuracy_score(y, told),
        "precision": sk.precision_score(y, told, average="macro", zero_division=0),
        "f1": sk.f1_score(y, told, average="macro"),
        "balanced_accuracy": sk.balanced_accuracy_score(y, told),
        "auroc": sk.roc_auc_score(y, p, multi_class="ovr"),
        "average_precision": np.mean([sk.average_precision_score(y == c, p[:, c]) for c in range(3)]),
    }
    assert {name: look["metrics"][name]["value"] for name in wanted} == pytest.approx(wanted, abs=1e-6)
    assert look["confusion"] == sk.confusion_matrix(y, told).tolist()
    assert look["pictures"] == [7, 7, 7]


def test_the_temperature_is_of_the_validation_data_and_stays(run, photos, shards):
    look = looked(run, "--data", photos)
    (kept,) = json.loads((run / "temperature.json").read_text())["temperatures"]
    assert (kept["data"], kept["samples"]) == (str(shards / "val"), 15)
    assert look["temperature"] == kept | {"judged": False}
    assert package.load(run).description.temperature == kept["temperature"]  # of model.json
    (run / "temperature.json").write_text(json.dumps({"temperatures": [kept | {"temperature": 2.0}]}))
    assert looked(run, "--data", photos)["temperature"]["temperature"] == 2.0
    assert looked(run, "--data", photos, "--tta", "flip")["temperature"]["temperature"] != 2.0  # other outputs
    assert looked(run, "--data", photos)["temperature"]["temperature"] == 2.0
    assert package.load(run).description.temperature == 2.0
    assert package.load(run, which="last").description.temperature is None
    for damage in ({"temperature": 0.0}, {"temperature": "2"}, {"samples": None}):
        (run / "temperature.json").write_text(json.dumps({"temperatures": [kept | damage]}))
        assert looked(run, "--data", photos)["temperature"]["temperature"] == kept["temperature"]
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(f"{shards}/val", f"{shards}/gone"))
    (run / "temperature.json").unlink()
    assert looked(run, "--data", photos)["temperature"] is None


def test_validation_pictures_that_cannot_be_read_cost_no_more_than_the_temperature(run, photos, monkeypatch):
    plain = evaluating.scored

    def some_bad(model, data, *rest):
        scores, bad = plain(model, data, *rest)
        return scores, bad if data.labels is not None else [BadSample(3, "x.jpg", "torn")]

    monkeypatch.setattr(evaluating, "scored", some_bad)
    done = invoke("evaluate", run, "--data", photos, *ARGUMENTS)
    assert "note: the temperature is fitted without 1 validation pictures: x.jpg: torn" in done.stderr
    (run / "temperature.json").unlink()

    def none(model, data, *rest):
        if data.labels is None:
            raise UserError("none of its pictures can be read", where=data.name)
        return plain(model, data, *rest)

    monkeypatch.setattr(evaluating, "scored", none)
    done = invoke("evaluate", run, "--data", photos, *ARGUMENTS)
    assert (done.exit_code, "note: no temperature is fitted: " in done.stderr) == (0, True)


def test_a_folder_that_cannot_be_read_is_told(run, photos, monkeypatch):
    def refused(at):
        raise PermissionError(13, "Permission denied", str(at))

    model = package.load(run)
    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(UserError, match="it cannot be read: Permission denied"):
        data_of(str(photos), model)


def test_a_run_that_cannot_be_written_is_judged(run, photos, monkeypatch):
    before = sorted(p.name for p in run.iterdir())
    able = os.access
    monkeypatch.setattr(os, "access", lambda at, how: Path(at) != run and able(at, how))
    done = invoke("evaluate", run, "--data", photos, *ARGUMENTS, "--json")
    assert f"note: this look is not recorded, since the run cannot be written: {run}\n" in done.stderr
    assert (json.loads(done.stdout)["samples"], sorted(p.name for p in run.iterdir())) == (21, before)


def test_mirrored_pictures_are_asked_too(run, shards):
    model = package.load(run)
    manifest = package.open_shards(str(shards / "val"))
    (plain,), (both,) = (list(model.forward.answers(manifest, batch=15, flip=flip)) for flip in (False, True))
    assert not torch.equal(plain.outputs, both.outputs)
    assert looked(run, "--tta", "flip")["tta"] == "flip"


def test_every_look_is_kept_by_its_data(run, photos, shards, tmp_path):
    assert [looked(run, "--data", photos)["look"] for _ in range(2)] == [1, 2]
    (file,) = (run / "evaluations").glob("*.json")
    kept = json.loads(file.read_text())
    assert [look["samples"] for look in kept["looks"]] == [21, 21]
    assert {"time", "command", "digest", "weights"} <= kept["looks"][0].keys()
    (tmp_path / file.stem.replace("-", "/")).parent.mkdir(parents=True, exist_ok=True)
    other = shutil.copytree(photos / "class0", tmp_path / "x" / photos.parent.name / photos.name / "class0").parent
    assert looked(run, "--data", other)["look"] == 1
    assert sorted(p.name for p in (run / "evaluations").glob("*.json")) == [f"{file.stem}-2.json", file.name]


def test_a_look_ends_with_a_page_of_its_own(run, photos, drawn, monkeypatch):
    monkeypatch.setattr(evaluating, "report_look", drawn)
    look = looked(run, "--data", photos)
    page = Path(look["report"])
    assert page == Path(look["recorded"]).with_suffix("") / "look-1" / "report.html"
    text = page.read_text()
    for said in ("Evaluation of run", "This is the first look", "Confusion matrix", str(photos), "balanced_accuracy"):
        assert said in text
    assert text.count("data:image/jpeg") >= 12  # pictures from the folder
    assert "What the network looked at" in text
    assert (page.parent / "figures" / "embedding.png").is_file()
    assert "What this page leaves out" not in text
    assert (page.parent / "figures" / "confusion.png").is_file()
    assert not (run / "report.html").exists()

    def broken(*about, **took):
        raise RuntimeError("no pencil")

    monkeypatch.setattr(evaluating, "report_look", broken)
    again = invoke("evaluate", run, "--data", photos, *ARGUMENTS, "--json")
    assert again.exit_code == 0
    assert "no report was drawn (no pencil)" in again.stderr
    assert json.loads(again.stdout)["look"] == 2


def test_class_folders_are_the_same_however_they_are_typed_and_others_once_pictures_change(
    run, photos, tmp_path, monkeypatch
):
    folder = shutil.copytree(photos, tmp_path / "in" / "photos")
    monkeypatch.chdir(tmp_path / "in")
    assert [looked(run, "--data", of)["look"] for of in ("photos", folder, "../in/photos")] == [1, 2, 3]
    some = next(folder.rglob("*.jpg"))
    some.write_bytes((folder / "class2" / some.name).read_bytes() + b"0")
    assert looked(run, "--data", "photos")["look"] == 1
    before = digest([FileList([str(some), "gone.jpg"], "")])
    os.utime(some, (1, 1))
    assert digest([FileList([str(some), "gone.jpg"], "")]) != before


def test_nested_classes_are_paths_of_folders(run, photos, tmp_path):
    model = package.load(run)
    classes = ("x/a", "x/b", "y")
    label = replace(model.task.targets["label"], classes=classes)
    task = SimpleNamespace(targets={"label": label}, heads=model.task.heads)
    for i, name in enumerate(classes):
        shutil.copytree(photos / f"class{i}", tmp_path / "n" / name)
    data = data_of(str(tmp_path / "n"), replace(model, task=task))
    assert data.labels.tolist() == [i for i in range(3) for _ in range(7)]
    (tmp_path / "n" / "x" / "a" / "deeper").mkdir()
    shutil.copy(next(photos.rglob("*.jpg")), tmp_path / "n" / "x" / "a" / "deeper")
    with pytest.raises(UserError, match="folder x/a/deeper is none of the model's classes"):
        data_of(str(tmp_path / "n"), replace(model, task=task))


def test_scores_are_the_same_on_any_number_of_ranks(run, shards):
    model = package.load(run)
    data = data_of(str(shards / "val"), model)

    def score(ranks, batches):
        rank = min(min(batch) for batch in batches)
        world = SimpleNamespace(rank=rank, size=size, main=rank == 0, gather=ranks.gather)
        world.stops = world.ask_to_stop = lambda: False
        return scored(model, data, Reading(4, 0), world)[0]

    found = []
    for size in (1, 2, 3):
        found += on_ranks(size, score, len(data.source))
    assert all(torch.equal(one.output, found[0].output) and torch.equal(one.ids, found[0].ids) for one in found)
    assert found[0].ids.tolist() == list(range(15))


def test_other_tasks_have_their_own_metrics_with_intervals(tmp_path):
    for split, seed in (("train", 0), ("val", 1)):
        make_target_shards(tmp_path / "s" / split, samples=24, seed=seed, size=16)
    task = {"name": "multitask", "tasks": {"tags": "multilabel", "age": {"name": "regression", "target": "age"}}}
    each = {"lr": 0.01, "duration": "1ep"}
    run = finished(raw_of(tmp_path / "s", tmp_path / "run", task=task, phases={"each": each}))
    look = looked(run, "--out", tmp_path / "p.jsonl")
    wanted = package.load(run).evaluate(tmp_path / "s" / "val", batch=4)
    assert look["metrics"]["age/mae"]["value"] == wanted["age/mae"]
    assert look["metrics"]["age/mae"]["low"] < wanted["age/mae"] < look["metrics"]["age/mae"]["high"]
    assert look["lists"]["tags/ap_per_class"] == wanted["tags/ap_per_class"]
    row = json.loads((tmp_path / "p.jsonl").read_text().splitlines()[0])
    assert set(row) == {"file", "true/age", "true/tags", "tags/labels", "tags/probabilities", "age/age"}
    assert max(map(len, table(look).splitlines())) <= 80


def test_a_picture_that_cannot_be_read_ends_it_or_is_left_out(run, photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "photos")
    (folder / "class1" / "bad.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"class1/bad\.jpg: not a picture"):
        looked(run, "--data", folder)
    look = looked(run, "--data", folder, "--skip-bad")
    assert (look["samples"], len(look["skipped"])) == (21, 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("FILE",), r"lies in no run, which would name its data\n  -> --data"),
        (("RUN", "--data", "gone"), "gone: there is no such folder"),
        (("RUN", "--data", "EMPTY"), r"there are no class folders\n  -> .*tlx shards build"),
        (("RUN", "--data", "OTHER"), "the folder dog is none of the model's classes"),
        (("RUN", "--tta", "crops"), "is no way to ask again"),
        (("RUN", "--out", "FILE"), "names no format"),
        (("RUN", "--out", "gone/p.csv"), "gone: there is no such folder"),
        (("EMPTY",), "neither a run's folder nor a checkpoint"),
    ],
)
def test_a_mistake_is_told(run, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "other" / "dog").mkdir(parents=True)
    shutil.copy(run / "checkpoints" / "best" / "model.safetensors", tmp_path / "file.safetensors")
    names = {"RUN": str(run), "FILE": "file.safetensors", "EMPTY": "empty", "OTHER": "other"}
    with pytest.raises(UserError, match=message):
        looked(*[names.get(word, word) for word in words], *(["--trusted"] if words[0] == "FILE" else []))
    assert not (run / "evaluations").exists()


@pytest.mark.slow
def test_two_ranks_have_the_numbers_of_one(run, photos, tmp_path):
    words = ("evaluate", run, "--data", photos, *ARGUMENTS, "--json")
    alone = tlx(*words, "--out", tmp_path / "1.csv", is_forked=True)
    both = tlx(*words, "--out", tmp_path / "2.csv", ranks=2, is_forked=True)
    one, two = json.loads(alone.stdout), json.loads(both.stdout)
    for name in ("metrics", "per_class", "confusion", "temperature", "samples"):
        assert one[name] == two[name], name
    assert (two["look"], (tmp_path / "1.csv").read_bytes()) == (2, (tmp_path / "2.csv").read_bytes())
