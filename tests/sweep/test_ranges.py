"""What a sweep varies: words to ranges and choices, strictly; points of a space."""

from __future__ import annotations

import re

import pytest

from tlx.base.errors import ConfigError, UserError
from tlx.sweep import space as spaces
from tlx.sweep.grammar import Choices, Range, divided, parse
from tlx.sweep.wandb_yaml import _parameter


def one(word):
    (found,), fixed = parse([word])
    assert not fixed
    return found


def test_words_are_ranges_choices_or_one_value():
    assert one("lr=1e-4..1e-2:log") == Range("lr", 1e-4, 1e-2, log=True, text="1e-4..1e-2:log")
    assert one("b=16..64/16") == Range("b", 16, 64, 16.0, whole=True, text="16..64/16")
    assert one("d=4ep..16ep") == Range("d", 4, 16, whole=True, unit="ep", text="4ep..16ep")
    assert one("n=timm/a,timm/b") == Choices("n", ("timm/a", "timm/b"), "timm/a,timm/b")
    assert one('t=[a, b],[c],"d,e"').values == ("[a, b]", "[c]", '"d,e"')
    assert parse(["seed=3", "data.train=../shards", "t=[a, b]", "x={a: 1, b: 2}"]) == (
        (), ["seed=3", "data.train=../shards", "t=[a, b]", "x={a: 1, b: 2}"],
    )  # fmt: skip
    assert divided("it's,b") == ["it's", "b"]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("x=1e-2..1e-4", "x: 1e-2..1e-4: the range is empty\n  -> write 1e-4..1e-2"),
        ("x=1..1", "the range is empty\n  -> set one value: x=1"),
        ("x=0..1:log", "there is no logarithm of 0 or less"),
        ("x=1..2:lgo", 'there is no ":lgo"; did you mean "log"?'),
        ("x=0..1/0.3", "the last step does not meet its end\n  -> write 0..0.9/0.3"),
        ("x=1..2:0.1", "a step is written with /\n  -> write 1..2/0.1"),
        ("x=1e-4..1e-2:log/3", "log has no steps"),
        ("x=1..", 'the range ends with ""'),
        ("x=4ep..10", "both ends must be of one unit\n  -> write 4ep..10ep"),
        ("x=1..1e999", "the ends must be finite"),
        ("n=a,,b", "a value is missing beside a comma"),
        ("n=1e-3,0.001", "0.001 is the same as 1e-3"),
        ("word", '"word" is neither key=value nor a range'),
    ],
)
def test_a_range_that_cannot_be_drawn_from_is_a_mistake(word, said):
    with pytest.raises(UserError, match=re.escape(said)):
        parse([word])


def test_mistakes_come_together():
    with pytest.raises(ConfigError) as caught:
        parse(["a=2..1", "b=1..2", "b=3", "c=0..1:log"])
    assert [line.partition(":")[0] for line in caught.value.problems] == ["a", "b", "c"]


def test_points_of_a_space():
    space, _ = parse(["a=0..1/0.1", "b=x,y", "c=2..4"])
    assert spaces.count(space) == 11 * 2 * 3
    points = [spaces.point(space, values) for values in spaces.every(space)]
    assert len(set(points)) == 66
    assert points[0] == ("a=0.0", "b=x", "c=2")
    assert ("a=0.3", "b=y", "c=4") in points, "0.30000000000000004 is 0.3"
    assert spaces.point(space, spaces.untried(space, points[:5], None)) == points[5]
    assert spaces.untried(space, points, "1") is None
    assert spaces.count(parse(["a=0..0.5"])[0]) is None
    assert spaces.middle(parse(["lr=1e-4..1e-2:log", "n=p,q"])[0]) == {"lr": pytest.approx(1e-3), "n": "p"}


@pytest.mark.parametrize(
    ("word", "made"),
    [
        ("x=1e-4..1e-2:log", {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2}),
        ("x=0.0..0.5", {"distribution": "uniform", "min": 0.0, "max": 0.5}),
        ("x=2..8", {"distribution": "int_uniform", "min": 2, "max": 8}),
        ("x=16..64/16", {"values": [16, 32, 48, 64]}),
        ("x=2ep..4ep", {"values": ["2ep", "3ep", "4ep"]}),
        ("x=true,null,3,1e-3,a", {"values": [True, "null", 3, 0.001, "a"]}),
    ],
)
def test_the_same_for_w_and_b(word, made):
    assert _parameter(one(word)) == made
