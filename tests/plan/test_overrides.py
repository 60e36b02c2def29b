"""`key=value` words over a configuration with its defaults, and the answers to names that other codes have."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from tlx.base.errors import ConfigError, UserError
from tlx.base.key_aliases import USUAL
from tlx.cli.main import app
from tlx.plan.config import load, parse, plain

BASE = """
run: runs/x
data: {train: shards/train, val: shards/val, batch: 32}
backbone: {name: toys:small, weights: none}
transforms: [{name: random_resized_crop, scale: [0.8, 1]}, horizontal_flip]
unfreeze: {name: gradual, every: 2ep}
phases:
  each: {lr: 1e-3, curve: {name: step, every: 7ep}, norm: statistics_move}
  from_features.1.0: {lr: 1e-4}
checkpoint: {keep: 5}
loop: {nonfinite: skip}
track: {trackers: [wandb, {name: tensorboard, folder: tb}]}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(BASE)
    return path


def at(config, key):
    node = plain(config)
    for step in key.split("/"):
        node = node[int(step) if isinstance(node, list) else step]
    return node


# The file leaves optimizer, head and objective at their defaults, adamw, linear and cross_entropy.
@pytest.mark.parametrize(
    ("word", "where", "value"),
    [
        ("optimizer.weight_decay=0.05", "optimizer", {"name": "adamw", "betas": [0.9, 0.999], "weight_decay": 0.05}),
        ("optimizer.betas.1=0.99", "optimizer", {"name": "adamw", "betas": [0.9, 0.99], "weight_decay": 0.01}),
        ("head.dropout=0.2", "head", {"name": "linear", "dropout": 0.2}),
        ("objective.label_smoothing=0.1", "objective/label_smoothing", 0.1),
        ("objective.label_smoothing=1e-1", "objective/label_smoothing", 0.1),
        ("mix.mixup=0.2", "mix", {"mixup": 0.2, "cutmix": 0.0, "prob": 1.0, "switch_prob": 0.5}),
        ("loop.ema.decay=0.99", "loop/ema", {"decay": 0.99, "ramp": True}),
        ("checkpoint.keep.best=2", "checkpoint/keep", {"last": 5, "best": 2, "every": None}),
        ("loop.nonfinite.limit=3", "loop/nonfinite", {"policy": "skip", "limit": 3, "overflows": 20}),
        ("track.trackers.0.project=x", "track/trackers/0/project", "x"),
        ("track.trackers.wandb.project=x", "track/trackers/0/project", "x"),
        ("track.trackers.tensorboard.folder=y", "track/trackers/1", {"name": "tensorboard", "folder": "y"}),
        ("transforms.0.scale.0=0.5", "transforms/0/scale", [0.5, 1]),
        ("transforms.horizontal_flip.p=0.1", "transforms/1", {"name": "horizontal_flip", "p": 0.1}),
        ("no_decay.0=norm", "no_decay", ["norm", "norm", "embedding", "scale"]),
        ("unfreeze.every=3ep", "unfreeze/every", "3ep"),
        ("phases.each.curve.gamma=0.5", "phases/each/curve", {"name": "step", "every": "7ep", "gamma": 0.5}),
        ("phases.each.layer_decay.name=exponential", "phases/each/layer_decay/factor", 0.75),
        # what a phase does not say is that of `each`
        ("phases.head.curve.gamma=0.5", "phases/head/curve", {"name": "step", "every": "7ep", "gamma": 0.5}),
        # a policy's name opens, also the one that a phase has from `each`, or by default
        (
            "phases.head.norm.trained.affine=frozen",
            "phases/head/norm",
            {
                "frozen": {"statistics": "moving", "affine": "frozen"},
                "trained": {"statistics": "moving", "affine": "frozen"},
            },
        ),
        ("phases.each.norm.frozen.statistics=fixed", "phases/each/norm/trained", {"statistics": "moving"}),
        # names of phases hold dots
        ("phases.from_features.1.0.lr=0.5", "phases/from_features.1.0", {"lr": 0.5}),
        ("phases.from_features.0.0.lr=0.5", "phases/from_features.0.0", {"lr": 0.5}),
    ],
)
def test_one_thing_is_set_and_the_rest_stays(file, word, where, value):
    before, found = plain(load(file)), at(load(file, [word]), where)
    assert {k: found[k] for k in value} == value if isinstance(value, dict) else found == value
    top = word.partition(".")[0]
    assert {k: v for k, v in plain(load(file, [word])).items() if k != top} == {
        k: v for k, v in before.items() if k != top
    }


def test_words_act_in_their_order(file):
    config = load(file, ["optimizer=sgd", "optimizer.momentum=0.5", "seed=1", "seed=2"])
    assert (config.optimizer.name, config.optimizer.args["momentum"], config.seed) == ("sgd", 0.5, 2)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (
            "track.trackers.wand.project=x",
            r'no element "wand"; did you mean "wandb"\?\n.*0 \(wandb\), 1 \(tensorboard\)',
        ),
        ("track.trackers.2.project=x", r'no element "2"\n.*0 \(wandb\), 1 \(tensorboard\)'),
        ("data.train.x=3", "data.train is shards/train, which has no keys below it"),
        ("phases.each.curve.every.x=3", "phases.each.curve.every is 7ep, which has no keys"),
        ("further.more.curve.final=0.1", r"what the phase before it has.*\n.*further.more.curve=\{name: \.\.\., final"),
        ("further.more.norm.trained.affine=frozen", r"\n.*say all of it: further.more.norm=\{trained: "),
        ("data..batch=3", "is not an override"),
        ("data.batch=[1", r"not YAML: line 1, column 3: expected ',' or '\]'.*\n.*in quotes of its own"),
        ("head={name: mlp, name: linear}", 'the key "name" was said in line 1 already'),
    ],
)
def test_what_cannot_be_set_says_why(file, word, said):
    with pytest.raises(UserError, match=said):
        load(file, [word])
    with pytest.raises(ConfigError, match="2 mistakes"):
        load(file, [word, "nonsense"])


def test_words_that_cannot_be_set_and_mistakes_of_the_file_are_one_report(file):
    file.write_text(BASE.replace("batch: 32", "batch: none") + "sed: 1\n")
    with pytest.raises(ConfigError) as caught:
        load(file, ["nonsense", "head.dropout=2", "data.val.x=1"])
    assert str(caught.value).startswith(f"{file}: 5 mistakes in the configuration\n")
    assert [problem[:24] for problem in caught.value.problems] == [
        '"nonsense" is not an ove', "data.val is shards/val, ", "data.batch: input should", "head.dropout: input shou",
        'sed: unknown key; did yo',
    ]  # fmt: skip


def test_an_element_of_an_empty_list_or_of_two_of_a_name(file):
    with pytest.raises(UserError, match="it is empty: write the whole list"):
        load(file, ["track.trackers=[]", "track.trackers.0.project=x"])
    with pytest.raises(UserError, match=r"more than one wandb\n.*0 \(wandb\), 1 \(wandb\)"):
        load(file, ["track.trackers=[wandb, wandb]", "track.trackers.wandb.project=x"])


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("lr=0.1", "phases.each.lr"),
        ("learning-rate=0.1", "phases.each.lr"),
        ("optimizer.lr=0.1", "phases.each.lr"),
        ("epochs=20", "duration=20ep"),
        ("batch_size=8", "data.batch"),
        ("data.batch_size=8", "data.batch"),
        ("batch=8", 'data.batch" or "evaluate.batch'),
        ("micro_batch=8", "loop.micro_batch"),
        ("weight_decay=0", "optimizer.weight_decay"),
        ("model=resnet50", "backbone.name"),
        ("num_workers=2", "data.workers"),
        ("output_dir=x", "run"),
        ("warmup=1ep", "phases.each.warmup"),
    ],
)
def test_names_of_other_codes_are_answered_with_the_key(file, word, key):
    with pytest.raises(ConfigError) as caught:
        load(file, [word])
    (problem,) = caught.value.problems
    assert problem.startswith(f"{word.partition('=')[0]}: ")
    assert problem.endswith(f'; did you mean "{key}"?')


def test_every_answer_is_a_key(file):
    """Set to nonsense, it is refused for its value; a key that is none would be unknown."""
    known = {key.partition("=")[0] for key in USUAL.values()} - {"optimizer.momentum", "backbone.args.drop_path_rate"}
    with pytest.raises(ConfigError) as caught:
        load(file, [f"{key}={{q: q}}" for key in sorted(known, key=len, reverse=True)])
    assert not [p for p in caught.value.problems if "unknown key" in p and not p.partition(":")[0].endswith(".q")]


# -- mistakes keep their place


@pytest.mark.parametrize(
    ("word", "problems"),
    [
        ("optimizer.betas.1=2", ["optimizer.betas.1: input should be less than 1 (given: 2)"]),
        ("phases.each.duration=3 weeks", ["phases.each.duration: '3 weeks' is not a length; write \"16ep\""]),
        (
            "phases.each.duration={max: 3x, patiance: 2}",
            [
                "phases.each.duration.max: '3x' is not a length",
                'phases.each.duration.patiance: unknown key; did you mean "pat',
            ],
        ),
        ("phases.each.duration={patience: 2}", ["phases.each.duration.max: missing"]),
        ("phases.lr=0.1", ["phases.lr: input should be a mapping of keys to values (given: 0.1)"]),
        ("data.bad_samples=200%", ["data.bad_samples: '200%' is no quota; write error, a number"]),
        (
            "input.size=abc",
            ["input.size: input should be a valid integer, unable to parse string as an integer, or a list"],
        ),
        ("input.size=[1, x]", ["input.size.1: input should be a valid integer"]),
        ("objective.class_weights=x", ["objective.class_weights: "]),
        ("run=2024", ['run: input should be text (given: 2024); write "2024" in quotes']),
        ("seed=2001-99-99", ["seed: input should be a valid integer"]),
        ("seed=true", ["seed: input should be a number, not true or false (given: True)"]),
        ("optimizer.weight_decay=true", ["optimizer.weight_decay: input should be a number, not true or false"]),
        ("head=[x]", ["head: input should be a name, or a mapping of name and arguments"]),
        ("phases.each.norm=3", ["phases.each.norm: input should be text, or a mapping of keys to values (given: 3)"]),
        ("phases.each.norm={frozen: x}", ["phases.each.norm.frozen: ", "phases.each.norm.trained: missing"]),
        ("stop_after=12:30", ["stop_after: '12:30' is not a time"]),
        ("backbone=18", ["backbone: input should be a mapping of keys to values (given: 18)"]),
        ("head=nope", ['head: there is no head "nope"; choose from attention_pool']),
        ("transforms.1=flip", ['transforms.1: there is no transform "flip"']),
        ("backbone.args={width: x}", ["backbone.args."]),
        (
            "mix={mixup: -1, cutmix: x}",
            ["mix.mixup: input should be greater", "mix.cutmix: input should be a valid number"],
        ),
        ("data.sampling.limit=-1", ["data.sampling: "]),
    ],
)
def test_one_mistake_is_one_problem_at_its_place(file, word, problems):
    with pytest.raises(ConfigError) as caught:
        load(file, [word])
    assert len(caught.value.problems) == len(problems), caught.value.problems
    for problem, said in zip(caught.value.problems, problems, strict=True):
        assert problem.startswith(said)
        assert not re.search(r"Plateau|PhaseSettings|BackboneConfig|Duration|pathlib|function-|instance of", problem)


def test_no_remedy_is_lost(file):
    with pytest.raises(ConfigError, match=r"backbone.name: several.*write torchvision/resnet50 or timm/resnet50"):
        load(file, ["backbone.name=resnet50"])
    with pytest.raises(ConfigError, match=r"curve: there is no curve.*entry point of an installed package"):
        load(file, ["phases.each.curve=cosinus"])


# -- words as sweep agents pass them


def folder(*words):
    return CliRunner().invoke(app, ["status", *map(str, words), "--folder"])


def test_options_named_after_keys_are_changes(file):
    assert folder(file, "--run=runs/a #3").stdout == "runs/a #3\n"
    assert folder(file, "--seed=1", "--optimizer.weight_decay=0.1", "--phases.each.lr=1e-3", "run=y").stdout == "y\n"
    assert "seed: input should be a valid integer" in str(folder(file, "--seed=x").exception)
    assert 'lr: unknown key; did you mean "phases.each.lr"?' in str(folder(file, "--lr=0.1").exception)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "FILE", "--fersh"], 'there is no option --fersh; did you mean "--fresh"'),
        (["train", "FILE", "--fersh=1"], 'there is no option --fersh; did you mean "--fresh"'),
        (["plan", "FILE", "--writ"], 'did you mean "--write"?'),
        (["submit", "FILE", "--gpu=x"], 'there is no option --gpu; did you mean "--gpus"'),
        (["plan", "FILE", "--sead=1"], 'there is no option --sead; did you mean "seed" or "head"?'),
        (["status", "FILE", "--seed", "1"], "--seed has no value\n  -> write it into the same word: seed=value"),
        (["status", "FILE", "-x"], "there is no option -x"),
        (["train", "--seed=1", "FILE"], "there is no option --seed=1\n  -> the configuration comes first"),
        (["bench", "train", "FILE", "--step=3"], 'did you mean "--steps"?'),
        (["doctor", "FILE", "--quik"], 'did you mean "--quick"?'),
    ],
)
def test_a_typo_of_an_option_is_never_silent(file, words, said):
    refused = CliRunner().invoke(app, [str(file) if word == "FILE" else word for word in words])
    assert isinstance(refused.exception, UserError), refused.output
    assert said in str(refused.exception)


# -- what earlier versions wrote


def test_numbers_that_an_earlier_tlx_kept_as_text_are_the_same_setting(file):
    """YAML 1.1 takes 1e-3 for a text, which was written down as one; a run that has it goes on."""
    from tlx.plan.saved_config import changes, essential

    config = load(file, ["optimizer.weight_decay=1e-3", "objective.label_smoothing=0.1"])
    then = essential(plain(config)) | {"optimizer.weight_decay": "1e-3"}
    assert changes(then, config) == []
    assert changes(then | {"optimizer.weight_decay": "2e-3"}, config) == ["optimizer.weight_decay: 0.002 -> 0.001"]
    assert plain(parse(plain(config))) == plain(config)


@pytest.mark.parametrize("said", ["yes", "on", "true", "True"])
def test_a_truth_may_be_said_as_in_earlier_files(file, said):
    assert load(file, [f"loop.compile={said}"]).loop.compile is True
