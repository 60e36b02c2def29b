"""Tasks of others, and what of a configuration and its shards no task can be made of: told in a line, with exit code 2,
before anything is written."""

from __future__ import annotations

import re

import numpy as np
import pytest
from commands import invoke, tlx, write_config
from composed import raw_of
from images import TARGETS, make_target_shards
from task_trainings import make_shards

from tlx.base.errors import UserError
from tlx.data.shards.targets import Target


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"))


def refused(shards, tmp_path, task, **over):
    """What `tlx plan` says; with exit code 2, as `main` has it of a UserError."""
    config = write_config(tmp_path / "c.yaml", raw_of(shards, tmp_path / "run", task=task, **over))
    done = invoke("plan", config)
    assert isinstance(done.exception, UserError), (done.output, done.exception)
    assert not (tmp_path / "run").exists()
    return str(done.exception)


@pytest.mark.parametrize(
    ("task", "told"),
    [
        ("mean", "it is a mean over samples"),
        ("contradicting", "mae is better when it is higher, which its name does not say"),
        ("without_loss", "has no metric loss"),
        ("without_rows", "returned Odd, which has no method rows"),
        ("without_heads", "returned Odd, which has no heads and no parts"),
        ("flat_weights", "weights have the shape (4,)"),
        ("more_outputs", "names 1 outputs, and its heads give 3"),
        ("no_metric", 'chooses by "accuracy", which is none of its metrics'),
        ("flat_hits", "hits are no tensor of a sum"),
        ("one_row", "rows of 4 samples are no list of as many"),
        ("lacking", "its meter gives no r2"),
        ("raising", "weights fails: ZeroDivisionError"),
        ("nothing", "returned NoneType"),
    ],
)
def test_a_task_that_is_none_is_told(shards, tmp_path, task, told):
    said = refused(shards, tmp_path, f"odd_tasks:{task}")
    assert told in said
    assert f"odd_tasks:{task}" in said
    assert len(said.strip().splitlines()) <= 2, said


SPECIES = {"species": "classification"}
SMOOTHED = {"name": "cross_entropy", "label_smoothing": 0.1}


def several(**tasks):
    return {"name": "multitask", "tasks": {**SPECIES, **tasks}}


@pytest.mark.parametrize(
    ("task", "told"),
    [
        ("multitsk", 'task: there is no task "multitsk"; did you mean "multitask"?'),
        ({"name": "multilabel", "loss": "asymetric"}, "task.loss: input should be"),
        ({"name": "regression", "target": "agee"}, 'task.target: the index has no target "agee"; did you mean "age"?'),
        ({"name": "regression", "target": "tags"}, "is of kind labels; this task needs one of kind number"),
        ("regression", "2 targets of kind number: age, box"),
        ("odd_tasks:other_target", 'there is no target "agee"; did you mean "age"?'),
        (
            several(colour={"name": "clasification"}),
            'task.tasks.colour: there is no task "clasification"; did you mean',
        ),
        (several(colour={"name": "classification", "targt": "colour"}), "task.tasks.colour.targt: "),
        (several(colour={"name": "classification", "target": "color"}), "task.tasks.colour.target: "),
        (several(tags={"name": "multilabel", "gamma": 2.0}), "task.tasks.tags.gamma: is of loss focal"),
        (several(tags=3), "task.tasks.tags: input should be a name, or a mapping of name and arguments"),
        (several(type="multilabel"), 'cannot have the name "type"'),
        (several(tags="multilabel") | {"weigting": "equal"}, 'task.weigting: .* did you mean "weighting"'),
    ],
)
def test_arguments_of_tasks_within_tasks_are_told_by_their_keys(shards, tmp_path, task, told):
    assert re.search(told, refused(shards, tmp_path, task)), told


@pytest.mark.parametrize(
    ("task", "over", "told"),
    [
        ("multilabel", {"objective": SMOOTHED}, "objective: task multilabel does not minimise it"),
        (several(tags="multilabel"), {"evaluate": {"metric": "val/tags/mop"}}, 'did you mean "val/tags/map"'),
        ("multilabel", {"evaluate": {"metric": "val/top1"}}, 'evaluate.metric: there is no metric "val/top1"'),
    ],
)
def test_settings_that_are_not_the_tasks_are_told(shards, tmp_path, task, over, told):
    assert told in refused(shards, tmp_path, task, **over)


COLOURS = TARGETS[0]
LONE = Target("colour", "class", ("blue",))
OTHER = Target("colour", "class", ("blue", "green", "violet"))
OF_COLOUR = {"name": "classification", "target": "colour"}
NONE = np.full(12, -1)


@pytest.mark.parametrize(
    ("train", "val", "told"),
    [
        ([], [COLOURS], 'the index has no target "colour"'),
        ([COLOURS], [], 'data.val: validation shards have no target "colour"; they have label'),
        ([COLOURS], [OTHER], "in validation shards; only on one side: red, violet"),
        (
            [COLOURS],
            [Target("colour", "number", width=2)],
            "of kind class in training shards, and in validation shards",
        ),
        ([COLOURS], [Target("colour", "class", COLOURS.classes[::-1])], "their order differs"),
        ([LONE], [LONE], 'task.target: target "colour" has only one class: blue'),
        (
            [(COLOURS, NONE.astype(np.int32))],
            [COLOURS],
            'data.train: no training sample has a value of target "colour"',
        ),
        ([COLOURS], [(COLOURS, NONE.astype(np.int32))], "evaluate.metric: no validation sample has a value of target"),
    ],
)
def test_shards_that_lack_what_is_to_be_learned_are_told(tmp_path, train, val, told):
    for part, targets in (("train", train), ("val", val)):
        make_target_shards(tmp_path / part, targets, samples=12, size=16)
    assert told in refused(tmp_path, tmp_path, OF_COLOUR)


def test_a_metric_of_another_target_may_choose_where_validation_lacks_one(tmp_path):
    for part, targets in (("train", [COLOURS]), ("val", [(COLOURS, NONE.astype(np.int32))])):
        make_target_shards(tmp_path / part, targets, samples=12, size=16)
    task, metric = several(colour=OF_COLOUR), {"metric": "val/species/top1"}
    said = refused(tmp_path, tmp_path, task)
    assert "val/score is never a number; choose another one (val/species/loss, val/species/top1)" in said
    chosen = raw_of(tmp_path, tmp_path / "run", task=task, evaluate=metric)
    assert invoke("plan", write_config(tmp_path / "c.yaml", chosen)).exit_code == 0


def test_shards_of_a_single_class_train_another_task(tmp_path):
    for part in ("train", "val"):
        make_target_shards(tmp_path / part, samples=12, size=16, classes=1)
    config = write_config(tmp_path / "c.yaml", raw_of(tmp_path, tmp_path / "run", task="multilabel"))
    assert invoke("plan", config).exit_code == 0
    assert 'target "label" has only one class' in refused(tmp_path, tmp_path, "classification")


@pytest.mark.slow
def test_the_exit_code_and_the_line(shards, tmp_path):
    config = write_config(tmp_path / "c.yaml", raw_of(shards, tmp_path / "run", task="odd_tasks:mean"))
    done = tlx("train", config, is_forked=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: task odd_tasks:mean: loss is the same for samples given once and twice")
    assert not (tmp_path / "run").exists()
