"""The commands, in this process; README's blocks."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
import yaml
from commands import environment, invoke, rows, tlx, write_config
from images import make_folder, make_shards
from places import ROOT
from safetensors.torch import load_file

from tlx.base.errors import UserError
from tlx.base.parsing import from_yaml
from tlx.cli import main as cli
from tlx.cli.main import app
from tlx.data.shards.manifest import Manifest
from tlx.plan.config import parse
from tlx.train.result import result_of

README = (ROOT / "README.md").read_text()


def test_shards_are_built_shown_checked_and_indexed(tmp_path):
    pictures = make_folder(tmp_path / "pictures", classes=3, per_class=8, size=24)
    out = tmp_path / "shards"
    built = invoke("shards", "build", pictures, out, "--val", "0.25", "--shard-samples", "5", "--jobs", "0")
    assert built.exit_code == 0, built.output
    assert "18 samples in 4 shards" in built.output
    again = invoke("shards", "build", pictures, out, "--val", "0.25", "--shard-samples", "5", "--jobs", "0")
    assert "nothing done" in again.output
    shown = invoke("shards", "show", out)
    assert re.search(r"class1\s+6\s+2", shown.output)
    assert invoke("shards", "check", out, "--jobs", "0").exit_code == 0
    tar, offset, size = Manifest.open(out / "train").locate(3)
    with open(tar, "r+b") as file:
        file.seek(offset)
        file.write(bytes(size))
    checked = invoke("shards", "check", out, "--jobs", "0")
    assert checked.exit_code == 1
    assert tar.name in checked.output
    assert "1 bad" in checked.output
    for name in ("index.json", "index.npy"):
        (out / "val" / name).unlink()
    names = tmp_path / "names.txt"
    names.write_text("class0\nclass1\nclass2\n")
    indexed = invoke("shards", "index", out / "val", "--classes", names, "--jobs", "0")
    assert indexed.exit_code == 0, indexed.output
    assert len(Manifest.open(out / "val")) == 6


def test_help_needs_neither_torch_nor_timm():
    code = (
        "import sys; import tlx.cli.main; print([m for m in ('torch', 'timm', 'numpy', 'wandb') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_a_users_mistake_is_no_traceback(tmp_path):
    command = [sys.executable, "-m", "tlx", "shards", "show", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    with pytest.raises(UserError):
        app(["models", "show"], standalone_mode=False)


def test_a_place_that_cannot_be_used_is_no_traceback(tmp_path):
    pictures, said = make_folder(tmp_path / "pictures", classes=2, per_class=2, size=16), "/proc/nosuch"
    words = ["shards", "build", str(pictures), f"{said}/out", "--val", "0", "--jobs", "0"]
    done = subprocess.run([sys.executable, "-m", "tlx", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: {said}")
    assert "\n  -> " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "error: No space left on device\n  -> free some room"),
        (PermissionError(13, "Permission denied", "/a\x1b[2J"), r"error: /a\x1b[2J: Permission denied"),
        (OSError(104, "Connection reset by peer"), None),
    ],
)
@pytest.mark.parametrize("under", [False, True], ids=["alone", "under a launcher"])
def test_faults_of_the_disk_are_said_and_others_show_their_trace(monkeypatch, capsys, error, said, under):
    def fail(**_named):
        raise error

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr(cli, "launched", lambda: under)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == (1 if under or said is None else 2)  # where a launcher stands, code 2 would become 0
    shown = capsys.readouterr().err
    assert (said or "Traceback") in shown
    assert ("Traceback" in shown) is (said is None)


def test_no_credentials_in_the_command_that_is_kept(monkeypatch):
    secret = "data.train=http://user:pw@host/train?token=abcdef"
    words = ["/bin/tlx", "train", "c.yaml", secret, "data.val=pipe:get -H s3cret {}"]
    monkeypatch.setattr(sys, "argv", words)
    kept = result_of(
        MagicMock(config=SimpleNamespace(run="r", backbone=MagicMock(), evaluate=MagicMock())), finished=True
    )["command"]
    assert kept == "tlx train c.yaml data.train=http://host/train 'data.val=pipe:get ... {}'"


RAW = {
    "seed": 3,
    "data": {"batch": 8, "workers": 0},
    "input": {"size": 16},
    "backbone": {"name": "toys:small", "weights": "none", "args": {"dropout": 0.1}},
    "unfreeze": {"name": "gradual", "every": "1.5ep"},
    "phases": {
        "each": {"lr": 0.01, "layer_decay": {"name": "exponential", "factor": "1/3"}},
        "head": {"curve": {"name": "step", "every": "0.5ep"}, "warmup": "20%"},
        "from_features.1.0": {"duration": {"max": "3ep", "metric": "val/loss", "patience": 1, "min_delta": 9}},
        "from_features.0.0": {"curve": "cosine", "optimizer_state": "reset", "norm": "statistics_move"},
    },
    "evaluate": {"every": 3},
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards") / "s", classes=3, per_class={"train": 10, "val": 5}, size=24)


def config_of(shards, path, **over):
    data = {**RAW["data"], "train": str(shards / "train"), "val": str(shards / "val")}
    return write_config(path, RAW, data=data, run=str(path.parent / "run"), **over)


@pytest.mark.slow
def test_training_from_the_written_schedule_is_the_same_training(shards, tmp_path):
    config = config_of(shards, tmp_path / "c.yaml")
    written = invoke("plan", config, f"run={tmp_path / 'again'}", "--write")
    assert written.exit_code == 0, written.output
    (tmp_path / "mine.yaml").write_text(written.stdout)
    for file in (config, tmp_path / "mine.yaml"):
        done = tlx("train", file)
        assert done.returncode == 0, done.stderr
    one, other = tmp_path / "run", tmp_path / "again"
    assert (one / "plan.json").read_bytes() == (other / "plan.json").read_bytes()
    assert rows(one) == rows(other)
    results = [json.loads((run / "result.json").read_text()) for run in (one, other)]
    assert results[0]["phases"]["from_features.1.0"]["stop"] < 24  # the plateau has ended it
    assert results[0]["phases"] == results[1]["phases"]
    for point in ("latest", "best"):
        a, b = (load_file(run / "checkpoints" / point / "model.safetensors") for run in (one, other))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_plan_is_drawn_where_it_is_said(shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = config_of(shards, tmp_path / "c.yaml")
    shown = invoke("plan", config, "--picture")
    assert shown.exit_code == 0, shown.output
    assert shown.output.splitlines()[-1] == "c-plan.png"
    assert "from_features.1.0" in shown.output
    first = (tmp_path / "c-plan.png").read_bytes()
    both = invoke("plan", config, "--write", "--picture", "mine.png", "phases.each.lr=0.1")
    assert parse(yaml.safe_load(both.stdout)).phases["head"].lr == 0.1
    assert both.stderr.splitlines()[-1] == "mine.png"
    from PIL import Image

    sizes = {Image.open(tmp_path / name).size for name in ("c-plan.png", "mine.png")}
    assert len(sizes) == 1
    assert min(sizes.pop()) > 500
    assert (tmp_path / "mine.png").read_bytes() != first
    (tmp_path / "c-plan.png").write_bytes(b"old")
    invoke("plan", config, "--picture")
    assert (tmp_path / "c-plan.png").read_bytes() == first


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--picture", "a.pdf"), "one .png file, not a.pdf"),
        (("--picture", "a.png", "b.png"), "one .png file"),
        (("--picture", "nowhere/a.png"), "cannot be written: No such file"),
        (("a.png",), "is not an override"),
    ],
)
def test_where_a_plan_cannot_be_drawn(shards, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    refused = invoke("plan", config_of(shards, tmp_path / "c.yaml"), *words)
    assert isinstance(refused.exception, UserError)
    assert message in str(refused.exception)
    assert not list(tmp_path.glob("*.png"))


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_readmes_configuration_loads_and_its_code_runs():
    configuration, of_cache, of_tasks = blocks("yaml")
    config = parse(yaml.safe_load(configuration))
    assert config.data.batch == 64
    for line in of_cache.splitlines()[1:]:
        parse({**yaml.safe_load(configuration), **from_yaml(line)})
    several = parse({**yaml.safe_load(configuration), **yaml.safe_load(of_tasks)})
    assert (several.task.name, several.evaluate.metric) == ("multitask", "val/species/top1")
    (code,) = (block for block in blocks("python") if "def top_down" in block)  # the others have tests of their own
    space = {}
    exec(compile(code, "README.md", "exec"), space)
    from nets import resnet_like

    from tlx.base.durations import duration

    first, second = space["top_down"](resnet_like(), every=duration("2ep"))
    assert (first.trains, "conv1" in second.trains) == ({"fc": "all"}, False)


def commands(block):
    """Its commands, without what is said of them."""
    lines = [shlex.split(line, comments=True) for line in block.splitlines()]
    return [words for words in lines if words]


TYPED = [words for block in blocks("bash") for words in commands(block) if "tlx" in words and words[0] != "git"]


@pytest.mark.parametrize("words", TYPED, ids=" ".join)
def test_every_command_of_readme_is_one(words):
    """Its words are understood: no option that is not there, no argument too many."""
    from typer.main import get_command

    command, rest = get_command(app), words[words.index("tlx") + 1 :]
    rest = rest[: rest.index(">")] if ">" in rest else rest
    while hasattr(command, "commands"):
        name, *rest = rest
        command = command.commands[name]
    command.make_context(name, rest)


def test_what_readme_uses_is_there_after_the_quickstart():
    """Its folders are those that the quickstart makes; a block about anything else says that it is a template."""
    made = ("configs/quickstart/transfer.yaml", "data/quickstart/shards/", "runs/quickstart/", "launch/cpu.yaml")
    for block in blocks("bash"):
        if block.startswith(("# template", "git clone")):
            continue
        named = [word for words in commands(block) for word in words if re.search(r"\w/\w.*|\.yaml$", word)]
        own = [w for w in named if not w.startswith((".venv/", "timm/", "torchvision/")) and w != "edited.yaml"]
        assert [w for w in own if not w.removeprefix("run=").startswith(made)] == []


@pytest.mark.slow
def test_readmes_blocks_run_in_a_fresh_shell_after_the_quickstart(tmp_path):
    if not (ROOT / ".venv/bin/activate").exists():
        pytest.skip("the environment is not in .venv")
    for name in (".venv", "configs", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    for task in ("source", "target"):  # as launch/digits.py makes them, smaller
        make_shards(tmp_path / f"data/quickstart/shards/{task}", classes=5, per_class={"train": 5, "val": 4}, size=32)
    short = {"pretrain": ("pretraining",), "transfer": ("feature_extraction", "fine_tuning")}
    for config, phases in short.items():
        for_two_steps = [w for p in phases for w in (f"phases.{p}.duration=2", f"phases.{p}.warmup=0")]
        words = [ROOT / ".venv/bin/python", "-m", "tlx", "train", f"configs/quickstart/{config}.yaml", *for_two_steps]
        subprocess.run(words, cwd=tmp_path, env=environment(), check=True, timeout=200)
    last = (ROOT / "launch/quickstart.sh").read_text().splitlines()[-1]
    assert "cd %q && source .venv/bin/activate && tlx plan configs/quickstart/transfer.yaml" in last
    fresh = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    block = next(b for b in blocks("bash") if b.startswith("source .venv/bin/activate"))
    plans = [line for b in blocks("bash") for line in b.splitlines() if line.startswith("tlx plan configs/quickstart")]
    for script in (block, "\n".join(["source .venv/bin/activate", *plans])):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, env=fresh, capture_output=True, text=True,
            timeout=900, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / "runs/quickstart/seed1/report.html").exists()
    assert (tmp_path / "runs/quickstart/transfer/comparison.html").exists()
    assert (tmp_path / "edited.yaml").exists()


def test_files_that_readme_names_exist():
    for name in re.findall(r"(?:launch|configs|tests|tlx)/[\w/]+\.(?:sh|yaml|md|png|py)", README):
        assert (ROOT / name).exists(), name
