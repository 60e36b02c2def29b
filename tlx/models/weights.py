"""Weights from files and caches: read safely, found quickly or missed quickly, loaded completely or not at all."""

from __future__ import annotations

import hashlib
import re
import socket
import threading
import urllib.request
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import nn

from tlx.errors import UserError

State = dict[str, torch.Tensor]
Convert = Callable[[State, nn.Module], State]

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
_PREFIXES = ("module.", "_orig_mod.")
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "net")
_PATIENCE_S = 1.0


def is_file(weights: str) -> bool:
    """Whether `weights` means a file rather than a tag of a library."""
    return weights.endswith(SUFFIXES) or "/" in weights or Path(weights).is_file()


def read(path: str | Path) -> State:
    """The tensors of a ``.safetensors`` or torch file, by name, without the prefixes that wrappers add.

    Torch files are read with ``weights_only=True``: nothing in them is executed.

    Raises:
        UserError: no such file, not readable, or no state dict inside.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError("no such file", where=str(path), todo="backbone.weights is default, a tag, a file, or none")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        todo = "it must be a state dict saved with torch.save or safetensors; nothing else is unpickled"
        raise UserError(f"cannot be read as weights ({reason})", where=str(path), todo=todo) from error
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise UserError("holds no state dict (parameter names with tensors)", where=str(path))
    return {_bare(name): tensor for name, tensor in content.items()}


def _bare(name: str) -> str:
    while name.startswith(_PREFIXES):
        name = name.partition(".")[2]
    return name


def fill(net: nn.Module, state: State, *, heads: Collection[str], where: str, convert: Convert | None = None) -> None:
    """Loads `state` into `net` completely, its classifiers left out; half precision becomes fp32.

    Args:
        heads: paths of modules whose values stay as they are and may be of any shape or absent in `state`.
        convert: the library's own way to read other layouts and sizes; tried when `state` does not fit as it is.

    Raises:
        UserError: parameters missing, unknown, of another shape or not numbers, listed.
    """
    problems = _misfit(net, state, heads)
    if problems and convert:
        try:
            converted = convert(state, net)
        except Exception:  # made for other files than this one: say what is wrong with this one
            converted = state
        state, problems = (converted, _misfit(net, converted, heads)) if converted is not state else (state, problems)
    if problems:
        raise UserError(
            f"does not fit {type(net).__name__}: {'; '.join(problems)}", where=where, todo=_advice(problems)
        )
    wanted = net.state_dict()
    with torch.no_grad():
        for name, tensor in state.items():
            if name in wanted and not _under(name, heads):
                wanted[name].copy_(tensor)


def _misfit(net: nn.Module, state: State, heads: Collection[str]) -> list[str]:
    want = {n: tuple(t.shape) for n, t in net.state_dict().items() if not _under(n, heads)}
    have = {n: tuple(t.shape) for n, t in state.items() if not _under(n, heads) and not _foreign_head(n, net)}
    missing = [n for n in want if n not in have and not n.endswith("num_batches_tracked")]
    holes = [n for n, t in state.items() if n in want and t.is_floating_point() and bool(t.isnan().any())]
    unknown = [n for n in have if n not in want and not n.endswith("num_batches_tracked")]
    shapes = [f"{n} {have[n]} instead of {want[n]}" for n in want if n in have and want[n] != have[n]]
    lists = {"missing": missing, "not in the network": unknown, "of another shape": shapes, "with NaN": holes}
    return [f"{len(names)} {what} ({_some(names)})" for what, names in lists.items() if names]


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (" ..." if len(names) > 4 else "")


def _advice(problems: list[str]) -> str:
    if all("another shape" in p for p in problems):
        return "backbone.args must be those that the weights were trained with (img_size, channels ...)"
    return "the file must come from this network with the same backbone.args; only the classifier may differ"


def _under(name: str, paths: Collection[str]) -> bool:
    return any(name.startswith(f"{path}.") for path in paths)


def _foreign_head(name: str, net: nn.Module) -> bool:
    """A head that tlx put on when it wrote the file."""
    return name.startswith(("head.new.", "new_head.")) or (name.startswith("head.") and not hasattr(net, "head"))


def reachable(url: str) -> bool:
    """Whether something answers at the address of `url` (or of the proxy on the way to it) within a second."""
    target = urlparse(url)
    proxy = urllib.request.getproxies().get(target.scheme or "https")
    if proxy and not urllib.request.proxy_bypass(target.hostname or ""):
        target = urlparse(proxy if "://" in proxy else f"http://{proxy}")
    address = (target.hostname or "", target.port or (80 if target.scheme == "http" else 443))
    answered: list[bool] = []

    def knock() -> None:
        try:
            socket.create_connection(address, timeout=_PATIENCE_S).close()
            answered.append(True)
        except OSError:
            pass

    thread = threading.Thread(target=knock, daemon=True)  # looking up a name has no timeout of its own
    thread.start()
    thread.join(_PATIENCE_S)
    return bool(answered)


def missing(name: str, cached: Path, command: str, *, copy: str = "the file to this path") -> UserError:
    """The error for weights that are neither in the cache nor to be had from here."""
    return UserError(
        f"the pretrained weights of {name} are not on this machine, and their server does not answer",
        where=str(cached),
        todo=(
            f"on a connected machine run  {command}  and copy {copy}; "
            "or set backbone.weights to a file of your own, or to none"
        ),
    )


def check_hash(path: Path) -> None:
    """Compares a file with the hash in its name (torch.hub's ``resnet50-11ad3fa6.pth``).

    Raises:
        UserError: it is damaged.
    """
    named = re.search(r"-([a-f0-9]{8,})\.", path.name)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else _digest(file)
    if named and not digest.hexdigest().startswith(named[1]):
        raise UserError("the file is damaged: its hash is not the one in its name", where=str(path), todo="delete it")


def _digest(file: Any) -> Any:
    digest = hashlib.sha256()  # Python 3.10
    while part := file.read(1 << 20):
        digest.update(part)
    return digest
