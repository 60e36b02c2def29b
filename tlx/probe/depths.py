"""`tlx probe CONFIG --depths`: a linear probe at several depths of the network, from one pass over the pictures; the
forecast of :mod:`tlx.probe.forecast` says what training above a depth would add."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tlx.base.errors import UserError
from tlx.base.terminal import drawn, say, tables, width
from tlx.features.knn import Table
from tlx.plan.config import Config
from tlx.probe.choice import RESAMPLES, Judged, means
from tlx.probe.features import composed, shown_plainly
from tlx.probe.grid_text import percent
from tlx.probe.regression import fit
from tlx.train.evaluation import Validation
from tlx.train.run import Run
from tlx.use.judged import Interval

PLACES = 8
"""That are looked at, at most: the last ones of the network's layers lie among them."""

_CS = (0.01, 0.1, 1.0)


@dataclass(frozen=True)
class Depth:
    """Features that enter a layer, pooled over their positions.

    Attributes:
        layer: the first one above.
        width: numbers of a picture.
        below: the share of the network's parameters that lie below.
        time: the share of a forward pass's time until there.
        lost: by how much it is less right than the place above all others, on the same pictures.
    """

    layer: str
    width: int
    below: float
    time: float
    accuracy: Interval
    lost: Interval

    def data(self) -> dict[str, Any]:
        return {
            "layer": self.layer,
            "width": self.width,
            "parameters_below": self.below,
            "time_until": self.time,
            "accuracy": self.accuracy.data(),
            "lost": self.lost.data(),
        }


@dataclass(frozen=True)
class Found:
    """Depths from the input to the head."""

    depths: Sequence[Depth]
    judged_on: str

    @property
    def best(self) -> Depth:
        """The highest accuracy; of equal ones the lowest place."""
        return max(self.depths, key=lambda one: one.accuracy.value)

    @property
    def lowest(self) -> Depth:
        """The lowest place that these pictures do not tell from the one at the head."""
        return next(one for one in self.depths if not one.lost.low > 0)

    def data(self) -> dict[str, Any]:
        return {
            "judged_on": self.judged_on,
            "best": self.best.layer,
            "lowest_not_worse": self.lowest.layer,
            "depths": [one.data() for one in self.depths],
        }


def search(config: Config, *, resamples: int = RESAMPLES) -> Found:
    """
    Raises:
        UserError: whatever keeps a training from beginning; no validation pictures.
    """
    with composed(config) as run:
        if run.validation is None:
            raise UserError("depths are judged on validation pictures", where="data.val", todo="set data.val")
        paths = places(run)
        say(
            f"{len(paths)} places, one pass over {len(run.stream.manifest):,} pictures and those of data.val",
            error=True,
        )
        times: dict[str, float] = {}
        train = _tables(run, shown_plainly(run), paths, times)
        val = _tables(run, run.validation, paths, times)
        classes, seed = len(run.task.outputs), run.config.seed
        below = _below(run, list(paths))
    logits = {name: fit(train[name], classes, _CS, seed).logits(val[name].rows) for name in paths}
    labels = next(iter(val.values())).labels
    judged = Judged.of(list(logits.values()), labels)
    lost = (judged.hits[-1:].double() - judged.hits.double()).contiguous()
    spent = max(times.values())
    return Found(
        [
            Depth(name, train[name].rows.shape[1], below[name], times[name] / spent, accuracy, gap)
            for name, accuracy, gap in zip(paths, judged.accuracies(resamples), means(lost, resamples), strict=True)
        ],
        f"{len(labels):,} pictures of data.val",
    )


def places(run: Run) -> dict[str, str]:
    """The first module that runs of each layer, by the layer's name, in the order in which they run; not of the first
    layer; as many as :data:`PLACES`."""
    order: dict[str, int] = {}
    spec, modules = run.description.input, dict(run.net.named_modules())
    with ExitStack() as undo, torch.no_grad():
        for path, module in modules.items():
            note = lambda _module, args, path=path: order.setdefault(path, len(order)) if _is_tensor(args) else None  # noqa: E731
            undo.callback(module.register_forward_pre_hook(lambda m, a, note=note: _ignore(note(m, a))).remove)
        run.net.eval()
        run.net(torch.zeros(2, spec.channels, *spec.size, device=run.world.device))
    first: dict[str, str] = {}
    for layer in list(run.plan.layers)[1:]:
        ran = [path for path in layer.modules if path in order]
        if ran:
            first[layer.name] = min(ran, key=lambda path: order[path])
    names = sorted(first, key=lambda name: order[first[name]])
    count = min(len(names), PLACES)
    chosen = {names[(number + 1) * len(names) // count - 1] for number in range(count)}
    return {name: first[name] for name in names if name in chosen}


def _ignore(_value: object) -> None:
    """A hook that returns something would replace what it saw."""


def _is_tensor(args: tuple[Any, ...]) -> bool:
    return bool(args) and isinstance(args[0], Tensor) and len(args[0]) == 2 and args[0].ndim > 1


def _below(run: Run, names: Sequence[str]) -> dict[str, float]:
    """The share of parameters of layers before each."""
    layers = list(run.plan.layers)
    whole = sum(layer.size for layer in layers)
    depth = {layer.name: layer.depth for layer in layers}
    return {name: sum(y.size for y in layers if y.depth < depth[name]) / whole for name in names}


@torch.no_grad()
def _tables(run: Run, pictures: Validation, paths: Mapping[str, str], times: dict[str, float]) -> dict[str, Table]:
    """Pooled features at each place; the time until there is added to `times`."""
    found: dict[str, list[Tensor]] = {name: [] for name in paths}
    places_, labels, target = list[Tensor](), list[Tensor](), next(iter(run.task.targets))
    began, count = 0.0, 0

    def keeper(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            times[name] = times.get(name, 0.0) + time.perf_counter() - began
            found[name].append(pooled(args[0])[:count].float().cpu())

        return keep

    run.net.eval()
    with ExitStack() as undo:
        for name, path in paths.items():
            undo.callback(run.net.get_submodule(path).register_forward_pre_hook(keeper(name)).remove)
        for batch in pictures.batches():
            count = len(batch.labels)
            if count:
                images = pictures.normalise(batch.images.to(run.world.device), pictures.batch)
                began = time.perf_counter()
                with run.world.autocast():
                    run.net(images)
                labels.append(batch.targets[target])
                places_.append(batch.ids)
    known = torch.cat(labels) >= 0
    rest = (torch.cat(labels), torch.cat(places_))
    return {name: Table(torch.cat(rows), *rest).of(known) for name, rows in found.items()}


def pooled(features: Tensor) -> Tensor:
    """[n, width]: maps [n, C, H, W] and [n, H, W, C] and tokens [n, L, C] by their mean over positions."""
    if features.ndim == 4:
        last = features.shape[1] == features.shape[2] != features.shape[3]
        return features.mean((1, 2) if last else (2, 3))
    return features.mean(1) if features.ndim == 3 else features.flatten(1)


def text(found: Found) -> str:
    """A table for people."""
    columns = {
        "width": [f"{one.width:,}" for one in found.depths],
        "parameters below": [f"{100 * one.below:.0f} %" for one in found.depths],
        "time until": [f"{100 * one.time:.0f} %" for one in found.depths],
        "linear, %": [percent(one.accuracy).replace(" %", "") for one in found.depths],
        "lost": [f"{100 * one.lost.value:.1f}" for one in found.depths],
    }
    title = f"features that enter a layer, judged on {found.judged_on}"
    low, lost = found.lowest, found.lowest.lost
    ends = f" [{100 * lost.low:.1f}, {100 * lost.high:.1f}]" if lost.resamples else ""
    lines = [
        drawn(*tables(title, {"layer": [one.layer for one in found.depths]}, columns, width(), more=title)),
        f"best: {found.best.layer}, {percent(found.best.accuracy)}; the best of {len(found.depths)} is optimistic.",
        "lowest that these pictures do not tell from the head's input: "
        f"{low.layer}, {100 * low.time:.0f} % of the time, {100 * lost.value:.1f} points{ends} lost",
        "linear: logistic regression of features pooled over positions, C by cross-validation on training pictures.",
    ]
    return "\n".join(lines)
