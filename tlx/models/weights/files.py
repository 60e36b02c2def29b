"""Weights from files, read safely: one state dict, and where it is from."""

from __future__ import annotations

import argparse
import itertools
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tlx.base.errors import UserError, did_you_mean
from tlx.base.launcher import exported_meanwhile
from tlx.base.terminal import escaped
from tlx.models.weights.formats import NOT_READ, SAFETENSORS, TORCH, format_of, listed, refused
from tlx.models.weights.provenance import Size, sizes_beside
from tlx.models.weights.state_dict_formats import Convert, State

__all__ = ["Convert", "Given", "State", "is_file", "opened", "read", "unpickled"]

SUFFIXES = (*SAFETENSORS, *TORCH)
_INSIDE = ("state_dict_ema", "model_ema", "state_dict", "model", "net", "model_state_dict")
"""Where training scripts put the state dict in what they save, the better one first."""

_DEEP = 4  # dicts in dicts that a state dict is looked for in
_LOOKED_AT = 10_000  # dicts at one depth
_LONGEST_KEY = 200  # letters of a key that leads to a state dict
_OPTIMIZER = re.compile(r"optim($|izer|_state)")
_REPEATED = 64 << 20  # bytes that a tensor may have of repeating a smaller storage


@dataclass(frozen=True)
class Given:
    """Tensors by name, and where they are from.

    Attributes:
        where: in words, or the file.
        sizes: of the pictures that they were trained on, as far as that is known; the likeliest first.
        notes: what people should know of how the file was read.
        precision: in which tensors were stored that have another one by now.
        same: whether they are of a network that was built like this one, or filled as such by its library.
    """

    state: State
    where: str
    sizes: Sequence[Size] = ()
    notes: tuple[str, ...] = ()
    same: bool = False
    precision: Mapping[str, torch.dtype] = field(default_factory=dict)


def is_file(weights: str) -> bool:
    """Whether `weights` means a file rather than a tag of a library."""
    return weights.endswith(SUFFIXES) or "/" in weights or location(weights).is_file()


def location(weights: str) -> Path:
    """The path that a setting names; ``~`` and variables in it were filled in where it was read.

    Raises:
        UserError: no file can have this name.
    """
    try:
        path = Path(weights)
        path.exists()
    except (OSError, ValueError) as error:  # too long; a null character
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"no file can have this name: {why}", where=ascii(weights)[:200]) from error
    return path


def read(path: str | Path, key: str = "") -> State:
    """The tensors of a file of weights, by name; see :func:`opened`."""
    return opened(path, key).state


def opened(path: str | Path, key: str = "") -> Given:
    """A ``.safetensors`` or torch file.

    Torch files are read with ``weights_only=True``: nothing in them is executed.

    Args:
        key: of the dict in the file that is meant (``teacher``, ``model.state_dict``), or what its names begin with
            (``encoder_q``); by default the one that there is, or that training scripts are known to mean.

    Raises:
        UserError: no such file, not readable, no state dict inside, or several and nobody says which is meant.
    """
    path = location(str(path))
    if not path.is_file():
        todo = "backbone.weights is default, a tag, a file, a folder, hf-hub:OWNER/REPO, or none"
        raise UserError("no such file", where=str(path), todo=todo)
    content = _content(path)
    name, state, notes = _state_dict(content, key, str(path))
    odd = [one for one, tensor in state.items() if not _is_plain(tensor)]
    if odd:
        raise UserError(f"holds tensors without values of their own ({listed(odd)})", where=str(path))
    taken = (f"from its {escaped(name)}",) if name else ()
    return Given(dict(state), str(path), sizes_beside(content), (*taken, *notes))


def _content(path: Path) -> Any:
    """What a file holds: tensors and plain data."""
    form = format_of(path)
    try:
        if form == "safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        verify_packing(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):  # a script's options
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # what comes of it is told
            return torch.load(path, map_location="cpu", weights_only=True)
    except _Compressed as error:
        raise UserError(f"{NOT_READ}: {error}", where=str(path), todo="save it anew with torch.save") from error
    except Exception as error:  # of safetensors and torch, which raise whatever a damaged file leads to
        raise refused(path, error) from error


def _state_dict(content: Any, key: str, where: str) -> tuple[str, Mapping[str, torch.Tensor], tuple[str, ...]]:
    """The state dict that is meant in what a file holds.

    Returns:
        its key, "" for all of it; the dict; notes.
    """
    found = dict(_state_dicts(content, key))
    if key:
        return _asked(found, key, where)
    path = _usual(content)
    if path not in found and len(found) == 1:
        path = next(iter(found))
    others = [name for name in found if name != path]
    if path in found:
        also = f"{listed(others)} is in there too (backbone.weights_key)"
        return path, found[path], (also,) if others and path else ()
    if found:
        raise UserError(
            f"holds {len(found)} state dicts, and nothing says which is meant: {listed(list(found))}",
            where=where,
            todo=f"set backbone.weights_key to one of them: {escaped(next(iter(found)))[:100]}",
        )
    names = [str(name)[:100] for name in content if isinstance(name, str)] if isinstance(content, Mapping) else []
    raise UserError(
        f"holds no state dict (parameter names with tensors){f'; it has {listed(names)}' if names else ''}",
        where=where,
        todo='it must be a state dict: torch.save(model.state_dict(), "weights.pth")',
    )


def _asked(
    found: Mapping[str, Mapping[str, torch.Tensor]], key: str, where: str
) -> tuple[str, Mapping[str, torch.Tensor], tuple[str, ...]]:
    """The dict of this key, or the part of one whose names begin with it."""
    if key in found:
        return key, found[key], ()
    parts = {}
    for path, state in found.items():
        start = f"{key.removeprefix(f'{path}.') if path else key}."
        part = {name.removeprefix(start): tensor for name, tensor in state.items() if name.startswith(start)}
        if part:
            parts[f"{path}.{start}".strip(".")] = part
    if key in parts or len(parts) == 1:
        full = key if key in parts else next(iter(parts))
        return full, parts[full], ()
    if parts:
        raise UserError(
            f'holds "{escaped(key)}" {len(parts)} times: {listed(list(parts))}',
            where=where,
            todo=f"set backbone.weights_key to the one that is meant: {escaped(next(iter(parts)))[:100]}",
        )
    starts = dict.fromkeys(name.partition(".")[0] for state in found.values() for name in state if "." in name)
    known = [path for path in found if path] or list(starts)
    raise UserError(
        f'has no state dict "{escaped(key)}"{did_you_mean(key, known[:100])}',
        where=where,
        todo=f"backbone.weights_key is one of {listed(known)}" if known else "leave backbone.weights_key out",
    )


def _state_dicts(content: Any, key: str) -> Iterator[tuple[str, Mapping[str, torch.Tensor]]]:
    """Every mapping of names to tensors in what a file holds, by the keys that lead to it, joined by dots."""
    verdicts: dict[int, bool] = {}  # a file may hold a dict twice, and itself
    level = [("", content)] if isinstance(content, Mapping) else []
    for _ in range(_DEEP + 1):
        below: list[tuple[str, Mapping[Any, Any]]] = []
        for path, value in level:
            if not value or verdicts.get(id(value)) is False:
                continue
            verdicts[id(value)] = verdicts.get(id(value)) or _is_state_dict(value)
            if verdicts[id(value)]:
                yield path, value
            elif all(isinstance(k, str) for k in value):
                below += itertools.islice(_below(path, value, key), _LOOKED_AT - len(below))
        level = below


def _below(path: str, value: Mapping[str, Any], key: str) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """The mappings in a mapping, by the keys that lead to them; an optimizer's states are no weights, unless `key` says
    so."""
    for name, inside in value.items():
        if not isinstance(inside, Mapping) or len(name) > _LONGEST_KEY:
            continue
        full = f"{path}.{name}" if path else name
        if not _OPTIMIZER.match(name) or f"{key}.".startswith(f"{full}."):
            yield full, inside


def _is_state_dict(value: Mapping[Any, Any]) -> bool:
    return all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in value.items())


def _usual(content: Any) -> str:
    """The keys that lead to the state dict where training scripts put it."""
    path: list[str] = []
    for _ in range(_DEEP):  # a file may hold itself
        inside = next((k for k in _INSIDE if isinstance(content.get(k), Mapping)), None) if _is_dict(content) else None
        if inside is None:
            break
        content = content[inside]
        path.append(inside)
    return ".".join(path)


def _is_dict(value: Any) -> bool:
    return isinstance(value, Mapping)


class _Compressed(ValueError):
    """An archive whose parts are compressed."""


def verify_packing(path: Path) -> None:
    """
    Raises:
        ValueError: a damaged zip file, or one whose parts are compressed, as torch.save never writes them: a kilobyte
            may become a gigabyte.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as file:
            unpacked = sum(part.file_size for part in file.infolist())
    except Exception as error:  # zipfile's own, and whatever else its fields lead to
        raise ValueError(f"not a whole file: {error}") from error
    if unpacked > path.stat().st_size:
        raise _Compressed("it is compressed")


def in_fp32(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_floating_point() or tensor.dtype == torch.float32:
        return tensor
    try:
        return tensor.float()
    except (RuntimeError, NotImplementedError):  # formats that pack several numbers into a byte; they do not fit
        return tensor


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is as large as it says, and not one small storage seen again and again, or none at all."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or tensor.is_nested:
        return False
    return tensor.numel() * tensor.element_size() <= max(tensor.untyped_storage().nbytes(), _REPEATED)


def unpickled() -> AbstractContextManager[None]:
    """Inside, torch.load reads tensors and plain data only, whatever the library that calls it asks for."""
    return exported_meanwhile({"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": None})
