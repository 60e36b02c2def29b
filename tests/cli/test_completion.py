"""<Tab> in a shell; `tlx config`; the help's groups."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from commands import environment, invoke
from places import ROOT
from screen import Screen

from tlx.base.errors import UserError
from tlx.cli.completion import table
from tlx.cli.help import GROUPS
from tlx.plan.config import Config, parse
from tlx.plan.explain import example_of, explain, value_in
from tlx.plan.overrides import changed
from tlx.plan.reference import keys

TRANSFER = ROOT / "configs" / "quickstart" / "transfer.yaml"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home in which <Tab> was pressed once, with a `tlx` on the path: what it takes then is the table."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "bin").mkdir()
    (folder / "bin" / "tlx").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tlx "$@"\n')
    (folder / "bin" / "tlx").chmod(0o755)
    assert offered(folder, "tlx shards s") == ["show"]
    assert (folder / ".cache" / "tlx" / "completion.json").exists()
    return folder


def of(home):
    return environment(HOME=str(home), PATH=f"{home / 'bin'}:/usr/bin:/bin")


def offered(home, line):
    words = [sys.executable, "-m", "tlx", "--complete", line]
    done = subprocess.run(words, env=of(home), capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("tlx tr", ["train", "track"]),
        ("tlx train --fr", ["--fresh"]),
        ("tlx train conf", ["*"]),
        ("tlx train c.yaml phases.e", ["phases.each."]),
        ("tlx train c.yaml phases.each.l", ["phases.each.lr=", "phases.each.layer_decay=", "phases.each.layer_decay."]),
        ("tlx train c.yaml seed=1 optimizer=adam", ["optimizer=adam", "optimizer=adamw"]),
        ("tlx train c.yaml optimizer.bet", ["optimizer.betas="]),
        ("tlx plan c.yaml loop.compile=", ["loop.compile=true", "loop.compile=false"]),
        (f"tlx train {TRANSFER} phases.f", ["phases.feature_extraction.", "phases.fine_tuning."]),
        ("tlx evaluate runs/x --data ", ["*"]),
        ("tlx config loop.cl", ["loop.clip"]),
        ("tlx completion ", ["bash", "zsh", "fish"]),
        ("tlx nothing ", []),
        ("tlx train 'c.yaml", ["*"]),
    ],
)
def test_tab_offers(home, line, found):
    assert offered(home, line) == found


def test_tab_imports_nothing_that_a_person_would_wait_for(home):
    code = "import sys; sys.argv[1:] = ['--complete', 'tlx train c.yaml phases.each.l']; from tlx.__main__ import main"
    code += "; main(); print(sorted({'typer', 'pydantic', 'rich', 'torch', 'yaml'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], env=of(home), capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_table_of_another_tlx_is_made_anew(home):
    file = home / ".cache" / "tlx" / "completion.json"
    file.write_text(json.dumps({"version": [], "table": {}}))
    assert offered(home, "tlx shards s") == ["show"]
    assert json.loads(file.read_text())["version"] != []


def test_bash_completes_at_tab(home, tmp_path):
    """A real bash on a terminal: keys after a dot, values after an equals sign, files."""
    (tmp_path / "mine.yaml").write_text("{}")
    words = ["bash", "--norc", "--noprofile", "-i"]
    shell = Screen(words, of(home) | {"PS1": "$ "}, columns=120, lines=12)
    shell.send(f'cd {tmp_path}; eval "$(tlx completion bash)"; clear; echo ready\n')
    shell.until(lambda text: text.startswith("ready"))
    for typed, whole in (
        ("tlx plan mi\t", "tlx plan mine.yaml "),
        ("phases.each.wa\t", "phases.each.warmup="),
        ("2ep optimizer=sg\t", "optimizer=sgd "),
        ("optimizer.nes\t", "optimizer.nesterov="),
    ):
        shell.send(typed)
        shell.until(lambda text, whole=whole: whole.strip() in text, timeout_s=20)
    assert shell.text.endswith("$ tlx plan mine.yaml phases.each.warmup=2ep optimizer=sgd optimizer.nesterov=")
    shell.process.kill()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_scripts_are_of_their_shells(shell):
    script = invoke("completion", shell).stdout
    assert "tlx --complete" in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)


# --- help


def test_every_command_is_in_a_group_and_has_an_example():
    named = {name for names in GROUPS.values() for name in names}
    known = table()["commands"]
    assert named == set(known)
    shown = invoke("--help").stdout
    assert [title for title in GROUPS if f"\n{title}:\n" in shown] == list(GROUPS)
    for name, command in known.items():
        for words in [(name, below) for below in command.get("commands", {})] or [(name,)]:
            said = invoke(*words, "--help").stdout
            assert "\n  Example" in said, words
            assert f"    tlx {' '.join(words)}" in said, words


# --- tlx config


def test_every_key_is_explained_with_an_example_that_a_configuration_takes():
    raw = {"run": "x", "data": {"train": "x", "val": "y", "batch": 8}, "backbone": {"name": "timm/resnet18"}}
    for key in keys():
        place, example = key.place.replace("NAME", "each" if "phases" in key.place else "colour"), example_of(key)
        said = explain(place)
        assert said.startswith(place)
        if example:
            parse(changed(raw, f"{place}={example}", Config), libraries=False)
            assert f"{place}={example}" in said


def test_a_key_is_explained_and_a_wrong_one_is_told():
    said = explain("phases.fine_tuning.lr")
    assert "number > 0" in said
    assert "phases.PHASE.lr and further.PHASE.lr" in said
    assert explain("optimizer.betas").splitlines()[1] == (
        "  of adam: 2 of number or fraction >= 0, < 1, default [0.9, 0.999]"
    )
    assert "of random_erasing" in explain("transforms.0.scale")
    assert "of random_erasing" not in explain("transforms.affine.scale")
    assert "Half a cosine" in explain("cosine")
    assert "loop.ema.decay" in explain("loop.ema")
    for word, near in (
        ("phases.each.crve", "phases.each.curve"),
        ("lr", "phases.each.lr"),
        ("batch_size", "data.batch"),
    ):
        with pytest.raises(UserError, match=f'did you mean "{near}"'):
            explain(word)
    with pytest.raises(UserError, match='did you mean "betas"'):
        explain("optimizer.beta")


def test_a_value_is_told_with_who_says_so(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "data: {train: shards/flowers/train, batch: 8}\nbackbone: timm/resnet18\nphases: {each: {warmup: 1ep}}\n"
        "optimizer: {name: adamw, weight_decay: 0.1}\n"
    )
    for key, said in {
        "data.batch": "8  (from the file)",
        "seed": "0  (the default)",
        "run": "runs/flowers-resnet18  (worked out from the rest)",
        "optimizer.weight_decay": "0.1  (from the file)",
        "optimizer.eps": "1.0e-08  (the default)",
        "phases.fine_tuning.lr": "0.0003  (from the table of defaults, tlx/plan/defaults.py)",
        "phases.fine_tuning.warmup": "1ep  (from the file, phases.each.warmup)",
        "phases.fine_tuning.norm": "frozen_is_frozen  (the default)",
    }.items():
        assert value_in(file, key) == f"{key}: {said}"
    assert value_in(file, "seed", ["seed=3"]) == "seed: 3  (from the command line)"
    with pytest.raises(UserError, match='did you mean "seed"'):
        value_in(file, "sed")


def test_the_list_of_keys_has_all_of_them():
    shown = invoke("config").stdout
    assert {key.place for key in keys()} <= set(shown.split())
