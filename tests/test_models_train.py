"""Any backbone really trains: a step of feature extraction and one of fine-tuning, with what the loop itself uses.

One small network for every module of timm and every family of torchvision, with random weights, 7 classes and a batch
of two, at its own image size or, where that takes long, a smaller one.
"""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torchvision
from nets import layer
from timm.models import model_entrypoint
from torch import nn
from torchvision.models import get_model_builder, list_models
from trainings import CLASSES, Training, alone, config_of, moved, values

from tlx.base.layers import LayerMap
from tlx.models.layers.kinds import is_norm
from tlx.plan.plan import Phase
from tlx.plan.unfreeze import head_only, two_phase
from tlx.train.evaluation import Validation, evaluate

CASES: dict[str, dict[str, Any]] = {
    "torchvision/alexnet": {},
    "torchvision/convnext_tiny": {"size": 64},
    "torchvision/densenet121": {"size": 64},
    "torchvision/efficientnet_b0": {},
    "torchvision/googlenet": {},
    "torchvision/inception_v3": {},
    "torchvision/maxvit_t": {},
    "torchvision/mnasnet0_5": {},
    "torchvision/mobilenet_v2": {},
    "torchvision/mobilenet_v3_small": {},
    "torchvision/regnet_y_400mf": {},
    "torchvision/resnet18": {},
    "torchvision/shufflenet_v2_x0_5": {},
    "torchvision/squeezenet1_1": {},
    "torchvision/swin_t": {},
    "torchvision/vgg11": {"size": 64},
    "torchvision/vit_b_16": {"args": {"image_size": 64}},
    "timm/beit_base_patch16_224": {"args": {"depth": 2}},
    "timm/cait_xxs24_224": {},
    "timm/coat_tiny": {},
    "timm/coatnet_pico_rw_224": {},
    "timm/convit_tiny": {},
    "timm/convmixer_768_32": {"size": 64},
    "timm/convnext_zepto_rms": {},
    "timm/cpubone_nano": {},
    "timm/crossvit_tiny_240": {},
    "timm/cs3darknet_focus_s": {},
    "timm/csatv2": {},
    "timm/cspnext_tiny": {},
    "timm/davit_tiny": {},
    "timm/deepseek_vit_412m": {"size": 126, "args": {"depth": 2, "embed_dim": 192, "num_heads": 4}},
    "timm/deit_tiny_distilled_patch16_224": {},
    "timm/densenet121": {"size": 64},
    "timm/dla46x_c": {},
    "timm/dpn48b": {},
    "timm/edgenext_xx_small": {},
    "timm/efficientformer_l1": {},
    "timm/efficientformerv2_s0": {},
    "timm/efficientvim_m1": {},
    "timm/efficientvit_b0": {},
    "timm/efficientvit_m0": {},
    "timm/ese_vovnet19b_slim_dw": {},
    "timm/eva02_tiny_patch14_224": {},
    "timm/fasternet_t0": {},
    "timm/fastvit_t8": {},
    "timm/focalnet_tiny_srf": {"size": 64},
    "timm/gcvit_xxtiny": {},
    "timm/gemma4_vit_167m": {"size": 192, "args": {"depth": 2}},
    "timm/ghostnet_050": {},
    "timm/gmlp_ti16_224": {},
    "timm/halonet_h1": {},
    "timm/hardcorenas_b": {},
    "timm/hgnetv2_b0": {},
    "timm/hiera_tiny_224": {},
    "timm/hrnet_w18_small": {"size": 64},
    "timm/iformer_t": {},
    "timm/inception_next_atto": {},
    "timm/inception_resnet_v2": {"size": 128},
    "timm/inception_v3": {"size": 128},
    "timm/inception_v4": {"size": 128},
    "timm/lcnetv2_small": {},
    "timm/legacy_seresnet18": {},
    "timm/legacy_xception": {"size": 128},
    "timm/levit_128s": {},
    "timm/lowformer_b0": {},
    "timm/mambaout_femto": {},
    "timm/mobilenetv2_035": {},
    "timm/mobilenetv3_small_050": {},
    "timm/mobilenetv5_base": {"size": 128},
    "timm/mobileone_s1": {},
    "timm/mobilevit_xxs": {},
    "timm/mvitv2_tiny": {},
    "timm/naflexvit_base_patch16_parfac_gap": {"size": 64},
    "timm/nasnetalarge": {"size": 96},
    "timm/nest_tiny": {},
    "timm/nextvit_small": {"size": 64},
    "timm/nf_regnet_b0": {},
    "timm/pit_ti_224": {},
    "timm/pnasnet5large": {"size": 96},
    "timm/poolformerv2_s12": {},
    "timm/pvt_v2_b0": {},
    "timm/qwen3_vit_88m": {"size": 224, "args": {"depth": 2}},
    "timm/rdnet_tiny": {"size": 64},
    "timm/regnetx_002": {},
    "timm/repghostnet_050": {},
    "timm/repvit_m1": {},
    "timm/res2next50": {"size": 64},
    "timm/resnest14d": {},
    "timm/resnet10t": {},
    "timm/resnetv2_18": {},
    "timm/rexnet_100": {},
    "timm/sam2_hiera_tiny": {"size": 224},
    "timm/samvit_base_patch16_224": {"args": {"depth": 3}},
    "timm/selecsls42": {"size": 64},
    "timm/sequencer2d_s": {"args": {"layers": [1, 1, 2, 1]}},
    "timm/shvit_s1": {},
    "timm/skresnet18": {},
    "timm/starnet_s050": {},
    "timm/swiftformer_xs": {},
    "timm/swin_tiny_patch4_window7_224": {},
    "timm/swinv2_cr_tiny_224": {},
    "timm/swinv2_tiny_window8_256": {},
    "timm/tiny_vit_5m_224": {},
    "timm/tnt_s_legacy_patch16_224": {},
    "timm/tresnet_m": {"size": 64},
    "timm/twins_svt_small": {},
    "timm/vgg11": {"args": {"mlp_ratio": 0.125}},
    "timm/visformer_tiny": {},
    "timm/vit_relpos_small_patch16_224": {},
    "timm/vit_tiny_patch16_224": {},
    "timm/vit_tiny_r_s16_p8_224": {},
    "timm/vitamin_small_224": {},
    "timm/volo_d1_224": {},
    "timm/xception41p": {"size": 128},
    "timm/xcit_nano_12_p8_224": {},
    "trainings:forked": {"size": 64},
}
"""What differs from the defaults: pixels of a side, arguments of the network."""

QUICK = (
    "torchvision/resnet18",
    "torchvision/googlenet",
    "timm/convnext_zepto_rms",
    "timm/deit_tiny_distilled_patch16_224",
    "timm/levit_128s",
    "timm/mobilenetv3_small_050",
    "timm/resnetv2_18",
    "trainings:forked",
)

KNOWN_FAILURES: dict[str, str] = {}
"""Networks that do not train, with the reason. README quotes them."""

REDUCED = tuple(CASES)[::9]
"""Those that also train in bf16."""


def runs() -> list[Any]:
    """Every network in fp32, some in bf16, the quick ones in the quick tier."""
    params = []
    for name, precision in [*((n, "fp32") for n in CASES), *((n, "bf16") for n in REDUCED)]:
        marks = [pytest.mark.slow] if name not in QUICK else []
        if name in KNOWN_FAILURES:
            marks.append(pytest.mark.xfail(reason=KNOWN_FAILURES[name], strict=True))
        params.append(pytest.param(name, precision, id=f"{name}-{precision}", marks=marks))
    return params


@pytest.mark.parametrize(("name", "precision"), runs())
def test_a_step_of_each_phase(name, precision):
    case = CASES[name]
    config = config_of(name, batch=2, args=case.get("args"))
    training = Training.of(config, alone(precision), size=case.get("size"))
    extraction, tuning = training.plan.phases
    norms = {path for path, module in training.backbone.module.named_modules() if is_norm(module)}
    assert norms == {path for y in training.plan.layers for path in y.norms}
    check(training, extraction)
    check(training, tuning)


def check(training: Training, phase: Phase) -> None:
    """One step: what trains gets a finite gradient and moves; nothing else does but statistics that are meant to."""
    net, layers = training.backbone.module, training.plan.layers
    parameters, before = dict(net.named_parameters()), values(net)
    phase_model = training.prepare_phase(phase)
    idle = {p.name for y in layers for p in y.parameters if p.idle and phase.trains[y.name] == "all"}
    for parameter in idle:
        parameters[parameter].requires_grad_()  # so that one that is not idle at all shows
    loss, _, samples, nonfinite = training.step(phase_model, phase, phase.start).tolist()
    assert torch.isfinite(torch.tensor(loss))
    assert (samples, nonfinite) == (2, 0)

    trained = {p.name for y in layers for p in phase.trained(y)}
    reached = {n: p.grad for n, p in parameters.items() if p.grad is not None}
    assert reached.keys() == trained, f"{len(trained - reached.keys())} without a gradient, {reached.keys() - trained}"
    assert all(torch.isfinite(g).all() for g in reached.values())

    changed, statistics = moved(net, before), statistics_that_move(training, phase)
    assert changed <= trained | statistics
    assert changed & statistics or not statistics
    # AdamW's first step is lr * g / (|g| + eps): less than that is lost in rounding
    assert {n for n, g in reached.items() if g.abs().max() > 1e-8} <= changed
    if phase.name == "feature_extraction":
        head = {p.name for p in layers.head.parameters}
        inside = {n for n, _ in net.named_buffers() if n.rpartition(".")[0] in layers.head.modules}
        assert changed <= head | inside
        assert head <= changed


def statistics_that_move(training: Training, phase: Phase) -> set[str]:
    """Buffers of the norms whose statistics move in a phase, as the layer map has them."""
    norms = {n for y in training.plan.layers if phase.norm_state(y).statistics == "moving" for n in y.moving}
    return {n for n, _ in training.backbone.module.named_buffers() if n.rpartition(".")[0] in norms}


class Caching(nn.Module):
    """Computes from its weights once, as attention biases of LeViT and others are until the network trains again."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.kept = nn.Parameter(torch.zeros(CLASSES)), None

    def train(self, mode: bool = True) -> Caching:
        super().train(mode)
        if mode:
            self.kept = None
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kept is None or self.training:
            self.kept = 2 * self.weight
        return x.mean((1, 2, 3))[:, None] * 0 + self.kept


def test_an_evaluation_sees_the_weights_of_now():
    training = Training.of(config_of("trainings:forked", batch=2), alone(), size=64)
    updater = training.updater
    validation = Validation(
        lambda: [training.batch(0)], "here", CLASSES, 5, updater.objective, updater.normalise, updater.world
    )

    def loss(net):
        return evaluate(net, validation, {}, lambda: 0, print)["loss"]

    net = Caching().eval()  # as the moving average of the weights always is
    before = loss(net)
    with torch.no_grad():
        net.weight[training.batch(0).labels] += 5
    assert loss(net) < before - 1


def test_the_head_is_the_new_part_even_where_a_pretrained_layer_is_called_head():
    layers = LayerMap((layer("stem", 0), layer("head", 1, role="classifier"), layer("head.fc", 1, role="head")))
    for schedule in (head_only, two_phase):
        assert [n for n, mode in schedule(layers)[0].trains.items() if mode != "frozen"] == ["head.fc"]


def test_every_module_of_timm_and_every_family_of_torchvision_is_here():
    tried = {model_entrypoint(n.removeprefix("timm/")).__module__ for n in CASES if n.startswith("timm/")}
    assert tried == {model_entrypoint(n).__module__ for n in timm.list_models()}
    families = {family(n.removeprefix("torchvision/")) for n in CASES if n.startswith("torchvision/")}
    assert families == {family(n) for n in list_models(module=torchvision.models)}


def family(name: str) -> str:
    return get_model_builder(name).__module__


def test_lists_name_cases():
    assert {*QUICK, *KNOWN_FAILURES} <= set(CASES)
