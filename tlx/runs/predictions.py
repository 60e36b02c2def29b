"""What was told of every validation picture, in the run folder: ``predictions/PHASE.best.npz`` by the weights that are
the best of a phase, ``predictions/PHASE.last.npz`` at its end, ``predictions/PHASE.last.ema.npz`` then by the moving
average's.

A file says of which step and weights it is. After a kill it may be of an evaluation that the checkpoint does not know
yet, or of an older one: :func:`read` gives it all the same, and :meth:`Predictions.matches` tells. They replace
those of earlier evaluations.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from tlx.base.files import write_whole
from tlx.tasks.told import About

FOLDER = "predictions"

Which = Literal["best", "last", "last.ema"]

_FORMAT = 1


@dataclass(frozen=True)
class Part:
    """What was told about one target of n pictures.

    Attributes:
        about: its kind, the names of classes, ranks, labels or columns.
        arrays: `truth`, and what there is of the others below, each with n rows.
    """

    about: About
    arrays: Mapping[str, NDArray[Any]]

    @property
    def kind(self) -> str:
        return self.about.kind

    @property
    def names(self) -> tuple[str, ...]:
        return self.about.names

    @property
    def truth(self) -> NDArray[Any]:
        """class, rank: int32 [n], a position in `names`, -1 without one; labels: int8 [n, names], 1 applies, 0 does
        not, -1 unknown; number: float32 [n, names], NaN unknown."""
        return self.arrays["truth"]

    @cached_property
    def told(self) -> NDArray[Any]:
        """class, rank: int32 [n], -1 where outputs were not finite; labels: bool [n, names] by a probability above 1/2;
        number: float32 [n, names]."""
        return self.probabilities > 0.5 if self.kind == "labels" else self.arrays["told"]

    @property
    def probabilities(self) -> NDArray[np.float16]:
        """[n, names] of a class, rank or labels. Of many pictures and classes there are none (`is_whole`): then the
        highest are in `arrays`: their positions as `top`, int32 [n, 5], and `shares`, float16 [n, 5]."""
        return self.arrays["probabilities"]

    @property
    def is_whole(self) -> bool:
        """Whether there are probabilities of all classes."""
        return "probabilities" in self.arrays

    @property
    def known(self) -> NDArray[np.bool_]:
        """[n]: pictures of which the truth is known, of labels and numbers in any column."""
        if self.kind in ("class", "rank"):
            return self.truth >= 0
        of_columns: NDArray[np.bool_] = ~np.isnan(self.truth) if self.kind == "number" else self.truth >= 0
        return np.asarray(of_columns.any(1))

    @property
    def right(self) -> NDArray[np.bool_]:
        """[n] of a class or rank: it was told, and is the truth."""
        return np.asarray((self.told == self.truth) & (self.truth >= 0))

    @cached_property
    def confidence(self) -> NDArray[np.float32]:
        """[n] of a class or rank: the probability of what was told; NaN where outputs were not finite."""
        return self._of(self.told)

    @cached_property
    def of_truth(self) -> NDArray[np.float32]:
        """[n] of a class or rank: the probability of the truth; NaN without one."""
        return self._of(self.truth) if self.is_whole else self.arrays["own"].astype(np.float32)

    def _of(self, places: NDArray[Any]) -> NDArray[np.float32]:
        rows = np.arange(len(places))  # what was told is the first of the top
        found = self.probabilities[rows, places] if self.is_whole else self.arrays["shares"][:, 0]
        return np.where(places >= 0, found, np.nan).astype(np.float32)


@dataclass(frozen=True)
class Predictions:
    """Of n pictures by one network.

    Attributes:
        phase, which, step, weights: of a training: see :data:`Which`, after so many steps, raw | ema.
        digest, content: of the shards; see :class:`tlx.data.shards.manifest.Manifest`. Predictions of the same digest
            are of the same pictures.
        samples: in the shards; those that are missing among `ids` could not be read.
        metrics: of this evaluation, by name such as ``val/top1``, ``val/thresholds``.
        ids: int64 [n], positions in the manifest, ascending.
        parts: one, or one for each of several tasks.
    """

    phase: str
    which: str
    step: int
    weights: str
    digest: str
    content: str | None
    samples: int
    metrics: Mapping[str, Any]
    ids: NDArray[np.int64]
    parts: tuple[Part, ...]

    def matches(self, entry: Mapping[str, Any]) -> bool:
        """Whether they are those of an evaluation that a result, or a checkpoint, tells of: {step, weights}."""
        return entry.get("step") == self.step and entry.get("weights", self.weights) == self.weights

    def data(self) -> bytes:
        """An npz file, without pickles."""
        own = {k: v for k, v in vars(self).items() if k not in ("ids", "parts")}
        about = {"format": _FORMAT, **own, "parts": [asdict(part.about) for part in self.parts]}
        arrays = {f"{i}/{name}": of for i, part in enumerate(self.parts) for name, of in part.arrays.items()}
        text = np.frombuffer(json.dumps(about).encode(), np.uint8)
        with io.BytesIO() as file:
            np.savez(file, allow_pickle=False, about=text, ids=self.ids, **arrays)
            return file.getvalue()


def file_of(run: Path, phase: str, which: Which) -> Path:
    return run / FOLDER / f"{quote(phase, safe='')}.{which}.npz"


def write(run: Path, predictions: Predictions) -> None:
    """Into a run folder that is there.

    Raises:
        OSError: it cannot be written.
    """
    (run / FOLDER).mkdir(exist_ok=True)
    write_whole(run / FOLDER / f"{quote(predictions.phase, safe='')}.{predictions.which}.npz", predictions.data())


def read(run: Path, phase: str, which: Which = "best") -> Predictions | None:
    """Those of a run's phase; None where there are none, or no readable ones: of an older version, torn."""
    return read_file(file_of(run, phase, which))


def read_file(file: Path) -> Predictions | None:
    """None where there is none that can be understood."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return _understood({name: arrays[name] for name in arrays.files})
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None


def _understood(arrays: Mapping[str, NDArray[Any]]) -> Predictions:
    """
    Raises:
        ValueError, KeyError, TypeError: they are not what `Predictions.data` makes.
    """
    about = json.loads(arrays["about"].tobytes())
    if about.pop("format") != _FORMAT:
        raise ValueError("another format")
    parts = []
    for i, said in enumerate(about.pop("parts")):
        own = {name.partition("/")[2]: of for name, of in arrays.items() if name.startswith(f"{i}/")}
        parts.append(_checked(Part(About(**{**said, "names": tuple(map(str, said["names"]))}), own), arrays["ids"]))
    return Predictions(ids=arrays["ids"], parts=tuple(parts), **about)


def _checked(part: Part, ids: NDArray[Any]) -> Part:
    n, classes = len(ids), len(part.names)
    if part.kind in ("class", "rank"):
        shapes: dict[str, tuple[int, ...]] = {"truth": (n,), "told": (n,)}
        top = part.arrays["top"].shape[1:] if "top" in part.arrays else ()
        of_top: dict[str, tuple[int, ...]] = {"top": (n, *top), "shares": (n, *top), "own": (n,)}
        shapes |= {"probabilities": (n, classes)} if part.is_whole else of_top
        places = [part.truth, part.told, *([part.arrays["top"]] if top else [])]
        if n and not all(of.min() >= -1 and of.max() < classes for of in places):
            raise ValueError("a position that is none")
    elif part.kind == "labels":
        shapes = {"truth": (n, classes), "probabilities": (n, classes)}
    else:
        shapes = {"truth": (n, classes), "told": (n, classes)}
    if any(
        part.arrays[name].shape != shape or part.arrays[name].dtype.kind not in "if" for name, shape in shapes.items()
    ):
        raise ValueError("arrays that do not fit each other")
    return part
