"""Networks ranked, cut and tuned on the pictures of a configuration, by the command."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from composed import raw_of
from images import make_shards
from typer.testing import CliRunner

from tlx.base.errors import UserError
from tlx.cli.main import app
from tlx.models.weights import local_weights as shelf
from tlx.probe.at_hand import Asked, asked, at_hand
from tlx.probe.depths import pooled


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("s") / "s", classes=3, per_class={"train": 8, "val": 5}, size=24)


@pytest.fixture(autouse=True)
def config(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("TLX_FEATURES", str(tmp_path / "features"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.chdir(tmp_path)
    own = {"backbone": {"name": "timm/test_resnet", "weights": "none"}, "input": {"size": 32}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw_of(shards, tmp_path / "run", **own)))


def invoked(*words):
    done = CliRunner().invoke(app, ["probe", "c.yaml", *words, "--bootstrap", "50"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


def refused(*words):
    CliRunner().invoke(app, ["probe", "c.yaml", *words], catch_exceptions=False, standalone_mode=False)


def test_networks_are_ranked_and_one_that_cannot_be_had_is_told(tmp_path):
    names = "[timm/test_resnet=none, {name: timm/test_byobnet, weights: none}, timm/test_vit=gone.safetensors]"
    done = invoked("--backbones", names, "--out", "p.png", "--json")
    found = json.loads(done.stdout[: done.stdout.rindex("}") + 1])
    rows = found["backbones"]
    assert {row["backbone"] for row in rows} == {"timm/test_resnet", "timm/test_byobnet"}
    assert rows[0]["linear"]["value"] >= rows[1]["linear"]["value"]
    assert rows[0]["behind_the_first"]["value"] == 0
    assert any(row["on_the_front"] for row in rows)
    for row in rows:
        assert row["pictures_per_s"] > 0
        assert row["peak_bytes"] > 4 * row["parameters"]
        assert row["linear"]["low"] <= row["linear"]["value"] <= row["linear"]["high"]
    assert "no such file" in found["failed"]["timm/test_vit=gone.safetensors"]
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="stays as it is"):
        refused("--backbones", "timm/test_vit", "--out", "p.png")


def test_depths_and_a_forecast():
    found = json.loads(invoked("--depths", "--json").stdout)
    layers = [one["layer"] for one in found["depths"]]
    assert layers == ["layer1.0", "layer2.0", "layer3.0", "layer4.0", "fc"]
    below = [one["parameters_below"] for one in found["depths"]]
    assert below == sorted(below)
    assert 0 < below[0] < below[-1] < 1
    assert [one["time_until"] for one in found["depths"]][-1] == 1
    assert found["depths"][-1]["lost"]["value"] == 0
    tuned = json.loads(invoked("--forecast", "--epochs", "1", "--json").stdout)
    assert [row["depths"] for row in tuned["rows"]] == [0, 1, 2]
    assert tuned["rows"][0]["gain"]["value"] == 0
    assert "fine-tun" in tuned["verdict"]


def test_weights_at_hand(tmp_path, monkeypatch):
    folder = tmp_path / "w"
    monkeypatch.setenv("TLX_WEIGHTS", str(folder))
    with pytest.raises(UserError, match="no weights were found"):
        asked(None, None, here=True)
    shelf.put(folder, "timm/test_vit.r160_in1k", {"x": torch.zeros(1)}, {"tag": "r160_in1k"})
    shelf.put(folder, "timm/resnet18.a1_in1k", {"x": torch.zeros(1)}, {"tag": "a1_in1k"})
    (folder / "nobody--x.safetensors").write_bytes((folder / "timm--resnet18.a1_in1k.safetensors").read_bytes())
    small = Asked("timm/test_vit", "r160_in1k")
    assert list(at_hand()) == [Asked("timm/resnet18", "a1_in1k"), small]
    assert asked(None, "1M", here=True) == [small]
    assert asked("test_*", None, here=True) == [small]


def test_too_many_networks_are_refused():
    with pytest.raises(UserError, match="at most 30"):
        asked("timm/resnet*", None, here=False)


@pytest.mark.parametrize("words", [["--shots", "1", "--lr", "0.1"], ["--depths", "--here"]])
def test_one_thing_at_a_time(words):
    with pytest.raises(UserError, match="are asked for"):
        refused(*words)


def test_shots_of_the_command():
    found = json.loads(invoked("--shots", "1,3", "--ways", "3", "--episodes", "20", "--queries", "4", "--json").stdout)
    assert set(found["shots"]) == {"1", "3"}
    assert found["chance"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("shape", [(2, 8, 3, 3), (2, 3, 3, 8), (2, 9, 8), (2, 8)])
def test_features_are_pooled_over_positions(shape):
    assert pooled(torch.randn(shape)).shape == (2, 8)
