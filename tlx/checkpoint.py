"""Checkpoints: written beside, flushed, renamed; damaged ones noticed; nothing unpickled.

``checkpoints/step-00001234/{model.safetensors, ema.safetensors, optimizer.pt, state.json}``, and the links `latest` and
`best`. Tensors are fp32 under the network's own names; the optimizer's state is by parameter name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer

from tlx.errors import TlxError, UserError
from tlx.files import write_whole

FORMAT = 1
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Snapshot:
    """All that a run needs to go on. `state` is plain data."""

    model: Weights
    optimizer: dict[str, Any]
    state: dict[str, Any]
    ema: Weights | None = None


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoint folder of a run: the `keep` last ones, and the best of each of those."""

    folder: Path
    keep: int = 2

    def save(self, step: int, snapshot: Snapshot) -> Path:
        """Writes a checkpoint, then moves `latest`, then removes what is no longer needed.

        Raises:
            OSError: no room or no permission; what was there before is untouched.
        """
        path = self.path(step)
        beside = self.folder / f".{path.name}.writing"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        try:
            _write(beside, snapshot)
        except Exception as error:  # safetensors and torch have exceptions of their own for a full disk
            shutil.rmtree(beside, ignore_errors=True)
            raise error if isinstance(error, OSError) else OSError(str(error)) from error
        for later in self._paths():  # damaged ones, that this run has gone back behind
            if later.name >= path.name:
                shutil.rmtree(later)
        beside.rename(path)
        _flush(self.folder)
        self._link("latest", path.name)
        best = snapshot.state["best"]
        if best and self.path(best["step"]).exists():
            self._link("best", self.path(best["step"]).name)
        self._prune()
        return path

    def newest(self, say: Callable[[str], None]) -> Path | None:
        """The newest checkpoint that is whole; `say` hears of damaged ones.

        Raises:
            TlxError: there are checkpoints, and every one is damaged.
        """
        paths = self._paths()
        for path in reversed(paths):
            damage = _damage(path)
            if damage is None:
                return path
            say(f"checkpoint {path} is damaged ({damage}); going back to the one before")
        if paths:
            raise TlxError(f"every checkpoint in {self.folder} is damaged; --fresh starts anew and keeps them aside")
        return None

    def best(self) -> Path | None:
        path = self.folder / "best"
        return path.resolve() if path.exists() else None

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _paths(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("step-*") if p.is_dir())

    def _link(self, name: str, target: str) -> None:
        beside = self.folder / f".{name}.writing"
        beside.unlink(missing_ok=True)
        beside.symlink_to(target)
        os.replace(beside, self.folder / name)
        _flush(self.folder)

    def _prune(self) -> None:
        paths = self._paths()
        needed = set(paths[-self.keep :])
        for path in list(needed):
            best = _best(path)
            needed |= {self.path(best["step"])} if best else set()
        for path in paths:
            if path not in needed:
                shutil.rmtree(path)


def read(path: Path) -> Snapshot:
    """A checkpoint, its tensors on the CPU.

    Raises:
        UserError: another format version.
    """
    state = _state(path)
    if state.get("format") != FORMAT:
        raise UserError(
            f"checkpoint format {state.get('format')}; this tlx reads format {FORMAT}",
            where=str(path),
            todo="use the tlx version named in its state.json, or --fresh",
        )
    ema = path / "ema.safetensors"
    return Snapshot(
        model=load_file(path / "model.safetensors"),
        optimizer=torch.load(path / "optimizer.pt", weights_only=True, map_location="cpu"),
        state=state,
        ema=load_file(ema) if ema.exists() else None,
    )


def weights_of(net: nn.Module) -> Weights:
    """Parameters and buffers by the network's own names, on the CPU, floating ones in fp32; tied ones once each."""
    return {
        name: (t.detach().float() if t.is_floating_point() else t.detach()).cpu().contiguous().clone()
        for name, t in net.state_dict().items()
    }


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """State by parameter name; frozen parameters have none."""
    return {
        name: dict(optimizer.state[tensor])
        for group in optimizer.param_groups
        for name, tensor in zip(group["names"], group["params"], strict=True)
        if tensor in optimizer.state
    }


def restore_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Puts named state back, on each parameter's device."""
    optimizer.state.clear()
    for group in optimizer.param_groups:
        for name, tensor in zip(group["names"], group["params"], strict=True):
            if name in state:
                optimizer.state[tensor] = {
                    key: _like(value, tensor, key) if isinstance(value, torch.Tensor) else value
                    for key, value in state[name].items()
                }


def _like(value: torch.Tensor, tensor: torch.Tensor, key: str) -> torch.Tensor:
    # Adam's step count stays on the CPU unless the optimizer is fused, as in torch's own load_state_dict
    if key == "step" and not tensor.is_cuda:
        return value.clone()
    return value.to(tensor.device, copy=True)


def _write(folder: Path, snapshot: Snapshot) -> None:
    save_file(snapshot.model, folder / "model.safetensors", metadata={"format": "pt"})
    if snapshot.ema is not None:
        save_file(snapshot.ema, folder / "ema.safetensors", metadata={"format": "pt"})
    torch.save(snapshot.optimizer, folder / "optimizer.pt")
    hashes = {}
    for path in sorted(folder.iterdir()):
        path.chmod(folder.stat().st_mode & 0o666)  # safetensors' files are for nobody else to read
        _flush(path)
        hashes[path.name] = _hash(path)
    state = {"format": FORMAT, **snapshot.state, "files": hashes}
    write_whole(folder / "state.json", json.dumps(state, indent=1))
    _flush(folder)


def _damage(path: Path) -> str | None:
    try:
        files = _state(path)["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"state.json: {error}"
    for name, digest in files.items():
        file = path / Path(name).name
        if not file.is_file():
            return f"{name} is missing"
        if _hash(file) != digest:
            return f"{name} is not what was written"
    return None


def _best(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        best: dict[str, Any] | None = _state(path).get("best")
        return best
    return None


def _state(path: Path) -> dict[str, Any]:
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if not isinstance(state, dict):
        raise ValueError("not a mapping")
    return state


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
