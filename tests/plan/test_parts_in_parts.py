"""Parts among the arguments of a part: checked, completed and written down as those at the top are."""

from __future__ import annotations

import pytest

from tlx.base import plug
from tlx.base.errors import ConfigError
from tlx.plan.config import parse, plain
from tlx.ranks.same_inputs import parts_of

RAW = {"run": "r", "data": {"train": "t", "batch": 8}, "backbone": {"name": "toys:small"}}
GONE = "no_such_package.tasks:counting"


def several(**tasks):
    return {**RAW, "task": {"name": "multitask", "tasks": {"species": "classification", **tasks}}}


def written(raw, **how):
    return plain(parse(raw, **how))["task"]["tasks"]


def test_they_are_written_down_with_their_defaults():
    colour = {"name": "classification", "target": "colour", "objective": {"name": "focal", "gamma": "3"}}
    made = written(several(colour=colour, tags="multilabel"))
    assert made["species"] == {"name": "classification", "target": None, "objective": None}
    focal = {"name": "focal", "gamma": 3, "class_weights": None, "aux_weight": 0.4}
    assert made["colour"] == {"name": "classification", "target": "colour", "objective": focal}
    assert made["tags"] == {"name": "multilabel", **plug.defaults(plug.find("task", "multilabel"))}
    said = plain(parse(several(colour=colour)))
    assert plain(parse(said)) == said


def test_all_that_is_wrong_with_them_is_told_with_its_key():
    wrong = several(
        colour={"name": "classification", "objective": {"name": "focal", "gama": 1}},
        tags={"name": "multilabl"},
        ages={"target": "age"},
        odd=3,
    )
    wrong["task"]["wheighting"] = "equal"
    with pytest.raises(ConfigError) as caught:
        parse(wrong)
    told = "\n".join(caught.value.problems)
    for expected in (
        'task.tasks.colour.objective.gama: objective focal has no argument "gama"; did you mean "gamma"?',
        'task.tasks.tags: there is no task "multilabl"; did you mean "multilabel"',
        "task.tasks.ages.name: missing",
        "task.tasks.odd: input should be a name, or a mapping of name and arguments",
        'task.wheighting: task multitask has no argument "wheighting"; did you mean "weighting"?',
    ):
        assert expected in told


def test_without_libraries_nothing_of_others_is_imported():
    odd = {"name": GONE, "target": "seeds"}
    assert written(several(odd=odd, other=GONE), libraries=False)["odd"] == odd
    with pytest.raises(ConfigError, match=f'task.tasks.odd: .*"{GONE}" cannot be loaded'):
        parse(several(odd=odd))


def outside(data):
    """A task of another package."""


def test_ranks_compare_the_code_that_is_named_within():
    assert "test_parts_in_parts" not in parts_of(parse(several()))
    for raw in (several(odd="test_parts_in_parts:outside"), {**RAW, "task": "test_parts_in_parts:outside"}):
        assert "test_parts_in_parts" in parts_of(parse(raw))
