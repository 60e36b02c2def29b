"""Parts for tlx from a package of its own: nothing in tlx knows of it."""

from __future__ import annotations

from tlx.base.durations import Length, Ratio
from tlx.plan.unfreeze import Assignment


def top_down(layers, *, every: Length, keep_stem: bool = True):
    """The head, then all but the first layer."""
    thawed = [layer.name for layer in layers][1 if keep_stem else 0 :]
    return [
        Assignment("only_head", {layers.head.name: "all"}, every),
        Assignment("the_rest", dict.fromkeys(thawed, "all"), every),
    ]


def halves(layers, *, lower: Ratio = 0.5):
    """The lower half of the depths at `lower` times the rate."""
    return {layer.name: lower if 2 * layer.depth < layers.depths else 1.0 for layer in layers}


def sawtooth(step: int, steps: int, *, teeth: int = 2) -> float:
    return 1 - (step * teeth / steps) % 1


def two_layers(features: int, classes: int, *, hidden: int = 16):
    from torch import nn

    return nn.Sequential(nn.Linear(features, hidden), nn.GELU(), nn.Linear(hidden, classes))


def tiny(classes: int, *, width: int = 8):
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(width, classes),
    )  # fmt: skip


def quantiles(data, *, target: str, levels: list[float] | None = None):
    """A task."""
    from outside_parts.quantile import Quantiles

    return Quantiles(data.targets[target].target, levels or [0.1, 0.5, 0.9])


quantiles.metric = "pinball_loss"


class Diary:
    """A tracker that hears of phases and weights, too."""

    def __init__(self, file) -> None:
        self.file = file

    def _say(self, *words) -> None:
        print(*words, file=self.file, flush=True)

    def log(self, row) -> None:
        self._say("row", row["step"])

    def phase_ended(self, end) -> None:
        self._say("phase", end.name, end.step, f"{end.metrics['val/top1']:.4f}")
        for table in end.tables():
            self._say("table", table.name, len(table.rows))
        for picture in end.pictures():
            self._say("picture", picture.id, picture.label, picture.told, len(picture.jpeg or b""))

    def model_trained(self, model) -> None:
        self._say("model", "+".join(model.aliases), model.step, model.file.name, model.file.is_file())

    def finish(self, result) -> None:
        self._say("end", result["finished"])
        self.file.close()


def diary(run, *, file: str = "diary.txt") -> Diary:
    return Diary((run.folder / file).open("a", encoding="utf-8"))
