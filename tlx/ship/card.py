"""The Hub's README.md of a model, with the numbers that were measured and nothing that was not; and the upload."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlx.base.errors import UserError
from tlx.runs.run_files import RunFiles, within
from tlx.runs.run_folder import AVERAGED
from tlx.ship.plain import activation
from tlx.use.evaluate import FOLDER
from tlx.use.model import Model

_NOT_GIVEN = "**not given** by whoever exported it: ask before you use it"
_COUNTS = ("samples", "nonfinite")


@dataclass(frozen=True)
class Licences:
    """Of the weights and of the data, as identifiers such as ``apache-2.0`` or in words; None: not given."""

    weights: str | None = None
    data: str | None = None


def card(model: Model, looks: list[dict[str, Any]], licences: Licences, repository: str) -> str:
    """
    Args:
        looks: see :func:`looks_of`; without any, the metrics that chose the checkpoint are told.
        repository: ``OWNER/NAME``, where it goes.
    """
    return "\n".join(_lines(model, looks, licences, repository)) + "\n"


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


def _lines(model: Model, looks: list[dict[str, Any]], licences: Licences, repository: str) -> Iterator[str]:
    said, spec = model.description, model.description.input
    yield from ("---", _header(model, licences), "---", "")
    yield f"# {said.backbone['name']}, {len(said.outputs)} outputs ({said.task['name']})"
    yield from (
        "",
        f"Trained with tlx from weights `{_without_folders(said.provenance.get('weights'))}`.",
        "",
        "```python",
    )
    yield from ("import timm", "import torch", "from PIL import Image, ImageOps", "")
    yield f'net = timm.create_model("hf-hub:{repository}", pretrained=True).eval()  # or "local-dir:FOLDER"'
    yield "view = timm.data.create_transform(**timm.data.resolve_model_data_config(net))"
    yield f'image = {"ImageOps.exif_transpose" if said.upright else ""}(Image.open("a.jpg")).convert("RGB")'
    yield from ("with torch.inference_mode():", "    outputs = net(view(image)[None])[0]")
    told = 'print(net.pretrained_cfg["label_names"][int(outputs.argmax())])'
    if activation(model) != ".softmax(1)":
        told = f'print(dict(zip(net.pretrained_cfg["label_names"], outputs{activation(model)}.tolist())))'
    yield from (told, "```", "")
    yield f"Pictures: {spec.size[0]} x {spec.size[1]} pixels, a centre crop of {spec.crop_pct:g} of the short side,"
    yield f"{spec.interpolation}, mean {_numbers(spec.mean)}, std {_numbers(spec.std)}."
    yield from ("", "## How good it is", "")
    for look in looks:
        yield from _look(look)
    if not looks:
        yield "Of the evaluation in training that chose these weights; no interval was measured:"
        yield from ("", "| metric | value |", "|---|---|")
        yield from (f"| {name} | {value:.4f} |" for name, value in said.metrics.items() if name not in _COUNTS)
    yield from ("", "## Licences", "", f"- of the weights: {licences.weights or _NOT_GIVEN}")
    yield f"- of the data it was trained on: {licences.data or _NOT_GIVEN}"
    yield from ("", "## Where it comes from", "", "| | |", "|---|---|")
    told_of = {name: of for name, of in said.provenance.items() if of is not None and name not in ("loaded", AVERAGED)}
    yield from (f"| {name} | `{_without_folders(of)}` |" for name, of in told_of.items())
    if isinstance(averaged := said.provenance.get(AVERAGED), Mapping):
        taken = [one["sha256"][:12] for one in averaged["ingredients"] if one["taken"]]
        yield f"| average of {len(taken)} models | `{', '.join(taken)}` |"


def _look(look: Mapping[str, Any]) -> Iterator[str]:
    bootstrap = look.get("bootstrap")
    resamples = bootstrap.get("resamples") if isinstance(bootstrap, dict) else None
    where = _without_folders(look.get("data"), 2)
    yield f"{look.get('samples')} pictures of `{where}`, {look.get('time')}; intervals: 95 % of {resamples}"
    yield from ("resamples.", "", "| metric | value | from | to |", "|---|---|---|---|")
    for name, of in dict(look.get("metrics") or {}).items():
        yield f"| {name} | {_number(of.get('value'))} | {_number(of.get('low'))} | {_number(of.get('high'))} |"
    yield ""


def _without_folders(value: Any, kept: int = 1) -> str:
    """Of a path on this machine, its end: where it lies is nobody's business."""
    return "/".join(Path(str(value)).parts[-kept:]) if str(value).startswith(("/", "~")) else str(value)


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else ""


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _header(model: Model, licences: Licences) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        library_name="timm",
        license=licences.weights,
        pipeline_tag="image-classification",
        tags=["timm", "image-classification", "tlx"],
    )
    return str(data.to_yaml())


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
        raise UserError("whose is it?", where=f"--push {repository}", todo="--push OWNER/NAME")
    if get_token() is None:
        raise UserError("the Hub takes it from somebody alone", where=f"--push {repository}", todo="hf auth login")


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
    except (OSError, ValueError, RuntimeError, json.JSONDecodeError) as error:
        why = " ".join(str(error).split())[:300]
        what = f"the Hub does not take it: {why}"
        raise UserError(
            what, where=f"--push {repository}", todo=f"it lies in {folder}: hf upload does it later"
        ) from error
    return str(url)
