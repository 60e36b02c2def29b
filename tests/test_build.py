"""From configurations to trainings: every recipe plans, and what does not fit together is said before anything runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from images import make_folder, make_shards

from tlx import build, feed
from tlx.config import load, parse
from tlx.data.write import BuildOptions, build_shards
from tlx.errors import UserError

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(ROOT.glob("configs/**/*.yaml"))


def plan_of(name, monkeypatch, *overrides):
    monkeypatch.chdir(ROOT)
    return build.plan(load(ROOT / "configs" / name, overrides))


@pytest.mark.parametrize("path", [p for p in CONFIGS if "quickstart" not in p.parts], ids=lambda p: p.stem)
def test_every_recipe_plans_without_data_weights_or_gpu(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
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


def test_one_class_is_refused(tmp_path):
    folder = make_folder(tmp_path / "pictures" / "train", classes=1, per_class=3, size=16).parent
    with pytest.raises(UserError, match="needs two classes or more; here: class0"):
        build_shards(str(folder), tmp_path / "one", BuildOptions(val=0.0, jobs=0))
    shards = make_shards(tmp_path / "two", classes=2, per_class={"train": 2}, size=16)
    index = shards / "train" / "index.json"
    header = json.loads(index.read_text())
    index.write_text(json.dumps({**header, "classes": ["only"]}))
    with pytest.raises(UserError, match="class"):
        feed.open_sets(config(tmp_path, shards / "train"))


def test_optimizer_groups_cover_every_parameter_once_and_spare_the_excluded_from_decay():
    from tlx import models
    from tlx.optim import adamw, parameter_groups

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

    from tlx.plan import Plan

    asked = config(tmp_path, "x", "y", **over)
    with pytest.raises(UserError, match=message):
        build.check_metrics(asked, Plan.make(asked, resnet_like(), samples=40), 3, validated=True)
    patient = config(tmp_path, "x", evaluate={"patience": 3})
    with pytest.raises(UserError, match="needs validation data"):
        build.check_metrics(patient, Plan.make(patient, resnet_like(), samples=40), 3, validated=False)


def test_the_catalogue_is_readable():
    from tlx.catalogue import listing
    from tlx.portrait import portrait

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
