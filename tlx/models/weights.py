"""Weights from files: read safely, loaded completely or not at all."""

from __future__ import annotations

import argparse
import os
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tlx.errors import UserError
from tlx.models.readings import Convert, Reading, State, readings

__all__ = ["Convert", "Filled", "State", "fill", "is_file", "read", "unpickled"]

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
_INSIDE = ("state_dict_ema", "model_ema", "state_dict", "model", "net")
"""Where training scripts put the state dict in what they save, the better one first."""


_REPEATED = 64 << 20  # bytes that a tensor may have of repeating a smaller storage


@dataclass(frozen=True)
class Filled:
    """What `fill` did.

    Attributes:
        taken: names of the network that got values.
        resized: those of `taken` whose values were resized.
        left: names of the file that were not taken.
    """

    taken: frozenset[str]
    resized: tuple[str, ...]
    left: tuple[str, ...]


def is_file(weights: str) -> bool:
    """Whether `weights` means a file rather than a tag of a library."""
    return weights.endswith(SUFFIXES) or "/" in weights or location(weights).is_file()


def location(weights: str) -> Path:
    """The path that a setting names.

    Raises:
        UserError: no file can have this name.
    """
    try:
        path = Path(weights).expanduser()
        path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long; a null character; ~ and nobody's name
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"no file can have this name: {why}", where=ascii(weights)[:200]) from error
    return path


def read(path: str | Path) -> State:
    """The tensors of a ``.safetensors`` or torch file, by name.

    Torch files are read with ``weights_only=True``: nothing in them is executed.

    Raises:
        UserError: no such file, not readable, or no state dict inside.
    """
    path = location(str(path))
    if not path.is_file():
        todo = "backbone.weights is default, a tag, a file, a folder, hf-hub:OWNER/REPO, or none"
        raise UserError("no such file", where=str(path), todo=todo)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            verify_packing(path)
            with torch.serialization.safe_globals([argparse.Namespace]):  # plain data: the options of a training script
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        todo = "it must be a state dict saved with torch.save or safetensors; nothing else is unpickled"
        raise UserError(f"cannot be read as weights ({reason})", where=str(path), todo=todo) from error
    for _ in range(4):  # a file may hold itself
        if isinstance(content, Mapping):
            content = next((content[key] for key in _INSIDE if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in content.items()
    ):
        named = [k[:100] for k in content if isinstance(k, str)] if isinstance(content, Mapping) else []
        found = f"; it has {_some(named)}" if named else ""
        raise UserError(f"holds no state dict (parameter names with tensors){found}", where=str(path))
    odd = [name for name, tensor in content.items() if not _is_plain(tensor)]
    if odd:
        raise UserError(f"holds tensors without values of their own ({_some(odd)})", where=str(path))
    return dict(content)


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
        raise ValueError("it is compressed")


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is as large as it says, and not one small storage seen again and again, or none at all."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or tensor.is_nested:
        return False
    return tensor.numel() * tensor.element_size() <= max(tensor.untyped_storage().nbytes(), _REPEATED)


@contextmanager
def unpickled() -> Iterator[None]:
    """Inside, torch.load reads tensors and plain data only, whatever the library that calls it asks for."""
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[0]] = "1"
    try:
        yield
    finally:
        os.environ.pop(names[0])
        os.environ.update({name: value for name, value in before.items() if value is not None})


def fill(net: nn.Module, state: State, *, heads: Collection[str], where: str, convert: Convert | None = None) -> Filled:
    """Loads `state` into `net` completely, its classifiers left out; half precision becomes fp32.

    Names may carry what DataParallel and torch.compile add, and a prefix under which the whole network is found.

    Args:
        heads: paths of modules whose values stay as they are and may be of any shape or absent in `state`.
        convert: the library's own way to read other layouts and sizes; tried when `state` does not fit as it is.

    Raises:
        UserError: parameters missing, unknown, of another shape or not numbers, listed.
    """
    state = {n: t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for n, t in state.items()}
    wanted = {n: t for n, t in net.state_dict().items() if not _under(n, heads)}
    misfits = []
    try:
        for reading in readings(net, state, wanted, convert):
            misfit = _misfit(net, wanted, reading.state, heads)
            if not misfit:
                filled = _fill(wanted, state, reading)
                if wanted and not filled.taken:
                    raise UserError("holds nothing of this network")
                return filled
            misfits.append(misfit)
    except UserError as error:
        raise UserError(error.what, where=where, todo=error.todo) from error
    worst = min(misfits, key=lambda misfit: sum(len(names) for names in misfit.values()))
    problems = "; ".join(f"{len(names)} {what} ({_some(names)})" for what, names in worst.items())
    raise UserError(f"does not fit {type(net).__name__}: {problems}", where=where, todo=_advice(worst))


def _fill(wanted: State, state: State, reading: Reading) -> Filled:
    taken = [name for name in wanted if name in reading.state]
    used: set[str] = set()
    resized = []
    with torch.no_grad():
        for name in taken:
            wanted[name].copy_(reading.state[name])
            used |= set(reading.origins[name])
            sizes = [state[origin].numel() for origin in reading.origins[name]]
            if len(sizes) == 1 and sizes[0] != wanted[name].numel():
                resized.append(name)
    return Filled(frozenset(taken), tuple(resized), tuple(name for name in state if name not in used))


def _misfit(net: nn.Module, wanted: State, state: State, heads: Collection[str]) -> dict[str, list[str]]:
    """What is wrong -> names."""
    want = {n: tuple(t.shape) for n, t in wanted.items()}
    have = {n: tuple(t.shape) for n, t in state.items() if not _under(n, heads) and not _foreign_head(n, net)}
    lists = {
        "missing": [n for n in want if n not in have and not n.endswith("num_batches_tracked")],
        "not in the network": [n for n in have if n not in want and not n.endswith("num_batches_tracked")],
        "of another shape": [f"{n} {have[n]} instead of {want[n]}" for n in want if n in have and want[n] != have[n]],
        "not finite or no real numbers": [n for n, t in state.items() if n in want and not _numbers(t, like=wanted[n])],
    }
    return {what: names for what, names in lists.items() if names}


def _numbers(given: torch.Tensor, *, like: torch.Tensor) -> bool:
    """Whether values can stand for those of a tensor of the network."""
    if not like.is_floating_point():
        return not (given.is_floating_point() or given.is_complex())
    return given.is_floating_point() and bool(given.isfinite().all())


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (" ..." if len(names) > 4 else "")


def _advice(misfit: Collection[str]) -> str:
    if list(misfit) == ["of another shape"]:
        return "backbone.args must be those that the weights were trained with (img_size, channels ...)"
    return "the file must come from this network with the same backbone.args; only the classifier may differ"


def _under(name: str, paths: Collection[str]) -> bool:
    return any(name.startswith(f"{path}.") for path in paths)


def _foreign_head(name: str, net: nn.Module) -> bool:
    """A head that tlx put on when it wrote the file."""
    return name.startswith(("head.new.", "new_head.")) or (name.startswith("head.") and not hasattr(net, "head"))
