"""The task of episodes, as a configuration names it. Imports no torch before a task is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from tlx.base.durations import Ratio
from tlx.base.errors import UserError
from tlx.data.shards.targets import LABEL
from tlx.data.stream.episodes import Episodes
from tlx.tasks import Task, TaskData
from tlx.tasks.choice import places_of

Count = Annotated[int, Field(ge=1)]
Name = str | int | float
"""Of a class: YAML reads the name 3 as a number."""
_NOVEL = "task.novel"


def episodic(
    data: TaskData,
    *,
    width: Count,
    ways: Annotated[int, Field(ge=2)] = 5,
    shots: Count = 5,
    queries: Count = 15,
    episodes: Count | None = None,
    novel: Annotated[list[Name], Field(min_length=1)] | None = None,
    val_ways: Annotated[int, Field(ge=2)] | None = None,
    val_shots: Count | None = None,
    val_queries: Count | None = None,
    val_episodes: Annotated[int, Field(ge=2)] = 600,
    aux_weight: Annotated[Ratio, Field(ge=0)] = 0.4,
) -> Task:
    """Prototypical networks (Snell et al. 2017, arXiv:1703.05175): features in which a few pictures tell a class.

    A global batch is one or several episodes: `ways` classes, and of each `shots` pictures, whose mean is the class's
    prototype, and `queries` others. A query's loss is -log of the softmax over minus its squared Euclidean distances to
    the prototypes; the step's loss is the mean over queries. Which classes and pictures they are follows from the seed
    and the episode's number: the same on any number of ranks, of which each has whole episodes, and after any stop.
    `data.batch` is a multiple of ways x (shots + queries). Classes come by the index's own class, all equally likely.

    Metrics: `accuracy`, the mean over `val_episodes` episodes of the share of queries whose nearest prototype is their
    class's; `margin_of_error`, half of that mean's 95 % interval, 1.96 standard errors, as the literature reports it
    (episodes share pictures: of other pictures it says less); `loss`, the mean over their queries. These episodes are
    always the same ones of the same pictures, whatever the seed. Every validation picture goes through the network
    once. The training curve shows the accuracy of its own episodes.

    Pretrained features are far from each other in some networks and near in others, which decides how sure the softmax
    begins: see the argument `scale` of ``head: features``.

    Args:
        width: numbers that the head gives for a picture. ``head: features`` gives the backbone's own features, and
            says how many they are; ``head: linear`` (or `mlp`) a learned embedding of them.
        episodes: of an epoch, a multiple of those of a step. By default as many steps as show as many pictures as the
            classes have.
        novel: classes that no training episode has, and the only ones of validation and test episodes. By default the
            data alone decide: training episodes are of all classes of data.train, others of all of theirs. (Shards of
            different classes must name all of them: build, or index, them with one list.)
        val_ways, val_shots, val_queries: of episodes of data.val and data.test; by default those of training.
        aux_weight: of auxiliary outputs (0.4 for Inception, Szegedy et al. 2016).

    Raises:
        UserError: the index has no class; a novel class that it does not know.
    """
    if LABEL not in data.targets:
        raise UserError("episodes are of classes, and these shards have none", where="task")
    target = data.targets[LABEL].target
    places = None if novel is None else places_of(novel, target.classes, where=_NOVEL)

    from tlx.tasks.episodic import Episodic

    training = Episodes(ways, shots, queries)
    judged = Episodes(val_ways or ways, val_shots or shots, val_queries or queries, val_episodes)
    return Episodic(target, width, training, judged, places, aux_weight)


episodic.metric = "accuracy"  # type: ignore[attr-defined]


def composed(args: Mapping[str, Any], classes: tuple[str, ...]) -> Episodes:
    """Of a training, by the task's arguments.

    Raises:
        UserError: no classes; a novel class that there is not.
    """
    if not classes:
        raise UserError("episodes are of classes, and these shards have none", where="task")
    left_out = places_of(args.get("novel") or (), classes, where=_NOVEL)
    given = {name: int(args[name]) for name in ("ways", "shots", "queries") if args.get(name) is not None}
    wanted = {"ways": 5, "shots": 5, "queries": 15} | given
    return Episodes(**wanted, per_epoch=args.get("episodes"), left_out=left_out)


episodic.episodes = composed  # type: ignore[attr-defined]
