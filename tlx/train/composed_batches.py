"""Which samples an epoch shows: as `data.sampling` says, without classes that a task leaves out, or the episodes of a
task whose batches consist of these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tlx.base import plug
from tlx.base.errors import Problems, UserError
from tlx.data.stream.episodes import Episodes, refuse_split, refuse_too_few
from tlx.data.stream.order import Ids
from tlx.data.stream.sampling import Sampling
from tlx.plan.config import Config
from tlx.plan.data_config import SamplingConfig
from tlx.tasks.choice import places_of


def sampling_of(config: Config, classes: tuple[str, ...], counts: Ids) -> Sampling:
    """
    Args:
        classes: of the training shards; `counts`: pictures of each.

    Raises:
        UserError: a class to be left out that is none; settings that episodes cannot go with; batches, or an epoch, of
            other than whole ones; classes of too few pictures.
    """
    compose = config.composes_batches
    if compose is None:
        key = getattr(plug.find("task", config.task.name), "leaves_out", None)
        without = places_of(config.task.args.get(key) or (), classes, where=f"task.{key}") if key else ()
        return replace(config.data.sampling.made(), without=without)
    found = Problems()
    _refuse_others(config, found)
    episodes = found.of(lambda: compose(config.task.args, classes))
    if episodes is not None:
        world, micro_batch = config.world.size or 1, config.loop.micro_batch
        found.of(lambda: refuse_split(episodes, config.data.batch, world=world, micro_batch=micro_batch))
        taken = episodes.taking(counts)
        where, of = "data.train", "classes that are not novel" if episodes.left_out else "classes"
        found.of(lambda: refuse_too_few(classes, taken, episodes, where=where, words="task.", of=of))
    found.refuse()
    assert episodes is not None
    step, pictures = config.data.batch // episodes.pictures, int(taken.sum())
    per_epoch = _per_epoch(episodes.per_epoch, step, -(-pictures // config.data.batch))
    return Sampling(episodes=replace(episodes, per_epoch=per_epoch, per_step=step))


def _per_epoch(asked: int | None, step: int, steps: int) -> int:
    """
    Args:
        step: episodes of one; `steps`: of an epoch of which nobody says it.

    Raises:
        UserError: an epoch would end within a step.
    """
    if asked is None:
        return steps * step
    if asked % step:
        below = asked // step * step
        near = " or ".join(str(n) for n in (below, below + step) if n)
        what = f"{asked} episodes are no whole number of steps, which have {step} each"
        raise UserError(what, where="task.episodes", todo=near)
    return asked


def _refuse_others(config: Config, found: Problems) -> None:
    """What is about plain samples, or about classes that the network would know."""
    label, data = f"task {config.task.name}", config.data
    odd = {
        "data.sampling": (
            data.sampling != SamplingConfig(),
            "episodes say themselves which pictures come, and how often",
        ),
        "data.window": (data.window is not None, "episodes are drawn from the pictures of all shards"),
        "data.parts": (data.parts > 1, "episodes are drawn from the pictures of all shards"),
        "data.drop_last": (data.drop_last, "an epoch of episodes has no short batch"),
        "mix": (config.mix is not None, "a mixed picture is of two classes, and a prototype of one"),
        "head": (config.solves_head, f"head {config.head.name} begins as what is known of classes, and it has none"),
    }
    for where, (is_set, why) in odd.items():
        if is_set:
            todo = "features, or linear" if where == "head" else "leave it out"
            found.add(UserError(f"{label}: {why}", where=where, todo=todo))


def note_of(episodes: Episodes, counts: Sequence[int]) -> str:
    """What an epoch shows, in words.

    Args:
        counts: how often classes come in an epoch, on average.
    """
    present, shown = int(np.count_nonzero(counts)), sum(counts)
    return (
        f"note: an epoch is {episodes.per_epoch} episodes, {episodes.per_step} a step: {episodes}, drawn from "
        f"{present} classes; {shown} pictures, some of them several times"
    )
