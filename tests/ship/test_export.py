"""Exports say what the model says, to programs without tlx; those that do not are refused, and nothing is left."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from commands import invoke
from composed import finished, raw_of
from hub import serve
from images import make_shards, make_target_shards
from safetensors.torch import load_file

import tlx
from tlx import models
from tlx.base.errors import UserError
from tlx.data.pixels.normalise import Normalise
from tlx.ship import card, graph, plain, quantise
from tlx.ship import export as exporting
from tlx.ship.export import FORMATS, Options, export
from tlx.use.model import Model

WITHOUT_TLX = """
import importlib.abc, json, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tlx":
            raise ImportError("tlx")
sys.meta_path.insert(0, Refuse())
import numpy, runpy, torch
pixels, folder = numpy.load(sys.argv[1])["pixels"], sys.argv[2]
said = {}
def told(name, outputs):
    said[name] = numpy.asarray(outputs).argmax(1).tolist()
"""
OF_WEIGHTS = """
own = runpy.run_path(folder + "/{to}/load.py")
mean, std = (torch.tensor(own["INPUT"][key])[:, None, None] for key in ("mean", "std"))
shown = (torch.from_numpy(pixels) / 255 - mean) / std
with torch.inference_mode():
    told("{to}", own["load"]()(shown))
"""
SCRIPTS = {
    "timm": OF_WEIGHTS.format(to="timm"),
    "torchvision": OF_WEIGHTS.format(to="torchvision"),
    "hub": """
import timm
with torch.inference_mode():
    told("hub", timm.create_model("local-dir:" + folder + "/hub", pretrained=True).eval()(shown))
""",  # after timm's
    "onnx": """
import onnxruntime
told("onnx", onnxruntime.InferenceSession(folder + "/mine.onnx").run(None, {"pixels": pixels})[0])
""",
    "torch.export": """
with torch.inference_mode():
    told("torch.export", torch.export.load(folder + "/mine.pt2").module()(torch.from_numpy(pixels)))
""",
    "openvino": """
import openvino
hint = {"INFERENCE_PRECISION_HINT": "f32"}  # elsewise bf16, on processors that have it
told("openvino", openvino.Core().compile_model(folder + "/openvino/model.xml", "CPU", hint)(pixels)[0])
""",
}
"""What another program does with an export, by format."""
PLACES = {"onnx": "mine.onnx", "torch.export": "mine.pt2"}
HAS_OPENVINO = importlib.util.find_spec("openvino") is not None


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("s") / "s", classes=3, per_class={"train": 16, "val": 20}, size=48)


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("r") / "run"
    backbone = {"name": "timm/test_resnet", "weights": "none"}
    phases = {"each": {"lr": 0.01, "duration": "3ep"}}
    own = {"input": {"size": 64, "crop_pct": 0.9}, "loop": {"ema": {"decay": 0.5}}}
    return finished(raw_of(shards, folder, backbone=backbone, phases=phases, **own))


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """A run of two tasks, with learned constants beside their outputs."""
    folder = tmp_path_factory.mktemp("m")
    for split, seed in (("train", 0), ("val", 1)):
        make_target_shards(folder / "s" / split, samples=34, seed=seed)
    tasks = {
        "tags": "multilabel",
        "kind": "classification",
        "pixels": {"name": "regression", "target": "age"},
    }  # called as a graph's input is
    task = {"name": "multitask", "tasks": tasks, "weighting": "uncertainty"}
    return finished(raw_of(folder / "s", folder / "run", task=task))


def answers(folder, model, data, formats):
    """Decisions by format of a process that cannot import tlx, and the model's."""
    manifest = tlx.Shards.open(str(data))
    _, pixels = model.forward.pixels(manifest, torch.arange(len(manifest)))
    np.savez(folder / "pixels.npz", pixels=pixels.numpy())
    script = WITHOUT_TLX + "".join(SCRIPTS[to] for to in formats) + "\nprint(json.dumps(said))"
    words = [sys.executable, "-I", "-c", script]
    done = subprocess.run(
        [*words, str(folder / "pixels.npz"), str(folder)], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), model.forward.outputs(pixels).argmax(1).tolist()


GRAPHS = [pytest.param(("torch.export", *(["openvino"] if HAS_OPENVINO else [])), marks=pytest.mark.slow)]


@pytest.mark.parametrize("formats", [("timm", "hub", "onnx"), *GRAPHS], ids=["weights_and_onnx", "other_graphs"])
def test_programs_without_tlx_get_the_models_decisions(formats, run, shards, tmp_path):
    for to in formats:
        options = ["--preprocess"] if FORMATS[to].preprocess else []
        done = invoke("export", run, tmp_path / PLACES.get(to, to), "--to", to, "--json", *options)
        assert done.exit_code == 0, done.output
        told = json.loads(done.stdout)
        assert (told["pictures"], told["equal_decisions"]) == (60, 60)
        assert told["largest_difference"] < 1e-4
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(PLACES.get(to, to) for to in formats)
    by_format, own = answers(tmp_path, tlx.load(run), shards / "val", formats)
    assert set(own) == {0, 1, 2}
    assert by_format == dict.fromkeys(formats, own)


def test_a_folder_of_weights_answers_by_itself(run, shards, tmp_path):
    export(run, tmp_path / "timm", Options("timm"))
    picture = next((shards.parent / "s-pictures" / "val" / "class1").glob("*.jpg"))
    shown = subprocess.run(
        [sys.executable, "-I", str(tmp_path / "timm" / "load.py"), str(picture)],
        capture_output=True, text=True, timeout=100, check=True,
    )  # fmt: skip
    (row,) = tlx.load(run).predict(picture)
    file, label, probability = shown.stdout.split(",")[0].split()
    assert (file, label) == (str(picture), row["label"])
    assert float(probability) == pytest.approx(row["probability"], abs=0.01)


def test_a_graph_says_what_it_is(several, tmp_path, monkeypatch):
    import onnx
    import onnxruntime

    licences = card.Licences(data="cc-by-4.0")
    export(several, tmp_path / "m.onnx", Options("onnx", preprocess=True, licences=licences))
    found = export(several, tmp_path / "m.pt2", Options("torch.export"))
    assert (found["pictures"], found["equal_decisions"]) == (34, 34)
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    assert [one.name for one in session.get_outputs()] == ["tags", "kind", "pixels_"]
    assert [(one.name, one.shape, one.type) for one in session.get_inputs()] == [
        ("pixels", ["batch", 3, 16, 16], "tensor(uint8)")
    ]
    said = {one.key: json.loads(one.value) for one in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert said["labels"] == {
        "tags": ["big", "old", "round", "wet"],
        "kind": ["class0", "class1", "class2"],
        "pixels_": ["age"],
    }
    assert said["preprocessing"]["pixels"] == "uint8 RGB, NCHW, of this size"
    described = onnx.load(tmp_path / "m.onnx").doc_string
    assert "- of the data it was trained on: cc-by-4.0" in described
    (code,) = re.findall("```python\n(.*?)```", described, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {"pixels": np.zeros((2, 3, 16, 16), np.uint8)}
    exec(code, names)
    assert [of.shape for of in names["outputs"]] == [(2, 4), (2, 3), (2, 1)]
    texts = {"labels.json": "", "preprocessing.json": ""}
    found = torch.export.load(tmp_path / "m.pt2", extra_files=texts).module()(torch.zeros(5, 3, 16, 16))
    assert {name: tuple(of.shape) for name, of in found.items()} == {"tags": (5, 4), "kind": (5, 3), "pixels_": (5, 1)}
    assert json.loads(texts["labels.json"]) == said["labels"]
    assert json.loads(texts["preprocessing.json"])["pixels"].startswith("float32")


def test_an_export_that_says_something_else_is_refused(run, tmp_path, monkeypatch):
    class Off(Normalise):
        def __init__(self, spec, device, *, channels_last):
            super().__init__(spec, device, channels_last=channels_last)
            self.shift = self.shift * 0.98  # by two grey levels

    monkeypatch.setattr(graph, "Normalise", Off)
    with pytest.raises(UserError, match=r"does not say what the model says: of 60 .* first is .*val.*: class\d is 0"):
        export(run, tmp_path / "mine.pt2", Options("torch.export", preprocess=True))
    assert list(tmp_path.iterdir()) == []


def test_which_weights(run, tmp_path):
    found = export(run, tmp_path / "mine", Options("timm", weights="ema"), which="last")
    file = run / "checkpoints" / "latest" / "ema.safetensors"
    assert found["weights"]["file"] == str(file)
    own, given = load_file(file), load_file(tmp_path / "mine" / "model.safetensors")
    assert all(torch.equal(own[name], given[name]) for name in own)


@pytest.mark.parametrize(
    ("out", "options", "told"),
    [
        ("mine", {"to": "onx"}, r'"onx" is no format; did you mean "onnx"'),
        ("mine", {"to": "onnx"}, r"ends in \.onnx"),
        ("there", {"to": "timm"}, "it is there already"),
        ("gone/mine", {"to": "timm"}, "nothing can be written there"),
        ("mine", {"to": "timm", "precision": "int8"}, "no int8 in this format"),
        ("mine", {"to": "hub", "preprocess": True}, "weights alone"),
        ("mine", {"to": "timm", "push": "me/mine"}, "--to hub"),
        ("mine", {"to": "hub", "push": "mine"}, "--push OWNER/NAME"),
        ("mine", {"to": "torchvision"}, r"which torchvision does not have\n  -> these formats do: timm, hub, onnx"),
    ],
)
def test_what_cannot_be_is_told_first(run, tmp_path, out, options, told):
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match=told):
        export(run, tmp_path / out, Options(**options))
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_weights_of_a_lone_file_and_licences_without_a_card_are_told(run, tmp_path):
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((run / "checkpoints" / "latest" / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="this file lies in no checkpoint, which would have both"):
        export(alone, tmp_path / "mine", Options("timm", weights="ema"))
    with pytest.raises(UserError, match=r"no card(.|\n)*--to hub, or --to onnx"):
        export(run, tmp_path / "mine", Options("timm", licences=card.Licences("mit")))


def test_a_damaged_checkpoint_is_not_exported(run, tmp_path):
    damaged = tmp_path / "run"
    shutil.copytree(run, damaged, symlinks=True)
    file = damaged / "checkpoints" / "latest" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 64
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors: this file is not what was written"):
        export(damaged, tmp_path / "mine", Options("timm", weights="raw"), which="last")


def test_data_that_are_gone_or_a_folder_of_pictures_are_called_by_their_name(run, shards, tmp_path, monkeypatch):
    pictures = str(shards.parent / "s-pictures" / "val")
    assert export(run, tmp_path / "mine", Options("timm", data=pictures))["data"] == pictures
    monkeypatch.setattr(exporting, "place_of", lambda place: f"{place}-gone")
    with pytest.raises(UserError, match=r"val-gone: the run's data to compare on cannot be used: .*\n  -> --data"):
        export(run, tmp_path / "again", Options("timm"))


@pytest.mark.parametrize("to", ["timm", "hub", "onnx", "torch.export"])
def test_a_full_disk_is_told_and_nothing_is_left(run, tmp_path, to, monkeypatch):
    writes = exporting.Making._written

    def written(*words):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        try:
            return writes(*words)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(exporting.Making, "_written", written)
    with pytest.raises(UserError, match=r"cannot be written: File too large\n  -> make room, or another place"):
        export(run, tmp_path / PLACES.get(to, to), Options(to))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_export_left_goes_and_that_of_another_one_stays(run, tmp_path):
    def work(process):
        folder = tmp_path / f".mine.{socket.gethostname()}-{process}.tmp"
        folder.mkdir()
        (folder / "some").write_text("thing")
        return folder

    gone, other = work(999_999_999), work(os.getppid())
    export(run, tmp_path / "mine", Options("timm"))
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "mine", other])
    assert not gone.exists()
    others = (tmp_path / "mine" / "load.py").stat().st_mode
    assert (tmp_path / "mine" / "model.safetensors").stat().st_mode == others


@pytest.mark.slow
def test_an_export_that_does_not_run_or_gives_too_little_is_refused(run, tmp_path, monkeypatch):
    run_program = graph.run_program

    def one_less(file, feed):
        told = run_program(file, feed)
        return lambda pixels: told(pixels)[:, 1:]

    monkeypatch.setattr(graph, "run_program", one_less)
    with pytest.raises(UserError, match="gives 2 outputs for 60 of 60 pictures, not 3"):
        export(run, tmp_path / "mine.pt2", Options("torch.export"))
    export(run, tmp_path / "mine.onnx", Options("onnx"))
    with pytest.raises(UserError, match="onnxruntime fails: InvalidArgument"):
        graph.run_onnx(tmp_path / "mine.onnx", lambda pixels: pixels.float())(torch.zeros(1, 3, 9, 9))


def test_a_network_that_has_no_graph_is_told_with_what_would_do(run, tmp_path):
    class Deciding(torch.nn.Module):
        def forward(self, images):
            return images.mean((2, 3)) if images.mean() > 0 else -images.mean((2, 3))

    model = dataclasses.replace(tlx.load(run, device="cpu"), module=Deciding())
    with pytest.raises(
        UserError, match=r"torch\.export of this network fails(.|\n)*does not decide by the pixels' values"
    ):
        graph.exported(model, preprocess=False)


def test_how_often_int8_is_faster_is_told_by_rounds_of_both(monkeypatch):
    clock = iter(time for number in range(2 * 13) for time in (number * 10.0, number * 10.0 + 1 + number % 2))
    monkeypatch.setattr(quantise.time, "perf_counter", lambda: next(clock))
    pixels = torch.zeros(4, 3, 2, 2)
    found = quantise._speed({"fp32": lambda pixels: pixels, "int8": lambda pixels: pixels}, pixels)
    # the second of each round takes 2 s and the first 1 s, and who begins changes
    assert found["pictures_per_second"] == {"fp32": 4 / 1.5, "int8": 4 / 1.5}
    assert found["times_as_fast"] == {"value": 1.25, "lowest": 0.5, "highest": 2.0}


def test_a_package_that_is_not_installed_and_heads_that_are_not_plain_are_told(run, several, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find_spec(name))
    with pytest.raises(UserError, match=r'takes onnxscript, which is not installed\n  -> pip install "tlx\[onnx\]"'):
        export(run, tmp_path / "mine.onnx", Options("onnx"))
    with pytest.raises(UserError, match=r"these formats do: onnx, torch\.export, openvino"):
        export(several, tmp_path / "mine", Options("timm"))
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((run / "checkpoints" / "latest" / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"no run, which would name pictures(.|\n)*--data"):
        export(alone, tmp_path / "mine", Options("timm"))


# int8


@pytest.mark.slow
def test_what_int8_costs_is_measured_on_pictures_that_nothing_was_chosen_by(run, shards, tmp_path, monkeypatch):
    import onnx

    kept = {}
    parts_of = exporting.Making._parts

    def parts(self, data):
        kept["parts"] = parts_of(self, data)
        return kept["parts"]

    monkeypatch.setattr(exporting.Making, "_parts", parts)
    options = Options("onnx", precision="int8", calibrate=20, preprocess=True)
    found = export(run, tmp_path / "mine.onnx", options)["int8"]
    assert (len(found["tried"]), found["reported"]) == (len(quantise.RECIPES), 30)
    assert found["drop"]["low"] <= found["drop"]["value"] <= found["drop"]["high"]
    assert min(found["pictures_per_second"].values()) > 0
    times = found["times_as_fast"]
    assert 0 < times["lowest"] <= times["value"] <= times["highest"]
    of_parts = kept["parts"]
    assert not set(of_parts.choice.ids.tolist()) & set(of_parts.report.ids.tolist())
    train = tlx.load(run).forward.pixels(tlx.Shards.open(str(shards / "train")), torch.arange(48))[1]
    assert all(any(torch.equal(one, other) for other in train) for one in of_parts.calibration)
    model = onnx.load(tmp_path / "mine.onnx")
    said = {one.key: json.loads(one.value) for one in model.metadata_props}
    assert said["int8"]["drop"] == found["drop"]
    drop = found["drop"]
    cost = f"It costs {drop['value']:.2f} points of top-1 ({drop['low']:.2f} to {drop['high']:.2f}, 95 %, paired)"
    assert cost in model.doc_string
    assert f"| top1 | {found['top1']['fp32']:.4f} | {found['top1']['int8']:.4f} |" in model.doc_string
    assert any(node.op_type == "QuantizeLinear" for node in model.graph.node)


@pytest.mark.slow
def test_int8_that_costs_too_much_is_refused(run, tmp_path, monkeypatch):
    run_onnx = quantise.run_onnx

    def reversed_in_int8(file, feed):
        told = run_onnx(file, feed)
        return told if file.name == "fp32.onnx" else lambda pixels: -told(pixels)

    monkeypatch.setattr(quantise, "run_onnx", reversed_in_int8)
    monkeypatch.setattr(quantise, "RECIPES", {"minmax": {}})
    with pytest.raises(UserError, match=r"int8 costs \d+\.\d+ points of top-1 \(.* 95 % .* 30 pictures\)"):
        export(run, tmp_path / "mine.onnx", Options("onnx", precision="int8"))
    assert list(tmp_path.iterdir()) == []


# The Hub


def test_the_hub_gets_the_folder_with_a_card_of_what_was_measured(run, tmp_path, monkeypatch):
    from huggingface_hub import constants

    assert invoke("evaluate", run, "--bootstrap", 50).exit_code == 0
    (look,) = json.loads(next((run / "evaluations").glob("*.json")).read_text())["looks"]
    with serve() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", "hf_of_tests")
        words = ["--to", "hub", "--push", "me/mine", "--license", "apache-2.0"]
        done = invoke("export", run, tmp_path / "mine", *words)
        assert done.exit_code == 0, done.output
        assert f"{hub.url}/me/mine" in done.output
        assert hub.private == {"me/mine": True}
        there = {path.rpartition("/")[2]: content for path, content in hub.files.items()}
        assert there == {p.name: p.read_bytes() for p in (tmp_path / "mine").iterdir()}
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        with pytest.raises(UserError, match=r"-> hf auth login"):
            export(run, tmp_path / "again", Options("hub", push="me/mine"))
    shown = there["README.md"].decode()
    assert shown.startswith("---\n")
    assert "license: apache-2.0" in shown.partition("\n---")[0]
    loss = look["metrics"]["loss"]
    assert f"| loss | {loss['value']:.4f} | {loss['low']:.4f} | {loss['high']:.4f} |" in shown
    assert "- of the weights: apache-2.0" in shown
    assert "- of the data it was trained on: **not given**" in shown
    assert str(run.parent) not in shown
    assert str(tmp_path.parent) not in shown
    config = json.loads(there["config.json"])
    assert config["label_names"] == ["class0", "class1", "class2"]
    assert config["pretrained_cfg"]["input_size"] == [3, 64, 64]
    assert not Path(tmp_path / "again").exists()


def test_a_hub_that_is_not_there_is_told_and_the_folder_is_kept(run, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody answers
    monkeypatch.setenv("HF_TOKEN", "hf_of_tests")
    later = f"-> it lies in {tmp_path / 'mine'}; hf upload me/mine {tmp_path / 'mine'} --private does it later"
    with pytest.raises(UserError, match=re.escape(later)):
        export(run, tmp_path / "mine", Options("hub", push="me/mine"))
    assert (tmp_path / "mine" / "README.md").is_file()


def test_a_licence_in_words_has_a_name_on_the_hub_and_texts_cannot_break_the_card(run):
    said = card.front_matter(card.Licences("Ours: 'see' \"LICENSE\"\n---"))
    assert yaml.safe_load(said.split("---\n")[1])["license_name"] == "ours-see-license"
    assert yaml.safe_load(said.split("---\n")[1])["license"] == "other"
    model = tlx.load(run, device="cpu")
    odd = dataclasses.replace(model.description, metrics={"recall/a|b\nc": 0.5}, provenance={"step": 3})
    text = card.body(dataclasses.replace(model, description=odd), [], [], card.Licences())
    assert "| recall/a\\|b c | 0.5000 |" in text
    assert "at step 3;" in text
    bare = dataclasses.replace(odd, metrics={})
    assert "Nothing was measured" in card.body(dataclasses.replace(model, description=bare), [], [], card.Licences())


# Networks as they are used

NETWORKS = (
    "timm/deit_tiny_patch16_224",
    "timm/swin_tiny_patch4_window7_224",
    "timm/convnext_atto",
    "torchvision/inception_v3",
    "torchvision/mobilenet_v2",
    "torchvision/resnet18",
)
EVERY_FORMAT = ("timm/deit_tiny_patch16_224", "torchvision/resnet18")


def drawn(name, folder, like, manifest):
    """A file of new weights of a network, which tells the pictures apart all the same."""
    torch.manual_seed(0)
    backbone = models.load(name, classes=3, weights="none")
    said = dataclasses.replace(like.description, backbone={"name": name, "args": {}}, input=backbone.input, batch=11)
    model = Model(backbone.module.eval(), like.task, said, torch.device("cpu"))
    outputs = model.forward.outputs(model.forward.pixels(manifest, torch.arange(len(manifest)))[1])
    weight, bias = [parameter for parameter in backbone.module.parameters() if parameter.shape[0] == 3][-2:]
    scale, mean = 2 / outputs.std(0), outputs.mean(0)
    with torch.no_grad():
        bias.sub_(mean).mul_(scale)
        weight.mul_(scale.view(-1, *[1] * (weight.ndim - 1)))
    plain.write_weights(model, folder / "drawn.safetensors")
    return folder / "drawn.safetensors"


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_both_libraries(name, run, shards, tmp_path, record_property):
    """With new weights."""
    library = name.partition("/")[0]
    manifest = tlx.Shards.open(str(shards / "val"))
    file = drawn(name, tmp_path, tlx.load(run), manifest)
    formats = [library, "onnx", *(["torch.export"] if name in EVERY_FORMAT else [])]
    formats += ["openvino"] if name in EVERY_FORMAT and HAS_OPENVINO else []
    for to in formats:
        options = Options(to, data=str(shards / "val"), preprocess=FORMATS[to].preprocess)
        found = export(file, tmp_path / PLACES.get(to, to), options)
        figure = f"{name} {to}: {found['largest_difference']:.1e}, {found['equal_decisions']} of 60 alike"
        record_property("figures", figure)
    by_format, decided = answers(tmp_path, tlx.load(file), shards / "val", formats)
    assert len(set(decided)) > 1
    assert by_format == dict.fromkeys(formats, decided)


def test_what_others_get_does_not_say_where_files_lie_here(run):
    said = tlx.load(run).description
    taken = [{"file": "/home/me/runs/a/model.safetensors", "name": "~/runs/a", "taken": True}]
    told = {"weights": "/home/me/w.safetensors", "averaged": {"ingredients": taken}, "step": 3, "loaded": "/home/me"}
    kept = card.without_folders(dataclasses.replace(said, provenance=told)).provenance
    own = [{"file": "model.safetensors", "name": "a", "taken": True}]
    assert kept == {"weights": "w.safetensors", "averaged": {"ingredients": own}, "step": 3}
