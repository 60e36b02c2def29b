"""Paths: `~` and variables mean the same in a file, in an override and on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from tlx.base.errors import ConfigError, UserError
from tlx.base.location import place
from tlx.base.paths import expanded, written
from tlx.cli.main import app
from tlx.plan.config import dump, load, plain

BASE = "run: runs/x\ndata: {train: t, val: v, batch: 2}\nbackbone: {name: toys:small, weights: none}\n"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.setenv("NOTHING", "")
    return tmp_path


@pytest.fixture
def file(home):
    path = home / "c.yaml"
    path.write_text(BASE)
    return path


def test_home_and_variables(home):
    for text, meant in (
        ("~", f"{home}"),
        ("~/x", f"{home}/x"),
        ("$SCRATCH/x", "/scratch/me/x"),
        ("${SCRATCH}x/$SCRATCH", "/scratch/mex//scratch/me"),
        ("a$$b", "a$b"),
        ("a~b/~", "a~b/~"),
        ("5$", "5$"),
        ("./~/x", "./~/x"),
    ):
        assert expanded(text) == meant
    for path in ("a$b", "~/x", "~", "$SCRATCH", "plain/a b"):
        assert Path(expanded(written(path))) == Path(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("$NOWHERE/x", r"the variable \$NOWHERE is not set"),
        ("${NOWHERE}", r"the variable \$\{NOWHERE\} is not set"),
        ("$NOTHING/x", r"the variable \$NOTHING is empty"),
        ("${NOWHERE:-x}", r"\$\{NOWHERE:-x\} is no variable"),
        ("~nobody-here/x", "~nobody-here is nobody's home folder"),
        ("a\0b", r"the control character U\+0000"),
        ("a\nb", r"the control character U\+000A"),
        ("", "an empty path"),
    ],
)
def test_what_cannot_be_filled_in_is_named(home, text, said):
    with pytest.raises(UserError, match=said):
        expanded(text)


KEYS = ("run", "data.train", "data.val", "data.cache.folder", "backbone.weights")


def said(config):
    raw = yaml.safe_load(dump(config))
    found = {"tracker": raw["track"]["trackers"][0]["folder"] if raw["track"]["trackers"] else None}
    for key in KEYS:
        node = raw
        for step in key.split("."):
            node = node[step]
        found[key] = node
    return found


def test_every_path_of_a_configuration_and_what_is_recorded(file, home):
    """What is written down is what came of it, so that the same run goes on from another shell."""
    words = [f"{key}=~/{key}" for key in KEYS] + ["track.trackers=[{name: tensorboard, folder: ~/tb}]"]
    config = load(file, words)
    assert said(config) == {"tracker": f"{home}/tb", **{key: f"{home}/{key}" for key in KEYS}}
    assert config.run == home / "run"
    file.write_text(dump(config))
    assert plain(load(file)) == plain(config)
    inside = load(file, [f"{key}=$SCRATCH/{key}" for key in KEYS])
    assert said(inside)["data.val"] == "/scratch/me/data.val"
    odd = load(file, ["run=a$$b", "data.train=./~/x", "backbone.weights=w$$.pt"])
    file.write_text(dump(odd))
    assert (load(file).run, load(file).data.train, load(file).backbone.weights) == (Path("a$b"), "~/x", "w$.pt")


def test_addresses_and_commands_are_left_alone(file):
    for address in ("s3://bucket/$X/~", "https://host/$X?y=$Z", "pipe:ssh host cat $DATA/{}"):
        assert place(address) == address
        assert load(file, [f"data.train={address}"]).data.train == address
    assert load(file, ["backbone.weights=hf-hub:me/$x"]).backbone.weights == "hf-hub:me/$x"


def test_variables_that_are_not_set_are_all_told(file):
    with pytest.raises(ConfigError) as caught:
        load(file, [f"{key}=$NOWHERE/x" for key in KEYS])
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        "run", "data.train", "data.val", "data.cache.folder", "backbone.weights",
    ]  # fmt: skip
    assert all("$NOWHERE is not set; export NOWHERE=" in problem for problem in caught.value.problems)


def test_paths_of_commands(file, home, monkeypatch):
    monkeypatch.chdir(home)
    runner = CliRunner()
    assert runner.invoke(app, ["status", "~/c.yaml", "run=~/r", "--folder"]).stdout == f"{home / 'r'}\n"
    assert runner.invoke(app, ["status", "$HOME/c.yaml", "--folder"]).stdout == "runs/x\n"
    for words in (
        ["report", "$NOWHERE/r"],
        ["report", "r", "--out=$NOWHERE"],
        ["train", "$NOWHERE/c.yaml"],
        ["plan", "c.yaml", "--picture", "$NOWHERE/x.png"],
        ["shards", "show", "$NOWHERE"],
        ["shards", "index", "$NOWHERE"],
        ["shards", "index", "t", "--classes=$NOWHERE"],
        ["shards", "check", "t", "--json=$NOWHERE"],
        ["shards", "build", "$NOWHERE", "out"],
        ["shards", "build", "src", "$NOWHERE"],
        ["track", "sync", "$NOWHERE"],
        ["weights", "fetch", "x", "--to=$NOWHERE"],
        ["submit", "c.yaml", "--site=$NOWHERE"],
        ["bench", "data", "$NOWHERE"],
        ["bench", "data", "--config=$NOWHERE"],
        ["bench", "train", "$NOWHERE"],
        ["doctor", "$NOWHERE"],
    ):
        refused = runner.invoke(app, words)
        assert isinstance(refused.exception, UserError), words
        assert "the variable $NOWHERE is not set" in str(refused.exception), words


def test_ranks_may_each_have_a_cache_of_their_own(file):
    """`data.cache.folder: $TMPDIR/x` is another folder on every node, and the same training."""
    from tlx.ranks.same_inputs import check_start

    said = []
    check_start(load(file, ["data.cache.folder=/a"]), lambda value, *, topic: said.append(value) or [value])
    check_start(load(file, ["data.cache.folder=/b"]), lambda value, *, topic: [said[0], value])
    with pytest.raises(UserError, match="ranks have different inputs"):
        check_start(load(file, ["seed=1"]), lambda value, *, topic: [said[0] if topic == "start" else value, value])
