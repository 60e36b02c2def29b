"""CONTRIBUTING.md: its parts are parts, and what it names is there."""

from __future__ import annotations

import re

import pytest
import torch
from nets import resnet_like
from places import ROOT

from tlx.base import plug
from tlx.base.errors import UserError
from tlx.tracking import RunInfo, guarded
from tlx.train.part_checks import check_objective, check_task

TEXT = (ROOT / "CONTRIBUTING.md").read_text()


@pytest.fixture(scope="module")
def space():
    """What its examples define."""
    found = {}
    for code in re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL):
        exec(compile(code, "CONTRIBUTING.md", "exec"), found)
    return found


def given(part, **said):
    """The arguments as a configuration's are checked."""
    return plug.arguments(part, said, label="unfreeze x")


def test_the_schedule(space):
    part = space["norms_first"]
    norms, everything = part(resnet_like(), **given(part, first="2ep"))
    assert (norms.trains["conv1"], norms.trains["fc"], str(norms.duration)) == ("norms", "all", "2ep")
    assert (set(everything.trains.values()), everything.duration) == ({"all"}, None)
    with pytest.raises(UserError, match='has no argument "frist"; did you mean "first"'):
        given(part, frist="2ep")


def test_the_head(space):
    torch.manual_seed(0)
    once = space["scaled"](4, 3).weight.detach().clone()
    torch.manual_seed(0)
    assert torch.equal(space["scaled"](4, 3, **given(space["scaled"], factor="2")).weight, 2 * once)


def test_the_tracker(space, tmp_path):
    plug.check_packages(space["lines"], label="tracker lines")
    tracker = guarded("lines", lambda: space["lines"](RunInfo(tmp_path, "a", "id", {})))
    tracker.log({"step": 1})
    tracker.finish({})
    assert (tmp_path / "rows.txt").read_text() == "{'step': 1}\n"


def test_the_objective(space):
    objective = space["one_against_rest"]([5, 5, 5])
    for mixed in (False, True):
        check_objective(objective, 3, mixed=mixed, label="objective one_against_rest")
    # -log sigmoid(2), twice -log(1 - sigmoid(0))
    loss = objective.loss(torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([0]), None)
    assert float(loss) == pytest.approx(0.126928 + 2 * 0.693147, abs=1e-5)


def test_the_task(space):
    from tlx.data.shards.targets import Target
    from tlx.tasks import TargetSummary, TaskData, Truth

    data = TaskData({"seeds": TargetSummary(Target("seeds", "number"), known=3)}, 3, 5, lambda _: None)
    part = space["counting"]
    task = part(data, **given(part, target="seeds"))
    for mixed in (False, True):
        check_task(task, mixed=mixed, label="task counting", metric=part.metric)
    output, count = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[2.0], [float("nan")], [3.0]])
    assert task.weights({"seeds": count.numpy()}).tolist() == [[1.0], [0.0], [1.0]]
    assert float(task.loss(output, Truth({"seeds": count}))) == pytest.approx(1 + 7.389056 - 6, abs=1e-5)
    meter = task.meter(torch.device("cpu"))
    meter.update(output, {"seeds": count}, torch.arange(3))
    assert meter.result()["mae"] == pytest.approx((1 + 4.389056) / 2, abs=1e-5)
    assert part.metric == task.metric
    mixed = Truth({"seeds": count}, {"seeds": count.flip(0)}, torch.tensor([0.75, 0.75, 0.75]))
    # e^x - n x of both counts in their shares; the second has neither
    assert float(task.loss(output, mixed)) == pytest.approx(1 + 7.389056 - 2 * (0.75 * 3 + 0.25 * 2), abs=1e-5)
    far = torch.tensor([[1.0], [200.0]], requires_grad=True)
    loss = task.loss(far, Truth({"seeds": torch.tensor([[2.0], [float("nan")]])}))
    loss.backward()
    assert (far.grad[0].item(), far.grad[1].item()) == (pytest.approx(2.718282 - 2, abs=1e-5), 0)
    assert task.hits(output, {"seeds": count}).tolist() == pytest.approx([1 + 4.389056, 2], abs=1e-5)


def test_what_it_names_is_there():
    named = re.findall(r"`((?:launch|tests|tlx)/[\w/*.]*)`|\]\(([\w/.]+)\)", TEXT)
    names = {one or other for one, other in named} | set(re.findall(r"(?:launch|tests)/[\w/]+\.(?:sh|py|txt)", TEXT))
    assert len(names) > 30
    for name in names:
        assert list(ROOT.glob(name)), name
