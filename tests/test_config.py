"""The configuration: closed, typed, all mistakes at once, and written back whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from tlx.config import dump, load, parse
from tlx.errors import ConfigError, UserError

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


def test_an_override_may_open_a_part_written_by_its_name(good):
    assert load(good, ["optimizer=sgd", "optimizer.momentum=0.5"]).optimizer.args["momentum"] == 0.5


def test_all_mistakes_are_told_at_once(good):
    wrong = [
        "data.bach=3",
        "loop.precision=fp61",
        "head.hiden=[3]",
        "optimizer=adamm",
        "phases.each.curve={name: step, evry: 3}",
        "backbone.args={drop_path: 0.1}",
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
        "backbone",
        "seed: input should be greater than or equal to 0",
        'there is no transform "horizontal_flop"; did you mean "horizontal_flip"',
        'there is no norm policy "frozen"; choose from frozen_is_frozen, statistics_move,',
        "'3 weeks' is not a length",
        'duraton: unknown key; did you mean "duration"?',
    ):
        assert expected in text, f"{expected!r} is not in\n{text}"
    assert len(caught.value.problems) >= 11


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


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[1].glob("configs/**/*.yaml")), ids=str)
def test_every_config_loads(path):
    load(path)
