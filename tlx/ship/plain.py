"""Weights as timm and torchvision load them, without tlx: a folder with a few lines that do it, or one for the Hub."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from string import Template
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from tlx import models
from tlx.base.errors import UserError
from tlx.base.files import json_text
from tlx.base.tensor_header import settled
from tlx.runs.checkpoint import DESCRIBED
from tlx.ship.agreement import Run
from tlx.ship.graph import quiet
from tlx.tasks.classification import Classification
from tlx.tasks.hierarchical import Hierarchical
from tlx.tasks.multilabel import MultiLabel
from tlx.tasks.semantic import Semantic
from tlx.use.model import Model

WEIGHTS = "model.safetensors"

_LOAD = Template('''"""$name, $outputs outputs, as it was trained: python load.py PICTURE ...

Takes torch, torchvision, safetensors and pillow$also.
"""

import json
import math
import sys
from pathlib import Path

import torch
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file
from torchvision.transforms.v2 import InterpolationMode, functional$imported

FILE = Path(__file__).with_name("model.safetensors")
with safe_open(FILE, "pt") as opened:
    ABOUT = json.loads(opened.metadata()["tlx"])  # also where it comes from, and how good it is
LABELS, INPUT = ABOUT["outputs"], ABOUT["input"]


def load():
    net = $build
    net.load_state_dict(load_file(FILE), strict=True)
    return net.eval()


def view(image):
    """A PIL image as the network was shown pictures in evaluations: float32 [1, channels, height, width]."""
    image = ImageOps.exif_transpose(image) if ABOUT["upright"] else image
    pixels = functional.pil_to_tensor(image.convert({1: "L", 3: "RGB", 4: "RGBA"}[len(INPUT["mean"])]))
    rows, columns = (math.floor(side / INPUT["crop_pct"] + 1e-6) for side in INPUT["size"])
    factor = max(rows / pixels.shape[1], columns / pixels.shape[2])
    cover = [max(round(pixels.shape[1] * factor), rows), max(round(pixels.shape[2] * factor), columns)]
    size = [rows] if rows == columns else cover  # of the short side
    pixels = functional.resize(pixels, size, InterpolationMode(INPUT["interpolation"]), antialias=True)
    pixels = functional.center_crop(pixels, INPUT["size"])
    return functional.normalize(pixels[None].float() / 255, INPUT["mean"], INPUT["std"])


if __name__ == "__main__":
    net = load()
    for path in sys.argv[1:]:
        with torch.inference_mode():
            outputs = net(view(Image.open(path)))$activation[0]
        best = outputs.argsort(descending=True)[:5].tolist()
        print(path, ", ".join(f"{LABELS[i]} {outputs[i]:.4f}" for i in best))
''')


def library_of(model: Model, to: str) -> tuple[str, str]:
    """Whose network it is, and its name there.

    Raises:
        UserError: that library cannot load it by itself.
    """
    said, asked = model.description, "timm" if to == "hub" else to
    library, _, name = (models.owner(said.backbone["name"]) or "").partition("/")
    why, others = None, ""
    if said.head["name"] != "linear":
        why = f"its head is {said.head['name']}, and not the network's own linear one"
    elif list(model.task.heads) != [""] or model.task.constants:
        why = f"it has several heads ({', '.join(model.task.heads)})"
    elif library != asked:
        why = f"the network is {said.backbone['name']}, which {asked} does not have"
        others = {"timm": "timm, hub, ", "torchvision": "torchvision, "}.get(library, "")
    elif library == "torchvision" and said.input.channels != 3:
        why = f"it takes pictures of {said.input.channels} channels, and torchvision's networks of 3 alone"
    if why is not None:
        raise UserError(why, where=f"--to {to}", todo=f"these formats do: {others}onnx, torch.export, openvino")
    return library, name


def write_weights(model: Model, file: Path) -> None:
    """What it is stands in the metadata, so that tlx reads the file, too."""
    state = {name: tensor.contiguous() for name, tensor in model.module.state_dict().items()}
    # not save_file, whose files nobody else may read, and whose error of a full disk is no OSError
    about = {"format": "pt", DESCRIBED: json.dumps(model.description.data())}
    file.write_bytes(settled(save(state, metadata=about)))


def write_plain(model: Model, folder: Path, library: str, name: str) -> None:
    """The weights, and ``load.py``."""
    folder.mkdir()
    write_weights(model, folder / WEIGHTS)
    args = {"num_classes": len(model.description.outputs), **_arguments(model, library)}
    given = ", ".join(f"{key}={value!r}" for key, value in args.items())
    timm = library == "timm"
    text = _LOAD.substitute(
        name=f"{library}/{name}",
        outputs=len(model.description.outputs),
        also=", and timm" if timm else "",
        imported="" if timm else "\nfrom torchvision.models import get_model",
        build=f"timm.create_model({name!r}, {given})" if timm else f"get_model({name!r}, {given})",
        activation=activation(model),
    )
    text = text.replace("import torch\n", "import timm\nimport torch\n", 1) if timm else text
    (folder / "load.py").write_text(text, encoding="utf-8")


def _arguments(model: Model, library: str) -> dict[str, Any]:
    """What the library's builder has to be told, besides the number of classes."""
    args, spec = dict(model.description.backbone.get("args", {})), model.description.input
    if library == "timm":
        return {**({"in_chans": spec.channels} if spec.channels != 3 else {}), **args}
    size = getattr(model.module, "image_size", None)  # of its vision transformers, which some weights fix
    drawn = "init_weights" in models.source(model.description.backbone["name"]).arguments()  # which takes long
    return {
        **({"image_size": size} if isinstance(size, int) else {}),
        **({"init_weights": False} if drawn else {}),
        **args,
    }


def activation(model: Model) -> str:
    if isinstance(model.task, Classification | Hierarchical | Semantic):
        return ".softmax(1)"
    return ".sigmoid()" if isinstance(model.task, MultiLabel) else ""


def run_plain(folder: Path, feed: Callable[[Tensor], Tensor]) -> Run:
    """By the lines that go with the weights."""
    with quiet("load.py"):
        return _running(runpy.run_path(str(folder / "load.py"))["load"](), feed)


def write_hub(model: Model, folder: Path, name: str, card: str) -> None:
    """What ``timm.create_model("local-dir:...")`` and ``"hf-hub:..."`` read, and the card."""
    folder.mkdir()
    write_weights(model, folder / WEIGHTS)
    said, net = model.description, model.module
    own, spec = dict(getattr(net, "pretrained_cfg", None) or {}), said.input
    view: dict[str, Any] = {
        "input_size": [spec.channels, *spec.size],
        "interpolation": spec.interpolation,
        "crop_pct": spec.crop_pct,
    }
    view |= {"crop_mode": "center", "mean": list(spec.mean), "std": list(spec.std), "custom_load": False}
    kept = {key: own[key] for key in ("pool_size", "first_conv", "classifier", "fixed_input_size") if key in own}
    config = {
        "architecture": name.partition(".")[0],
        "num_classes": len(said.outputs),
        "num_features": getattr(net, "num_features", None),
        "label_names": list(said.outputs),
        "model_args": _arguments(model, "timm"),
        "pretrained_cfg": {**kept, **view, "num_classes": len(said.outputs)},
    }
    (folder / "config.json").write_text(json_text(config), encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")


def run_hub(folder: Path, model: Model, feed: Callable[[Tensor], Tensor]) -> Run:
    """
    Raises:
        UserError: timm would show it pictures in another way, or tell other labels.
    """
    import timm

    with quiet("timm.create_model"):
        net = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        view = timm.data.resolve_model_data_config(net)
    spec = model.description.input
    own: dict[str, Any] = {"input_size": (spec.channels, *spec.size), "mean": spec.mean, "std": spec.std}
    own |= {"interpolation": spec.interpolation, "crop_pct": spec.crop_pct}
    odd = [key for key, value in own.items() if _plain(view.get(key)) != _plain(value)]
    if odd or list(net.pretrained_cfg.get("label_names") or ()) != list(model.description.outputs):
        raise UserError(f"timm reads {', '.join(odd) or 'labels'} of the folder in another way", todo="--to timm")
    return _running(net, feed)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


def _running(net: torch.nn.Module, feed: Callable[[Tensor], Tensor]) -> Run:
    def run(pixels: Tensor) -> Tensor:
        with quiet("the network that was loaded"), torch.inference_mode():
            found = net(feed(pixels))
        return found[0] if isinstance(found, tuple) else found  # type: ignore[no-any-return]

    return run
