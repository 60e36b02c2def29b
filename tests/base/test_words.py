"""Level 0: errors, durations, pluggable parts."""

from __future__ import annotations

import pytest

from tlx.base import plug
from tlx.base.durations import duration, ratio
from tlx.base.errors import ConfigError, UserError, did_you_mean


@pytest.mark.parametrize(
    ("text", "steps"),
    [("16ep", 160), ("2.5ep", 25), ("1 epoch", 10), (400, 400), ("400", 400), ("400 steps", 400), ("5%", 50)],
)
def test_durations_count_in_any_unit(text, steps):
    assert duration(text).steps(epoch=10, whole=1000) == steps
    assert duration(str(duration(text))) == duration(text)


@pytest.mark.parametrize("text", ["", "ep", "-1ep", "1.5", "1.5 steps", True, None, "3 weeks", "1e3"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ValueError, match="is not a length"):
        duration(text)


def test_fractions_are_numbers():
    assert ratio("1/3") == 1 / 3
    assert ratio("1e-3") == 0.001
    for wrong in ("one third", "1/0", True):
        with pytest.raises(ValueError, match="number"):
            ratio(wrong)


def test_suggestions_name_the_near_ones_or_all_when_few():
    assert did_you_mean("resnet05", ["resnet50", "vgg16"]) == '; did you mean "resnet50"?'
    assert did_you_mean("x", ["alpha", "beta"]) == "; choose from alpha, beta"
    assert did_you_mean("x", [str(i) * 9 for i in range(30)]) == ""


def test_an_error_says_what_where_and_what_to_do():
    error = UserError("it is broken", where="shard 3", todo="mend it")
    assert str(error) == "shard 3: it is broken\n  -> mend it"
    assert str(ConfigError(["a", "b"], where="c.yaml")) == "c.yaml: 2 mistakes in the configuration\n  - a\n  - b"


def test_a_part_is_found_by_name_or_path_and_a_near_miss_is_suggested():
    assert plug.find("curve", "cosine") is plug.find("curve", "tlx.plan.curves:cosine")
    with pytest.raises(UserError, match='did you mean "cosine"'):
        plug.find("curve", "cosinus")
    with pytest.raises(UserError, match="cannot be loaded"):
        plug.find("curve", "no_such_package:curve")
    with pytest.raises(UserError, match="cannot be loaded"):
        plug.find("curve", "tlx.plan.curves:no_such")


def test_arguments_of_a_part_are_checked_all_at_once():
    step = plug.find("curve", "step")
    with pytest.raises(UserError) as caught:
        plug.arguments(step, {"evry": "7ep", "gamma": "a lot"}, label="curve step")
    assert 'did you mean "every"' in str(caught.value)
    assert "gamma: 'a lot' is not a number or a fraction" in str(caught.value)
    assert 'needs the argument "every"' in str(caught.value)
    assert plug.arguments(step, {"every": "7ep", "gamma": "1/10"}, label="")["gamma"] == 0.1


def test_a_name_with_two_owners_is_an_error(monkeypatch):
    from importlib.metadata import EntryPoint

    stranger = EntryPoint("cosine", "somebody.else:cosine", "tlx.curve")
    monkeypatch.setattr(plug, "_theirs", lambda group: [stranger] if group == "curve" else [])
    with pytest.raises(UserError, match=r"2 owners: tlx\.plan\.curves:cosine, somebody\.else:cosine"):
        plug.find("curve", "cosine")


def test_a_part_of_ours_whose_types_are_not_there_is_a_fault(monkeypatch):
    def ours(*, width: Width = 4):  # noqa: F821
        pass

    assert plug.arguments(ours, {"width": "x"}, label="a part from elsewhere") == {"width": "x"}
    assert plug.unchecked(ours) == "name 'Width' is not defined"
    monkeypatch.setattr(ours, "__module__", "tlx.plan.curves")
    with pytest.raises(NameError, match="Width"):
        plug.arguments(ours, {"width": 3}, label="curve ours")
