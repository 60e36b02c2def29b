"""What is chosen for some pictures and a backbone, as a configuration whose every line says why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tlx.base.parsing import to_yaml
from tlx.init.pictures import Pictures
from tlx.plan import defaults
from tlx.plan.defaults import Kind, Row

IMBALANCE = 10
"""So many times as many samples in the largest class as in the smallest are worth a word."""


@dataclass(frozen=True)
class Machine:
    """What trains: whether it has GPUs, and processor cores for each of them, or for its one process."""

    gpu: bool
    cores: int


@dataclass(frozen=True)
class Choices:
    """Of a configuration."""

    pictures: Pictures
    backbone: str
    machine: Machine

    @property
    def row(self) -> Row:
        return defaults.row_of(self.pictures.counts("train"))

    @property
    def kind(self) -> Kind:
        return defaults.kind_of(self.backbone)

    def text(self, command: str) -> str:
        """The file.

        Args:
            command: that makes it.
        """
        blocks = [
            self._head(command),
            self._data(),
            self._backbone(),
            self._augmentation(),
            self._loop(),
            self._phases(),
        ]
        return "\n".join("\n".join(block) + "\n" for block in blocks)

    def _head(self, command: str) -> Iterator[str]:
        counts, classes = self.pictures.counts, len(self.pictures.built.classes)
        yield f"# Made by: {_line(command)}"
        yield f"# {counts('train'):,} training and {counts('val'):,} validation pictures, {classes:,} classes."
        yield "# Any line may be changed. All keys: configs/REFERENCE.md. Sources of the choices: tlx/plan/defaults.py."

    def _data(self) -> Iterator[str]:
        train = self.pictures.built.out / "train"
        yield "# What the training leaves; the same command goes on after a stop. Another training: another folder."
        yield f"run: {_flow(defaults.run_of(f'{self.pictures.name}/train', self.backbone))}"
        yield "data:"
        yield f"  train: {_flow(str(train))}"
        if self.pictures.counts("val"):
            drawn = f"; {self.pictures.val:.0%} of each class, drawn once" if self.pictures.val else ""
            yield f"  val: {_flow(str(self.pictures.built.out / 'val'))}  # chooses the best weights{drawn}"
        if self.pictures.counts("test"):
            yield f"  test: {_flow(str(self.pictures.built.out / 'test'))}  # looked at once, at the end: it reports"
        yield f"  batch: {self.row.batch}  # over all GPUs; {_why_batch(self.row)}"
        yield f"  workers: {self._workers}  # processes that read pictures, for each GPU"
        most, fewest = self._classes
        if most > IMBALANCE * fewest:
            yield f"  # classes have {fewest:,} to {most:,} pictures; rare ones more often: sampling: {{method: sqrt}}"

    def _backbone(self) -> Iterator[str]:
        if self.backbone == defaults.BACKBONE:
            yield "# 5.7 million parameters, pretrained on ImageNet: small, and good at photographs. Others: tlx models"
        yield "backbone:"
        yield f"  name: {_flow(self.backbone)}"
        yield "  weights: default  # of its library; or a file, or none"
        if not self.machine.gpu:
            yield "# No GPU here: smaller pictures are faster and cost accuracy; half the time with input: {size: 160}"

    def _augmentation(self) -> Iterator[str]:
        yield "# What training pictures go through; validation pictures are resized and cropped in the middle."
        yield "transforms:"
        crop = {"name": "random_resized_crop", "scale": [self.row.crop, 1]}
        yield f"  - {_flow(crop)}  # the more pictures, the smaller"
        yield "  - horizontal_flip  # take it away where left and right differ in meaning: letters, digits, arrows"
        jitter = {"name": "color_jitter", "brightness": 0.2, "contrast": 0.2, "saturation": 0.2}
        yield f"  - {_flow(jitter)}"
        yield "objective: {name: cross_entropy, label_smoothing: 0.1}  # against over-confidence on few pictures"

    def _loop(self) -> Iterator[str]:
        yield "optimizer: {name: adamw, weight_decay: 0.05}  # rates below are of adamw"
        loop: dict[str, Any] = {"clip": 1.0, **({"precision": "bf16"} if self.machine.gpu else {})}
        why = "gradients of a new head may be large" + ("; bf16 is twice as fast" if self.machine.gpu else "")
        yield f"loop: {_flow(loop)}  # {why}"

    def _phases(self) -> Iterator[str]:
        head = defaults.phase_of("head", self.kind, self.row)
        everything = defaults.phase_of("all", self.kind, self.row)
        yield f"# Epochs of {_size(self.row)}. A run that is done goes on by more of them: tlx train --extend."
        yield "phases:"
        yield "  # The new head alone, at ten times the rate: a random head would shock pretrained layers."
        yield f"  feature_extraction: {_flow(head)}"
        yield "  # Then everything, at rates that fall toward the input: what its layers know serves every photograph."
        yield f"  fine_tuning: {_flow(everything)}"

    @property
    def _workers(self) -> int:
        return max(1, min(8, self.machine.cores - 1))

    @property
    def _classes(self) -> tuple[int, int]:
        """Training samples of the largest and of the smallest class."""
        train = self.pictures.built.statistics.get("train")
        counts: Mapping[str, int] = train.counts if train is not None else {}
        return (max(counts.values()), min(counts.values())) if counts else (1, 1)


def _size(row: Row) -> str:
    most = row is defaults.TABLE[-1]
    return f"{defaults.TABLE[-2].below:,} pictures and more" if most else f"fewer than {row.below:,} pictures"


def _why_batch(row: Row) -> str:
    if row.batch <= defaults.USUAL.batch:
        return f"with {_size(row)} a larger one leaves few steps"
    return f"with {_size(row)} steps are many enough for it"


def _line(text: str) -> str:
    return " ".join(text.split())


def _flow(value: Any) -> str:
    return to_yaml(value, flow=True).strip().removesuffix("\n...").strip()
