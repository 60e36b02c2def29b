"""Ordered layers of real networks, against what a person reads in their sources."""

from __future__ import annotations

import functools
import inspect
from fnmatch import fnmatch

import pytest
import torch
from backbone_cases import CASES
from timm.models import model_entrypoint
from torch import nn

from tlx import models
from tlx.models import Description


@functools.cache
def described(name: str) -> Description:
    return models.describe(name, measured=False)


def grid(pattern: str, counts: list[int], first: int = 0) -> list[str]:
    """``layer{}.{}`` with 2, 3 -> layer1.0, layer1.1, layer2.0 ..."""
    return [pattern.format(i, j) for i, n in enumerate(counts, first) for j in range(n)]


def numbered(pattern: str, first: int, last: int) -> list[str]:
    return [pattern.format(i) for i in range(first, last + 1)]


STAGES = ["stage1", "stage2", "stage3", "stage4", "stage5"]
RESNET = ["layer1", "layer2", "layer3", "layer4"]

# name: (stages, blocks, modules, the layers at the end that share the head's depth)
EXPECTED: dict[str, tuple[list[str], list[str], list[str], list[str]]] = {
    "torchvision/vgg16": (
        STAGES,
        [f"features.{i}" for i in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)],
        numbered("features.{}", 0, 30),
        ["classifier", "classifier.6"],
    ),
    "torchvision/vgg16_bn": (
        STAGES,
        [f"features.{i}" for i in (0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40)],
        numbered("features.{}", 0, 43),
        ["classifier", "classifier.6"],
    ),
    **{
        f"torchvision/resnet{depth}": (
            ["stem", *RESNET],
            ["stem", *grid("layer{}.{}", counts, 1)],
            ["conv1", "bn1", *RESNET],
            ["fc"],
        )
        for depth, counts in {18: [2, 2, 2, 2], 34: [3, 4, 6, 3], 50: [3, 4, 6, 3], 152: [3, 8, 36, 3]}.items()
    },
    "torchvision/mobilenet_v2": (
        ["stem", *STAGES],
        ["stem", *numbered("features.{}", 1, 18)],
        numbered("features.{}", 0, 18),
        ["classifier.1"],
    ),
    "torchvision/mobilenet_v3_small": (
        ["stem", *STAGES[:4]],
        ["stem", *numbered("features.{}", 1, 12)],
        numbered("features.{}", 0, 12),
        ["classifier.0", "classifier.3"],
    ),
    "torchvision/mobilenet_v3_large": (
        ["stem", *STAGES],
        ["stem", *numbered("features.{}", 1, 16)],
        numbered("features.{}", 0, 16),
        ["classifier.0", "classifier.3"],
    ),
    "torchvision/efficientnet_b0": (
        ["stem", *STAGES],
        ["stem", *grid("features.{}.{}", [1, 2, 2, 3, 3, 4, 1], 1), "features.8"],
        numbered("features.{}", 0, 8),
        ["classifier.1"],
    ),
    "torchvision/convnext_tiny": (
        ["stem", "features.1", "features.3", "features.5", "features.7"],
        ["stem", *[f"features.{s}.{i}" for s, n in ((1, 3), (3, 3), (5, 9), (7, 3)) for i in range(n)]],
        numbered("features.{}", 0, 7),
        ["classifier.0", "classifier.2"],
    ),
    "torchvision/inception_v3": (
        ["stem", *STAGES[:3]],
        ["stem", *[f"Mixed_{x}" for x in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")]],
        [f"Conv2d_{x}" for x in ("1a_3x3", "2a_3x3", "2b_3x3", "3b_1x1", "4a_3x3")]
        + [f"Mixed_{x}" for x in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")],
        ["fc"],
    ),
    "torchvision/googlenet": (
        ["stem", *STAGES[:3]],
        ["stem", *[f"inception{x}" for x in ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b")]],
        ["conv1", "conv2", "conv3"] + [f"inception{x}" for x in ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b")],
        ["fc"],
    ),
    "torchvision/densenet121": (
        ["stem", *numbered("features.denseblock{}", 1, 4)],
        [
            "stem",
            *[
                f"features.denseblock{b}.denselayer{i}"
                for b, n in ((1, 6), (2, 12), (3, 24), (4, 16))
                for i in range(1, n + 1)
            ],
        ],
        [f"features.{x}" for x in ("conv0", "norm0", "relu0", "pool0", "denseblock1", "transition1", "denseblock2")]
        + [f"features.{x}" for x in ("transition2", "denseblock3", "transition3", "denseblock4", "norm5")],
        ["features.norm5", "classifier"],
    ),
    "torchvision/vit_b_16": (
        ["stem", "encoder.layers"],
        ["stem", *numbered("encoder.layers.encoder_layer_{}", 0, 11)],
        ["conv_proj", *numbered("encoder.layers.encoder_layer_{}", 0, 11)],
        ["encoder.ln", "heads.head"],
    ),
    "torchvision/swin_t": (
        ["stem", "features.1", "features.3", "features.5", "features.7"],
        ["stem", *[f"features.{s}.{i}" for s, n in ((1, 2), (3, 2), (5, 6), (7, 2)) for i in range(n)]],
        numbered("features.{}", 0, 7),
        ["norm", "head"],
    ),
    "timm/resnet50": (
        ["stem", *RESNET],
        ["stem", *grid("layer{}.{}", [3, 4, 6, 3], 1)],
        ["conv1", "bn1", *RESNET],
        ["fc"],
    ),
    "timm/resnet10t": (
        ["stem", *RESNET],
        ["stem", *grid("layer{}.{}", [1, 1, 1, 1], 1)],
        ["conv1", "bn1", *RESNET],
        ["fc"],
    ),
    "timm/convnext_tiny": (
        ["stem", *numbered("stages.{}", 0, 3)],
        ["stem", *grid("stages.{}.blocks.{}", [3, 3, 9, 3])],
        ["stem", *numbered("stages.{}", 0, 3)],
        ["head.norm", "head.fc"],
    ),
    **{
        f"timm/{name}": (
            ["stem", "blocks"],
            ["stem", *numbered("blocks.{}", 0, 11)],
            ["patch_embed", *numbered("blocks.{}", 0, 11)],
            ["norm", "head"],
        )
        for name in (
            "vit_tiny_patch16_224",
            "vit_base_patch16_224",
            "deit_tiny_patch16_224",
            "deit_tiny_distilled_patch16_224",
        )
    },
    "timm/swin_tiny_patch4_window7_224": (
        ["stem", *numbered("layers.{}", 0, 3)],
        ["stem", *grid("layers.{}.blocks.{}", [2, 2, 6, 2])],
        ["patch_embed", *numbered("layers.{}", 0, 3)],
        ["norm", "head.fc"],
    ),
    "timm/mobilenetv2_100": (
        ["stem", *STAGES],
        ["stem", *grid("blocks.{}.{}", [1, 2, 3, 4, 3, 3, 1]), "conv_head"],
        ["conv_stem", "bn1", *numbered("blocks.{}", 0, 6), "conv_head", "bn2"],
        ["classifier"],
    ),
    "timm/mobilenetv3_small_100": (
        ["stem", *STAGES[:4]],
        ["stem", *grid("blocks.{}.{}", [1, 2, 3, 2, 3, 1])],
        ["conv_stem", "bn1", *numbered("blocks.{}", 0, 5)],
        ["conv_head", "classifier"],
    ),
    "timm/mobilenetv3_large_100": (
        ["stem", *STAGES],
        ["stem", *grid("blocks.{}.{}", [1, 2, 3, 4, 2, 3, 1])],
        ["conv_stem", "bn1", *numbered("blocks.{}", 0, 6)],
        ["conv_head", "classifier"],
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_layers_and_depths(name: str) -> None:
    stages, blocks, modules, ends = EXPECTED[name]
    layers = described(name).layers
    for granularity, body in (("stage", stages), ("block", blocks), ("module", modules)):
        found = layers[granularity]
        own_depth = [e for e in ends if e not in body]  # densenet's last norm is a module of the trunk, too
        assert list(found.names) == [*body, *own_depth]
        assert [y.depth for y in found] == [*range(len(body)), *[len(body)] * len(own_depth)]
        assert found.layers[-1].role == "head"


@pytest.mark.parametrize("name", ["torchvision/resnet50", "torchvision/vit_b_16", "timm/swin_tiny_patch4_window7_224"])
def test_a_coarser_cut_holds_the_same_parameters(name: str) -> None:
    sets = [{p for y in m for p in y.parameters} for m in described(name).layers.values()]
    assert sets[0] == sets[1] == sets[2]


def layer_of(name: str, parameter: str, granularity: str = "block") -> str:
    layers = described(name).layers[granularity]  # type: ignore[index]
    return next(y.name for y in layers if any(p.name == parameter for p in y.parameters))


def test_tokens_and_embeddings_are_in_the_stem() -> None:
    assert layer_of("torchvision/vit_b_16", "class_token") == "stem"
    assert layer_of("torchvision/vit_b_16", "encoder.pos_embedding") == "stem"
    for name in ("cls_token", "dist_token", "pos_embed", "patch_embed.proj.weight"):
        assert layer_of("timm/deit_tiny_distilled_patch16_224", name) == "stem"
        assert layer_of("timm/deit_tiny_distilled_patch16_224", name, "module") == "patch_embed"


def test_a_token_that_enters_late_still_is_an_embedding() -> None:
    assert layer_of("timm/cait_xxs24_224", "cls_token") == "stem"
    last = described("timm/cait_xxs24_224").layers["block"].names[-5:]
    assert last == ("blocks.23", "blocks_token_only.0", "blocks_token_only.1", "norm", "head")


# what runs side by side, and stages of unusual make: (stages, blocks), the head and what shares its depth last
UNUSUAL: dict[str, tuple[list[str], list[str]]] = {
    "torchvision/maxvit_t": (  # convolution, window attention and grid attention are one block
        ["stem", *numbered("blocks.{}", 0, 3), "classifier", "classifier.5"],
        ["stem", *grid("blocks.{}.layers.{}", [2, 2, 5, 2]), "classifier", "classifier.5"],
    ),
    "timm/maxvit_tiny_tf_224": (
        ["stem", *numbered("stages.{}", 0, 3), "head.norm", "head.fc"],
        ["stem", *grid("stages.{}.blocks.{}", [2, 2, 5, 2]), "head.norm", "head.fc"],
    ),
    "timm/hrnet_w18_small": (  # branches of one module are one block; stages are the trunk's children
        ["stem", "layer1", "stage2", "stage3", "stage4", "incre_modules", "classifier"],
        [
            *("stem", "layer1.0", "stage2.0", "stage3.0", "stage4.0", *numbered("incre_modules.{}.0", 0, 3)),
            *("downsamp_modules.2", "final_layer", "classifier"),
        ],
    ),
    "timm/crossvit_tiny_240": (
        ["stem", "blocks", "norm.0", "norm.1", "head.0"],
        ["stem", *numbered("blocks.{}", 0, 2), "norm.0", "norm.1", "head.0"],
    ),
    "timm/coat_tiny": (  # position encodings that blocks share are in the first block that runs them
        ["stem", *STAGES, "head"],
        [
            *("stem", *[f"serial_blocks{s}.{i}" for s in (1, 2, 3, 4) for i in (0, 1)]),
            *(*numbered("parallel_blocks.{}", 0, 5), "norm2", "norm3", "norm4", "aggregate", "head"),
        ],
    ),
    "timm/pit_ti_224": (  # a stage that puts the class token in front joins, but is no block
        ["stem", *numbered("transformers.{}", 0, 2), "norm", "head"],
        ["stem", *grid("transformers.{}.blocks.{}", [2, 6, 4]), "norm", "head"],
    ),
    "timm/cspresnet50": (  # one branch of a cross-stage partial stage is a row of blocks
        ["stem", *numbered("stages.{}", 0, 3), "head.fc"],
        ["stem", *grid("stages.{}.blocks.{}", [3, 3, 5, 2]), "head.fc"],
    ),
    "timm/fastvit_t8": (  # three multi-branch convolutions are the stem
        ["stem", *STAGES[:4], "head.fc"],
        ["stem", *numbered("stages.0.blocks.{}", 0, 1)]
        + [
            f"stages.{s}.{x}"
            for s, n in ((1, 2), (2, 4), (3, 2))
            for x in ("downsample.proj.0", "downsample.proj.1", *numbered("blocks.{}", 0, n - 1))
        ]
        + ["final_conv", "head.fc"],
    ),
    "timm/vit_base_patch16_siglip_224": (  # pooling by attention is at the head's depth
        ["stem", "blocks", "norm", "attn_pool", "head"],
        ["stem", *numbered("blocks.{}", 0, 11), "norm", "attn_pool", "head"],
    ),
    "timm/resnet50_clip": (
        ["stem", *numbered("stages.{}", 0, 3), "head.q", "head.proj"],
        ["stem", *grid("stages.{}.{}", [3, 4, 6, 3]), "head.q", "head.proj"],
    ),
    "timm/mobilenetv1_100": (  # a plain network
        [*STAGES, "classifier"],
        ["conv_stem", *grid("blocks.{}.{}", [1, 2, 2, 6, 2]), "classifier"],
    ),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_layers_of_unusual_networks(name: str) -> None:
    layers = described(name).layers
    assert (list(layers["stage"].names), list(layers["block"].names)) == UNUSUAL[name]


def test_what_shares_the_heads_depth() -> None:
    for name, names in {
        "timm/vit_base_patch16_siglip_224": {"norm", "attn_pool", "head"},
        "timm/crossvit_tiny_240": {"norm.0", "norm.1", "head.0"},
        "timm/resnet50_clip": {"head.q", "head.proj"},
        "timm/coat_tiny": {"head"},
    }.items():
        layers = described(name).layers["block"]
        assert {y.name for y in layers if y.depth == layers.head.depth} == names


def test_no_layer_but_the_head_is_called_head() -> None:
    """A pattern or schedule that says head must not train what was pretrained beside it."""
    for name in ("timm/maxvit_tiny_tf_224", "timm/resnet50_clip", "timm/test_mambaout"):
        for layers in described(name).layers.values():
            assert [y.role for y in layers if y.name == "head"] == []
            assert layers.match("head") == (layers.head,)


def test_what_joins_the_branches_of_a_stage_belongs_to_its_last_block() -> None:
    assert layer_of("timm/cspresnet50", "stages.0.conv_transition.conv.weight") == "stages.0.blocks.2"
    assert layer_of("timm/mobilevit_xxs", "stages.2.1.conv_fusion.conv.weight") == "stages.2.1.transformer.1"
    assert layer_of("timm/coat_tiny", "cpe1.proj.weight") == "serial_blocks1.0"


def test_groups_of_timm_that_lump_blocks_are_not_used() -> None:
    """timm's finest groups of PVT are its stages."""
    assert list(described("timm/pvt_v2_b0").layers["block"].names) == [
        "stem",
        *grid("stages.{}.blocks.{}", [2, 2, 2, 2]),
        "stages.3.norm",
        "head",
    ]


def test_a_downsampling_belongs_to_the_block_after_it() -> None:
    assert layer_of("torchvision/swin_t", "features.2.reduction.weight") == "features.3.0"
    assert layer_of("torchvision/convnext_tiny", "features.4.1.weight") == "features.5.0"
    assert layer_of("timm/convnext_tiny", "stages.2.downsample.1.weight") == "stages.2.blocks.0"
    assert layer_of("torchvision/resnet50", "layer2.0.downsample.0.weight") == "layer2.0"
    for library in ("timm", "torchvision"):
        transition = "features.transition1.conv.weight"
        assert layer_of(f"{library}/densenet121", transition) == "features.denseblock2.denselayer1"


def test_heads_and_auxiliary_branches() -> None:
    head = described("torchvision/inception_v3").layers["block"].head
    assert {p.name.partition(".")[0] for p in head.parameters} == {"fc"}
    assert layer_of("torchvision/inception_v3", "AuxLogits.conv0.conv.weight") == "Mixed_6e"
    assert layer_of("torchvision/googlenet", "aux1.fc2.weight") == "inception4a"
    assert layer_of("torchvision/googlenet", "aux2.conv.bn.weight") == "inception4d"
    distilled = described("timm/deit_tiny_distilled_patch16_224").layers["block"].head
    assert [p.name for p in distilled.parameters] == ["head.weight", "head.bias", "head_dist.weight", "head_dist.bias"]
    assert described("torchvision/inception_v3").row.auxiliary == ("AuxLogits.fc",)


def test_roles_of_a_classifier_block() -> None:
    layers = described("torchvision/vgg16_bn").layers["module"]
    classifier, head = layers.match("classifier")[0], layers.head
    assert [p.name for p in classifier.parameters] == [
        f"classifier.{i}.{x}" for i in (0, 3) for x in ("weight", "bias")
    ]
    assert classifier.role == "classifier"
    assert head.modules == ("classifier.4", "classifier.5", "classifier.6")  # ReLU and dropout just before it
    assert classifier.modules == ("classifier.0", "classifier.1", "classifier.2", "classifier.3")
    assert [y.name for y in described("timm/mobilenetv3_small_100").layers["block"].match("classifier")] == [
        "conv_head",
        "classifier",
    ]


def test_parameterless_modules_count_in_a_plain_trunk_only() -> None:
    layers = described("torchvision/vgg16_bn").layers["module"]
    assert [y.name for y in layers if not y.parameters][:3] == ["features.2", "features.5", "features.6"]
    assert next(y for y in layers if y.name == "features.43").modules == ("features.43",)
    assert layers.depths == 45
    stem = described("torchvision/resnet50").layers["block"].layers[0]
    assert stem.modules == ("conv1", "bn1", "relu", "maxpool")
    assert described("torchvision/resnet50").layers["module"].layers[1].modules == ("bn1", "relu", "maxpool")


@pytest.mark.parametrize("name", ["torchvision/resnet50", "torchvision/vgg16_bn", "timm/convnext_tiny"])
@pytest.mark.parametrize("granularity", ["stage", "block", "module"])
def test_every_leaf_module_is_in_one_layer(name: str, granularity: str) -> None:
    net = models.load(name, classes=10, weights="none", empty=True).module
    layers = described(name).layers[granularity]  # type: ignore[index]
    owned = [m for y in layers for m in y.modules]
    leaves = [path for path, m in net.named_modules() if path and not any(True for _ in m.children())]
    assert len(owned) == len(set(owned))
    assert set(leaves) <= set(owned)


def test_norms_are_found_in_every_variant() -> None:
    for name, count in {
        "torchvision/resnet50": 53,
        "torchvision/densenet121": 121,
        "torchvision/vit_b_16": 25,
        "timm/mobilenetv2_100": 52,  # BatchNormAct2d
        "timm/convnext_tiny": 23,  # LayerNorm and LayerNorm2d
    }.items():
        assert sum(len(y.norms) for y in described(name).layers["block"]) == count
    moving = [y.moving for y in described("timm/mobilenetv2_100").layers["block"]]
    assert sum(map(len, moving)) == 52
    assert not any(y.moving for y in described("timm/convnext_tiny").layers["block"])


def test_kinds_of_norms_that_share_no_base_class() -> None:
    import timm.layers
    from torchvision.ops import FrozenBatchNorm2d

    from tlx.models.layers.kinds import is_norm, moves

    norms = [
        *(FrozenBatchNorm2d(4), nn.SyncBatchNorm(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.RMSNorm(4)),
        *(timm.layers.GroupNormAct(4, 2), timm.layers.LayerNormAct(4), timm.layers.LayerNorm2d(4)),
        *(timm.layers.EvoNorm2dS0(4, groups=2), timm.layers.FilterResponseNormTlu2d(4), timm.layers.RmsNorm(4)),
        *(timm.layers.FrozenBatchNormAct2d(4), timm.layers.BatchNormAct2d(4), timm.layers.grn.GlobalResponseNorm(4)),
    ]
    assert [type(n).__name__ for n in norms if not is_norm(n)] == []
    assert {type(n).__name__ for n in norms if moves(n)} == {"SyncBatchNorm", "BatchNormAct2d"}
    assert not is_norm(timm.layers.ConvNormAct(3, 4, 1))
    assert not is_norm(nn.Linear(3, 4))


def test_kinds_of_parameters() -> None:
    def kinds(name: str) -> dict[str, str]:
        return {p.name: p.kind for y in described(name).layers["block"] for p in y.parameters}

    vit = kinds("torchvision/vit_b_16")
    assert vit["class_token"] == vit["encoder.pos_embedding"] == "embedding"
    layer = "encoder.layers.encoder_layer_0"
    assert vit[f"{layer}.self_attention.in_proj_bias"] == "bias"
    assert vit[f"{layer}.self_attention.in_proj_weight"] == vit["conv_proj.weight"] == "weight"
    assert vit[f"{layer}.ln_1.bias"] == "norm"
    assert kinds("torchvision/convnext_tiny")["features.1.0.layer_scale"] == "scale"
    assert kinds("timm/convnext_tiny")["stages.0.blocks.0.gamma"] == "scale"
    table = "attn.relative_position_bias_table"
    assert kinds("torchvision/swin_t")[f"features.1.0.{table}"] == "embedding"
    assert kinds("timm/swin_tiny_patch4_window7_224")[f"layers.0.blocks.0.{table}"] == "embedding"
    resnet = kinds("torchvision/resnet50")
    assert {k for n, k in resnet.items() if "bn" in n or "downsample.1" in n} == {"norm"}
    assert {k for n, k in resnet.items() if "conv" in n or n == "fc.weight"} == {"weight"}


EXEMPT = {  # matrices that the authors' own lists keep from decay, beside what has no matrix or is a table
    "timm/swinv2_tiny_window8_256": {".attn.cpb_mlp.0.weight": 12, ".attn.cpb_mlp.2.weight": 12},
    "torchvision/swin_v2_t": {".attn.cpb_mlp.0.weight": 12, ".attn.cpb_mlp.2.weight": 12},
    "timm/twins_svt_small": {".proj.0.weight": 4},
    "timm/xcit_nano_12_p16_224": {"pos_embed.token_projection.weight": 1},
}


@pytest.mark.parametrize("name", EXEMPT)
def test_what_the_authors_exempt_from_decay(name: str) -> None:
    net = models.load(name, classes=3, weights="none", empty=True)
    found = {p.name for y in net.layers for p in y.parameters if p.kind == "embedding" and p.name.endswith(".weight")}
    assert {end: sum(name.endswith(end) for name in found) for end in EXEMPT[name]} == EXEMPT[name]
    assert len(found) == sum(EXEMPT[name].values())


def lists_some(name: str) -> bool:
    module = inspect.getmodule(model_entrypoint(name.removeprefix("timm/")))
    assert module is not None
    return "def no_weight_decay" in inspect.getsource(module)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("timm/") and lists_some(n)])
def test_every_familys_own_list_is_kept_from_decay(name: str) -> None:
    """As timm's optimizers read it: shell patterns over names."""
    net = models.load(name, classes=3, weights="none", empty=True, args=CASES[name].get("args", {}))
    listed = getattr(net.module, "no_weight_decay", set)()
    kinds = {p.name: p.kind for y in net.layers for p in y.parameters}
    decaying = [n for n, kind in kinds.items() if kind == "weight" and any(fnmatch(n, w) for w in listed)]
    assert decaying == []


def test_blocks_for_checkpointing_are_modules() -> None:
    assert described("torchvision/resnet50").blocks[:4] == ("layer1.0", "layer1.1", "layer1.2", "layer2.0")
    assert len(described("torchvision/mobilenet_v2").blocks) == 17  # those without a shortcut, too
    assert len(described("timm/vit_base_patch16_224").blocks) == 12
    assert described("torchvision/vgg16_bn").blocks == ()
    assert len(described("timm/vit_base_patch16_siglip_224").blocks) == 12  # the pooling by attention is none


class Branching(nn.Module):
    """Blocks defined in another order than they run, a token used late, a module that never runs."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.late = Residual(8)
        self.fc = nn.Linear(8, classes)
        self.early = Residual(8)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.offset = nn.Parameter(torch.zeros(1, 8, 1, 1))
        self.spare = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.late(self.early(self.stem(x)) + self.offset)
        return self.fc(x.mean((2, 3)))


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norm(self.conv(x)).relu_()


def branching(classes: int) -> nn.Module:
    return Branching(classes)


def test_execution_order_counts_not_definition_order() -> None:
    backbone = models.load(f"{__name__}:branching", classes=5)
    layers = backbone.layers
    assert layers.names == ("stem", "early", "late", "fc")
    assert backbone.blocks == ("early", "late")
    owner = {p.name: y.name for y in layers for p in y.parameters}
    assert owner["offset"] == "early"  # first used after it
    assert {p.name for y in layers for p in y.parameters if p.idle} == {"spare.weight", "spare.bias"}
    assert set(owner) == {n for n, _ in backbone.module.named_parameters()}
    assert backbone.module.training  # tracing leaves the network as it was
    assert int(backbone.module.early.norm.num_batches_tracked) == 0  # type: ignore[union-attr]
