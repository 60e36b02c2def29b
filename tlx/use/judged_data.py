"""Pictures with their truth, to judge a model by: shards, or a folder with a folder per class."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tlx.base.errors import UserError
from tlx.base.location import is_remote, shown
from tlx.data.shards.manifest import Manifest
from tlx.data.shards.passed_over import kind_of_name
from tlx.data.shards.targets import LABEL
from tlx.data.stream.batch_targets import as_tensors, values_of
from tlx.data.stream.file_list import FileList
from tlx.data.stream.reader import BadSample
from tlx.ranks.collectives import World
from tlx.ranks.together import together
from tlx.tasks import Ranks
from tlx.tasks.gathered import Gathered, Scores
from tlx.use.inputs import digest, pictures_of
from tlx.use.model import Model


@dataclass(frozen=True)
class Reading:
    """How pictures are read and asked; see :class:`tlx.use.predict.Options`.

    Attributes:
        flip: outputs are the mean of those of the picture and of its mirror image.
        between: called after each batch, and now and then in what follows; it may raise a UserError.
        faults: see :func:`tlx.ranks.together.together`.
    """

    batch: int | None = None
    workers: int = 2
    skip_bad: bool = False
    flip: bool = False
    between: Callable[[], None] = lambda: None
    faults: bool = False


@dataclass(frozen=True)
class JudgedData:
    """Pictures of which the truth is known.

    Attributes:
        labels: of files, int64 [files]; shards know their own.
    """

    source: Manifest | FileList
    labels: Tensor | None = None

    @property
    def name(self) -> str:
        """For people; of a folder, however it was typed, the same."""
        location = self.source.location
        return shown(location) if isinstance(self.source, Manifest) else os.path.realpath(location)

    @cached_property
    def digest(self) -> str:
        """Of shards, of what their index says; of files, of their names in the folder, sizes and times."""
        source = self.source
        return source.digest if isinstance(source, Manifest) else digest([source], below=source.location)

    def own(self, model: Model, ids: Tensor) -> Mapping[str, Tensor]:
        """Targets by name, as a meter takes them."""
        if isinstance(self.source, Manifest):
            return as_tensors(values_of(self.source, model.task.targets, ids.numpy()))
        assert self.labels is not None
        return {LABEL: self.labels[ids]}


def data_of(location: str, model: Model) -> JudgedData:
    """
    Raises:
        UserError: there are neither shards nor class folders; classes that the model does not know; it cannot be read.
    """
    try:
        return _opened(location, model)
    except OSError as error:
        what = f"it cannot be read: {error.strerror or error}"
        raise UserError(what, where=str(error.filename or location)) from error


def _opened(location: str, model: Model) -> JudgedData:
    folder = Path(location)
    if is_remote(location) or (folder / "index.json").exists():
        manifest = Manifest.open(location)
        model.refuse_other_targets(manifest)
        if not len(manifest):
            raise UserError("there are no pictures", where=manifest.location)
        return JudgedData(manifest)
    if not folder.is_dir():
        raise UserError("there is no such folder", where=location)
    return _of_class_folders(folder, model)


def _of_class_folders(folder: Path, model: Model) -> JudgedData:
    targets = model.task.targets
    if list(targets) != [LABEL] or targets[LABEL].kind != "class" or len(model.task.heads) > 1:
        what = f"a {model.description.task['name']} is judged by shards, which hold its targets"
        raise UserError(what, where=str(folder), todo="tlx shards build FOLDER|CSV SHARDS --target ...")
    classes = targets[LABEL].classes
    inside = _by_folder(folder) if any("/" in name for name in classes) else _by_first_folder(folder)
    unknown = [name for name in inside if name not in classes]
    if unknown or not inside:
        what = f"the folder {unknown[0]} is none of the model's classes" if unknown else "there are no class folders"
        todo = f"a folder for each class ({', '.join(classes[:5])} ...), or shards: tlx shards build"
        raise UserError(what, where=str(folder), todo=todo)
    found = [path for own in inside.values() for path in own]
    labels = [classes.index(name) for name, own in inside.items() for _ in own]
    if not found:
        raise UserError("there are no pictures in its folders", where=str(folder))
    return JudgedData(FileList(found, str(folder)), torch.from_numpy(np.array(labels, np.int64)))


def _by_first_folder(folder: Path) -> dict[str, list[str]]:
    """Pictures by the folder that they lie in or below."""
    inside = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not kind_of_name(entry.name))
    return {name: list(pictures_of(folder / name)) for name in inside}


def _by_folder(folder: Path) -> dict[str, list[str]]:
    """Pictures by the path of folders to them, as nested classes are called; none of those that lie in no folder."""
    found: dict[str, list[str]] = {}
    for path in pictures_of(folder):
        found.setdefault(Path(path).relative_to(folder).parent.as_posix(), []).append(path)
    return {name: own for name, own in found.items() if name != "."}


def scored(model: Model, data: JudgedData, reading: Reading, world: World) -> tuple[Scores, list[BadSample]]:
    """What the model gives for every picture, on every rank, in the order of pictures; and those that cannot be read.

    Raises:
        UserError: a picture cannot be read, without `skip_bad`; none can; outputs that are not finite.
    """
    gathered, bad = Gathered(Ranks(gather=world.gather)), list[BadSample]()

    def ask() -> None:
        answers_of, part = model.forward.answers, (world.rank, world.size)
        asked = answers_of(data.source, batch=reading.batch, workers=reading.workers, part=part, flip=reading.flip)
        for answers in asked:
            for one in answers.bad:
                bad.append(one)
                if not reading.skip_bad:
                    world.ask_to_stop()
                    raise UserError(str(one), todo="mend it, or --skip-bad leaves it out")
            reading.between()
            gathered.add(answers.outputs, data.own(model, answers.ids), answers.ids)
            if world.stops():
                return

    together(world, ask, faults=reading.faults)
    scores = gathered.all()
    skipped = sorted((one for of_rank in world.gather(bad) for one in of_rank), key=lambda one: one.id)
    if not len(scores.ids):
        raise UserError("none of its pictures can be read", where=data.name)
    odd = scores.ids[~scores.finite()].tolist()
    if odd:
        what = f"the model's outputs for {len(odd)} pictures are not finite, the first of them"
        raise UserError(f"{what} {data.source.describe(odd[0])}", where=data.name)
    return scores, skipped
