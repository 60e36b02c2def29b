"""A trained network with everything that its use takes: ``model = tlx.load("runs/mine"); model.predict("photos")``."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tlx.base.errors import UserError
from tlx.data.pixels.transforms import eval_transform
from tlx.data.shards.manifest import Manifest
from tlx.data.stream.batch_targets import as_tensors, refuse_unknown, values_of
from tlx.data.stream.file_list import FileList
from tlx.tasks import Task, views_of
from tlx.use.description import ModelDescription
from tlx.use.forward import Forward
from tlx.use.inputs import pictures_of

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Model:
    """A trained network in evaluation mode.

    Attributes:
        module: the plain network: float32 [N, channels, H, W], normalised, to float32 [N, outputs].
        task: what its outputs mean.
        description: all else that is known of it.
        device: where it computes.
        heads: paths of the modules that make the outputs.
    """

    module: nn.Module
    task: Task
    description: ModelDescription
    device: torch.device
    heads: tuple[str, ...] = ()

    def predict(
        self, pictures: Any, *, batch: int | None = None, workers: int = 0, skip_bad: bool = False
    ) -> list[dict[str, Any]]:
        """Predictions, a row for each picture, in their order.

        Args:
            pictures: a file, a folder (its pictures, and those in folders below, sorted), or several of: files, PIL
                images, arrays uint8 [H, W, channels] (or [H, W] of grey ones), tensors uint8 [channels, H, W].
            batch: pictures that go through the network at once; by default as in training's evaluations. Batches are
                always full, so that a picture's numbers do not depend on how many others there are.
            workers: processes that decode files; 0 for none.
            skip_bad: a file that cannot be read gets a row with its `error` in place of a prediction.

        Returns:
            What the task says of each (:meth:`tlx.tasks.Task.rows`): of a classification `label`, `probability` and
            the `top` ones. Rows of files begin with `file`.

        Raises:
            UserError: nothing to predict, a file that cannot be read.
        """
        given, batch = _listed(pictures), batch or self.description.batch
        if all(isinstance(one, str | Path) for one in given):
            files = FileList([str(one) for one in given], _name(pictures))
            return self._of_files(files, batch, workers, skip_bad=skip_bad)
        if any(isinstance(one, str | Path) for one in given):
            raise UserError("files and pictures in memory together", where="predict", todo="give one kind at a time")
        return self._of_memory(given, batch)

    @functools.cached_property
    def forward(self) -> Forward:
        """What answers for pictures with the network's outputs."""
        said = self.description
        return Forward(self.module, said.input, len(said.outputs), said.batch, self.device, upright=said.upright)

    def evaluate(
        self, shards: Manifest | str | Path, *, batch: int | None = None, workers: int = 0, skip_bad: bool = False
    ) -> dict[str, Any]:
        """Exact metrics over shards, those of the task: of a classification ``loss``, ``top1``, ``top5``, ``samples``
        and ``per_class``.

        Raises:
            UserError: shards of other classes, or without the targets; a picture that cannot be read, without skip_bad.
        """
        manifest = shards if isinstance(shards, Manifest) else Manifest.open(shards)
        self.refuse_other_targets(manifest)
        meter = self.task.meter(torch.device("cpu"))
        for answers in self.forward.answers(manifest, batch=batch, workers=workers):
            if answers.bad and not skip_bad:
                raise UserError(str(answers.bad[0]), todo="mend it, or skip_bad leaves it out")
            if len(answers.ids):
                own = as_tensors(values_of(manifest, self.task.targets, answers.ids.numpy()))
                meter.update(answers.outputs, own, answers.ids)
        return meter.result()

    def refuse_other_targets(self, manifest: Manifest) -> None:
        """
        Raises:
            UserError: shards without a target that the task reads, or with other classes of it; a task that draws its
                own.
        """
        if views_of(self.task) is not None:
            what = f"task {self.description.task['name']} draws what it is asked: no shards hold it"
            todo = "its features: tlx embed RUN; what they are worth: backbone.weights=RUN of a classification"
            raise UserError(what, where=manifest.location, todo=todo)
        refuse_unknown(manifest, self.task.targets)
        for name, target in self.task.targets.items():
            there = manifest.targets.get(name)
            if there is None:
                raise UserError(f"these shards have no target {name}", where=manifest.location)
            if there.classes != target.classes:
                odd = sorted(set(there.classes) ^ set(target.classes))
                raise UserError(
                    f"the model knows {len(target.classes)} classes of {name}, these shards have {len(there.classes)}"
                    + (f"; only on one side: {', '.join(odd[:8])}" if odd else "; their order differs"),
                    where=manifest.location,
                    todo="shards with the same classes in the same order (tlx shards index --classes)",
                )

    def _of_files(self, files: FileList, batch: int, workers: int, *, skip_bad: bool) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = [{"file": path} for path in files.paths]
        for answers in self.forward.answers(files, batch=batch, workers=workers):
            for bad in answers.bad:
                if not skip_bad:
                    raise UserError(str(bad), todo="mend it, or skip_bad gives it a row with its error")
                rows[bad.id]["error"] = bad.reason
            told = self.task.rows(answers.outputs, self.description.kept) if len(answers.ids) else []
            for place, row in zip(answers.ids.tolist(), told, strict=True):
                rows[place] |= row
        return rows

    def _of_memory(self, pictures: Sequence[Any], batch: int) -> list[dict[str, Any]]:
        view, rows = eval_transform(self.description.input), list[dict[str, Any]]()
        for at in range(0, len(pictures), batch):
            shown = [view(self._pixels(picture)) for picture in pictures[at : at + batch]]
            rows += self.task.rows(self.forward.outputs(torch.stack(shown), batch=batch), self.description.kept)
        return rows

    def _pixels(self, picture: Any) -> Tensor:
        """uint8 [channels, H, W].

        Raises:
            UserError: nothing that is a picture, or one of other channels.
        """
        channels = self.description.input.channels
        if isinstance(picture, Tensor):
            pixels = picture
        elif isinstance(picture, np.ndarray):
            pixels = torch.from_numpy(picture if picture.ndim == 2 else picture.transpose(2, 0, 1))
            pixels = pixels[None] if picture.ndim == 2 else pixels
        elif hasattr(picture, "convert"):
            pixels = torch.from_numpy(_of_pil(picture, channels, upright=self.description.upright))
        else:
            what = f"{type(picture).__name__} is no picture"
            raise UserError(what, where="predict", todo="a path, a PIL image, or uint8 pixels")
        if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[0] != channels:
            raise UserError(
                f"pixels of shape {tuple(pixels.shape)} and type {str(pixels.dtype).removeprefix('torch.')}",
                where="predict",
                todo=f"uint8: arrays [H, W, {channels}], tensors [{channels}, H, W]",
            )
        return pixels


def _of_pil(image: Image, channels: int, *, upright: bool) -> NDArray[np.uint8]:
    from PIL import ImageOps

    turned = ImageOps.exif_transpose(image) if upright else image
    pixels = np.array(turned.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels]))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _listed(pictures: Any) -> list[Any]:
    """What is to be predicted, one by one.

    Raises:
        UserError: nothing.
    """
    if isinstance(pictures, str | Path):
        found: list[Any] = list(pictures_of(Path(pictures)))
    elif isinstance(pictures, Iterable) and not isinstance(pictures, Tensor | np.ndarray | Mapping):
        found = [
            path for one in pictures for path in (pictures_of(Path(one)) if isinstance(one, str | Path) else [one])
        ]
    else:
        found = [pictures]
    if not found:
        raise UserError("there are no pictures", where=_name(pictures))
    return found


def _name(pictures: Any) -> str:
    return str(pictures) if isinstance(pictures, str | Path) else "predict"
