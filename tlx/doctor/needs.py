"""What the training of a configuration will take, as far as that is known without a GPU or weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tlx.plan.config import Config


@dataclass(frozen=True)
class Needs:
    """Bytes.

    Attributes:
        checkpoint: of one.
        checkpoints: of all that are kept, and one that is being written; those of `checkpoint.keep.every` not counted.
        batches: of pictures under way, in the memory of one rank.
        gradients: what an update sends between ranks, in the phase that trains most.
        memory: on the device of one rank, estimated; None where that is not known.
    """

    checkpoint: int
    checkpoints: int
    batches: int
    gradients: int
    memory: int | None


def needs_of(config: Config, ranks: int) -> Needs:
    """From the plan; takes a second or so per phase.

    Raises:
        UserError: there is no plan, for instance since there are no shards yet.
    """
    from tlx.plan.plan import Plan
    from tlx.train.build import memory_of
    from tlx.train.components import backbone_of
    from tlx.train.data import count_samples

    samples = count_samples(config)
    backbone = backbone_of(config, samples.classes, empty=True)
    plan = Plan.make(config, backbone.layers, samples=samples.train, world=ranks)
    phases = memory_of(config, plan, backbone, ranks).values()
    totals = [phase.total for phase in phases]
    # what is held is written: the weights, their average, the optimizer's state
    one = max(phase.weights + phase.optimizer for phase in phases)
    height, width = config.input.over(backbone.input).size
    return Needs(
        checkpoint=one,
        checkpoints=one * (config.checkpoint.keep.last + config.checkpoint.keep.best + 1),
        batches=batches_of(config, ranks, pixels=height * width),
        gradients=max(phase.gradients for phase in phases),
        memory=None if None in totals else max(t for t in totals if t is not None),
    )


def batches_of(config: Config, ranks: int, *, pixels: int) -> int:
    """Bytes of the slots that a rank's loaders of training and validation keep; see `tlx.data.stream.loader`."""
    from tlx.data.stream.loader import slot_count

    share = -(-config.data.batch // ranks)
    at_once = min(share, config.loop.micro_batch or share)
    guests = 2 if config.mix is not None and (config.mix.mixup or config.mix.cutmix) else 0
    evaluated = (config.evaluate.batch or at_once) if config.data.val else 0
    return (at_once + guests + evaluated) * pixels * config.input.channels * slot_count(config.data.workers)
