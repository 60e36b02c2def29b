"""The commands, in this process; README's blocks."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from images import make_folder
from typer.testing import CliRunner

from tlx.cli import app
from tlx.config import parse
from tlx.data.manifest import Manifest
from tlx.errors import UserError

README = (Path(__file__).parents[1] / "README.md").read_text()


def invoke(*words):
    return CliRunner().invoke(app, [str(w) for w in words])


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


@pytest.mark.parametrize(
    "words",
    [("train",), ("plan",), ("models",), ("report",), *(("shards", w) for w in ("build", "index", "check", "show"))],
    ids=" ".join,
)
def test_help_has_an_example(words):
    shown = invoke(*words, "--help")
    assert shown.exit_code == 0
    assert "Example" in shown.output


def test_help_needs_neither_torch_nor_timm():
    code = (
        "import sys; from tlx import cli; print([m for m in ('torch', 'timm', 'numpy', 'wandb') if m in sys.modules])"
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


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_readmes_configuration_loads_and_its_code_runs():
    (configuration,) = blocks("yaml")
    assert parse(yaml.safe_load(configuration)).data.batch == 64
    (code,) = blocks("python")
    space = {}
    exec(compile(code, "README.md", "exec"), space)
    from nets import resnet_like

    from tlx.durations import duration

    first, second = space["top_down"](resnet_like(), every=duration("2ep"))
    assert (first.trains, "conv1" in second.trains) == ({"fc": "all"}, False)


def test_files_that_readme_names_exist():
    root = Path(__file__).parents[1]
    for name in re.findall(r"(?:launch|configs|tests|tlx)/[\w/]+\.(?:sh|yaml|md|png|py)", README):
        assert (root / name).exists(), name
