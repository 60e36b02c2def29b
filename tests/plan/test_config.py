"""The configuration: closed, typed, all mistakes at once, and written back whole."""

from __future__ import annotations

import pytest
from places import ROOT

from tlx.base.errors import ConfigError, UserError
from tlx.plan.config import dump, load, parse
from tlx.plan.reference import reference

GOOD = """
run: runs/x
data: {train: shards/train, val: shards/val, batch: 32}
backbone: {name: torchvision/resnet18, weights: none}
head: {name: mlp, hidden: [256], dropout: 0.4}
transforms: [{name: random_resized_crop, scale: [0.8, 1]}, horizontal_flip]
unfreeze: {name: gradual, every: 2ep}
phases: {each: {lr: 1e-3, curve: {name: step, every: 7ep}, warmup: 5%}}
objective: {name: cross_entropy, label_smoothing: 0.1}
"""


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    return path


def test_a_configuration_is_read_and_written_back_whole(good, tmp_path):
    config = load(good, ["data.batch=64", "phases.each.lr=1e-4", "head.dropout=0.2"])
    assert (config.data.batch, config.settings("any").lr, config.head.args["dropout"]) == (64, 1e-4, 0.2)
    again = tmp_path / "again.yaml"
    again.write_text(dump(config))
    assert dump(load(again)) == dump(config)
    assert "momentum" in dump(load(good, ["optimizer=sgd"]))  # defaults of parts are said too


def test_all_mistakes_are_told_at_once(good):
    wrong = [
        "data.bach=3",
        "loop.precision=fp61",
        "head.hiden=[3]",
        "optimizer=adamm",
        "phases.each.curve={name: step, evry: 3}",
        "backbone.name=timm/resnet51",
        "seed=-1",
        "transforms=[horizontal_flop]",
        "phases.each.norm=frozen",
        "unfreeze={name: gradual, every: 3 weeks}",
        "phases.each.duraton=3ep",
    ]
    with pytest.raises(ConfigError) as caught:
        load(good, wrong)
    text = str(caught.value)
    for expected in (
        'data.bach: unknown key; did you mean "batch" or "cache"?',
        "loop.precision: input should be 'fp32', 'bf16' or 'fp16' (given: 'fp61')",
        'did you mean "hidden"?',
        'there is no optimizer "adamm"; did you mean "adam',
        'did you mean "every"?',
        "seed: input should be greater than or equal to 0",
        'there is no transform "horizontal_flop"; did you mean "horizontal_flip"',
        'there is no norm policy "frozen"; choose from frozen_is_frozen, statistics_move,',
        "'3 weeks' is not a length",
        'duraton: unknown key; did you mean "duration"?',
    ):
        assert expected in text, f"{expected!r} is not in\n{text}"
    assert 'backbone.name: there is no backbone "timm/resnet51"; did you mean "timm/resnet' in text
    assert len(caught.value.problems) >= 11


def test_arguments_that_only_a_library_knows_are_checked_once_all_else_is_right(good):
    argument = "backbone.args={drop_path: 0.1}"
    with pytest.raises(ConfigError) as caught:
        load(good, [argument, "sed=1"])
    assert caught.value.problems == ('sed: unknown key; did you mean "seed"?',)
    with pytest.raises(ConfigError, match="drop_path"):
        load(good, [argument])


def test_the_reference_names_every_key_as_it_is():
    page = ROOT / "configs" / "REFERENCE.md"
    assert page.read_text() == reference(), "python -m tlx.plan.reference > configs/REFERENCE.md"


def test_a_direction_is_that_of_the_metric_by_which_the_task_chooses(good):
    assert load(good, ["evaluate.mode=max"]).evaluate.metric == "val/top1"
    for words, told in (
        (["evaluate.mode=min"], "val/top1 is better when it is higher"),
        (["evaluate.mode=max", "task=regression"], "val/mae is better when it is lower"),
    ):
        with pytest.raises(ConfigError, match=f"evaluate.mode: {told}"):
            load(good, words)


def test_missing_keys_and_files(tmp_path, good):
    with pytest.raises(ConfigError, match="data: missing"):
        parse({"run": "x", "backbone": {"name": "toys:small"}})
    with pytest.raises(UserError, match=r'did you mean "good\.yaml"'):
        load(tmp_path / "godo.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(UserError, match="not a mapping"):
        load(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(UserError, match="is not YAML"):
        load(tmp_path / "broken.yaml")
    with pytest.raises(UserError, match="key=value"):
        load(good, ["data.batch"])


def test_the_quota_of_bad_samples(good):
    assert load(good).data.quota(1000) == 0
    assert load(good, ["data.bad_samples=1.5%"]).data.quota(1000) == 15
    assert load(good, ["data.bad_samples=7"]).data.quota(1000) == 7


BEYOND = """
phases.each.lr: .inf
phases.each.lr: 0
phases.each.duration: {max: 3ep, min_delta: .nan}
phases.each.curve: {name: cosine, final: -0.1}
phases.each.curve: {name: cosine, final: inf}
phases.each.curve: {name: linear, final: .nan}
phases.each.curve: {name: step, every: 1ep, gamma: 0}
phases.each.curve: {name: multi_step, at: [50%], gamma: -1}
phases.each.curve: {name: multi_step, at: []}
phases.each.curve: {name: one_cycle, rise: 1.5}
phases.each.curve: {name: one_cycle, start: -1}
phases.each.curve: {name: one_cycle, final: 2}
phases.each.layer_decay: {name: table, rates: {head: -0.1}}
phases.each.layer_decay: {name: table, rates: {head: .nan}}
phases.each.layer_decay: {name: table, rates: {}, rest: -1}
phases.each.layer_decay: {name: groups, body: -1/3}
phases.each.layer_decay: {name: groups, body: inf}
phases.each.layer_decay: {name: exponential, factor: 1.5}
phases.each.layer_decay: {name: linear, ratio: 2}
loop.clip: .inf
loop.clip: 0
loop.ema: {decay: 1}
loop.ema: {decay: .nan}
mix: {mixup: .inf}
mix: {cutmix: -1}
mix: {mixup: 1, prob: 1.5}
input.mean: [123.7, 116.3, 103.5]
input.std: [0, 0.2, 0.2]
input.std: [.nan, 0.2, 0.2]
input.crop_pct: .nan
input.size: 100000
data.bad_samples: 200%
data.sampling: {method: repeat_factors, threshold: .nan}
world.timeout_minutes: .inf
optimizer: {name: adamw, betas: [2, 3]}
optimizer: {name: adam, betas: [0.9, 1]}
optimizer: {name: adamw, eps: 0}
optimizer: {name: adamw, eps: -1e-8}
optimizer: {name: adamw, weight_decay: .inf}
optimizer: {name: sgd, momentum: 1.5}
optimizer: {name: sgd, momentum: -0.9}
optimizer: {name: rmsprop, alpha: 2}
optimizer: {name: rmsprop, eps: .nan}
objective: {name: cross_entropy, label_smoothing: 1}
objective: {name: cross_entropy, aux_weight: -1}
objective: {name: cross_entropy, aux_weight: .inf}
objective: {name: cross_entropy, class_weights: [1, -1]}
objective: {name: cross_entropy, class_weights: [1, .inf]}
head: {name: mlp, dropout: 1}
head: {name: mlp, hidden: [0]}
head: {name: cosine, scale: .inf}
head: {name: attention_pool, mlp_ratio: 0}
backbone.args: {zero_init_residual: .nan}
transforms: [{name: random_resized_crop, scale: [0.9, 0.1]}]
transforms: [{name: random_resized_crop, scale: [0.5, 1.5]}]
transforms: [{name: random_resized_crop, ratio: [0, 1]}]
transforms: [{name: random_resized_crop, size: 0}]
transforms: [{name: horizontal_flip, p: 2}]
transforms: [{name: random_erasing, p: -1}]
transforms: [{name: random_erasing, fill: 300}]
transforms: [{name: random_crop, padding: -1}]
transforms: [{name: rotation, degrees: .inf}]
transforms: [{name: affine, translate: [2, 0]}]
transforms: [{name: affine, scale: [2, 1]}]
transforms: [{name: perspective, distortion_scale: 3}]
transforms: [{name: color_jitter, brightness: -1}]
transforms: [{name: color_jitter, hue: 0.7}]
transforms: [{name: rand_augment, num_magnitude_bins: 1}]
transforms: [{name: rand_augment, num_ops: 0}]
transforms: [{name: augmix, severity: 11}]
transforms: [{name: augmix, alpha: 0}]
transforms: [{name: gaussian_blur, sigma: [2, 1]}]
transforms: [{name: gaussian_blur, sigma: [0, 1]}]
""".strip().splitlines()


@pytest.mark.parametrize("line", BEYOND)
def test_numbers_are_finite_and_in_range(good, line):
    key, _, value = line.partition(": ")
    with pytest.raises(ConfigError) as caught:
        load(good, [f"{key}={value}"])
    places = [problem.partition(": ")[0] for problem in caught.value.problems]
    assert len(set(places)) == len(places), caught.value.problems  # one for each value that is wrong
    assert all(problem.startswith(key.split(".")[0]) for problem in caught.value.problems)


def test_numbers_at_the_ends_of_their_ranges_are_fine(good):
    for line in (
        "phases.each.curve={name: one_cycle, rise: 0, start: 0, final: 1}",
        "phases.each.curve={name: linear, final: 10}",
        "phases.each.layer_decay={name: table, rates: {head: 0, layer4: 3}}",
        "optimizer={name: adam, betas: [0, 0.5], eps: 1}",
        "optimizer={name: sgd, momentum: 0}",
        "objective={name: cross_entropy, class_weights: [0, 1/3], aux_weight: 0}",
        "transforms=[{name: random_erasing, scale: [0, 1], p: 1, fill: 255}]",
        "data.bad_samples=100%",
        "input.std=[1, 1, 1]",
    ):
        load(good, [line])


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/**/*.yaml")), ids=str)
def test_every_config_loads(path):
    load(path)
