"""A task from elsewhere whose promises do not hold is named before it trains."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from task_data import make, of_class, of_numbers

from tlx.base.errors import UserError
from tlx.data.shards.targets import Target
from tlx.plan.config import parse
from tlx.plan.parts import chosen_by
from tlx.tasks import TargetSummary
from tlx.tasks.ordinal import Ordinal
from tlx.train.build import _outputs_in_words
from tlx.train.components import output_check
from tlx.train.part_checks import check_task

GRADES = of_class("1", "2", "3")


class Blind(Ordinal):
    """Takes a mixed sample for its own alone."""

    def loss(self, output, truth):
        return super().loss(output, dataclasses.replace(truth, partner=None))


def blind(data):
    made = make("ordinal", GRADES)
    return Blind(**{field.name: getattr(made, field.name) for field in dataclasses.fields(made)})


def of_every_kind():
    tags = TargetSummary(Target("tags", "labels", ("old", "wet")), (3, 3), (6, 6))
    colour, box = of_class("red", "blue", name="colour"), of_numbers("box", [0.0, 1.0], [1.0, 2.0])
    path = of_class("a/b", "a/c", "d", name="path")
    plain = {"name": "classification", "target": "colour"}
    yield make("classification", of_class("a", "b"))
    for objective in (
        {"name": "bce", "target_threshold": 0.9},
        {"name": "cross_entropy", "class_weights": [0, 1]},
        "focal",
    ):
        yield make("classification", colour, objective=objective)
    for loss in ("bce", "asymmetric", "focal"):
        yield make("multilabel", tags, loss=loss)
    yield make("regression", box)
    yield make("ordinal", GRADES)
    yield make("hierarchical", path)
    tasks = {"a": plain, "b": "multilabel", "c": "regression"}
    for weighting in ("equal", "uncertainty"):
        yield make("multitask", colour, tags, box, tasks=tasks, weighting=weighting)


@pytest.mark.parametrize("task", [*of_every_kind()], ids=lambda task: type(task).__name__)
@pytest.mark.parametrize("mixed", [False, True])
def test_ours_keep_theirs(task, mixed):
    check_task(task, mixed=mixed, label="task", metric=task.metric)


def test_a_task_that_does_not_mix_is_named():
    task = blind(None)
    check_task(task, mixed=False, label="task blind")
    with pytest.raises(UserError, match=r'task blind does not mix: .*"label"'):
        check_task(task, mixed=True, label="task blind")


def test_one_of_several_that_does_not_mix_is_found_by_its_target():
    box = of_numbers("box", [0.0], [1.0])
    task = make("multitask", GRADES, box, tasks={"a": "regression", "b": "test_checked:blind"})
    with pytest.raises(UserError, match=r'does not mix: .*"label"'):
        check_task(task, mixed=True, label="task")


def test_the_metric_that_chooses_is_what_the_function_says():
    task = make("ordinal", GRADES)
    assert chosen_by("ordinal") == task.metric == "mae"
    assert chosen_by("test_checked:blind") == "loss"
    with pytest.raises(UserError, match=r'chooses by "mae", and its function says "loss"\n.*FUNCTION.metric = "mae"'):
        check_task(task, mixed=False, label="task", metric="loss")
    with pytest.raises(UserError, match='chooses by "kapa", which is none of its metrics; did you mean "kappa"'):
        check_task(dataclasses.replace(task, metric="kapa"), mixed=False, label="task", metric="kapa")


def config(task):
    raw = {"run": "r", "data": {"train": "t", "batch": 8}, "backbone": {"name": "toys:small"}, "task": task}
    return parse({**raw, "objective": "focal"})


def of_colours(data):
    """Classification under another name."""


def test_words_are_those_of_what_a_task_is_and_not_of_its_name():
    task = make("classification", of_class("red", "blue"), objective="focal")
    elsewhere = config("test_checked:of_colours")
    assert _outputs_in_words(elsewhere, task) == "2 classes"
    ordinal = make("ordinal", GRADES)
    assert _outputs_in_words(elsewhere, ordinal) == "test_checked:of_colours of label, outputs: 2"
    with pytest.raises(UserError, match=r"^objective focal: loss of"):
        output_check(elsewhere, task)((torch.zeros(2, 2), torch.zeros(2, 1)))
    with pytest.raises(UserError, match=r"^task test_checked:of_colours: loss of"):
        output_check(elsewhere, ordinal)((torch.zeros(2, 2), torch.zeros(2)))
