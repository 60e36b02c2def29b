"""Checkpoints: written beside, flushed, renamed; damaged ones noticed; nothing unpickled.

``checkpoints/step-00001234/{model.safetensors, ema.safetensors, optimizer.pt, state.json}``, and the links `latest` and
`best`. Tensors are fp32 under the network's own names; the optimizer's state is by parameter name. `state.json` holds
the hashes of the other files, and its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer

from tlx.base.errors import TlxError, UserError
from tlx.base.files import sha256_of, write_whole
from tlx.base.tensor_header import settle
from tlx.models.weights.files import verify_packing
from tlx.models.weights.formats import reason
from tlx.runs.older_meaning import WRITERS

FORMAT = 3
DESCRIBED = "tlx"
"""Of the metadata of a file of weights: what the model is, as JSON."""
READS = (FORMAT, *WRITERS)
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Snapshot:
    """All that a run needs to go on: copies, on the CPU.

    Attributes:
        state: plain data.
        described: metadata of the files of weights, by name (``model``, ``ema``): what the model is.
    """

    model: Weights
    optimizer: dict[str, Any]
    state: dict[str, Any]
    ema: Weights | None = None
    described: Mapping[str, str] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """About what it takes on a disk."""
        states = [t for of_one in self.optimizer.values() for t in of_one.values() if isinstance(t, torch.Tensor)]
        return sum(t.nbytes for t in [*self.model.values(), *(self.ema or {}).values(), *states])


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoint folder of a run.

    Attributes:
        keep: so many of the newest stay, and with each the best ones that its state names (`leaders`).
        every: those at multiples of so many steps stay for good; 0 for none.
        earlier: (interval, last step) of those that stay for good by what `every` has been before.
    """

    folder: Path
    keep: int = 2
    every: int = 0
    earlier: Callable[[], Sequence[tuple[int, int]]] = tuple

    def save(self, step: int, snapshot: Snapshot) -> Path:
        """Writes a checkpoint, then moves `latest`, then removes what is no longer needed."""
        path = self.write(step, snapshot)
        self.supersede(path)
        return path

    def write(self, step: int, snapshot: Snapshot) -> Path:
        """Writes a checkpoint beside, then gives it its name.

        Raises:
            OSError: no room or no permission, or the run folder is gone; what was there before is untouched.
        """
        path = self.path(step)
        beside = self.folder / f".{path.name}.writing"
        shutil.rmtree(beside, ignore_errors=True)
        try:
            self.folder.mkdir(exist_ok=True)  # not its parents: a run folder that was removed stays so
            beside.mkdir()
            _write(beside, snapshot)
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk, by whoever writes
            shutil.rmtree(beside, ignore_errors=True)
            raise error if isinstance(error, OSError) else OSError(str(error)) from error
        if path.exists():  # damaged: this run has gone back behind it
            shutil.rmtree(path)
        beside.rename(path)
        _flush(self.folder)
        return path

    def supersede(self, path: Path) -> None:
        """`path` is on the disk: later ones, damaged, go; see :meth:`settle`."""
        for later in self._paths():
            if later.name > path.name:
                shutil.rmtree(later)
        self.settle(path)

    def settle(self, path: Path) -> None:
        """Points the links to `path`, the newest whole one, and removes what is no longer needed; also for a process
        that was killed before it did.

        Raises:
            OSError: links cannot be written, or old checkpoints not removed.
        """
        best = _state(path)["best"]
        self._link("latest", path.name)
        if best and self.path(int(best["step"])).exists():
            self._link("best", self.path(int(best["step"])).name)
        self._prune(path)

    def sweep(self) -> None:
        """Removes what a process that was killed was writing."""
        for left in self.folder.glob(".*.writing"):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)

    def newest(self, say: Callable[[str], None]) -> Path | None:
        """The newest checkpoint that is whole; `say` hears of damaged ones.

        Raises:
            TlxError: there are checkpoints, and every one is damaged.
        """
        paths = self._paths()
        for path in reversed(paths):
            wrong = damage(path)
            if wrong is None:
                return path
            say(f"checkpoint {path} is damaged ({wrong}); going back to the one before")
        if paths:
            raise TlxError(f"every checkpoint in {self.folder} is damaged; --fresh starts anew and keeps them aside")
        return None

    def newest_stated(self) -> Path | None:
        """The newest whose state.json is whole; whether its tensors are, costs reading them: see :meth:`newest`."""
        return next((path for path in reversed(self._paths()) if _state_damage(path) is None), None)

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

    def _prune(self, newest: Path) -> None:
        paths = [p for p in self._paths() if p.name <= newest.name]  # damaged ones behind it are no reason to stay
        needed = set(paths[-self.keep :])
        for path in list(needed):
            needed |= {self.path(step) for step in _leaders(path)}
        needed.add(self.best() or newest)  # also where a better one could not be written
        for path in paths:
            if path not in needed and not self._for_good(path):
                shutil.rmtree(path)

    def _for_good(self, path: Path) -> bool:
        number = path.name.removeprefix("step-")
        if not number.isdigit():
            return False
        step = int(number)
        intervals = [self.every, *(every for every, until in self.earlier() if step <= until)]
        return any(every > 0 and step % every == 0 for every in intervals)


@dataclass
class Saver:
    """Writes one checkpoint at a time, in a thread beside training unless `background` is false.

    Attributes:
        place: called by who saves: the folder of checkpoints, where it is now; raises where it is another training's.
        before: called before a checkpoint is written: metrics that it counts must be on the disk.
        say: hears when one cannot be written; training goes on.
        written: the step of the newest on the disk.
    """

    checkpoints: Checkpoints
    place: Callable[[], Path]
    before: Callable[[], None]
    say: Callable[[str], None]
    background: bool = True
    written: int = 0
    _thread: ThreadPoolExecutor | None = field(default=None, init=False, repr=False)
    _under_way: Future[None] | None = field(default=None, init=False, repr=False)

    def save(self, step: int, snapshot: Snapshot) -> None:
        """Begins to write, once the one before is written; raises what that one raised, but for OSError."""
        self.settle()
        self.follow()
        if not self.background:
            self._write(step, snapshot)
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way = self._thread.submit(self._write, step, snapshot)

    def follow(self) -> None:
        """Checkpoints are where the run folder is now."""
        self.checkpoints = replace(self.checkpoints, folder=self.place())

    def settle(self) -> None:
        """Waits until what was handed over is on the disk, or has failed."""
        under_way = self._under_way
        if under_way is None:
            return
        try:
            under_way.result()
        finally:
            if self._under_way is under_way:  # the watch may wait for it beside the main thread
                self._under_way = None

    def close(self) -> None:
        """The same, for the last time; safe after a fault."""
        try:
            self.settle()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
                self._thread = None

    def _write(self, step: int, snapshot: Snapshot) -> None:
        try:
            self.before()
            path = self.checkpoints.write(step, snapshot)
        except OSError as error:
            self.say(
                f"WARNING: the checkpoint of step {step} could not be written ({error}).\n"
                f"  Training goes on; {self._left()} Mend that, or make room: {self._room(snapshot)}"
            )
            return
        self.written = step
        try:
            self.checkpoints.supersede(path)
        except OSError as error:
            self.say(
                f"WARNING: {path} is written, but not the links to it, or older ones could not be removed ({error})"
            )

    def _left(self) -> str:
        return f"the one of step {self.written} is untouched." if self.written else "there is none before it."

    def _room(self, snapshot: Snapshot) -> str:
        needed = f"it takes {snapshot.bytes / 2**20:,.1f} MiB"
        try:
            free = shutil.disk_usage(self.checkpoints.folder.parent).free
        except OSError:
            return needed
        return f"{needed}, and {free / 2**20:,.1f} MiB are free in {self.checkpoints.folder.parent}"


def read(path: Path) -> Snapshot:
    """A checkpoint, its tensors on the CPU.

    Raises:
        UserError: another format version.
        TlxError: it holds something else than a checkpoint does; no code in it was run.
    """
    state = read_state(path)
    ema = path / "ema.safetensors"
    with understood(path):
        verify_packing(path / "optimizer.pt")
        optimizer = torch.load(path / "optimizer.pt", weights_only=True, map_location="cpu")
        if not isinstance(optimizer, dict) or not all(isinstance(of_one, dict) for of_one in optimizer.values()):
            raise ValueError("optimizer.pt does not hold states by name")
        return Snapshot(
            model=load_file(path / "model.safetensors"),
            optimizer=optimizer,
            state=state,
            ema=load_file(ema) if ema.exists() else None,
        )


def read_state(path: Path) -> dict[str, Any]:
    """A checkpoint's plain data.

    Raises:
        UserError: another format version.
        TlxError: it cannot be understood.
    """
    with understood(path):
        state = _state(path)
    if state.get("format") not in READS:
        raise UserError(
            f"checkpoint format {state.get('format')}; this tlx reads format {' and '.join(map(str, sorted(READS)))}",
            where=str(path),
            todo="use the tlx version that wrote it, or --fresh",
        )
    return state


@contextlib.contextmanager
def understood(path: Path) -> Iterator[None]:
    """What a checkpoint holds is used inside; whatever does not fit is its fault.

    Raises:
        TlxError: naming it, and what to do.
    """
    wrong = (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, EOFError, RecursionError)
    try:
        yield
    except (*wrong, OSError, SafetensorError, pickle.UnpicklingError) as error:
        of_the_disk = isinstance(error, OSError) and error.filename is not None  # torch has some without a file
        if of_the_disk or isinstance(error, (torch.OutOfMemoryError, UserError)):
            raise
        raise TlxError(
            f"{path}: this is not a checkpoint of this training ({type(error).__name__}: {reason(error)})\n"
            "  -> move it elsewhere, and the one before is used; or --fresh"
        ) from error


def weights_of(net: nn.Module) -> Weights:
    """Parameters and buffers by the network's own names, copied to the CPU, floating ones in fp32; tied ones once
    each."""
    copies = {
        name: _on_host(t.float() if t.is_floating_point() else t, torch.contiguous_format)
        for name, t in net.state_dict().items()
    }
    _arrived(net.state_dict().values())
    return copies


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """State by parameter name, copied to the CPU; frozen parameters have none."""
    states = {
        name: {
            key: _on_host(value, torch.preserve_format) if isinstance(value, torch.Tensor) else value
            for key, value in optimizer.state[tensor].items()
        }
        for group in optimizer.param_groups
        for name, tensor in zip(group["names"], group["params"], strict=True)
        if tensor in optimizer.state
    }
    _arrived(tensor for group in optimizer.param_groups for tensor in group["params"])
    return states


def restore_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Puts named state back, on each parameter's device.

    Raises:
        ValueError: states that are not of these parameters.
    """
    optimizer.state.clear()
    known = {
        name: tensor
        for group in optimizer.param_groups
        for name, tensor in zip(group["names"], group["params"], strict=True)
    }
    for name, of_one in state.items():
        if name not in known:
            raise ValueError(f"there is no parameter {name}")
        tensor = known[name]
        for key, value in of_one.items():
            if isinstance(value, torch.Tensor) and value.numel() > 1 and value.shape != tensor.shape:
                raise ValueError(f"{key} of {name} is {tuple(value.shape)}, the parameter is {tuple(tensor.shape)}")
        optimizer.state[tensor] = {
            key: _like(value, tensor, key) if isinstance(value, torch.Tensor) else value
            for key, value in of_one.items()
        }


def _like(value: torch.Tensor, tensor: torch.Tensor, key: str) -> torch.Tensor:
    # Adam's step count stays on the CPU unless the optimizer is fused, as in torch's own load_state_dict
    if key == "step" and not tensor.is_cuda:
        return value.clone()
    return value.to(tensor.device, copy=True)


def _on_host(tensor: torch.Tensor, layout: torch.memory_format) -> torch.Tensor:
    """A copy on the CPU; from a GPU it is under way until :func:`_arrived`."""
    copy = torch.empty_like(tensor, device="cpu", memory_format=layout, pin_memory=tensor.is_cuda)
    return copy.copy_(tensor.detach(), non_blocking=True)


def _arrived(tensors: Any) -> None:
    for device in {t.device for t in tensors if t.is_cuda}:
        torch.cuda.synchronize(device)


def _write(folder: Path, snapshot: Snapshot) -> None:
    for name, weights in (("model", snapshot.model), ("ema", snapshot.ema)):
        if weights is not None:
            about = {DESCRIBED: snapshot.described[name]} if name in snapshot.described else {}
            save_file(weights, folder / f"{name}.safetensors", metadata={"format": "pt", **about})
            settle(folder / f"{name}.safetensors")
    torch.save(snapshot.optimizer, folder / "optimizer.pt")
    hashes = {}
    for path in sorted(folder.iterdir()):
        path.chmod(folder.stat().st_mode & 0o666)  # safetensors' files are for nobody else to read
        _flush(path)
        hashes[path.name] = _hash(path)
    state = {"format": FORMAT, **snapshot.state, "files": hashes}
    write_whole(folder / "state.json", json.dumps({**state, "sha256": _hash_of(state)}, indent=1))
    _flush(folder)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None for a whole one."""
    wrong = _state_damage(path)
    if wrong is not None:
        return wrong
    state = _state(path)
    if state.get("format") not in READS:
        return None
    try:
        for name, digest in dict(state["files"]).items():
            file = path / Path(name).name
            if not file.is_file():
                return f"{name} is missing"
            if _hash(file) != digest:
                return f"{name} is not what was written"
    except OSError as error:
        return f"it cannot be read: {error}"
    return None


def _state_damage(path: Path) -> str | None:
    try:
        state = _state(path)
        if state.get("format") not in READS:
            return None  # not damaged, another tlx's: `read` says so
        dict(state["files"])
        if state.pop("sha256", None) != _hash_of(state):
            return "state.json is not what was written"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"state.json: {error}"
    return None


def _leaders(path: Path) -> list[int]:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        return [int(leader["step"]) for leader in _state(path)["progress"]["leaders"]]
    return []


def _state(path: Path) -> dict[str, Any]:
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if not isinstance(state, dict):
        raise ValueError("not a mapping")
    return state


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return sha256_of(file)


def _hash_of(state: Mapping[str, Any]) -> str:
    # as it reads back: JSON makes lists of tuples and text of numbers that are keys
    return hashlib.sha256(json.dumps(json.loads(json.dumps(state)), sort_keys=True).encode()).hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
