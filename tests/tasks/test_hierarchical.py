"""Classes that form a tree: one softmax over leaves, losses and metrics by level."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss
from task_data import NAN, evaluated, make, of_class
from torch.nn.functional import cross_entropy

from tlx.base.errors import UserError
from tlx.tasks import Truth

# paths of different depth; dog and animal are classes, too, and no leaves
NAMES = ("animal/dog/poodle", "animal/dog", "animal/dog/terrier", "animal/cat", "chair", "animal")
LEAVES = ("animal/dog/poodle", "animal/dog/terrier", "animal/cat", "chair")
CLASSES = of_class(*NAMES)
POODLE, DOG, TERRIER, CAT, CHAIR, ANIMAL = range(6)


def drawn(count=40):
    random = np.random.default_rng(2)
    return torch.tensor(random.normal(0, 2, (count, 4)), dtype=torch.float32), torch.tensor(
        random.integers(0, 6, count)
    )


def softmax(logits):
    e = np.exp(logits.numpy().astype(np.float64))
    return e / e.sum(1, keepdims=True)


def probability(leaves, node):
    """Of a node by its path, from those of leaves; the root is ""."""
    return sum(
        p for name, p in zip(LEAVES, leaves, strict=True) if name == node or name.startswith(node and f"{node}/")
    )


def hxe(leaves, name, alpha):
    """Bertinetto et al. 2020, equations 3 and 4, with steps below the first level."""
    parts = name.split("/")
    nodes = ["", *("/".join(parts[: i + 1]) for i in range(len(parts)))]
    steps = zip(nodes[1:], nodes[:-1], strict=True)
    conditional = [probability(leaves, node) / probability(leaves, parent) for node, parent in steps]
    return -sum(math.exp(-alpha * depth) * math.log(p) for depth, p in enumerate(conditional))


@pytest.mark.parametrize("alpha", [0, 0.1, 0.5, 3])
def test_the_loss_is_that_of_the_paper(alpha):
    task, (output, target) = make("hierarchical", CLASSES, alpha=alpha), drawn()
    expected = [hxe(p, NAMES[c], alpha) for p, c in zip(softmax(output), target, strict=True)]
    assert task.each(output, target).tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert float(task.loss(output, Truth({"label": target}))) == pytest.approx(sum(expected), rel=1e-6)


def test_without_alpha_it_is_the_cross_entropy_of_leaves():
    task, (output, target) = make("hierarchical", CLASSES, alpha=0), drawn()
    leaf = {POODLE: 0, TERRIER: 1, CAT: 2, CHAIR: 3}
    chosen = [i for i, c in enumerate(target.tolist()) if c in leaf]
    own = output[chosen].requires_grad_()
    plain = output[chosen].clone().requires_grad_()
    task.loss(own, Truth({"label": target[chosen]})).backward()
    labels = torch.tensor([leaf[c] for c in target[chosen].tolist()])
    cross_entropy(plain, labels, reduction="sum").backward()
    torch.testing.assert_close(own.grad, plain.grad, rtol=1e-5, atol=1e-6)
    losses = cross_entropy(plain, labels, reduction="none")
    torch.testing.assert_close(task.each(output, target)[chosen], losses.detach(), rtol=1e-6, atol=1e-6)


def test_a_high_alpha_asks_for_the_first_level_alone():
    task = make("hierarchical", CLASSES, alpha=50)
    output = torch.tensor([[0.0, 9.0, 0.0, 0.0]])  # a terrier
    animal, chair = task.each(output, torch.tensor([POODLE])), task.each(output, torch.tensor([CHAIR]))
    assert float(animal) == pytest.approx(-math.log(1 - 1 / (math.e**9 + 3)), rel=1e-3)
    assert float(chair) == pytest.approx(math.log(math.e**9 + 3))


def test_a_sample_teaches_the_levels_that_it_knows():
    task = make("hierarchical", CLASSES)
    output = torch.zeros(3, 4, requires_grad=True)
    task.loss(output, Truth({"label": torch.tensor([DOG, ANIMAL, -1])})).backward()
    assert output.grad[0, 0] == output.grad[0, 1] < 0 < output.grad[0, 3]  # a dog, of either kind
    assert output.grad[1].tolist() == pytest.approx([-1 / 12] * 3 + [1 / 4])  # from 1/4 each to 1/3 each of three
    assert output.grad[2].tolist() == [0] * 4
    assert task.weights({"label": np.array([DOG, ANIMAL, -1], np.int32)}).tolist() == [[1], [1], [0]]


def test_extreme_outputs_have_a_finite_loss():
    task = make("hierarchical", CLASSES)
    target = torch.tensor([POODLE, DOG, CHAIR, -1])
    output = torch.tensor([[-1e4, 1e4, 0, 1e5], [-1e5, -1e5, 1e5, 1e5], [1e30, 0, 0, -1e30], [NAN, 0, 0, 0]])
    output.requires_grad_()
    total = task.loss(output, Truth({"label": target}))
    total.backward()
    assert bool(total.isfinite())
    assert bool(output.grad.isfinite().all())
    # the first level, of 1e5 too much; then dogs among animals, which they are; then poodles among dogs
    first, below = 1e5 - 1e4, 2e4
    assert float(task.each(output, target)[0].detach()) == pytest.approx(first + math.exp(-0.2) * below, rel=1e-6)


def test_mixed_and_auxiliary_losses():
    task, (output, target) = make("hierarchical", CLASSES, aux_weight=0.5), drawn(4)
    lam, partner = torch.tensor([0.25, 1.0, 0.5, 0.75]), torch.tensor([3, 2, -1, 5])
    own, other = (task.each(output, t) for t in (target, partner))
    mixed = (lam * own + (1 - lam) * other).sum()
    truth = Truth({"label": target}, {"label": partner}, lam)
    assert float(other[2]) == 0
    assert float(task.loss(output, truth)) == pytest.approx(float(mixed))
    assert float(task.loss((output, output, None), truth)) == pytest.approx(1.5 * float(mixed))


def test_metrics_by_hand():
    task = make("hierarchical", CLASSES)
    of = {name: 20 * torch.eye(4)[i] for i, name in enumerate(["poodle", "terrier", "cat", "chair"])}
    of["cat"][0] = 1  # rather a poodle than a terrier
    samples = [
        (of["poodle"], POODLE),
        (of["poodle"], TERRIER),  # they meet at the dog, of height 1
        (of["cat"], POODLE),  # at the animal, of height 2
        (of["chair"], CAT),  # at the root, of height 3
        (of["terrier"], DOG),  # right, as far as is known
        (of["chair"], DOG),  # at the root
        (of["cat"], ANIMAL),
        (of["cat"], -1),
    ]
    output, target = torch.stack([s[0] for s in samples]), torch.tensor([s[1] for s in samples])
    result = evaluated(task, output, target)
    assert result["distance"] == pytest.approx((1 + 2 + 3 + 3) / 7)
    assert (result["top1"], result["per_class"]) == (1 / 4, [1 / 2, 0, 0, None])
    assert result["level1_top1"] == pytest.approx(5 / 7)
    assert result["level2_top1"] == pytest.approx(
        4 / 6
    )  # the likeliest below animals is a dog where a chair is likelier yet
    assert result["level3_top1"] == pytest.approx(2 / 3)
    assert result["samples"] == 8
    assert float(task.hits(output, {"label": target})[0]) == 3  # poodle, dog, animal


def test_a_level_is_judged_by_the_sums_of_its_nodes():
    task = make("hierarchical", CLASSES)
    output = torch.tensor([[0.3, 0.3, 0.0, 0.35]]).log()
    output[0, 2] = math.log(0.05)
    [row] = task.rows(output, {})
    assert row == {
        "label": "chair",
        "probability": pytest.approx(0.35),
        "level1": "animal",
        "level1_probability": pytest.approx(0.65),
        "level2": "animal/dog",
        "level2_probability": pytest.approx(0.6),
        "level3": "animal/dog/poodle",
        "level3_probability": pytest.approx(0.3),
    }
    result = evaluated(task, output, torch.tensor([POODLE]))
    names = ("top1", "level1_top1", "level2_top1", "level3_top1", "distance")
    assert [result[name] for name in names] == [0, 1, 1, 1, 3]


def test_metrics_are_scikit_learns_on_any_number_of_ranks():
    task, (output, target) = make("hierarchical", CLASSES), drawn()
    target[[5, 6]] = -1
    result = evaluated(task, output, target)
    leaves = softmax(output)
    truth = [NAMES[c] if c >= 0 else None for c in target]
    at_leaf = [i for i, name in enumerate(truth) if name in LEAVES]
    predicted = [LEAVES[i] for i in leaves.argmax(1)]
    assert result["top1"] == accuracy_score([truth[i] for i in at_leaf], [predicted[i] for i in at_leaf])
    for level, nodes in ((1, ["animal", "chair"]), (2, ["animal/dog", "animal/cat"])):
        known = [i for i, name in enumerate(truth) if name and name.count("/") >= level - 1]
        best = [max(nodes, key=lambda node, i=i: probability(leaves[i], node)) for i in known]
        above = ["/".join(truth[i].split("/")[:level]) for i in known]
        assert result[f"level{level}_top1"] == pytest.approx(accuracy_score(above, best))
    losses = [-math.log(probability(leaves[i], name)) for i, name in enumerate(truth) if name]
    assert result["loss"] == pytest.approx(np.mean(losses), rel=1e-9)
    alone = evaluated(task, output[at_leaf], target[at_leaf])
    plain = log_loss([LEAVES.index(truth[i]) for i in at_leaf], leaves[at_leaf], labels=range(4))
    assert alone["loss"] == pytest.approx(plain)
    assert (result["samples"], {*task.metrics} | {*task.lists} | {"samples"}) == (40, {*result})
    for ranks in (2, 3):
        assert repr(evaluated(task, output, target, ranks)) == repr(result)


@pytest.mark.parametrize("ranks", [1, 3])
def test_outputs_that_are_not_finite_count_as_wrong_at_every_level(ranks):
    task = make("hierarchical", CLASSES)
    output = torch.tensor([[NAN] * 4, [9.0, 0, 0, 0], [math.inf, 0, 0, 0], [NAN, 0, 0, 0]])
    target = torch.tensor([POODLE, POODLE, POODLE, -1])
    result = evaluated(task, output, target, ranks)
    assert (result["nonfinite"], result["samples"], result["distance"]) == (3, 4, 2)
    assert [result[name] for name in ("top1", "level1_top1", "level2_top1", "level3_top1")] == [1 / 3] * 4
    assert result["per_class"] == [1 / 3, None, None, None]
    assert math.isnan(result["loss"])
    assert float(task.hits(output, {"label": target})[0]) == 1
    sure = evaluated(task, torch.tensor([[9.0, 0, 0, -math.inf], [9.0, 0, 0, 0]]), torch.tensor([0, 0]), ranks)
    assert (math.isnan(sure["loss"]), sure["nonfinite"]) == (True, 1)


def test_what_no_sample_tells_about_is_no_number():
    task = make("hierarchical", CLASSES)
    assert evaluated(task, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), ranks=2) == {"samples": 0}
    for output, target in ((0.0, -1), (NAN, 0)):  # without a class; without any answer
        result = evaluated(task, torch.full((2, 4), output), torch.full((2,), target))
        assert all(math.isnan(result[name]) for name in task.metrics)
        assert (result["samples"], result["per_class"]) == (2, [None] * 4)
    result = evaluated(task, torch.zeros(1, 4), torch.tensor([ANIMAL]))
    assert [name for name in task.metrics if math.isnan(result[name])] == ["top1", "level2_top1", "level3_top1"]


def test_what_is_above_a_class_may_be_said_beside_its_name():
    levels = {"poodle": "animal/dog", "dog": "animal", "terrier": "animal/dog", "cat": "animal", "chair": "", "7": ""}
    said = make("hierarchical", of_class(*levels), levels={int(k) if k == "7" else k: v for k, v in levels.items()})
    named = make("hierarchical", of_class("a>d>p", "a>d", "a>d>t", "a>c", "chair", "7"), separator=">")
    assert said.outputs == ("poodle", "terrier", "cat", "chair", "7")
    assert named.outputs == ("a>d>p", "a>d>t", "a>c", "chair", "7")
    output, target = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.arange(6)
    assert said.each(output, target).tolist() == named.each(output, target).tolist()
    assert (said.rows(output, {})[0]["level1"] in ("animal", "chair", "7"), said.metrics) == (True, named.metrics)


def test_metrics_have_a_direction():
    assert make("hierarchical", CLASSES).metrics == {
        "loss": False,
        "top1": True,
        "level1_top1": True,
        "level2_top1": True,
        "level3_top1": True,
        "distance": False,
    }


@pytest.mark.parametrize(
    ("classes", "given", "says"),
    [
        (("cat", "dog"), {}, 'none holds "/".*task.separator.*task.levels.*classification'),
        (("animal/dog", "animal//cat"), {}, '"animal//cat" has an empty part'),
        (("animal", "animal/dog"), {}, "nothing to tell apart"),
        (("cat", "dog"), {"levels": {"cat": "animal"}}, "1 of 2 classes are missing: dog"),
        (("cat", "dog"), {"levels": {"cat": "a", "dgo": "a"}}, 'no class "dgo"; did you mean "dog"'),
        (("cat", "dog"), {"levels": {"cat": "", "dog": ""}}, "no class is below one"),
        (NAMES, {"alpha": -1}, "alpha"),
        (NAMES, {"separator": ""}, "separator"),
    ],
)
def test_refused(classes, given, says):
    with pytest.raises(UserError, match=f"(?s){says}"):
        make("hierarchical", of_class(*classes), **given)
