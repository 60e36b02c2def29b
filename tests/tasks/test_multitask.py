"""Several tasks at once: the sum of means over the samples that have each target, whatever the division of a batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy as torchs

from tlx.base.errors import UserError
from tlx.data.shards.targets import Target
from tlx.models.head_modules import TaskHeads
from tlx.tasks import TargetSummary, TaskData, Truth
from tlx.tasks.kinds import multitask
from tlx.tasks.objectives import cross_entropy

SPECIES, COLOUR = ("rose", "iris", "lily"), ("red", "blue")
TASKS = {"species": "classification", "colour": {"name": "classification", "target": "colour"}}


def data():
    targets = {
        "label": TargetSummary(Target("label", "class", SPECIES), (2, 2, 2), 6),
        "colour": TargetSummary(Target("colour", "class", COLOUR), (3, 1), 4),
    }
    return TaskData(targets, 6, 5, cross_entropy)


def truth(species, colour, *, of=None):
    """Of these samples; the scales are those of the whole batch `of`."""
    whole = colour if of is None else of
    known = int((whole >= 0).sum())
    scales = torch.tensor([1.0, len(whole) / known if known else 0.0])
    return Truth({"label": species, "colour": colour}, scales=scales)


def drawn(samples=6, columns=5):
    return torch.randn(samples, columns, generator=torch.Generator().manual_seed(0))


def test_the_loss_is_the_sum_of_each_tasks_mean_over_the_samples_that_have_its_target():
    task = multitask(data(), tasks=TASKS)
    outputs, species = drawn(), torch.tensor([0, 1, 2, 0, 1, 2])
    colour = torch.tensor([0, -1, 1, 0, -1, 0])
    there = colour >= 0
    expected = torchs(outputs[:, :3], species) + torchs(outputs[there, 3:], colour[there])
    assert task.loss(outputs, truth(species, colour)) / 6 == pytest.approx(float(expected), rel=1e-6)
    apart = [task.loss(outputs[i], truth(species[i], colour[i], of=colour)) for i in (slice(0, 1), slice(1, 6))]
    assert float(sum(apart)) / 6 == pytest.approx(float(expected), rel=1e-6)


def test_what_samples_weigh_is_known_from_the_index():
    task = multitask(data(), tasks=TASKS)
    values = {"label": np.array([0, 1, 2]), "colour": np.array([1, -1, 0])}
    assert task.weights(values).tolist() == [[1, 1], [1, 0], [1, 1]]


def test_a_batch_without_a_target_leaves_that_head_alone():
    task = multitask(data(), tasks=TASKS, weighting="uncertainty")
    outputs, none = drawn(columns=7).requires_grad_(), torch.full((6,), -1)
    loss = task.loss(outputs, truth(torch.arange(6) % 3, none))
    loss.backward()
    assert math.isfinite(loss.item())
    assert not outputs.grad[:, 3:5].any()
    assert not outputs.grad[:, 6].any()
    assert outputs.grad[:, 5].sum() != 0


def test_uncertainty_is_kendalls():
    task = multitask(data(), tasks=TASKS, weighting="uncertainty")
    species, colour = torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([0, -1, 1, 0, -1, 0])
    heads = TaskHeads({"species": torch.nn.Linear(4, 3), "colour": torch.nn.Linear(4, 2)}, 2)
    with torch.no_grad():
        heads.constants.copy_(torch.tensor([0.5, -1.0]))
    outputs = heads(drawn(columns=4))
    assert outputs.shape == (6, 7)
    first, second = torchs(outputs[:, :3], species), torchs(outputs[:, 3:5], colour, ignore_index=-1)
    expected = math.exp(-0.5) * first + 0.5 + math.exp(1.0) * second - 1.0
    loss = task.loss(outputs, truth(species, colour)) / 6
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    grown = [1 - math.exp(-0.5) * first.item(), 1 - math.exp(1.0) * second.item()]
    assert heads.constants.grad.tolist() == pytest.approx(grown, rel=1e-5)


def test_shares_by_hand_and_auxiliary_outputs():
    task = multitask(data(), tasks=TASKS, weighting={"colour": 0.25})
    outputs, species, colour = drawn(), torch.arange(6) % 3, torch.arange(6) % 2
    expected = torchs(outputs[:, :3], species) + 0.25 * torchs(outputs[:, 3:], colour)
    assert task.loss(outputs, truth(species, colour)) / 6 == pytest.approx(float(expected), rel=1e-6)
    both = task.loss((outputs, outputs, None), truth(species, colour)) / 6
    assert both == pytest.approx(1.4 * float(expected), rel=1e-6)  # aux_weight 0.4 of the objective


def test_partners_that_lack_a_target_weigh_nothing():
    task = multitask(data(), tasks=TASKS)
    outputs, species = drawn(2), torch.tensor([0, 1])
    own, other, lam = torch.tensor([0, -1]), torch.tensor([-1, 1]), torch.tensor([0.75, 0.75])
    mixed = Truth({"label": species, "colour": own}, {"label": species.flip(0), "colour": other}, lam, torch.ones(2))
    each = torchs(outputs[:, 3:], torch.tensor([0, 1]), reduction="none")
    soft = torchs(outputs[:, :3], species, reduction="none") * 0.75
    soft += torchs(outputs[:, :3], species.flip(0), reduction="none") * 0.25
    expected = soft.sum() + 0.75 * each[0] + 0.25 * each[1]
    assert task.loss(outputs, mixed).item() == pytest.approx(expected.item(), rel=1e-6)


def test_metrics_of_each_task_and_the_score_that_chooses():
    task = multitask(data(), tasks=TASKS, score={"species/top1": 1.0, "colour/loss": -0.5})
    meter = task.meter(torch.device("cpu"))
    outputs = torch.tensor([[9.0, 0, 0, 5, 0], [0, 9, 0, 5, 0], [9, 0, 0, 0, 5], [0, 0, 9, 0, 5]])
    own = {"label": torch.tensor([0, 1, 2, 2]), "colour": torch.tensor([0, 1, -1, 1])}
    meter.update(outputs[:3], {k: v[:3] for k, v in own.items()}, torch.arange(3))
    meter.update(outputs[3:], {k: v[3:] for k, v in own.items()}, torch.arange(3, 4))
    found = meter.result()
    assert found["species/top1"] == pytest.approx(3 / 4)
    assert found["colour/top1"] == pytest.approx(2 / 3)
    assert (found["samples"], found["species/per_class"]) == (4, [1.0, 1.0, 0.5])
    loss = torchs(outputs[:, 3:], own["colour"], ignore_index=-1)
    assert found["colour/loss"] == pytest.approx(float(loss), rel=1e-6)
    assert found["score"] == pytest.approx(3 / 4 - 0.5 * float(loss), rel=1e-6)
    assert set(task.metrics) < set(found)
    rows = task.rows(outputs[:1], {})
    assert (rows[0]["species/label"], rows[0]["colour/label"]) == ("rose", "red")


def test_a_task_that_weighs_nothing_need_not_be_a_number():
    task = multitask(data(), tasks=TASKS, weighting={"colour": 0})
    assert task.score == {"species/top1": 1.0}
    meter = task.meter(torch.device("cpu"))
    own = {"label": torch.tensor([0, 1]), "colour": torch.tensor([-1, -1])}
    meter.update(torch.tensor([[9.0, 0, 0, 5, 0], [9, 0, 0, 5, 0]]), own, torch.arange(2))
    found = meter.result()
    assert math.isnan(found["colour/loss"])
    assert found["score"] == 0.5
    assert found["loss"] == found["species/loss"]


def not_one_of_several(data, *, constants: tuple[str, ...] = (), heads: dict[str, int] | None = None, metric="top1"):
    from types import SimpleNamespace

    given = heads or {"": 3}
    return SimpleNamespace(parts=1, constants=constants, heads=given, metric=metric, metrics={"top1": True})


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"constants": ["sigma"]}, r"task.tasks.odd: its loss learns constants \(sigma\)"),
        ({"heads": {"a": 2, "b": 3}}, r"task.tasks.odd: has 2 heads \(a, b\)"),
        ({"metric": "kappa"}, 'task.tasks.odd: chooses by "kappa"'),
    ],
)
def test_a_task_that_cannot_be_one_of_several_is_named(given, told):
    with pytest.raises(UserError, match=told):
        multitask(data(), tasks={**TASKS, "odd": {"name": "test_multitask:not_one_of_several", **given}})


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"tasks": {"a": "classification"}}, "1 task"),
        ({"tasks": {**TASKS, "hue": {"name": "classification", "target": "color"}}}, "did you mean"),
        ({"tasks": TASKS, "weighting": {"colours": 1.0}}, "colours"),
        ({"tasks": TASKS, "weighting": {"colour": 0.0, "species": 0.0}}, "nothing to learn"),
        ({"tasks": TASKS, "score": {"colour/top9": 1.0}}, "colour/top9"),
        ({"tasks": {**TASKS, "a b": "classification"}}, "a b"),
    ],
)
def test_what_cannot_be_is_told(said, told):
    with pytest.raises(UserError, match=told):
        multitask(data(), **said)
