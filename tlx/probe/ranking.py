"""`tlx probe CONFIG --backbones a,b,c`: networks on the user's own pictures, by nearest neighbours, a linear probe and
LogME, with what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tlx.base.errors import UserError, lines
from tlx.base.terminal import say
from tlx.features.knn import chosen_k, votes
from tlx.plan.config import Config, parse
from tlx.probe.at_hand import Asked, shown
from tlx.probe.choice import RESAMPLES, Judged, means
from tlx.probe.costs import Costs, costs_of
from tlx.probe.features import probed
from tlx.probe.grid import judges
from tlx.probe.logme import logme
from tlx.probe.regression import CS, fit
from tlx.use.judged import Interval


@dataclass(frozen=True)
class Ranked:
    """One network.

    Attributes:
        linear: accuracy of logistic regression with `c`, chosen by cross-validation on training pictures.
        neighbours: accuracy by the `k` nearest training pictures, k chosen on these.
        logme: of the training pictures.
        hits: bool [n], of `linear`, of each picture that judges.
    """

    asked: Asked
    width: int
    linear: Interval
    c: float
    neighbours: Interval
    k: int
    logme: float
    costs: Costs
    hits: torch.Tensor

    def data(self) -> dict[str, Any]:
        return {
            "backbone": self.asked.name,
            "weights": self.asked.weights,
            "features": self.width,
            "linear": {**self.linear.data(), "c": self.c},
            "knn": {**self.neighbours.data(), "k": self.k},
            "logme": self.logme,
            "parameters": self.costs.parameters,
            "pictures_per_s": self.costs.pictures_per_s,
            "peak_bytes": self.costs.peak,
        }


@dataclass(frozen=True)
class Found:
    """
    Attributes:
        rows: the best first, by the linear probe.
        failed: networks that could not be looked at, and why.
        behind: of each row, by how much it is less right than the first one on the same pictures.
        judged_on: the pictures that judge, in words.
    """

    rows: Sequence[Ranked]
    failed: dict[str, str]
    behind: Sequence[Interval]
    judged_on: str
    device: str

    @property
    def front(self) -> list[Ranked]:
        """Those that no other one beats in both accuracy and speed, the fastest first."""
        return [
            one
            for one in sorted(self.rows, key=lambda row: -row.costs.pictures_per_s)
            if not any(
                other.linear.value >= one.linear.value
                and other.costs.pictures_per_s >= one.costs.pictures_per_s
                and other is not one
                and (other.linear.value, other.costs.pictures_per_s) != (one.linear.value, one.costs.pictures_per_s)
                for other in self.rows
            )
        ]

    def data(self) -> dict[str, Any]:
        return {
            "judged_on": self.judged_on,
            "device": self.device,
            "backbones": [
                {**row.data(), "behind_the_first": gap.data(), "on_the_front": row in self.front}
                for row, gap in zip(self.rows, self.behind, strict=True)
            ],
            "failed": self.failed,
        }


def search(config: Config, wanted: Sequence[Asked], *, resamples: int = RESAMPLES) -> Found:
    """
    Raises:
        UserError: no network could be looked at.
    """
    rows, failed, where = list[Ranked](), dict[str, str](), ("", "")
    for number, asked in enumerate(wanted, start=1):
        say(f"{number} of {len(wanted)}: {shown(asked)}", error=True)
        try:
            row, *rest = _ranked(of_backbone(config, asked), asked, resamples)
        except UserError as error:
            failed[str(asked)] = "; ".join(map(str, lines(error)))
            say(f"  left out: {error}", error=True)
            continue
        rows.append(row)
        where = (rest[0], rest[1])
    if not rows:
        raise UserError("none of these could be looked at", where=", ".join(failed), todo=next(iter(failed.values())))
    rows.sort(key=lambda row: (-row.linear.value, -row.neighbours.value))
    gaps = [means((rows[0].hits.double() - row.hits.double())[None], resamples)[0] for row in rows]
    return Found(rows, failed, gaps, *where)


def of_backbone(config: Config, asked: Asked) -> Config:
    """The configuration with another network, which sees what its own weights were trained to see; a size that the
    configuration says stays.

    Raises:
        UserError: it says what no configuration could.
    """
    said = {key: value for key, value in asked.said.items() if key != "input"}
    own = config.input.model_dump(mode="json", exclude_unset=True, include={"channels", "size"})
    raw = {
        "backbone": said or {"name": asked.name, "weights": asked.weights},
        "input": own | asked.said.get("input", {}),
    }
    checked = parse({**raw, "data": config.data.model_dump(mode="json", include={"train"})})
    return config.model_copy(update={"backbone": checked.backbone, "input": checked.input})


def _ranked(config: Config, asked: Asked, resamples: int) -> tuple[Ranked, str, str]:
    with probed(config, plain=True) as own:
        costs, device = costs_of(own.run), str(own.run.world.device)
        table, judging, _, judged_on = judges(own)
        classes, width, seed = len(own.classes), own.width, config.seed
    fitted, k = fit(table, classes, CS, seed), chosen_k(table, classes)
    both = Judged.of([fitted.logits(judging.rows), votes(table, judging, classes, k)], judging.labels)
    linear, neighbours = both.accuracies(resamples)
    score = logme(table.rows, table.labels, classes)
    row = Ranked(asked, width, linear, fitted.c, neighbours, k, score, costs, both.hits[0])
    return row, judged_on, device
