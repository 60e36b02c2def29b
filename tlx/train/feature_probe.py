"""What features are worth while a network trains without labels: nearest neighbours on pictures with labels, and
whether the features still tell pictures apart."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tlx.base.inputs import InputSpec
from tlx.data.pixels.normalise import Normalise
from tlx.data.pixels.transforms import eval_transform
from tlx.data.shards.manifest import Manifest
from tlx.data.stream.stream import Batch, evaluation_batches
from tlx.data.stream.transfer import on_device
from tlx.features.cut import Rest
from tlx.features.knn import Table, votes, votes_of_others
from tlx.models import Backbone
from tlx.plan.config import Config
from tlx.ranks.collectives import World
from tlx.tasks.spread import MOST, effective_rank, spread
from tlx.train.data import Datasets
from tlx.use.embedder import Vectors

METRICS = ("feature_spread", "feature_rank")
WITH_LABELS = ("knn", *METRICS)
"""What a probe measures, with higher values the better ones."""


@dataclass(frozen=True)
class FeatureProbe:
    """Measures what the head is given, in evaluation mode, of pictures as evaluations show them.

    Attributes:
        pictures: starts a pass over this rank's share.
        judged: of other pictures, that are judged by those; None: each is judged by the others.
        classes: 0 where pictures have none: then there is no accuracy.
        k: neighbours.
        head: the path of the module whose input the features are.
        normalise, batch: as of a :class:`tlx.train.evaluation.Validation`, of one picture for a sample.
    """

    pictures: Callable[[], Iterable[Batch]]
    judged: Callable[[], Iterable[Batch]] | None
    classes: int
    k: int
    head: str
    spec: InputSpec
    normalise: Callable[[Tensor, int | None], Tensor]
    batch: int
    world: World

    @torch.no_grad()
    def measure(self, net: nn.Module, bad: dict[str, str]) -> dict[str, Any]:
        """The same numbers on every rank, which all call it.

        Args:
            bad: takes unreadable pictures, place -> reason.
        """
        whole = net.net if isinstance(net, Rest) else net
        whole.eval()
        table = self._table(whole, self.pictures(), bad)
        found = {"feature_spread": spread(table.rows[:MOST]), "feature_rank": effective_rank(table.rows)}
        if not self.classes:
            return found
        if self.judged is None:
            told, truth = votes_of_others(table, self.classes, self.k), table.labels
        else:
            judged = self._table(whole, self.judged(), bad)
            told, truth = votes(table, judged, self.classes, self.k), judged.labels
        return {"knn": float((told.argmax(1) == truth).double().mean()), **found}

    def _table(self, net: nn.Module, batches: Iterable[Batch], bad: dict[str, str]) -> Table:
        """Of all ranks, in the order of the index."""
        vectors = Vectors(net, self.head, self.spec, entering=True)
        own: list[tuple[Tensor, Tensor, Tensor]] = []
        for batch in on_device(batches, self.world.device):
            self.world.watch.beat("evaluation")
            bad |= {b.where: b.reason for b in batch.bad}
            if len(batch.ids):
                with self.world.autocast():
                    rows = vectors(self.normalise(batch.images, self.batch))[: len(batch.ids)]
                own.append((rows.float().cpu(), batch.labels.cpu(), batch.ids.cpu()))
        given = [part for parts in self.world.gather(_together(own)) for part in parts]
        if not given:
            return Table(torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
        [(rows, labels, ids)] = _together(given)
        order = ids.argsort(stable=True)
        return Table(rows[order], labels[order], ids[order])


def _together(parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """All in one; nothing for none."""
    if not parts:
        return []
    rows, labels, ids = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return [(rows, labels, ids)]


def numbers(samples: int, batch: int, most: int, rank: int, world: int) -> list[int]:
    """Which batches of an index a rank looks at: so many that about `most` samples are seen, evenly over the index."""
    batches = -(-samples // batch)
    wanted = min(batches, -(-most // batch))
    return [at * batches // wanted for at in range(wanted)][rank::world]


def probe_of(config: Config, sets: Datasets, spec: InputSpec, backbone: Backbone, world: World) -> FeatureProbe | None:
    """What measures features at each evaluation: `evaluate.probe`; of a task that draws its own targets, in any case
    whether they differ from picture to picture."""
    asked, batch = config.evaluate.probe, config.evaluate.samples
    seen = sets.probe if asked is not None else sets.val if config.draws_targets else None
    if seen is None or not backbone.heads:
        return None

    def pictures(shards: Manifest) -> Callable[[], Iterable[Batch]]:
        most = asked.samples if asked is not None else MOST
        return functools.partial(
            evaluation_batches,
            shards,
            batch=batch,
            transform=eval_transform(spec),
            channels=config.input.channels,
            workers=config.data.workers,
            skip_bad=True,
            upright=config.data.exif_orientation,
            numbers=numbers(len(shards), batch, most, world.rank, world.size),
        )

    return FeatureProbe(
        pictures=pictures(seen),
        judged=pictures(sets.probe_val) if sets.probe_val is not None else None,
        classes=len(seen.classes) if asked is not None else 0,
        k=asked.k if asked is not None else 0,
        head=backbone.heads[0],
        spec=spec,
        normalise=Normalise(spec, world.device, channels_last=config.loop.channels_last),
        batch=batch,
        world=world,
    )
