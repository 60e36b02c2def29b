"""One class per image, by vectors of the classes. See :func:`tlx.tasks.kinds.semantic`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from tlx.base.errors import UserError
from tlx.base.paths import expanded
from tlx.data.shards.targets import Target
from tlx.models import ClassVectors
from tlx.tasks import Ranks, Truth
from tlx.tasks.class_vectors import WHERE, from_file
from tlx.tasks.constants import Constant
from tlx.tasks.gathered import Gathered
from tlx.tasks.mixing import summed
from tlx.tasks.stacking import Stacking, harmonic_mean
from tlx.tasks.told import About, Told, of_classes

TEXT = "text:"
CONSTANT = "calibration"
"""The list of an evaluation's result that holds the constant."""


def vectors_of(
    embeddings: str | None,
    names: Mapping[str, str],
    *,
    prompts: Sequence[str] | None = None,
    width: int | None = None,
    normalise: bool = True,
) -> ClassVectors:
    """
    Args:
        names: of each class, as a file or a prompt writes it.

    Raises:
        UserError: see :func:`tlx.tasks.kinds.semantic`.
    """
    if prompts is not None and not (embeddings or "").startswith(TEXT):
        what = "prompts are for a text encoder"
        raise UserError(what, where="task.prompts", todo="task.embeddings: text:MODEL, or leave them out")
    if embeddings is None:
        if width is None:
            raise UserError("nothing says what is known of the classes", where=WHERE, todo="a file, or text:MODEL")
        return ClassVectors(np.zeros((len(names), width), np.float32), f"{width} numbers each, those of the weights")
    if width is not None:
        raise UserError("the vectors say it themselves", where="task.width", todo="leave it out")
    if embeddings.startswith(TEXT):
        from tlx.tasks.text_encoder import encoded

        found = encoded(embeddings.removeprefix(TEXT), tuple(names.values()), tuple(prompts or ()))
    else:
        found = from_file(Path(expanded(embeddings)), names)
    if not normalise:
        return found
    lengths = np.linalg.norm(found.values.astype(np.float64), axis=1, keepdims=True)
    return replace(found, values=(found.values / lengths).astype(np.float32))


@dataclass(frozen=True)
class Semantic:
    """
    Attributes:
        target: the class.
        unseen: places of classes that are not trained on, ascending.
        vectors: what the head begins with.
        margin: of the rank loss; None for cross-entropy.
        calibration: the constant that is taken from scores of seen classes, or that it is chosen on validation.
        described: the arguments that say what the task is once the weights hold the vectors.
    """

    target: Target
    unseen: tuple[int, ...]
    vectors: ClassVectors = field(compare=False)
    margin: float | None
    calibration: float | Literal["validation"]
    top_k: int
    aux_weight: float
    described: Mapping[str, Any] = field(compare=False)
    constants: tuple[str, ...] = ()
    metric: str = "harmonic"
    shown: str | None = "top1"
    parts: int = 1

    @property
    def classes(self) -> tuple[str, ...]:
        return self.target.classes

    @property
    def targets(self) -> Mapping[str, Target]:
        return {self.target.name: self.target}

    @property
    def heads(self) -> Mapping[str, int]:
        return {"": len(self.classes)}

    @property
    def outputs(self) -> tuple[str, ...]:
        return self.classes

    @property
    def metrics(self) -> Mapping[str, bool]:
        return {"loss": False, **dict.fromkeys(_SEEN + (_UNSEEN if self.unseen else ()), True)}

    @property
    def headline(self) -> tuple[str, ...]:
        calibrated = ("calibrated_harmonic",) if self.unseen else ()
        return ("loss", "top1", "seen", *(("unseen", "zsl") if self.unseen else ()), "harmonic", *calibrated)

    @property
    def lists(self) -> Mapping[str, Sequence[str]]:
        return {"per_class": self.classes, **({CONSTANT: ("constant",)} if self.unseen else {})}

    @property
    def about_vectors(self) -> str:
        """A line for people, with what chance would give."""
        seen, all_ = len(self.classes) - len(self.unseen), len(self.classes)
        said = f"class vectors: {self.vectors.source}; {seen} classes seen, {len(self.unseen)} unseen"
        chance = f"chance: {1 / all_:.1%} among all classes"
        return f"{said}; {chance}" + (f", {1 / len(self.unseen):.1%} among unseen ones" if self.unseen else "")

    def settled(self, kept: Mapping[str, Any]) -> Semantic:
        """With the constant of the evaluation that chose the weights."""
        if self.calibration != "validation":
            return self
        found = next(iter(kept.get(CONSTANT) or ()), None)
        return replace(self, calibration=0.0 if found is None else float(found))

    def without_pictures(self, counts: Sequence[int]) -> tuple[set[str], str]:
        """Metrics that are never numbers on data with so many pictures of each class, and of which classes there are
        none, in words."""
        if not self.unseen or any(counts[place] for place in self.unseen):
            return set(), ""
        return {"harmonic", *_UNSEEN} - {"calibrated_seen"}, "an unseen class (task.unseen)"

    def weights(self, values: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
        """1 for a sample of a seen class."""
        labels = values[self.target.name]
        return ((labels >= 0) & ~np.isin(labels, self.unseen)).astype(np.float64)[:, None]

    def loss(self, output: Any, truth: Truth) -> Tensor:
        return summed(self.each, output, truth, self.target.name, self.aux_weight)

    def each(self, output: Tensor, labels: Tensor) -> Tensor:
        """The loss of each sample among seen classes, float32 [m]; 0 without such a class."""
        own = self._places.on(labels.device)[labels]
        known = own >= 0
        scores = torch.where(known[:, None], output.float()[:, self._seen.on(labels.device)], 0.0)
        own = own.clamp(min=0)
        if self.margin is None:
            losses = cross_entropy(scores, own, reduction="none")
        else:
            behind = (self.margin - scores.gather(1, own[:, None]) + scores).relu()
            losses = behind.sum(1) - self.margin  # the class itself is no other one
        return torch.where(known, losses, 0.0)

    @cached_property
    def _seen(self) -> Constant:
        return Constant(torch.tensor([i for i in range(len(self.classes)) if i not in self.unseen]))

    @cached_property
    def _places(self) -> Constant:
        """int64 [classes + 1]: a class's place among the seen ones, -1 for others and for none."""
        seen = self._seen.on(torch.device("cpu")).tolist()
        return Constant(torch.tensor([seen.index(i) if i in seen else -1 for i in range(len(self.classes))] + [-1]))

    def hits(self, output: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        labels = own[self.target.name]
        told = output[:, self._seen.on(labels.device)].argmax(1)
        places = self._places.on(labels.device)[labels]
        return torch.stack([((told == places) & (places >= 0)).sum(), (places >= 0).sum()])

    def meter(self, device: torch.device, ranks: Ranks = Ranks()) -> SemanticMeter:  # noqa: B008  # frozen
        return SemanticMeter(self, ranks)

    def calibrated(self, output: Tensor) -> Tensor:
        """Scores with the constant taken from those of seen classes, where it is known."""
        if self.calibration == "validation" or not self.unseen:
            return output.float()
        shift = torch.full((len(self.classes),), float(self.calibration), device=output.device)
        shift[list(self.unseen)] = 0.0
        return output.float() - shift

    def told(self, output: Tensor, own: Mapping[str, Tensor], samples: int) -> list[Told]:
        """See :class:`tlx.tasks.Task`."""
        scores = self.calibrated(output)
        about = About("class", self.classes, self.target.name)
        return [of_classes(about, scores.softmax(1), scores.argmax(1), own[self.target.name], samples)]

    def rows(self, output: Tensor, kept: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The likeliest classes, by calibrated scores."""
        probabilities = self.settled(kept).calibrated(output).softmax(1)
        shares, places = probabilities.topk(min(self.top_k, len(self.classes)))
        return [
            {
                "label": self.classes[own[0]],
                "probability": of[0],
                "seen": own[0] not in self.unseen,
                "top": [{"label": self.classes[i], "probability": p} for i, p in zip(own, of, strict=True)],
            }
            for own, of in zip(places.tolist(), shares.tolist(), strict=True)
        ]


_SEEN = ("top1", "seen", "harmonic")
_UNSEEN = ("unseen", "zsl", "calibrated_seen", "calibrated_unseen", "calibrated_harmonic", "ausuc")


class SemanticMeter:
    """Metrics of one evaluation; see :func:`tlx.tasks.kinds.semantic`."""

    def __init__(self, task: Semantic, ranks: Ranks) -> None:
        self._task = task
        self._gathered = Gathered(ranks)

    def update(self, output: Tensor, own: Mapping[str, Tensor], ids: Tensor) -> None:
        self._gathered.add(output, {self._task.target.name: own[self._task.target.name]}, ids)

    def result(self) -> dict[str, Any]:
        """See :class:`tlx.tasks.Meter`. A sample with an output that is not finite is wrong by every metric."""
        task, scores = self._task, self._gathered.all()
        if not len(scores.ids):
            return {"samples": 0}
        known = scores.own[task.target.name] >= 0
        finite = scores.finite()[known]
        output, labels = scores.output[known].double(), scores.own[task.target.name][known]
        nonfinite = int((~scores.finite()).sum())
        stacking = Stacking.of(output, labels, task.unseen, answered=finite if bool(finite.any()) else None)
        seen, unseen = stacking.accuracies(0.0)
        found: dict[str, Any] = {
            "loss": float(cross_entropy(output, labels)) if len(labels) and not nonfinite else math.nan,
            "top1": stacking.share(0.0),
            "seen": seen,
            "harmonic": harmonic_mean(seen, unseen) if task.unseen else seen,
            "samples": len(scores.ids),
            **({"nonfinite": nonfinite} if nonfinite else {}),
            "per_class": stacking.by_class(0.0),
        }
        return found | (self._of_unseen(stacking, unseen) if task.unseen else {})

    def _of_unseen(self, stacking: Stacking, unseen: float) -> dict[str, Any]:
        given = self._task.calibration
        best = stacking.best() if given == "validation" else given
        shifts = stacking.cross_fitted() if given == "validation" else given
        after = stacking.accuracies(shifts)
        return {
            "unseen": unseen,
            "zsl": stacking.zsl(),
            "calibrated_seen": after[0],
            "calibrated_unseen": after[1],
            "calibrated_harmonic": harmonic_mean(*after),
            "ausuc": stacking.area(),
            CONSTANT: [best],
        }
