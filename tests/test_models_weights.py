"""Weights from files and caches."""

from __future__ import annotations

import hashlib
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from tlx import models
from tlx.errors import UserError
from tlx.models import weights as files

SMALL: dict[str, Any] = {"channels": [8, 8, 16, 16]}
VIT: dict[str, Any] = {"patch_size": 8, "depth": 1, "embed_dim": 24, "num_heads": 3}


def resnet(classes: int = 10, **args: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return dict(timm.create_model("resnet10t", num_classes=classes, **{**SMALL, **args}).state_dict())


def load(path: Path, **wish: Any) -> dict[str, torch.Tensor]:
    wish = {"name": "timm/resnet10t", "classes": 3, "args": SMALL, "weights": str(path), **wish}
    return dict(models.load(**wish).module.state_dict())


def error(path: Path, **wish: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(path, **wish)
    return str(caught.value)


def same_body(found: dict[str, torch.Tensor], given: dict[str, torch.Tensor], head: str = "fc.") -> bool:
    return all(torch.equal(found[n], given[n]) for n in found if not n.startswith(head))


@pytest.mark.parametrize("classes", [10, 3])  # the old head never comes along, of whatever size it is
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_files(tmp_path: Path, suffix: str, classes: int) -> None:
    state, path = resnet(classes), tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    found = load(path)
    assert same_body(found, state)
    assert found["fc.weight"].shape == (3, 16)
    assert classes != 3 or not torch.equal(found["fc.weight"], state["fc.weight"])


def test_wrappers_prefixes_and_half_precision(tmp_path: Path) -> None:
    state = {n: t.bfloat16() if t.is_floating_point() else t for n, t in resnet().items()}
    torch.save({"epoch": 3, "state_dict": {f"module._orig_mod.{n}": t for n, t in state.items()}}, tmp_path / "w.pth")
    found = load(tmp_path / "w.pth")
    assert {t.dtype for t in found.values() if t.is_floating_point()} == {torch.float32}
    assert same_body(found, {n: t.to(found[n].dtype) for n, t in state.items()})


def test_a_file_without_a_head_is_fine(tmp_path: Path) -> None:
    state = {n: t for n, t in resnet().items() if not n.startswith("fc.")}
    torch.save(state, tmp_path / "w.pth")
    assert same_body(load(tmp_path / "w.pth"), state)


def test_a_file_that_tlx_wrote_with_another_head(tmp_path: Path) -> None:
    mlp = models.load("timm/resnet10t", classes=5, weights="none", args=SMALL, head="mlp").module
    torch.save(mlp.state_dict(), tmp_path / "w.pth")
    assert same_body(load(tmp_path / "w.pth"), dict(mlp.state_dict()))
    assert same_body(load(tmp_path / "w.pth", head="concat_pool"), dict(mlp.state_dict()), head="head.")


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    state = resnet()
    del state["layer1.0.conv1.weight"]
    state["layer9.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "w.pth")
    text = error(tmp_path / "w.pth")
    assert "w.pth: does not fit ResNet: 1 missing (layer1.0.conv1.weight); 1 not in the network (layer9.weight)" in text
    torch.save(resnet(channels=[8, 8, 16, 32]), tmp_path / "w.pth")
    text = error(tmp_path / "w.pth")
    assert "of another shape (layer4.0.conv1.weight (32, 16, 3, 3) instead of (16, 16, 3, 3)" in text
    assert "backbone.args" in text
    state = resnet()
    state["layer1.0.conv1.weight"][0, 0, 0, 0] = torch.nan
    torch.save(state, tmp_path / "w.pth")
    assert "1 with NaN (layer1.0.conv1.weight)" in error(tmp_path / "w.pth")


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    assert "no such file" in error(tmp_path / "none.pth")
    (tmp_path / "noise.pth").write_bytes(b"not a file of torch")
    assert "cannot be read as weights" in error(tmp_path / "noise.pth")
    torch.save({"a": Path("code")}, tmp_path / "pickle.pth")  # an object, not tensors: weights_only refuses it
    assert "cannot be read as weights" in error(tmp_path / "pickle.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    assert "holds no state dict" in error(tmp_path / "list.pth")


def test_position_embedding_of_another_size(tmp_path: Path) -> None:
    name = "vit_tiny_patch16_224"
    state = dict(timm.create_model(name, img_size=64, num_classes=3, **VIT).state_dict())
    torch.save(state, tmp_path / "w.pth")
    found = load(tmp_path / "w.pth", name=f"timm/{name}", args={**VIT, "img_size": 32})
    resized = timm.layers.resample_abs_pos_embed(state["pos_embed"], [4, 4])
    assert found["pos_embed"].shape == (1, 17, 24)
    assert torch.allclose(found["pos_embed"], resized, atol=1e-6)
    assert torch.equal(found["blocks.0.attn.qkv.weight"], state["blocks.0.attn.qkv.weight"])


@pytest.mark.slow
def test_position_embedding_of_torchvision(tmp_path: Path) -> None:
    state = dict(torchvision.models.vit_b_16(image_size=64).state_dict())
    torch.save(state, tmp_path / "w.pth")
    found = load(tmp_path / "w.pth", name="torchvision/vit_b_16", args={"image_size": 32})
    assert found["encoder.pos_embedding"].shape == (1, 5, 768)
    assert torch.equal(found["encoder.ln.weight"], state["encoder.ln.weight"])


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches, and a proxy where nobody listens."""
    import huggingface_hub

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "file", "command"),
    [
        (
            "torchvision/mobilenet_v3_small",
            "torch/hub/checkpoints/mobilenet_v3_small-047dcff4.pth",
            "torchvision.models.get_model('mobilenet_v3_small', weights='IMAGENET1K_V1')",
        ),
        (
            "timm/resnet10t",
            "hub/models--timm--resnet10t.c3_in1k/snapshots/*/model.safetensors",
            "timm.create_model('resnet10t.c3_in1k', pretrained=True)",
        ),
    ],
)
def test_missing_weights_are_named_at_once(offline: Path, name: str, file: str, command: str) -> None:
    models.source(name).tags()  # imports are not what is timed
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        models.load(name, classes=3)
    assert time.monotonic() - start < 3
    assert str(offline / file) in str(caught.value)
    assert command in str(caught.value)
    assert "or to none" in str(caught.value)


def test_a_server_that_does_not_answer_takes_a_second() -> None:
    start = time.monotonic()
    assert not files.reachable("https://192.0.2.1/weights.pth")  # reserved for documentation: packets vanish
    assert time.monotonic() - start < 2


def test_a_name_server_that_does_not_answer_takes_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_more: time.sleep(6))
    start = time.monotonic()
    assert not files.reachable("https://download.pytorch.org/models/w.pth")
    assert time.monotonic() - start < 2


def test_tags(offline: Path) -> None:
    with pytest.raises(UserError, match='no weights "IMAGENET1K_V3"; did you mean "IMAGENET1K_V'):
        models.load("torchvision/resnet50", classes=3, weights="IMAGENET1K_V3")
    with pytest.raises(UserError, match='no weights "a9_in1k"; did you mean'):
        models.load("timm/resnet50", classes=3, weights="a9_in1k")
    with pytest.raises(UserError, match="has no pretrained weights"):
        models.load("timm/resnet50t", classes=3)


def test_torchvisions_cache(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    given = torchvision.models.mobilenet_v3_small(weights=None).state_dict()
    folder = offline / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(given, folder / "draft.pth")
    digest = hashlib.sha256((folder / "draft.pth").read_bytes()).hexdigest()[:8]
    path = (folder / "draft.pth").rename(folder / f"mobilenet_v3_small-{digest}.pth")
    member = torchvision.models.MobileNet_V3_Small_Weights.IMAGENET1K_V1
    monkeypatch.setattr(member.value, "url", f"https://download.pytorch.org/models/{path.name}")
    found = models.load("torchvision/mobilenet_v3_small", classes=4).module.state_dict()
    assert same_body(found, given, head="classifier.3.")
    assert found["classifier.3.weight"].shape == (4, 1024)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(UserError, match="its hash is not the one in its name"):
        models.load("torchvision/mobilenet_v3_small", classes=4)


def test_timms_cache(offline: Path) -> None:
    repository = offline / "hub" / "models--timm--resnet10t.c3_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123456789abcdef0123456789abcdef01234567")
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    torch.manual_seed(3)
    given = dict(timm.create_model("resnet10t").state_dict())
    save_file(given, snapshot / "model.safetensors")
    backbone = models.load("timm/resnet10t", classes=4)
    assert same_body(dict(backbone.module.state_dict()), given)
    assert backbone.input.size == (176, 176)
    with pytest.raises(UserError, match="timm cannot load the weights with these args"):
        models.load("timm/resnet10t", classes=4, args=SMALL)
