"""Folders of weights under names that can be foretold: ``timm--resnet50.a1_in1k.safetensors``.

`tlx weights fetch` fills one on a machine with internet; the environment variable TLX_WEIGHTS names one, or several as
in PATH, on a machine without. A file's header says what it is.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from tlx.base.errors import UserError
from tlx.base.launcher import environment
from tlx.base.paths import expanded_path
from tlx.base.tensor_header import settle
from tlx.models.weights.formats import format_of, refused

VARIABLE = "TLX_WEIGHTS"


def full_name(source: str, tag: str | None) -> str:
    """``timm/resnet50`` and ``a1_in1k`` give ``timm/resnet50.a1_in1k``; a tag that the name has already is replaced."""
    base = source.partition(".")[0]
    return f"{base}.{tag}" if tag else base


def file_name(name: str) -> str:
    """Of ``timm/resnet50.a1_in1k`` or ``hf-hub:OWNER/REPO@REVISION``."""
    return f"{re.sub('[^A-Za-z0-9_.@+-]+', '--', name)}.safetensors"


def folders() -> list[Path]:
    """Those of TLX_WEIGHTS, in its order."""
    return [expanded_path(word, where=VARIABLE) for word in environment().get(VARIABLE).split(os.pathsep) if word]


def find(name: str) -> Path | None:
    """The file of these weights in the first folder of TLX_WEIGHTS that has it."""
    return next((f / file_name(name) for f in folders() if (f / file_name(name)).is_file()), None)


def make(folder: Path) -> None:
    """Raises UserError: it cannot be written to."""
    probe = folder / f".{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot be written to: {error.strerror}", where=str(folder)) from error


def put(folder: Path, name: str, state: Mapping[str, torch.Tensor], about: Mapping[str, str]) -> Path:
    """Writes beside, flushes to the disk, renames: the name only ever stands for a whole file.

    Args:
        about: for the header, with `name`.

    Raises:
        UserError: no permission, no room.
    """
    from safetensors.torch import save_file

    path = folder / file_name(name)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        beside.touch()
        permissions = beside.stat().st_mode  # of the user's new files; safetensors' own are for nobody else to read
        save_file(_apart(state), beside, {"format": "pt", "name": name, **about})
        settle(beside)
        beside.chmod(permissions)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except Exception as error:  # safetensors has exceptions of its own for a full disk
        raise UserError(f"cannot be written: {error}", where=str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()
    return path


def _apart(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous tensors that share no storage, as safetensors wants them."""
    apart, seen = {}, set()
    for name, tensor in state.items():
        whole = tensor.detach().contiguous()
        apart[name] = whole.clone() if whole.untyped_storage().data_ptr() in seen else whole
        seen.add(whole.untyped_storage().data_ptr())
    return apart


def header(path: Path) -> Mapping[str, str]:
    """What a file of a shelf says about itself; nothing if it is another kind of file.

    Raises:
        UserError: it is not whole, or something else under the name of a safetensors file.
    """
    from safetensors import safe_open

    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    format_of(path)
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except Exception as error:  # safetensors' own, whatever a damaged file leads to
        raise refused(path, error) from error
