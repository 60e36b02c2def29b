"""From configurations to trainings: every recipe plans, and what does not fit together is said before anything runs."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from images import make_folder, make_shards, make_target_shards
from places import ROOT
from safetensors.torch import save_file
from torchvision.models import resnet18

from tlx.base.errors import ConfigError, UserError
from tlx.data.build.write import BuildOptions, build_shards
from tlx.data.shards.manifest import Manifest
from tlx.data.shards.targets import Target
from tlx.data.stream.sampling import Sampling
from tlx.plan.config import load, parse
from tlx.tasks.summaries import summaries
from tlx.train import build
from tlx.train import data as feed
from tlx.train.components import backbone_of, task_of

CONFIGS = sorted(ROOT.glob("configs/**/*.yaml"))


def plan_of(name, monkeypatch, *overrides):
    monkeypatch.chdir(ROOT)
    return build.plan(load(ROOT / "configs" / name, overrides))


@pytest.mark.parametrize("path", [p for p in CONFIGS if "quickstart" not in p.parts], ids=lambda p: p.stem)
def test_every_recipe_plans_without_data_weights_or_gpu(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")  # a recipe may name a file that lies beside it
    made, text = build.plan(load(path))
    assert "no shards at" in text
    assert made.steps > 0


def test_vgg16_is_the_articles(monkeypatch):
    made, text = plan_of("flowers102/vgg16.yaml", monkeypatch)
    assert [(p.name, (p.stop - p.start) / made.steps_per_epoch, p.lr) for p in made.phases] == [
        ("feature_extraction", 16, 1e-3),
        ("fine_tuning", 8, 1e-4),
    ]
    features = [y for y in made.layers if y.name.startswith("features.")]
    assert [y.depth for y in features] == list(range(44))
    rates = made.phases[1].rates(made.phases[1].start)
    for i in (0, 20, 40):
        assert rates[f"features.{i}"] == pytest.approx(1e-4 + (1e-7 - 1e-4) / 44 * (44 - i))
    assert rates["classifier"] == rates["classifier.6"] == 1e-4
    assert "features.43" in text
    assert "1e-07" in text


@pytest.mark.parametrize("name", ["resnet50", "resnet152"])
def test_resnets_fall_by_a_third_per_step(name, monkeypatch):
    made, _ = plan_of(f"flowers102/{name}.yaml", monkeypatch)
    rates = made.phases[1].rates(made.phases[1].start)
    assert list(rates) == ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc"]
    assert [1e-4 / rate for rate in reversed(rates.values())] == pytest.approx([3**i for i in range(7)])


@pytest.mark.slow
def test_the_clothing_rows_differ_in_what_they_say(monkeypatch):
    trained = {}
    for path in sorted((ROOT / "configs" / "clothing").glob("*.yaml")):
        made, _ = plan_of(f"clothing/{path.name}", monkeypatch)
        layer = made.layers.match("layer1")[0]
        trained[path.stem[0]] = [
            (p.norm_state(layer).statistics, {q.kind for q in p.trained(layer)}) for p in made.phases
        ]
    assert trained == {
        "1": [("moving", set())],
        "2": [("fixed", set())],
        "3": [("moving", {"norm"})],
        "4": [("moving", {"norm"}), ("moving", {"norm", "weight"})],
        "5": [("fixed", set()), ("fixed", {"weight"})],
        "6": [("fixed", set())],
    }


def config(tmp_path, train, val=None, **over):
    data = {"train": str(train), "val": val and str(val), "batch": 4, "workers": 0, **over.pop("data", {})}
    phases = {"each": {"lr": 0.1, "duration": "1ep"}}
    raw = {"run": str(tmp_path / "run"), "data": data, "backbone": {"name": "toys:small"}, "phases": phases}
    return parse({**raw, **over})


def test_shards_that_do_not_fit_are_refused(tmp_path):
    three = make_shards(tmp_path / "three", classes=3, per_class={"train": 2, "val": 1}, size=16)
    two = make_shards(tmp_path / "two", classes=2, per_class={"train": 2, "val": 1}, size=16)
    with pytest.raises(UserError, match="3 classes, validation shards 2; only on one side: class2"):
        feed.open_sets(config(tmp_path, three / "train", two / "val"))
    with pytest.raises(UserError, match="hold 6, the configuration expects 7"):
        feed.open_sets(config(tmp_path, three / "train", data={"expected": {"classes": 3, "train": 7}}))
    with pytest.raises(UserError, match="hold 3, the configuration expects 5"):
        feed.open_sets(config(tmp_path, three / "train", data={"expected": {"classes": 5, "train": 6}}))
    with pytest.raises(UserError, match="tlx shards"):
        feed.open_sets(config(tmp_path, tmp_path / "nowhere"))


def test_classes_are_the_same_in_training_and_validation(tmp_path):
    def made(name, classes):
        return make_target_shards(tmp_path / name, [Target("age", "number")], samples=6, size=16, classes=classes).path

    train, none = made("train", 3), made("none", 0)
    sets = feed.open_sets(config(tmp_path, train, made("val", 3)))
    assert (sets.samples.train, sets.samples.counts) == (6, (2, 2, 2))
    with pytest.raises(UserError, match="3 classes, validation shards 0"):
        feed.open_sets(config(tmp_path, train, none))
    sets = feed.open_sets(config(tmp_path, none, made("val_none", 0)))
    assert (sets.samples.classes, sets.samples.train, sets.samples.counts) == (0, 6, ())
    balanced = feed.open_sets(config(tmp_path, none, data={"sampling": {"method": "balanced"}}))
    with pytest.raises(UserError, match="cannot be chosen by class"):
        assert balanced.samples


def test_what_a_task_reads_is_the_same_in_training_and_validation(tmp_path):
    """And what it does not read makes no difference."""

    def made(name, *targets):
        return make_target_shards(tmp_path / name, targets, samples=6, size=16).path

    def told(val, **task):
        asked = config(tmp_path, train, val, task=task)
        return task_of(asked, feed.open_sets(asked).samples)

    colour, other = (Target("colour", "class", names) for names in (("blue", "red"), ("blue", "white")))
    age = Target("age", "number")
    train = made("train", colour, age)
    white, without, wide = made("white", other), made("without"), made("wide", Target("age", "number", width=2), colour)
    for val in (white, without, wide):
        assert list(told(val, name="classification").targets) == ["label"]
    assert list(told(wide, name="classification", target="colour").targets) == ["colour"]
    with pytest.raises(UserError, match=r"only on one side: red, white\n.* VAL --target-classes colour=TRAIN"):
        told(white, name="classification", target="colour")
    with pytest.raises(UserError, match=r'no target "colour"; they have label\n.*--target colour:class=KEY'):
        told(without, name="classification", target="colour")
    with pytest.raises(UserError, match=r"width 1 in .* of width 2\n.*--target age:number=KEY"):
        told(wide, name="regression")


def test_wide_labels_are_counted_in_little_memory():
    """64 MiB of labels in parts of 16, and what is compared in each of them."""
    labels = np.ones((1 << 12, 1 << 14), np.int8)
    target = Target("tags", "labels", tuple(map(str, range(1 << 14))))
    shards = SimpleNamespace(targets={"tags": target}, values={"tags": labels}.get, labels=None, classes=())
    tracemalloc.start()
    assert summaries(shards, Sampling(), 0)["tags"].counts == (1 << 12,) * (1 << 14)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 32 << 20


def test_targets_that_nobody_asks_for_are_not_counted(tmp_path, monkeypatch):
    train = make_target_shards(tmp_path / "train", samples=6, size=16).path
    asked = config(tmp_path, train, task={"name": "regression", "target": "age"})
    sets, read, plain = feed.open_sets(asked), [], Manifest.values
    monkeypatch.setattr(Manifest, "values", lambda self, name: read.append(name) or plain(self, name))
    samples = sets.samples
    assert samples.targets["tags"].target.classes == ("big", "old", "round", "wet")
    assert read == []
    assert list(task_of(asked, samples).targets) == ["age"]
    assert set(read) == {"age"}
    # i / 4, without the second one: 0, 2, 3, 4, 5 quarters
    assert (samples.targets["age"].mean, samples.targets["age"].samples) == ((0.7,), 5)
    assert read == ["age"]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """8 pictures of a class and 42 of another."""
    folder = tmp_path_factory.mktemp("uneven")
    for split in ("train", "val"):
        make_folder(folder / "p" / split, 1, 8, 16, names=["few"])
        make_folder(folder / "p" / split, 1, 42, 16, names=["many"], seed=1)
    build_shards(str(folder / "p"), folder / "shards", BuildOptions(jobs=0))
    return folder / "shards"


@pytest.mark.parametrize(
    ("sampling", "counts", "weights", "quota"),
    [
        ({}, (8, 42), [3.125, 50 / 84], 5),
        ({"limit": 4}, (4, 4), [1.0, 1.0], 0),
        ({"limit": 10}, (8, 10), [18 / 16, 18 / 20], 1),
        ({"method": "balanced"}, (25, 25), [1.0, 1.0], 5),
        ({"method": "sqrt"}, (15, 35), [50 / 30, 50 / 70], 5),
        ({"method": "repeat_factors"}, (14, 42), [2.0, 56 / 84], 5),
    ],
    ids=str,
)
def test_statistics_are_of_the_epoch_that_is_trained_on(
    uneven, tmp_path, monkeypatch, sampling, counts, weights, quota
):
    from composed import composer

    from tlx.train.step import share_unreadable

    where = {"train": str(uneven / "train"), "val": str(uneven / "val")}
    data = {**where, "batch": 8, "workers": 0, "sampling": sampling, "bad_samples": "10%"}
    objective = {"name": "cross_entropy", "class_weights": "balanced"}
    run = composer(uneven, tmp_path / "run", monkeypatch, data=data, objective=objective)()
    assert run.task.objective.class_weights == pytest.approx(weights)
    assert sum(weights[c] * counts[c] for c in (0, 1)) == pytest.approx(sum(counts))
    shown = [int(label) for batch in run.stream.batches(0, run.plan.steps_per_epoch) for label in batch.labels]
    assert (shown.count(0), shown.count(1)) == counts
    assert run.plan.samples == sum(counts)
    run.progress.bad = {f"sample {i}": "damaged" for i in range(quota)}
    share_unreadable(run.progress.bad, run.quota, run.world)
    run.progress.bad["one more"] = "damaged"
    with pytest.raises(UserError, match=f"{quota + 1} unreadable samples, {quota} allowed"):
        share_unreadable(run.progress.bad, run.quota, run.world)
    made, text = build.plan(run.config)
    assert made.samples == sum(counts)
    said = f"data.sampling makes an epoch of {sum(counts)} samples out of 50, "
    assert (said in text) == bool(sampling)


def test_a_plan_without_shards_counts_what_is_expected(tmp_path):
    expected = {"classes": 4, "train": 42}
    asked = config(tmp_path, tmp_path / "later", data={"expected": expected, "sampling": {"limit": 10}})
    assert feed.count_samples(asked).counts == (10, 10, 10, 10)
    asked = config(tmp_path, tmp_path / "later", data={"expected": expected})
    assert feed.count_samples(asked).counts == (11, 11, 10, 10)


def test_validation_on_what_is_trained_on_is_warned_of(uneven, tmp_path):
    def said(train, val):
        return [w for w in build.plan(config(tmp_path, train, val))[0].warnings if "look too good" in w]

    assert said(uneven / "train", uneven / "train") == [
        f"1 of the 1 shards of data.val are shards of data.train, too: {TOO}"
    ]
    assert said(uneven / "train", uneven / "val") == [  # the same pictures in another order
        f"32 of 32 pictures of data.val that were looked at are in data.train, too: {TOO}"
    ]
    three = make_shards(tmp_path / "three", classes=3, per_class={"train": 8, "val": 8}, size=16, shard_samples=6)
    assert said(three / "train", three / "val") == []
    copied = tmp_path / "renamed"
    shutil.copytree(three / "train", copied)
    assert said(three / "train", copied) == [f"4 of the 4 shards of data.val are shards of data.train, too: {TOO}"]
    for file in copied.glob("*.tar"):  # other pictures of the same lengths, as those without compression have
        file.write_bytes(bytes(byte ^ 1 for byte in file.read_bytes()))
    assert said(three / "train", copied) == []
    later = config(tmp_path, "later", "later", data={"expected": {"classes": 3, "train": 24}})
    assert f"data.val is data.train: {TOO}" in build.plan(later)[0].warnings


TOO = feed.TOO_GOOD


def test_one_class_is_refused(tmp_path):
    folder = make_folder(tmp_path / "pictures" / "train", classes=1, per_class=3, size=16).parent
    with pytest.raises(UserError, match="needs two classes or more; here: class0"):
        build_shards(str(folder), tmp_path / "one", BuildOptions(val=0.0, jobs=0))
    shards = make_shards(tmp_path / "two", classes=2, per_class={"train": 2}, size=16)
    index = shards / "train" / "index.json"
    header = json.loads(index.read_text())
    index.write_text(json.dumps({**header, "classes": ["only"]}))
    with pytest.raises(UserError, match="class"):
        build.prepared(config(tmp_path, shards / "train"))


def test_optimizer_groups_cover_every_parameter_once_and_spare_the_excluded_from_decay():
    from tlx import models
    from tlx.train.optim import adamw, parameter_groups

    backbone = models.load("timm/vit_tiny_patch16_224", classes=3, weights="none")
    groups = parameter_groups(backbone.module, backbone.layers, no_decay=["bias", "norm", "embedding", "scale"])
    optimizer = adamw(groups, weight_decay=0.3)
    names = [name for group in optimizer.param_groups for name in group["names"]]
    assert sorted(names) == sorted(n for n, _ in backbone.module.named_parameters())
    decay = {name: group["weight_decay"] for group in optimizer.param_groups for name in group["names"]}
    assert decay["blocks.0.attn.qkv.weight"] == 0.3
    for spared in (
        "cls_token",
        "pos_embed",
        "norm.weight",
        "blocks.3.norm1.bias",
        "blocks.0.attn.qkv.bias",
        "head.bias",
    ):
        assert decay[spared] == 0.0, spared
    assert all(isinstance(group["lr"], float) for group in optimizer.param_groups)
    assert not torch.is_tensor(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"evaluate": {"metric": "val/top5"}}, 'no metric "val/top5"; did you mean "val/top1"'),
        ({"phases": {"each": {"lr": 1, "duration": {"max": "2ep", "metric": "val/los"}}}}, 'did you mean "val/loss"'),
    ],
)
def test_metrics_that_no_evaluation_gives_are_refused(tmp_path, over, message):
    from nets import resnet_like
    from updates import classifying

    from tlx.plan.plan import Plan
    from tlx.tasks.objectives import cross_entropy

    task = classifying(cross_entropy([1, 1, 1]))
    asked = config(tmp_path, "x", "y", **over)
    with pytest.raises(UserError, match=message):
        build.check_metrics(asked, Plan.make(asked, resnet_like(), samples=40), task, None)
    patient = config(tmp_path, "x", evaluate={"patience": 3})
    with pytest.raises(UserError, match="needs validation data"):
        build.check_metrics(patient, Plan.make(patient, resnet_like(), samples=40), task, None)


def test_a_plan_refuses_all_that_training_would_at_once(tmp_path):
    asked = config(
        tmp_path,
        tmp_path / "later",
        data={"expected": {"classes": 3, "train": 24}},
        input={"size": 16},
        transforms=[{"name": "random_resized_crop", "size": 20}],
        objective={"name": "cross_entropy", "class_weights": [1, 2]},
        optimizer={"name": "sgd", "momentum": 0, "nesterov": True},
        phases={"each": {"duration": "1ep"}},
        evaluate={"metric": "val/top9"},
    )
    with pytest.raises(ConfigError) as caught:
        build.plan(asked)
    text = str(caught.value)
    for expected in (
        "phases.feature_extraction: the phase has no learning rate",
        "make 3 x 20 x 20 torch.uint8 of a picture of 32 x 48; the backbone wants 3 x 16 x 16",
        "objective.class_weights: 2 class weights for 3 classes",
        "Nesterov momentum requires a momentum",
    ):
        assert expected in text, text
    assert "5 mistakes" in text  # sgd has no default rate: one for each of two phases
    gone = asked.model_copy(update={"data": asked.data.model_copy(update={"expected": None})})
    with pytest.raises(ConfigError, match=r"later: there is no such folder[\s\S]*wants 3 x 16 x 16[\s\S]*Nesterov"):
        build.plan(gone)
    one = asked.model_copy(update={"objective": asked.objective.model_copy(update={"args": {}})})
    with pytest.raises(ConfigError, match="4 mistakes"):
        build.plan(one)


TARGETS = {
    "tags": {"kind": "labels", "classes": ["old", "wet"]},
    "colour": {"classes": 4},
    "box": {"kind": "number", "width": 4},
}


@pytest.mark.parametrize(
    ("task", "outputs", "metric"),
    [
        ("multilabel", "multilabel of tags, outputs: 2", "val/map"),
        ("regression", "regression of box, outputs: 4", "val/mae"),
        ({"name": "ordinal", "target": "colour"}, "ordinal of colour, outputs: 3", "val/mae"),
        (
            {"name": "multitask", "tasks": {"a": "multilabel", "b": {"name": "classification", "target": "colour"}}},
            "multitask of tags, colour, outputs: a 2, b 4",
            "val/score",
        ),
    ],
)
def test_every_task_plans_before_there_are_shards(tmp_path, task, outputs, metric):
    asked = config(tmp_path, tmp_path / "later", data={"expected": {"train": 24, "targets": TARGETS}}, task=task)
    assert asked.evaluate.metric == metric
    assert outputs in build.plan(asked)[1]


def test_targets_that_are_not_as_expected_are_refused(tmp_path):
    from images import make_target_shards

    make_target_shards(tmp_path / "s", samples=24)
    for targets, told in (
        ({"tags": {"kind": "labels", "classes": 3}}, "targets.tags.classes: the shards hold 4, the configuration"),
        ({"colour": {"classes": ["red", "green", "blue"]}}, "hold blue, green, red, the configuration expects red, "),
        ({"hue": {"classes": 3}}, "data.expected.targets.hue.kind: the shards hold none"),
        ({"box": {"kind": "number", "width": 2}}, "data.expected.targets.box.width: the shards hold 4"),
    ):
        asked = config(tmp_path, tmp_path / "s", data={"expected": {"train": 24, "targets": targets}})
        with pytest.raises(UserError, match=told):
            build.plan(asked)


def test_training_refuses_what_the_plan_does(uneven, tmp_path, monkeypatch):
    from composed import composer

    compose = composer(uneven, tmp_path / "run", monkeypatch)
    wrong = {"transforms": [{"name": "random_resized_crop", "size": 20}], "evaluate": {"metric": "val/top9"}}
    with pytest.raises(ConfigError, match=r'no metric "val/top9"[\s\S]*wants 3 x 16 x 16'):
        compose(**wrong)


def test_an_input_other_than_the_weights_is_warned_of(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = ROOT / "configs" / "flowers17" / "deit_tiny.yaml"  # 0.485, 0.456, 0.406
    half = ["input.mean=[0.5, 0.5, 0.5]"]
    made, text = build.plan(load(path, half))
    assert (
        "input.mean is (0.5, 0.5, 0.5), and the weights of timm/deit_tiny_patch16_224 were trained with (0.485, 0.456, "
        "0.406)" in made.warnings[0]
    )
    assert "warning: input.mean is" in text
    assert made.data()["warnings"] == list(made.warnings)
    assert build.plan(load(path, ["input.std=[0.229, 0.224, 0.225]"]))[0].warnings == ()
    assert build.plan(load(path, [*half, "backbone.weights=none"]))[0].warnings == ()


def test_a_plan_says_that_a_file_of_weights_is_not_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = ROOT / "configs" / "flowers17" / "deit_tiny.yaml"
    assert "is not here" not in build.plan(load(path))[1]
    text = build.plan(load(path, ["backbone.weights=gone/a.safetensors"]))[1]
    assert "warning: gone/a.safetensors (backbone.weights) is not here" in " ".join(text.split())


def test_weights_of_a_run_were_trained_with_what_the_run_says(tmp_path):
    """Of a file that no run has written nothing is known."""

    def noticed(file, **said):
        raw = {"run": "r", "data": {"train": "t", "batch": 8}, "input": {"size": 32, **said}}
        config = parse({**raw, "backbone": {"name": "torchvision/resnet18", "weights": str(file)}})
        return build.other_input(config, backbone_of(config, 2, empty=True))

    own, other = tmp_path / "step-7" / "model.safetensors", tmp_path / "other.safetensors"
    own.parent.mkdir()
    for file in (own, other):
        save_file(resnet18(num_classes=2).state_dict(), file)
    state = {"identity": {"input": {"mean": [0.5, 0.5, 0.5], "std": [0.229, 0.224, 0.225]}}}
    (own.parent / "state.json").write_text(json.dumps(state))
    half, usual = [0.5, 0.5, 0.5], [0.485, 0.456, 0.406]
    assert noticed(own, mean=half) == []
    assert noticed(other, mean=half) == noticed(other, mean=usual) == noticed(other) == []
    (said,) = noticed(own)
    assert said.startswith(
        f"input.mean is (0.485, 0.456, 0.406), and the weights in {own} were trained with (0.5, 0.5,"
    )
    assert said.endswith("set it to [0.5, 0.5, 0.5]")


@pytest.mark.slow
def test_recipes_are_not_warned_of(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for path in CONFIGS:
        if "quickstart" not in path.parts:
            warnings = build.plan(load(path))[0].warnings
            assert [w for w in warnings if not w.startswith("BatchNorm statistics move")] == [], path


def test_the_plan_refuses_an_epoch_that_weighs_nothing(uneven, tmp_path, monkeypatch):
    """A weight above 0, for a class that has no samples."""
    loss = {"name": "cross_entropy", "class_weights": [0, 1]}
    asked = config(tmp_path, uneven / "train", objective=loss, input={"size": 16})
    build.plan(asked)
    monkeypatch.setattr(Manifest, "counts", lambda _: np.array([8, 0]))
    with pytest.raises(UserError, match="every class that an epoch shows weighs 0: few"):
        build.plan(asked)


class Loss:
    """An objective from elsewhere, with faults."""

    def __init__(self, fault, weights=None):
        self.fault, self.class_weights = fault, weights

    def loss(self, output, labels, mix):
        loss = torch.nn.functional.cross_entropy(output, labels, reduction="mean" if self.fault == "mean" else "sum")
        if self.fault == "raises":
            raise IndexError("no such class")
        return {"float": loss.item(), "each": output.sum(1), "nan": loss * float("nan"), "cut": loss.detach()}.get(
            self.fault, loss
        )

    def evaluation_loss(self, logits, labels):
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none" if self.fault == "each_of" else "sum")


def lossy(counts, *, fault: str = "", weights: list[float] | None = None):
    return Loss(fault, weights) if fault != "nothing" else None


def no_optimizer(groups):
    return None


def half_optimizer(groups):
    return torch.optim.SGD(groups[:1], lr=0.0)


def nameless_optimizer(groups):
    return torch.optim.SGD([{"params": g["params"]} for g in groups], lr=0.0)


def no_transform(input):
    return 3


def float_transform(input):
    return lambda image: image.float()


def no_head(features: int, classes: int):
    return None


def wide_head(features: int, classes: int):
    return torch.nn.Linear(features, classes + 1)


def broken_part(*given):
    raise KeyError("oh")


def no_backbone(classes: int):
    return "net"


def wide_backbone(classes: int):
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())


if TYPE_CHECKING:
    from somewhere import Width


def sparse_head(features: int, classes: int, *, width: Width = 4):
    return torch.nn.Linear(features, classes)


def test_a_part_from_elsewhere_whose_arguments_cannot_be_checked_is_told(tmp_path):
    expected = {"expected": {"classes": 3, "train": 24}}
    said = {"data": expected, "input": {"size": 16}}
    text = build.plan(
        config(tmp_path, tmp_path / "later", head={"name": "test_build:sparse_head", "width": "x"}, **said)
    )[1]
    assert (
        "warning: the arguments of head test_build:sparse_head are not checked: name 'Width' is not defined"
        in " ".join(text.split())
    )
    assert "not checked" not in build.plan(config(tmp_path, tmp_path / "later", **said))[1]


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"objective": {"name": "test_build:lossy"}}, None),
        (
            {"objective": {"name": "test_build:lossy", "fault": "nothing"}},
            "objective test_build:lossy returned NoneType, wh",
        ),
        (
            {"objective": {"name": "test_build:lossy", "fault": "mean"}},
            "test_build:lossy: loss is the same for .* a mean",
        ),
        ({"objective": {"name": "test_build:lossy", "fault": "float"}}, "lossy: loss returned float.*a scalar tensor"),
        ({"objective": {"name": "test_build:lossy", "fault": "each"}}, r"lossy: loss returned Tensor of shape \(4,\)"),
        ({"objective": {"name": "test_build:lossy", "fault": "nan"}}, "lossy: loss is nan for logits"),
        ({"objective": {"name": "test_build:lossy", "fault": "cut"}}, "lossy: loss does not depend on the network"),
        ({"objective": {"name": "test_build:lossy", "fault": "each_of"}}, r"evaluation_loss returned Tensor of shape"),
        ({"objective": {"name": "test_build:lossy", "fault": "raises"}}, r"IndexError: no such class \(test_build.py"),
        ({"objective": {"name": "test_build:lossy", "weights": [1, 1]}}, "lossy has 2 class weights for 3 classes"),
        ({"objective": {"name": "test_build:lossy", "weights": [1, -1, 1]}}, "lossy has a class weight of -1.0"),
        ({"objective": {"name": "test_build:lossy", "weights": [0, 0, 0]}}, "lossy has only class weights of 0"),
        ({"optimizer": "test_build:no_optimizer"}, "optimizer test_build:no_optimizer returned NoneType"),
        ({"optimizer": "test_build:half_optimizer"}, "half_optimizer has 1 parameters in its groups, and was given 11"),
        (
            {"optimizer": "test_build:nameless_optimizer"},
            "nameless_optimizer has parameter groups without names and layer",
        ),
        (
            {"optimizer": "test_build:broken_part"},
            r"optimizer test_build:broken_part fails: KeyError: 'oh' \(test_build",
        ),
        ({"transforms": ["test_build:no_transform"]}, "test_build:no_transform returned int"),
        ({"transforms": ["random_resized_crop", "test_build:float_transform"]}, "3 x 16 x 16 torch.float32"),
        ({"transforms": ["test_build:broken_part"]}, r"transforms\.0: test_build:broken_part fails: KeyError: 'oh'"),
        ({"head": "test_build:no_head"}, "head test_build:no_head returned NoneType"),
        ({"head": "test_build:wide_head"}, "head test_build:wide_head gives .* instead of 3 outputs"),
        ({"head": "test_build:broken_part"}, "head test_build:broken_part fails: KeyError: 'oh'"),
        ({"backbone": {"name": "test_build:no_backbone"}}, "the function returned str"),
        ({"backbone": {"name": "test_build:broken_part"}}, "backbone test_build:broken_part fails: KeyError: 'oh'"),
        ({"backbone": {"name": "test_build:wide_backbone"}}, "test_build:wide_backbone"),
    ],
    ids=str,
)
def test_a_part_from_elsewhere_that_gives_the_wrong_thing_is_named(tmp_path, over, message):
    expected = {"expected": {"classes": 3, "train": 24}}
    asked = config(tmp_path, tmp_path / "later", data=expected, input={"size": 16}, **over)
    if message is None:
        build.plan(asked)
        return
    with pytest.raises(UserError, match=f"(?s){message}"):
        build.plan(asked)


def test_a_tracker_without_its_methods_is_named(tmp_path):
    from tlx.plan.parts import Part
    from tlx.train.components import tracker_of

    with pytest.raises(
        UserError, match="tracker test_build:no_transform returned int, which has no method log and no fin"
    ):
        tracker_of(Part(name="test_build:no_transform"), None)
    with pytest.raises(KeyError):  # courtesy: the guard around a tracker says it, and training goes on
        tracker_of(Part(name="test_build:broken_part"), None)


def test_the_catalogue_is_readable():
    from tlx.models.model_summary import portrait
    from tlx.models.model_table import listing

    listed = listing("resnet1*")
    assert "torchvision/resnet18" in listed
    assert "11,689,512" in listed
    shown = portrait("timm/vit_tiny_patch16_224")
    facts = ("5,717,416", "2.51 GFLOP", "25 LayerNorm", "224 x 224, bicubic, crop 0.9", "head (head)", "drop_path_rate")
    for expected in (*facts, "4 layers by stage, 3 depths", "15 layers by block, 14 depths", "15 layers by module"):
        assert expected in shown
    block = next(line.split() for line in shown.splitlines() if "blocks.11" in line)
    assert block[:8] == ["12", "blocks.11", "444,864", "197", "x", "192", "8.1%", block[7]]
    assert set(block[7]) == {"\u2588"}
    shares = [line.split("%")[0].split()[-1] for line in portrait("timm/coat_lite_tiny").splitlines() if "%" in line]
    assert sum(map(float, shares)) == pytest.approx(300, abs=1.5)  # modules that layers share are counted once
    with pytest.raises(UserError, match="no backbone matches"):
        listing("zzz*")
