"""Targets that are drawn with the picture: rotations, places and orders of patches, the same for every process."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from built import options
from composed import raw_of, train
from images import encoded, make_shards
from PIL import Image

from tlx import models
from tlx.base.errors import UserError
from tlx.base.inputs import InputSpec
from tlx.data.build.write import build_shards
from tlx.data.shards.manifest import Manifest
from tlx.data.stream.randomness import own_randomness
from tlx.data.stream.stream import ShardStream, evaluation_batches
from tlx.data.stream.views import Shown, drawn_of, shown_as
from tlx.models import Outputs
from tlx.plan.config import parse
from tlx.tasks.pretext import Grid, Neighbour, Rotated, Shuffled, far_orders
from tlx.train.build import plan

SIZE = 16
EVERYTHING = {"name": "explicit", "phases": [{"name": "all", "layers": {"*": "all"}}]}


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory):
    """22 training and 7 validation pictures: dark, with a bright upper left corner."""
    root = tmp_path_factory.mktemp("corners")
    (root / "p").mkdir()
    for n in range(29):
        pixels = np.zeros((SIZE, SIZE, 3), np.uint8)
        pixels[:6, :6] = 200 + n
        (root / "p" / f"{n:02d}.png").write_bytes(encoded(Image.fromarray(pixels), "PNG"))
    build_shards(str(root / "p"), root / "s", options(labels=False, val=0.25))
    return root / "s"


def stream(shards, views, **how):
    shown = Shown(views, lambda image: image, (SIZE, SIZE))
    return ShardStream(
        Manifest.open(shards / "train"), batch=8, seed=3, transform=shown, views=views, **{"targets": (), **how}
    )


def corner(picture):
    """By how much a picture was turned counterclockwise, told by its bright corner."""
    value = picture.float().mean(0)
    corners = {0: value[0, 0], 1: value[-1, 0], 2: value[-1, -1], 3: value[0, -1]}
    return max(corners, key=lambda at: corners[at])


def test_the_target_of_a_sample_is_what_its_picture_shows(unlabelled):
    told, seen = [], []
    for batch in stream(unlabelled, Rotated()).batches(0, 6):
        told += batch.targets["rotation"].tolist()
        seen += [corner(picture) for picture in batch.images]
    assert told == seen
    assert set(told) == {0, 1, 2, 3}
    by_epoch = told[:22], told[22:]
    assert by_epoch[0] != by_epoch[1]
    of_val = list(
        evaluation_batches(
            Manifest.open(unlabelled / "val"),
            batch=4,
            transform=Shown(Rotated(), lambda i: i, (SIZE, SIZE)),
            views=Rotated(),
            targets=(),
        )
    )
    assert [b.targets["rotation"].tolist() for b in of_val] == [[corner(p) for p in b.images] for b in of_val]


@pytest.mark.parametrize(("world", "workers", "micro"), [(1, 1, None), (2, 0, 2), (3, 0, None)])
def test_the_same_pictures_and_targets_however_a_batch_is_dealt(unlabelled, world, workers, micro):
    views = Neighbour(Grid(3, 0.5, (0.5, 1.0)))

    def all_of(**how):
        batches = [
            b
            for rank in range(how.get("world", 1))
            for b in stream(unlabelled, views, rank=rank, **how).batches(0, 4)
            if not b.idle
        ]
        rows = [
            (b.step, int(i), int(t), p.numpy().tobytes())
            for b in batches
            for i, t, p in zip(b.ids, b.targets["position"], b.images, strict=True)
        ]
        return sorted(rows)

    assert all_of(world=world, workers=workers, micro_batch=micro) == all_of()


def in_place(height, width):
    """Red rises downward, green to the right."""
    y, x = np.mgrid[0:height, 0:width]
    return torch.from_numpy(np.stack([y * 255 // height, x * 255 // width, 0 * x])).to(torch.uint8)


@pytest.mark.parametrize("key", range(12))
def test_a_patch_lies_where_the_target_says(key):
    views, image = Neighbour(Grid(3, 0.5, (1.0, 1.0))), in_place(90, 90)
    with own_randomness() as seed:
        seed(key)
        middle, other = Shown(views, lambda patch: patch, (10, 10))(image).float().unflatten(1, (2, 10)).unbind(1)
    down, right = ((other.mean((1, 2)) - middle.mean((1, 2)))[:2] / (255 / 3)).round().int().tolist()
    names = {(-1, -1): "upper left", (-1, 0): "above", (-1, 1): "upper right", (0, -1): "left", (0, 1): "right"}
    names |= {(1, -1): "lower left", (1, 0): "below", (1, 1): "lower right"}
    (target,) = views.targets.values()
    assert target.classes[drawn_of(views, [key])["position"][0]] == names[down, right]


def test_patches_are_shown_in_the_order_of_the_target():
    views, image = Shuffled(Grid(2, 0.2, (1.0, 1.0)), far_orders(4, 8)), in_place(80, 80)
    for key in range(8):
        with own_randomness() as seed:
            seed(key)
            patches = Shown(views, lambda patch: patch, (10, 10))(image).float().unflatten(1, (4, 10))
        cells = [int(p[0].mean() > 127) * 2 + int(p[1].mean() > 127) for p in patches.unbind(1)]
        (target,) = views.targets.values()
        assert " ".join(map(str, cells)) == target.classes[drawn_of(views, [key])["order"][0]]


def test_orders_are_far_from_each_other():
    def distances(orders):
        return [sum(a != b for a, b in zip(*pair, strict=True)) for pair in itertools.combinations(orders, 2)]

    assert far_orders(4, 4) == ((0, 1, 2, 3), (1, 0, 3, 2), (2, 3, 0, 1), (3, 2, 1, 0))  # by hand: no place twice
    assert len(far_orders(4, 1000)) == 24
    drawn = random.Random(0)
    chance = [tuple(drawn.sample(range(9), 9)) for _ in range(12)]
    assert min(distances(far_orders(9, 12))) >= 7 > min(distances(chance))


@pytest.mark.parametrize("joined", [True, False])
def test_views_go_through_the_trunk_one_by_one(joined):
    torch.manual_seed(0)
    net = models.load(
        "toys:small",
        classes=Outputs({"": 5}, views=3, joined=joined),
        weights="none",
        head="mlp",
        head_args={"hidden": [7]},
    )
    plain, x = net.module.eval(), torch.randn(2, 3, 3, 16, 16)
    features = []
    hook = plain.get_submodule(net.heads[0]).register_forward_pre_hook(lambda _m, args: features.append(args[0]))
    output = plain(x)
    hook.remove()
    alone = torch.stack([plain.features(x[:, view]).mean((2, 3)) for view in range(3)], 1)
    assert torch.allclose(features[0].unflatten(0, (2, 3)), alone, atol=1e-6)
    head = torch.nn.Sequential(*plain.get_submodule(net.heads[0]).children())
    by_hand = head(alone.flatten(1)) if joined else torch.cat([head(alone[:, view]) for view in range(3)], 1)
    assert torch.allclose(output, by_hand, atol=1e-6)
    assert plain(x[:, 0]).shape == (2, 5)  # a lone picture


def raw(shards, run, task, **over):
    return raw_of(
        shards,
        run,
        **{"task": task, "unfreeze": EVERYTHING, "phases": {"all": {"lr": 0.01, "duration": "12ep"}}, **over},
    )


@pytest.mark.slow
def test_what_was_turned_by_how_much_is_learned_without_a_label(unlabelled, tmp_path):
    result = train(raw(unlabelled, tmp_path / "r", "rotation", transforms=["resize"], evaluate={"every": "4ep"}))
    assert result["best"]["value"] == 1.0


@pytest.mark.parametrize("task", ["patches", {"name": "jigsaw", "cells": 2, "orders": 4}])
def test_tasks_of_patches_train(unlabelled, tmp_path, task):
    over = {
        "head": {"name": "mlp", "hidden": [8]},
        "phases": {"all": {"lr": 0.01, "duration": 2}},
        "evaluate": {"every": 2},
    }
    result = train(raw(unlabelled, tmp_path / "r", task, **over))
    assert result["best"]["metric"] == "val/top1"


def test_what_does_not_go_together_is_refused_before_anything_is_trained(unlabelled, tmp_path):
    def refusal(task, **over):
        with pytest.raises(UserError) as caught:
            plan(parse(raw(unlabelled, tmp_path / "r", task, **over)))
        return str(caught.value)

    assert "no target of kind class" in refusal("classification")
    assert "simclr" in refusal("classification")
    assert "square" in refusal("rotation", input={"size": [16, 24]})
    assert "do not mix" in refusal("rotation", mix={"mixup": 0.2})
    weighted = {"name": "cross_entropy", "class_weights": [1, 1, 1, 2]}
    assert "equally often" in refusal("rotation", objective=weighted)
    assert "pools a map" in refusal("patches", head="concat_pool")
    assert "the smallest share comes first: [0.1, 0.9]" in refusal({"name": "patches", "area": [0.9, 0.1]})
    assisted = {"name": "toys:assisted", "weights": "none"}
    for task in ("jigsaw", "simclr"):
        assert "has auxiliary classifiers (" in refusal(task, head="mlp", backbone=assisted)
    plan(parse(raw(unlabelled, tmp_path / "r", "rotation", backbone=assisted)))  # one view, which they answer, too
    with pytest.raises(UserError, match="shape"):
        shown_as(Rotated(), lambda image: image[:, :8, :9], InputSpec(size=(8, 9)))


def test_the_plan_says_what_is_shown(unlabelled, tmp_path):
    _, text = plan(parse(raw(unlabelled, tmp_path / "r", "patches", head="mlp")))
    assert "of 2 pictures for each sample; no label is read" in text


def test_labels_may_be_in_the_training_shards_and_not_in_those_that_judge(unlabelled, tmp_path):
    labelled = make_shards(tmp_path / "l", classes=3, per_class={"train": 4, "val": 2}, size=SIZE)
    data = {"train": str(labelled / "train"), "val": str(unlabelled / "val"), "batch": 4, "workers": 0}
    _, text = plan(parse(raw(unlabelled, tmp_path / "r", "rotation", data=data)))
    assert "no label is read" in text
