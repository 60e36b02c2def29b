"""A trained model in use: the numbers of training, whoever asks and however many pictures there are."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from composed import finished, raw_of
from images import encoded, make_folder, make_shards, make_target_shards, picture
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tlx
from tlx.base.errors import UserError
from tlx.runs.checkpoint import DESCRIBED


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("s") / "s", classes=3, per_class={"train": 8, "val": 5}, size=24)


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory):
    """A network of timm, with a moving average."""
    return finished(
        raw_of(
            shards,
            tmp_path_factory.mktemp("r") / "run",
            input={"size": 32, "crop_pct": 0.9},
            backbone={"name": "timm/test_resnet", "weights": "none"},
            loop={"ema": {"decay": 0.5}},
            phases={"each": {"lr": 0.01, "duration": "3ep"}},
        )
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("p"), classes=3, per_class=3, size=(30, 41), seed=7)


@pytest.mark.parametrize("which", ["best", "last"])
def test_an_evaluation_gives_the_numbers_of_training(run, shards, which):
    result = json.loads((run / "result.json").read_text())
    found = tlx.load(run, which=which).evaluate(shards / "val", batch=4)
    if which == "best":
        told = next(p["best"] for p in result["phases"].values() if p["best"]["step"] == result["best"]["step"])
    else:
        told = result["last"]
    assert found["samples"] == 15
    assert found["top1"] == told["val/top1"]
    assert found["loss"] == pytest.approx(told["val/loss"], rel=1e-6)
    assert found["per_class"] == told["val/per_class"]


def test_plain_timm_with_what_the_file_says_decides_alike(run, photos):
    import timm
    from torchvision.transforms.v2 import functional

    model, file = tlx.load(run), run / "checkpoints" / "best" / "model.safetensors"
    if model.description.metrics != _said(file)["metrics"]:  # the moving average was the best
        file = file.with_name("ema.safetensors")
    said = _said(file)
    net = timm.create_model(said["backbone"]["name"].removeprefix("timm/"), num_classes=len(said["outputs"])).eval()
    net.load_state_dict(load_file(file), strict=True)
    side = int(said["input"]["size"][0] / said["input"]["crop_pct"] + 1e-6)
    for path in sorted(photos.rglob("*.jpg")):
        pixels = functional.pil_to_tensor(Image.open(path).convert("RGB"))
        shown = functional.center_crop(functional.resize(pixels, [side], antialias=True), said["input"]["size"])
        mean, std = said["input"]["mean"], said["input"]["std"]
        with torch.no_grad():
            logits = net(functional.normalize(shown[None].float() / 255, mean, std))
        (row,) = model.predict(path)
        assert row["label"] == said["outputs"][int(logits.argmax())]
        assert row["probability"] == pytest.approx(float(logits.softmax(1).max()), abs=0.02)


def _said(file):
    with safe_open(file, framework="pt") as opened:
        return json.loads(opened.metadata()[DESCRIBED])


def test_nothing_that_training_used_is_left_to_a_library(run):
    said = _said(run / "checkpoints" / "latest" / "model.safetensors")
    assert said["input"] == {
        "size": [32, 32],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bilinear",
        "crop_pct": 0.9,
    }
    assert said["outputs"] == ["class0", "class1", "class2"]
    assert said["backbone"]["name"] == "timm/test_resnet"
    assert said["task"]["name"] == "classification"
    origin = said["provenance"]
    assert (said["upright"], origin["weights"], origin["run"]) == (True, "none", "run")
    here = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    assert origin["commit"] == (here.stdout.strip() or None)
    top = json.loads((run / "model.json").read_text())
    assert {k: v for k, v in top.items() if k not in ("metrics", "kept")} == {
        k: v for k, v in said.items() if k not in ("metrics", "kept")
    }
    assert top["metrics"]["top1"] == json.loads((run / "result.json").read_text())["best"]["value"]


def test_a_picture_has_the_same_numbers_alone_among_others_and_on_several_processes(run, photos):
    model, files = tlx.load(run), sorted(map(str, photos.rglob("*.jpg")))
    together = model.predict(photos, batch=4)
    assert [row["file"] for row in together] == files
    assert together == [row for file in files for row in model.predict(file, batch=4)]
    assert together == model.predict(files, batch=4, workers=2)
    backwards = model.predict(files[::-1], batch=4)
    assert [row["label"] for row in backwards[::-1]] == [row["label"] for row in together]
    source = tlx.Shards.open(str(_shards_of(photos)))
    whole = list(model.forward.answers(source, batch=2))
    for of in (2, 3):
        parts = [a for i in range(of) for a in model.forward.answers(source, batch=2, part=(i, of))]
        found = {int(i): o for a in parts for i, o in zip(a.ids, a.outputs, strict=True)}
        assert all(torch.equal(found[int(i)], o) for a in whole for i, o in zip(a.ids, a.outputs, strict=True))


def _shards_of(photos):
    out = photos.parent / "as-shards"
    if not out.exists():
        from tlx.data.build.write import BuildOptions, build_shards

        build_shards(photos, out, BuildOptions(val=0))
    return out / "train"


def test_files_pil_images_arrays_and_tensors_are_one_picture(run, tmp_path):
    image = picture(1, size=(40, 52))
    image.save(tmp_path / "a.png")
    model, pixels = tlx.load(run), np.array(image)
    (of_file,) = model.predict(tmp_path / "a.png")
    assert of_file.pop("file") == str(tmp_path / "a.png")
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    for given in (image, pixels, tensor, [image], [pixels]):
        assert model.predict(given)[0] == of_file
    assert of_file["probability"] == of_file["top"][0]["probability"]
    assert sum(one["probability"] for one in of_file["top"]) == pytest.approx(1)


def test_pictures_are_turned_as_in_training(run, tmp_path):
    image = picture(1, size=(40, 52))
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "turned.jpg").write_bytes(encoded(image.rotate(90, expand=True), exif=exif, quality=100))
    model = tlx.load(run)
    (turned,), (plain,) = model.predict(Image.open(tmp_path / "turned.jpg")), model.predict(image)
    assert turned["probability"] == pytest.approx(plain["probability"], abs=0.02)


def test_a_file_that_cannot_be_read_is_named_or_gets_a_row(run, tmp_path):
    picture(0).save(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").write_bytes(b"no picture")
    picture(2).save(tmp_path / "c.jpg")
    model = tlx.load(run)
    with pytest.raises(UserError, match=r"b\.jpg: not a picture"):
        model.predict(tmp_path)
    rows = model.predict(tmp_path, skip_bad=True, batch=2)
    assert [sorted(row) for row in rows] == [
        ["file", "label", "probability", "top"],
        ["error", "file"],
        ["file", "label", "probability", "top"],
    ]
    with pytest.raises(UserError, match=r"gone\.jpg: the file cannot be read: No such file"):
        model.predict(tmp_path / "gone.jpg")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "there are no pictures"),
        (7, "int is no picture"),
        (np.zeros((4, 4, 3), np.float32), r"uint8: arrays \[H, W, 3\]"),
        (["a.jpg", np.zeros((4, 4, 3), np.uint8)], "one kind at a time"),
    ],
)
def test_what_is_no_picture_is_told(run, given, told):
    with pytest.raises(UserError, match=told):
        tlx.load(run).predict(given)


def test_shards_of_other_classes_are_refused(run, tmp_path):
    other = make_shards(tmp_path / "s", classes=2, per_class={"val": 4}, size=24)
    with pytest.raises(UserError, match="the model knows 3 classes of label, these shards have 2; only on one side"):
        tlx.load(run).evaluate(other / "val")


def test_several_tasks_are_told_each_with_what_it_learned(tmp_path):
    for split, seed in (("train", 0), ("val", 1)):
        make_target_shards(tmp_path / "s" / split, samples=24, seed=seed)
    task = {"name": "multitask", "tasks": {"tags": "multilabel", "age": {"name": "regression", "target": "age"}}}
    run = finished(raw_of(tmp_path / "s", tmp_path / "run", task=task))
    model = tlx.load(run)
    told = json.loads((run / "result.json").read_text())["best"]
    assert model.evaluate(tmp_path / "s" / "val")["score"] == pytest.approx(told["value"], rel=1e-6)
    (row,) = model.predict(picture(0))
    assert set(row) == {"tags/labels", "tags/probabilities", "age/age"}
    assert len(model.description.kept["tags/thresholds"]) == 4
    assert 0 < row["age/age"] < 100  # in its own units


def test_readme(tmp_path, monkeypatch, capsys):
    """Its lines of Python: those with tlx, and those with timm alone."""
    monkeypatch.chdir(tmp_path)
    shards = make_shards(Path("data/photos"), classes=3, per_class={"train": 8, "val": 4}, size=40)
    backbone = {"name": "timm/test_resnet", "weights": "none"}
    phases = {"each": {"lr": 0.01, "duration": "3ep"}}
    finished(raw_of(shards, "runs/mine", backbone=backbone, input={"size": [32, 32]}, phases=phases))
    make_folder(Path("photos"), classes=3, per_class=2, size=(60, 45), seed=7)
    first = sorted(Path("photos").rglob("*.jpg"))[0]
    shutil.copy(first, "photos/a.jpg")
    text = (Path(__file__).parents[2] / "README.md").read_text()
    blocks = [block.partition("```")[0] for block in text.split("```python\n")[1:]]
    capsys.readouterr()
    said = []
    for block in [block for block in blocks if "runs/mine" in block]:
        exec(compile(block, "README.md", "exec"), {})
        said.append(capsys.readouterr().out.splitlines())
    of_tlx, of_timm = said
    best = json.loads(Path("runs/mine/model.json").read_text())["metrics"]
    assert of_tlx[-1] == str(best["top1"])
    told = {file: label for file, label, _ in map(str.split, of_tlx[:-1])}
    assert len(told) == 7
    assert of_timm == [told["photos/a.jpg"]]


# Files from elsewhere


def test_a_file_says_itself_what_it_is_wherever_it_lies(run, tmp_path, photos):
    file = run / "checkpoints" / "latest" / "model.safetensors"
    shutil.copy(file, tmp_path / "given.safetensors")
    assert tlx.load(tmp_path / "given.safetensors").predict(photos) == tlx.load(file).predict(photos)


def test_a_run_of_before_is_read(run, tmp_path, photos):
    """Files of weights did not say what they are then."""
    earlier = tmp_path / "run"
    shutil.copytree(run, earlier, symlinks=True)
    for name in ("model", "ema"):
        file = earlier / "checkpoints" / "best" / f"{name}.safetensors"
        save_file(load_file(file), file, metadata={"format": "pt"})
    assert tlx.load(earlier).predict(photos) == tlx.load(run).predict(photos)


def _with(run, tmp_path, change, name="model.safetensors"):
    file = run / "checkpoints" / "latest" / "model.safetensors"
    said = _said(file)
    change(said)
    save_file(load_file(file), tmp_path / name, metadata={"format": "pt", DESCRIBED: json.dumps(said)})
    return tmp_path / name


def test_a_strangers_file_does_not_choose_what_is_called(run, tmp_path):
    file = _with(run, tmp_path, lambda said: said["backbone"].update(name="os:system", args={"command": "id"}))
    with pytest.raises(UserError, match=r"names a part by path \(os:system\)"):
        tlx.load(file)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda said: said.update(format=9), "has format 9; this tlx reads 1"),
        (lambda said: said.pop("outputs"), "cannot be used: KeyError: 'outputs'"),
        (lambda said: said["input"].update(interpolation="best"), "interpolation best"),
        (lambda said: said.update(head={"name": "mlp"}), "the weights do not fit the network"),
        (lambda said: said["backbone"].update(name="timm/test_resnetx"), "did you mean"),
    ],
)
def test_a_description_that_cannot_be_used_is_told(run, tmp_path, change, told):
    with pytest.raises(UserError, match=told):
        tlx.load(_with(run, tmp_path, change))


def test_what_is_no_model_is_told(run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "w.safetensors").write_bytes(b"nothing")
    save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    for name, told in (
        ("emty", "there is no such file or folder; did you mean"),
        ("empty", "neither a run's folder nor a checkpoint"),
        ("w.safetensors", "no file of weights"),
        ("plain.safetensors", "does not say which network"),
        ("begun", "no checkpoint yet"),
    ):
        with pytest.raises(UserError, match=told):
            tlx.load(tmp_path / name)
