"""What answers: a run's network by torch, or an ONNX file that `tlx export` wrote by onnxruntime. One noun for both."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tlx.base.errors import UserError
from tlx.data.pixels.normalise import Normalise
from tlx.ship.graph import INPUT, session_of
from tlx.tasks import Task
from tlx.use.description import ModelDescription
from tlx.use.load import Which, find_file, load, refuse_paths, task_of


@dataclass(frozen=True)
class Network:
    """A trained network that is asked for pictures of one size.

    Attributes:
        description: classes, input and all else that is known of it.
        task: what its outputs mean.
        run: its outputs, float32 [n, outputs], for uint8 [n, channels, H, W], as the first of a full batch of a size.
        file: what it was loaded from.
        where: what computes, for people.
    """

    description: ModelDescription
    task: Task
    run: Callable[[Tensor, int], Tensor]
    file: Path
    where: str

    def answers(self, pictures: Sequence[Tensor], size: int) -> list[dict[str, Any]]:
        """The task's rows of up to `size` pictures, uint8 [channels, H, W]; those that are missing are filled up."""
        return self.task.rows(self.run(torch.stack(list(pictures)), size), self.description.kept)

    def telling(self, top: int | None) -> Network:
        """The same with so many classes in each row; None: as many as training told.

        Raises:
            UserError: the task ranks no classes.
        """
        if top is None:
            return self
        row = self.answers([torch.zeros(self._shape, dtype=torch.uint8)], 1)[0]
        if not any(name.endswith("top") for name in row):
            raise UserError(f"a {self.description.task['name']} tells no ranking of classes", where="--top")
        description = replace(self.description, top_k=top)
        return replace(self, description=description, task=task_of(description))

    def warm_up(self, sizes: Sequence[int]) -> None:
        """The first pass takes longer than others, and what the graph does not take shows before anybody asks.

        Raises:
            UserError: it does not compute, or gives something else than it says.
        """
        wanted = sum(self.task.heads.values())
        for size in sizes:
            try:
                found = self.run(torch.zeros((1, *self._shape), dtype=torch.uint8), size)
            except Exception as error:  # torch's and onnxruntime's
                why = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
                raise UserError(f"it does not compute {size} pictures: {why}", where=str(self.file)) from error
            if found.ndim != 2 or len(found) != 1 or found.shape[1] < wanted:
                what = f"its outputs have the shape {tuple(found.shape)}, and it says that they are {wanted}"
                raise UserError(what, where=str(self.file))

    @property
    def _shape(self) -> tuple[int, int, int]:
        return (self.description.input.channels, *self.description.input.size)


def network_of(place: Path, *, which: Which = "best", device: str | None = None, trusted: bool = False) -> Network:
    """
    Args:
        place: what :func:`tlx.load` takes, or an ONNX file.

    Raises:
        UserError: neither; see :func:`tlx.load`; an ONNX file that does not say what it is.
    """
    if place.suffix.lower() == ".onnx":
        return _of_onnx(place, device, trusted=trusted)
    model = load(place, which=which, device=device, trusted=trusted)
    threads = f", threads: {torch.get_num_threads()}" if model.device.type == "cpu" else ""

    def run(pixels: Tensor, size: int) -> Tensor:
        return model.forward.outputs(pixels, batch=size)

    return Network(model.description, model.task, run, find_file(place, which)[0], f"torch, {model.device}{threads}")


def _of_onnx(file: Path, device: str | None, *, trusted: bool) -> Network:
    if not file.is_file():
        raise UserError("there is no such file", where=str(file))
    if importlib.util.find_spec("onnxruntime") is None:
        todo = 'pip install "tlx[onnx]"'
        raise UserError("it takes onnxruntime, which is not installed", where=str(file), todo=todo)
    if device not in (None, "cpu"):
        raise UserError("an ONNX file is computed on the CPU here", where=f"--device {device}", todo="leave it out")
    try:
        session = session_of(file)
    except UserError as error:
        raise UserError(f"it is no ONNX file that can be used: {error.what}", where=str(file)) from error
    said = session.get_modelmeta().custom_metadata_map.get("tlx")
    if said is None:
        raise UserError(
            "it does not say which classes and which input it has",
            where=str(file),
            todo="a file that tlx has written: tlx export RUN FILE.onnx --to onnx --preprocess",
        )
    description = ModelDescription.read(said, where=str(file))
    if not trusted:
        refuse_paths(description, file)
    kind = _kind_of_input(session, description, file)
    task = task_of(description)
    feed = Normalise(description.input, torch.device("cpu"), channels_last=False)

    def run(pixels: Tensor, size: int) -> Tensor:
        count = len(pixels)
        full = torch.cat([pixels, pixels.new_zeros((size - count, *pixels.shape[1:]))])
        given = full if kind == "tensor(uint8)" else feed(full)
        outputs = session.run(None, {INPUT: given.numpy()})
        return torch.from_numpy(np.concatenate([np.asarray(one, np.float32) for one in outputs], 1)[:count])

    return Network(description, task, run, file, "onnxruntime, cpu")


def _kind_of_input(session: Any, description: ModelDescription, file: Path) -> str:
    """
    Raises:
        UserError: the graph takes something else than its description says.
    """
    inputs = [(one.name, list(one.shape)[1:], one.type) for one in session.get_inputs()]
    shape = [description.input.channels, *description.input.size]
    if len(inputs) != 1 or inputs[0][:2] != (INPUT, shape) or inputs[0][2] not in ("tensor(uint8)", "tensor(float)"):
        what = f"it takes {inputs}, and says that it takes {INPUT} of {shape}"
        raise UserError(what, where=str(file), todo="export it again")
    return str(inputs[0][2])
