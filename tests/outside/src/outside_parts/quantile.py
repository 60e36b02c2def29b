"""A task that tlx does not have: quantiles of a number (Koenker and Bassett 1978), one output for each."""

from __future__ import annotations

import numpy as np
import torch

from tlx.tasks import Ranks


class Quantiles:
    constants, parts, lists, shown = (), 1, {}, None
    metric = "pinball_loss"

    def __init__(self, target, quantiles) -> None:
        self.target, self.quantiles = target, tuple(quantiles)
        self.targets = {target.name: target}
        self.outputs = tuple(f"{target.name}_q{q:g}" for q in self.quantiles)
        self.heads = {"": len(self.outputs)}
        self.metrics = {"loss": False, "pinball_loss": False, "coverage": True}

    def weights(self, values):
        return (~np.isnan(values[self.target.name])).astype(np.float64)

    def each(self, output, values):
        """The pinball loss of each sample, 0 without a value."""
        errors = values - output.float()
        share = errors.new_tensor(self.quantiles)
        return torch.where(values.isnan(), 0.0, torch.maximum(share * errors, (share - 1) * errors)).sum(1)

    def loss(self, output, truth):
        return self.each(output, truth.own[self.target.name]).sum()

    def hits(self, output, own):
        return output.new_zeros(2)

    def meter(self, device, ranks=Ranks()):  # noqa: B008 - it is frozen
        return Meter(self, device, ranks)

    def rows(self, output, kept):
        return [dict(zip(self.outputs, row, strict=True)) for row in output.tolist()]


class Meter:
    def __init__(self, task, device, ranks) -> None:
        self.task, self.ranks = task, ranks
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, covered, known, samples

    def update(self, output, own, ids):
        values = own[self.task.target.name]
        known = ~values.isnan()[:, 0]
        covered = ((output[:, :1] <= values) & (values <= output[:, -1:]))[:, 0]
        loss = self.task.each(output, values)
        counts = loss.sum(), (covered & known).sum(), known.sum(), torch.tensor(len(ids))
        self.sums += torch.stack([count.double() for count in counts])

    def result(self):
        loss, covered, known, samples = self.ranks.sum(self.sums).tolist()
        if not samples:
            return {"samples": 0}
        loss, covered = (total / known if known else float("nan") for total in (loss, covered))
        return {"loss": loss, "pinball_loss": loss, "coverage": covered, "samples": int(samples)}
