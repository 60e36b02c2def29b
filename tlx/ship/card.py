"""What goes with a model for people: the Hub's README.md, the description in an ONNX file. It has the numbers that were
measured and nothing that was not. And the upload."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlx.base.errors import UserError
from tlx.runs.run_files import RunFiles, within
from tlx.runs.run_folder import AVERAGED
from tlx.ship.plain import activation
from tlx.use.description import ModelDescription
from tlx.use.evaluate import FOLDER
from tlx.use.model import Model

_NOT_GIVEN = "**not given** by whoever exported it: ask before you use it"
_COUNTS = ("samples", "nonfinite")


@dataclass(frozen=True)
class Licences:
    """Of the weights and of the data, as identifiers such as ``apache-2.0`` or in words; None: not given."""

    weights: str | None = None
    data: str | None = None


def front_matter(licences: Licences) -> str:
    """What the Hub reads of the card, above it. A licence in words is `other` to it, with a name."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        library_name="timm",
        license=licences.weights,
        pipeline_tag="image-classification",
        tags=["timm", "image-classification", "tlx"],
    )
    if licences.weights is not None and re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licences.weights) is None:
        data.license, data.license_name = "other", re.sub(r"[^a-z0-9]+", "-", licences.weights.lower()).strip("-")
    return f"---\n{data.to_yaml()}\n---\n\n"


def body(
    model: Model,
    lines: Iterable[str],
    looks: list[dict[str, Any]],
    licences: Licences,
    int8: Mapping[str, Any] | None = None,
) -> str:
    """
    Args:
        lines: of Python that uses it.
        looks: see :func:`looks_of`; without any, the metrics that chose the checkpoint are told.
        int8: what it costs, see :func:`tlx.ship.quantise.quantised`.
    """
    said, spec = model.description, model.description.input
    parts = [
        f"# {said.backbone['name']}, {len(said.outputs)} outputs ({said.task['name']})",
        "",
        f"Trained with tlx from weights `{said.provenance.get('weights')}`.",
        *("", "```python", *lines, "```", ""),
        f"Pictures: {spec.size[0]} x {spec.size[1]} pixels, a centre crop of {spec.crop_pct:g} of the short side,",
        f"{spec.interpolation}, mean {_numbers(spec.mean)}, std {_numbers(spec.std)}.",
    ]
    if said.temperature is not None:
        parts.append(f"Logits divided by {said.temperature:.4g} give probabilities as calibrated on validation data.")
    parts += ["", "## How good it is", "", *_measured(model, looks)]
    if int8 is not None:
        parts += ["", "## What int8 costs", "", *_of_int8(int8)]
    parts += ["", "## Licences", "", f"- of the weights: {licences.weights or _NOT_GIVEN}"]
    parts += [f"- of the data it was trained on: {licences.data or _NOT_GIVEN}"]
    parts += ["", "## Where it comes from", "", "| | |", "|---|---|"]
    told = {name: of for name, of in said.provenance.items() if of is not None and name != AVERAGED}
    parts += [f"| {name} | `{of}` |" for name, of in told.items()]
    if isinstance(averaged := said.provenance.get(AVERAGED), Mapping):
        taken = [one["sha256"][:12] for one in averaged["ingredients"] if one["taken"]]
        parts.append(f"| average of {len(taken)} models | `{', '.join(taken)}` |")
    return "\n".join(parts) + "\n"


def timm_lines(model: Model, repository: str) -> Iterator[str]:
    """
    Args:
        repository: ``OWNER/NAME``, where it goes.
    """
    is_upright, active = model.description.upright, activation(model)
    yield from ("import timm", "import torch", "from PIL import Image, ImageOps", "")
    yield f'net = timm.create_model("hf-hub:{repository}", pretrained=True).eval()  # or "local-dir:FOLDER"'
    yield "view = timm.data.create_transform(**timm.data.resolve_model_data_config(net))"
    yield f'image = {"ImageOps.exif_transpose" if is_upright else ""}(Image.open("a.jpg")).convert("RGB")'
    yield from ("with torch.inference_mode():", "    outputs = net(view(image)[None])[0]")
    if active == ".softmax(1)":
        yield 'print(net.pretrained_cfg["label_names"][int(outputs.argmax())])'
    else:
        yield f'print(dict(zip(net.pretrained_cfg["label_names"], outputs{active}.tolist())))'


def onnx_lines(name: str, model: Model, takes: str) -> Iterator[str]:
    """
    Args:
        takes: its numbers, ``uint8`` or ``float32``.
    """
    shape = f"[n, {model.description.input.channels}, {', '.join(map(str, model.description.input.size))}]"
    yield from ("import json", "", "import onnxruntime", "")
    yield f"session = onnxruntime.InferenceSession({name!r})"
    yield "about = {k: json.loads(v) for k, v in session.get_modelmeta().custom_metadata_map.items()}"
    yield 'print(about["labels"], about["preprocessing"])'
    yield f'outputs = session.run(None, {{"pixels": pixels}})  # {takes} {shape}'


def _measured(model: Model, looks: list[dict[str, Any]]) -> Iterator[str]:
    for look in looks:
        yield from _look(look)
    told = {name: value for name, value in model.description.metrics.items() if name not in _COUNTS}
    if not looks and not told:
        yield "Nothing was measured of these weights."
    elif not looks:
        step = model.description.provenance.get("step")
        yield f"Of the evaluation in training at step {step}; no interval was measured:"
        yield from ("", "| metric | value |", "|---|---|")
        yield from (f"| {_cell(name)} | {value:.4f} |" for name, value in told.items())


def _of_int8(int8: Mapping[str, Any]) -> Iterator[str]:
    drop, speed, top1, count = int8["drop"], int8["pictures_per_second"], int8["top1"], int8["reported"]
    yield f"The numbers above are of the network in fp32. int8 is by the recipe `{int8['recipe']}`, the best of"
    yield f"{len(int8['tried'])}. On {count} pictures that it was neither calibrated nor chosen by:"
    yield from ("", "| | fp32 | int8 |", "|---|---|---|")
    yield f"| top1 | {top1['fp32']:.4f} | {top1['int8']:.4f} |"
    yield f"| pictures per second, on the CPU that exported it | {speed['fp32']:.1f} | {speed['int8']:.1f} |"
    yield ""
    yield f"It costs {drop['value']:.2f} points of top-1 ({drop['low']:.2f} to {drop['high']:.2f}, 95 %, paired), and"
    times = int8["times_as_fast"]
    yield f"{int8['equal_decisions']} of {count} decisions are equal. It is {times['value']:.2f} times as fast there"
    yield f"({times['lowest']:.2f} to {times['highest']:.2f} in rounds of both)."


def looks_of(run: Path | None, sha256: str) -> list[dict[str, Any]]:
    """Of a run's evaluations of these weights, the last one of each data."""
    files = sorted((run / FOLDER).glob("*.json")) if run is not None else []
    found = []
    for file in files:
        own = [look for look in within(RunFiles(file.parent).read(file.name), "looks") if _weights(look) == sha256]
        found += own[-1:]
    return found


def _weights(look: Mapping[str, Any]) -> Any:
    weights = look.get("weights")
    return weights.get("sha256") if isinstance(weights, dict) else None


def _look(look: Mapping[str, Any]) -> Iterator[str]:
    bootstrap = look.get("bootstrap")
    resamples = bootstrap.get("resamples") if isinstance(bootstrap, dict) else None
    where = "/".join(Path(str(look.get("data"))).parts[-2:])
    yield f"{look.get('samples')} pictures of `{where}`, {look.get('time')}; intervals: 95 % of {resamples}"
    yield from ("resamples.", "", "| metric | value | from | to |", "|---|---|---|---|")
    for name, of in dict(look.get("metrics") or {}).items():
        yield f"| {_cell(name)} | {_number(of.get('value'))} | {_number(of.get('low'))} | {_number(of.get('high'))} |"
    yield ""


def without_folders(said: ModelDescription) -> ModelDescription:
    """Where files lie on this machine is nobody's business: of paths, their ends, and nothing of what loading told."""
    kept = {name: _end(of) for name, of in said.provenance.items() if name != "loaded"}
    return dataclasses.replace(said, provenance=kept)


def _end(value: Any) -> Any:
    """Of a path, its last name; other values as they are."""
    if isinstance(value, Mapping):
        return {name: _end(of) for name, of in value.items()}
    if isinstance(value, list):
        return [_end(of) for of in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value


def _cell(text: str) -> str:
    """Of a table."""
    return " ".join(text.replace("|", "\\|").split())


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else ""


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def check_repository(repository: str) -> None:
    """Before anything is computed for it.

    Raises:
        UserError: it has no such name, or nobody has logged in.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(str(error), where=f"--push {repository}", todo="--push OWNER/NAME") from error
    if repository.count("/") != 1:
        raise UserError("a repository has an owner", where=f"--push {repository}", todo="--push OWNER/NAME")
    if get_token() is None:
        raise UserError("nobody is logged in to the Hub", where=f"--push {repository}", todo="hf auth login")


def push(folder: Path, repository: str) -> str:
    """Uploads what lies there; where the repository is new, it is private.

    Returns:
        Its address.

    Raises:
        UserError: the Hub does not take it.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="tlx")
    try:
        url = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository, commit_message="Model of tlx export")
    except Exception as error:  # of its client, and of the one that this uses
        what = f"the Hub does not take it: {' '.join(str(error).split())[:300] or type(error).__name__}"
        later = shlex.join(["hf", "upload", repository, str(folder), "--private"])
        raise UserError(
            what, where=f"--push {repository}", todo=f"it lies in {folder}; {later} does it later"
        ) from error
    return str(url)
