"""Configurations from strangers: a clean error or a configuration; no code run, no blow-up."""

from __future__ import annotations

import random

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import BOMB, apart, changed, mutated, odd, outcomes

from tlx.base.errors import ConfigError, UserError
from tlx.plan.config import dump, load, parse

GOOD = """
run: runs/x
seed: 3
duration: 20ep
stop_after: 3h55m
data: {train: shards/train, val: shards/val, batch: 32, bad_samples: 1%, cache: {folder: /tmp/x, limit: 20GB},
  sampling: {method: repeat_factors, threshold: 0.01}, expected: {classes: 3, train: 100, val: 10}}
input: {size: [64, 64], mean: [0.5, 0.5, 0.5], std: [0.2, 0.2, 0.2], crop_pct: 0.9}
mix: {mixup: 0.2, cutmix: 1.0}
backbone: {name: torchvision/resnet18, weights: none, args: {}}
head: {name: mlp, hidden: [256], dropout: 0.4}
transforms: [{name: random_resized_crop, scale: [0.8, 1]}, horizontal_flip]
unfreeze: {name: gradual, every: 2ep}
phases:
  each: &each {lr: 1e-3, curve: {name: step, every: 7ep}, warmup: 5%, layer_decay: {name: exponential, factor: 1/3}}
  head: {<<: *each, duration: {max: 10ep, metric: val/loss, patience: 2}}
objective: {name: cross_entropy, label_smoothing: 0.1}
optimizer: {name: adamw, weight_decay: 0.05}
loop: {micro_batch: 8, clip: 1.0, nonfinite: skip, ema: {decay: 0.99}}
evaluate: {every: 1ep, patience: 3}
checkpoint: {every: 500, keep: {last: 2, best: 1, every: 10ep}}
track: {every: 10, trackers: []}
world: {size: 2, timeout_minutes: 5}
"""
RAW = yaml.safe_load(GOOD)
MANY = [80, pytest.param(800, marks=pytest.mark.slow)]

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.dates(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=4),
    max_leaves=12,
)
keys = st.sampled_from(
    [*RAW, "data.batch", "phases.each.lr", "backbone.args.x", "head.name", "data.cache.limit", "a..b"]
)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "c.yaml"


def read(config):
    """As `tlx train` does: what is read is also written down."""
    return dump(config)


@pytest.fixture(scope="module", autouse=True)
def imported():
    """Libraries come before the limit on memory, which they would exceed."""
    read(parse(RAW))


def kept(seen, least):
    print(dict(seen))
    assert min(seen["fine"], seen["refused"]) >= least, f"the cases tell little: {seen}"


@pytest.mark.parametrize("count", MANY)
def test_damaged_files(file, count):
    def try_all():
        rng = random.Random(1)

        def one(data):
            file.write_bytes(data)
            read(load(file))

        return outcomes((mutated(rng, GOOD.encode()) for _ in range(count)), one)

    kept(apart(try_all, seconds=600), 1)


@pytest.mark.parametrize("count", MANY)
def test_values_of_other_kinds(file, count):
    def try_all():
        rng = random.Random(2)

        def one(raw):
            file.write_text(yaml.safe_dump(raw))
            read(load(file))

        return outcomes((changed(rng, RAW) for _ in range(count)), one)

    kept(apart(try_all, seconds=600), 1)


@pytest.mark.parametrize("count", MANY)
def test_odd_overrides(file, count):
    file.write_text(GOOD)

    def try_all():
        rng = random.Random(3)
        names = [*RAW, "data.batch", "data.train", "phases.each.lr", "backbone.args.x", "run.a.b", "", ".", "a" * 5000]

        def one(_):
            key, value = rng.choice(names), odd(rng)
            text = rng.choice((str, repr, yaml.safe_dump))(value) if value != 10**400 else "9" * 400
            return f"{key}{rng.choice(('=', '=', '=', '', '=='))}{text}"

        return outcomes((one(i) for i in range(count)), lambda said: read(load(file, [said])))

    kept(apart(try_all, seconds=600), 1)


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda t: t.encode("utf-8", "surrogatepass")))
@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_anything_as_a_file(file, data):
    file.write_bytes(data)
    with pytest.raises(UserError):
        load(file)


@given(st.dictionaries(st.sampled_from([*RAW]) | st.text(max_size=5), plain, max_size=5))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_anything_in_a_mapping(raw):
    outcomes([RAW | raw], lambda raw: read(parse(raw)))


@given(keys, st.text(max_size=30))
@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_anything_as_an_override(file, key, text):
    file.write_text(GOOD)
    outcomes([f"{key}={text}"], lambda said: read(load(file, [said])))


BAD = {
    "the billion laughs": BOMB,
    "the billion laughs in a part": BOMB + GOOD.replace("args: {}", "args: {x: *a24}"),
    "the billion laughs by merging": "a0: &a0 {x: 1}\n"
    + "\n".join(f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 25)),
    "what stands for itself": "run: &a [*a]",
    "what merges itself": "run: &a {<<: *a}",
    "nested too deep": "[" * 10**5,
    "nested too deep by mappings": "".join(" " * i + "a:\n" for i in range(400)),
    "a number of a million digits": "seed: " + "9" * 10**6,
    "a number of ten thousand digits": "seed: " + "9" * 10**4,
    "a number of many hexadecimal digits": "seed: 0x" + "f" * 10**4,
    "a number in base sixty": "seed: 1" + ":59" * 10**4,
    "a day that is no text": "run: !!timestamp 2020-01-01",
    "a key that is said twice": GOOD + "seed: 4\n",
    "a truth that is none": "run: !!bool x",
    "a number that is none": "run: !!int ''",
    "bytes that are none": "run: !!binary x",
    "half of a character": 'run: "\\ud800"',
    "a null character": 'run: "a\\0b"',
    "a set of lists": "run: !!set {[1]: 1}",
    "a key that is a list": "{[1]: 2}",
    "nothing": "",
    "two documents": "a: 1\n---\nb: 2",
    "long": "run: x\n" + "# x\n" * 10**6,
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "long")) for n in BAD])
def test_what_no_configuration_is(file, name):
    file.write_text(BAD[name])

    def one():
        with pytest.raises(UserError):
            load(file)

    apart(one, memory=256 << 20, seconds=30)


CODE = (
    "object/apply:os.system",
    "object/new:os.system",
    "object:os.system",
    "name:os.system",
    "module:this",
    "object/apply:eval",
)


@pytest.mark.parametrize(
    "tag", [f"{start}{code}" for code in CODE for start in ("!!python/", "!<tag:yaml.org,2002:python/")]
)
def test_no_tag_runs_code(file, tmp_path, monkeypatch, tag):
    monkeypatch.chdir(tmp_path)
    said = f"{tag}{'>' if '<' in tag else ''} ['touch ran']"
    file.write_text(f"{GOOD}\nx: {said}\n")
    with pytest.raises(UserError, match="is not YAML"):
        load(file)
    file.write_text(GOOD)
    for word in (f"head={said}", f"head=[{said}]"):
        with pytest.raises(UserError):
            load(file, [word])
    assert [p.name for p in tmp_path.iterdir()] == ["c.yaml"]


@pytest.mark.parametrize("bomb", ["duration", "data.batch", "backbone.args", "head", "phases", "run", "x"])
def test_aliases_do_not_grow_in_messages_or_files(file, bomb):
    """As large as may be: what is said of it stays short."""
    file.write_text(GOOD)
    text = (
        "[&a [x,x,x,x,x,x,x,x,x], "
        + "".join(f"&{c} [{','.join([f'*{b}'] * 9)}], " for b, c in ("ab", "bc", "cd"))
        + "]"
    )
    apart(lambda: outcomes([text], lambda text: read(load(file, [f"{bomb}={text}"]))), memory=256 << 20, seconds=30)


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("duration=" + "9" * 400 + "ep", "duration"),
        ("stop_after=" + "9" * 400 + "h", "stop_after"),
        ("phases.each.curve={name: step, every: 1ep, gamma: 1/0}", "gamma"),
        ("data.bad_samples=" + "9" * 400 + "%", "bad_samples"),
        ("head=toys", 'there is no head "toys"'),
        ("head=':'", "cannot be loaded"),
        ("head=.x:y", "cannot be loaded"),
        ("head=no such:thing", "cannot be loaded"),
        ("head=broken_module:f", "cannot be loaded: SyntaxError"),
        ("head=leaving_module:f", "cannot be loaded: ZeroDivisionError"),
        ("head=builtins:dict", "cannot be used"),
        ("head=builtins:__name__", "is not a function"),
        ("backbone.name=builtins:min", "cannot be used"),
        (".".join(["a"] * 10**5) + "=1", "deeper than any key"),
        ("no equals sign", "is not an override"),
        ("data.batch=[", "is not YAML"),
    ],
)
def test_odd_values_are_named(file, tmp_path, monkeypatch, override, where):
    (tmp_path / "broken_module.py").write_text("def f(:\n")
    (tmp_path / "leaving_module.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    file.write_text(GOOD)
    with pytest.raises(UserError) as error:
        load(file, [override])
    assert where in str(error.value)


def test_names_of_files_that_none_can_have(tmp_path):
    for name in ("a\0b", "x" * 5000, ".", "\ud800"):
        with pytest.raises(UserError, match=r"cannot be read|is a folder"):
            load(tmp_path / name)


def test_mistakes_of_all_kinds_are_one_error(file):
    file.write_text(GOOD)
    with pytest.raises(ConfigError, match="3 mistakes"):
        load(file, ["seed=x", "data.batch=0", "nothing=1"])
