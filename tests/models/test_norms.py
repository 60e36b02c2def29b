"""The norm policy on every kind of norm that torch, torchvision and timm have, and BatchNorm over all ranks."""

from __future__ import annotations

import copy
import functools
import inspect
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import timm.layers.norm as plain
import torch
from commands import rows, tlx, write_config
from images import make_shards
from nets import layer
from timm import layers as timms
from timm.layers import grn, inplace_abn, norm_act
from timm.models import hgnet, metaformer, mlp_mixer
from torch import nn
from torch.nn.modules import batchnorm, instancenorm
from torchvision.models import convnext
from torchvision.ops import FrozenBatchNorm2d
from trainings import Alone, Training, alone, bits, config_of, moved, values

from tlx import models
from tlx.base.errors import UserError
from tlx.base.layers import LayerMap
from tlx.base.norms import POLICIES, NormState
from tlx.models.layers.kinds import is_norm, moves
from tlx.plan.plan import Phase, Plan
from tlx.ranks.collectives import World
from tlx.runs.checkpoint import weights_of
from tlx.train.freeze import synchronise
from tlx.train.recompute import recompute_blocks

WIDTH = 32

MOVING = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(timms.BatchNormAct2d, timms.SyncBatchNormAct, timms.SplitBatchNorm2d),
    *(timms.EvoNorm2dB0, timms.EvoNorm2dB1, timms.EvoNorm2dB2),
)
"""Classes that keep running statistics; InstanceNorm does where it is told to."""

TAKES: dict[type[nn.Module], str] = {
    **dict.fromkeys(MOVING, "map"),
    **dict.fromkeys((nn.BatchNorm1d, nn.InstanceNorm1d), "sequence"),
    **dict.fromkeys((nn.BatchNorm3d, nn.InstanceNorm3d), "volume"),
    **dict.fromkeys((nn.InstanceNorm2d, nn.GroupNorm, nn.LocalResponseNorm), "map"),
    **dict.fromkeys((nn.LayerNorm, nn.RMSNorm), "channels_last"),
    **dict.fromkeys((FrozenBatchNorm2d, timms.FrozenBatchNormAct2d, convnext.LayerNorm2d), "map"),
    **dict.fromkeys((timms.EvoNorm2dS0, timms.EvoNorm2dS0a, timms.EvoNorm2dS1, timms.EvoNorm2dS1a), "map"),
    **dict.fromkeys((timms.EvoNorm2dS2, timms.EvoNorm2dS2a), "map"),
    **dict.fromkeys((timms.FilterResponseNormAct2d, timms.FilterResponseNormTlu2d), "map"),
    **dict.fromkeys((plain.GroupNorm, plain.GroupNorm1, norm_act.GroupNormAct, norm_act.GroupNorm1Act), "map"),
    **dict.fromkeys((plain.LayerNorm2d, plain.LayerNorm2dFp32, plain.LayerNormExp2d), "map"),
    **dict.fromkeys((plain.RmsNorm2d, plain.RmsNorm2dFp32, plain.SimpleNorm2d, plain.SimpleNorm2dFp32), "map"),
    **dict.fromkeys((norm_act.LayerNormAct2d, norm_act.LayerNormAct2dFp32), "map"),
    **dict.fromkeys((norm_act.RmsNormAct2d, norm_act.RmsNormAct2dFp32), "map"),
    **dict.fromkeys((plain.LayerNorm, plain.LayerNormFp32, plain.RmsNorm, plain.RmsNormFp32), "channels_last"),
    **dict.fromkeys((plain.SimpleNorm, plain.SimpleNormFp32), "channels_last"),
    **dict.fromkeys((norm_act.LayerNormAct, norm_act.LayerNormActFp32), "channels_last"),
    **dict.fromkeys((norm_act.RmsNormAct, norm_act.RmsNormActFp32), "channels_last"),
    **dict.fromkeys((metaformer.GroupNorm1NoBias, metaformer.LayerNorm2dNoBias), "map"),
    **dict.fromkeys((metaformer.LayerNormNoBias, grn.GlobalResponseNorm), "channels_last"),
    **dict.fromkeys((hgnet.LearnableAffineBlock,), "map"),
    **dict.fromkeys((mlp_mixer.Affine,), "tokens"),
}
"""Every class of norm, and what it takes: [N, C, H, W], [N, H, W, C], [N, L, C], [N, C, L], [N, C, D, H, W]."""

OPTIONS: dict[type[nn.Module], tuple[Any, ...]] = {
    **dict.fromkeys((nn.GroupNorm,), (4, WIDTH)),
    **dict.fromkeys((plain.GroupNorm, norm_act.GroupNormAct), (WIDTH, 4)),
    **dict.fromkeys((nn.LocalResponseNorm,), (2,)),
    **dict.fromkeys((hgnet.LearnableAffineBlock,), ()),
}
"""Arguments, where they are not the number of channels."""

TRACKED = {"affine": True, "track_running_stats": True}
VARIANTS: dict[str, tuple[type[nn.Module], str, dict[str, Any]]] = {
    **{f"{c.__module__}.{c.__qualname__}": (c, takes, {}) for c, takes in TAKES.items()},
    "of vectors": (nn.BatchNorm1d, "vector", {}),
    "cumulative": (nn.BatchNorm2d, "map", {"momentum": None}),
    "without affine": (nn.BatchNorm2d, "map", {"affine": False}),
    "without statistics": (nn.BatchNorm2d, "map", {"track_running_stats": False}),
    "InstanceNorm1d with statistics": (nn.InstanceNorm1d, "sequence", TRACKED),
    "InstanceNorm2d with statistics": (nn.InstanceNorm2d, "map", TRACKED),
    "InstanceNorm3d with statistics": (nn.InstanceNorm3d, "volume", TRACKED),
}

DERIVED = {"timm.layers.split_batchnorm"}
"""Where classes are defined that inherit their statistics."""

CONTAINERS = (
    *("ClNormMlpClassifierHead", "NormMlpClassifierHead", "ConvNormAct", "GlobalResponseNormMlp", "NormMlp"),
    *("SeparableConvNormAct", "ConvMlpWithNorm", "ConvNorm", "NormLinear", "LinearNorm", "Conv2dNorm"),
    *("EvaBlockPostNorm", "DownsampleNormFirst", "NormalCell", "NormFreeBlock", "NormFreeNet"),
    *("Conv2dNormActivation", "Conv3dNormActivation", "ConvNormActivation"),
)
"""Classes with a norm inside or beside, by name."""


def make(variant: str) -> nn.Module:
    norm, _, options = VARIANTS[variant]
    return norm(*OPTIONS.get(norm, (WIDTH,)), **options)


class Around(nn.Module):
    """A norm on maps, whatever it takes."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.takes = VARIANTS[variant][1]
        self.norm = make(variant)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.takes == "channels_last":
            return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if self.takes == "tokens":
            return self.norm(x.flatten(2).transpose(1, 2)).transpose(1, 2).view_as(x)
        if self.takes == "vector":
            return x + self.norm(x.mean((2, 3)))[:, :, None, None]
        shape = {"sequence": (*x.shape[:2], -1), "volume": (*x.shape[:2], 1, *x.shape[2:])}.get(self.takes, x.shape)
        return self.norm(x.reshape(shape)).reshape(x.shape)


class Net(nn.Module):
    """Two convolutions with a norm each, and a classifier."""

    def __init__(self, classes: int, variant: str) -> None:
        super().__init__()
        self.below = nn.Sequential(nn.Conv2d(3, WIDTH, 3, stride=4), Around(variant), nn.Sigmoid())
        self.above = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, stride=2), Around(variant), nn.Sigmoid())
        self.fc = nn.Linear(WIDTH, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.above(self.below(x)).square().mean((2, 3)))


def net(classes: int, *, variant: str) -> nn.Module:
    """A backbone for `backbone: {name: "test_norms:net"}`."""
    return Net(classes, variant)


def phases_of(trained: dict[str, str]) -> dict[str, Any]:
    """A phase for every policy, each of which trains the same layers: all that a configuration says of them."""
    schedule = [{"name": policy, "layers": trained} for policy in POLICIES]
    own = {policy: {"norm": policy} for policy in POLICIES}
    return {
        "unfreeze": {"name": "explicit", "phases": schedule},
        "phases": {"each": {"lr": 1e-2, "duration": 1}, **own},
        "no_decay": [],  # so that decay would show
    }


OPTIMIZERS = [{"name": "sgd", "momentum": 0.9, "weight_decay": 0.1}, {"name": "adamw", "weight_decay": 0.1}]


def with_optimizers() -> list[Any]:
    """Every norm with every optimizer; in the quick tier torch's and those with statistics, an optimizer in turn."""
    params = []
    for i, (variant, (norm, _, _)) in enumerate(VARIANTS.items()):
        for j, optimizer in enumerate(OPTIMIZERS):
            quick = (i + j) % 2 and (norm in MOVING or norm.__module__.startswith("torch."))
            marks = [] if quick else [pytest.mark.slow]
            params.append(pytest.param(variant, optimizer, id=f"{variant}-{optimizer['name']}", marks=marks))
    return params


@pytest.mark.parametrize(("variant", "optimizer"), with_optimizers())
def test_every_policy_on_every_norm(variant, optimizer):
    backbone = {"name": "test_norms:net", "args": {"variant": variant}, "weights": "none", "layers": "module"}
    said = phases_of({"above*": "all", "head": "all"}) | {"backbone": backbone, "optimizer": optimizer}
    training = Training.of(config_of("unused", batch=4, **said), alone(), size=32)
    for phase in training.plan.phases:
        seen = a_step(training, phase)
        check(seen["below.1.norm"], phase.norm.frozen)
        check(seen["above.1.norm"], phase.norm.trained)


@dataclass
class Seen:
    """A norm as it was before a step, what it took and returned in it, and itself."""

    before: nn.Module
    now: nn.Module
    input: torch.Tensor | None = None
    output: torch.Tensor | None = None


def a_step(training: Training, phase: Phase) -> dict[str, Seen]:
    """A step of a phase, and every norm of the network in it, by path."""
    phase_model = training.prepare_phase(phase)
    norms = {path: m for path, m in phase_model.net.named_modules() if is_norm(m)}
    seen = {path: Seen(copy.deepcopy(norm), norm) for path, norm in norms.items()}
    hooks = [norm.register_forward_hook(functools.partial(_keep, seen=seen[path])) for path, norm in norms.items()]
    training.step(phase_model, phase, phase.start)
    for hook in hooks:
        hook.remove()
    return seen


def _keep(_norm: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor, *, seen: Seen) -> None:
    seen.input, seen.output = args[0].detach().clone(), output.detach().clone()


def check(seen: Seen, state: NormState) -> None:
    """Statistics and output are those of the mode that the state means; the affine part moved or did not."""
    moving, expected = state.statistics == "moving", copy.deepcopy(seen.before)
    assert torch.equal(expected.train(moving)(seen.input), seen.output)
    assert same(expected.buffers(), seen.now.buffers())
    assert same(seen.before.buffers(), seen.now.buffers()) != (moving and moves(seen.now))
    if state.affine == "frozen":
        assert same(seen.before.parameters(), seen.now.parameters())
    splits = isinstance(seen.now, timms.SplitBatchNorm2d) and not moving  # then its other norms do not run
    for before, now in zip(seen.before.parameters(not splits), seen.now.parameters(not splits), strict=True):
        assert (now.grad is None) == (state.affine == "frozen")
        assert torch.equal(bits(before), bits(now)) == (state.affine == "frozen")


def same(one: Iterable[torch.Tensor], other: Iterable[torch.Tensor]) -> bool:
    """Bit by bit."""
    return all(torch.equal(bits(a.detach()), bits(b.detach())) for a, b in zip(one, other, strict=True))


def test_what_moves_is_known():
    assert [v for v in VARIANTS if not is_norm(make(v))] == []
    tracked = {v for v, (norm, _, options) in VARIANTS.items() if norm in MOVING or options == TRACKED}
    assert {v for v in VARIANTS if moves(make(v))} == tracked - {"without statistics"}
    iabn = inplace_abn.InplaceAbn(WIDTH)  # timm's; runs only with a package of its own
    assert is_norm(iabn)
    assert moves(iabn)


def test_every_norm_of_the_libraries_is_here():
    named = {c for c in library_modules() if "norm" in c.__name__.lower() or "affine" in c.__name__.lower()}
    based = {c for c in library_modules() if issubclass(c, batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm)}
    abstract = {batchnorm._NormBase, batchnorm._BatchNorm, instancenorm._InstanceNorm, batchnorm._LazyNormBase}
    lazy = {c for c in named if issubclass(c, batchnorm._LazyNormBase)}  # they become the others when they first run
    found = {c for c in named | based if c.__name__ not in CONTAINERS} - abstract - lazy
    assert found == TAKES.keys()
    homes = {c.__module__ for c in library_modules()} - {nn.Module.__module__}  # which shows it in a docstring
    keeping = {m for m in homes if re.search(r"register_buffer\(\s*['\"]running_", inspect.getsource(sys.modules[m]))}
    assert keeping == {c.__module__ for c in (*MOVING, FrozenBatchNorm2d, inplace_abn.InplaceAbn)} - DERIVED


def library_modules() -> set[type[nn.Module]]:
    """Every class of module that torch.nn, timm's layers and networks and torchvision's define."""
    homes = ("torch.nn.modules.", "timm.layers", "timm.models", "torchvision.models.", "torchvision.ops")
    loaded = [m for name, m in list(sys.modules.items()) if name.startswith(homes)]
    classes = {c for m in loaded for c in vars(m).values() if inspect.isclass(c) and issubclass(c, nn.Module)}
    return {c for c in classes if c.__module__.startswith(homes)}


NETWORKS: dict[str, dict[str, Any]] = {
    "torchvision/resnet18": {"size": 64},
    "timm/levit_128s": {},  # BatchNorm1d, in the head too
    "timm/mobilenetv2_035": {"size": 64},  # BatchNormAct2d
    "timm/mobilenetv2_035 ": {"size": 64, "args": {"norm_layer": "evonormb0"}},
    "timm/resnetv2_50d_frn": {"size": 64},
    "timm/test_convnext2": {},  # LayerNorm on maps
    "timm/convnextv2_atto": {"size": 64},  # GlobalResponseNorm
    "timm/test_efficientnet_evos": {},
    "timm/test_efficientnet_gn": {},
    "timm/test_nfnet": {},  # none at all
    "timm/test_vit": {},
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (i > 2 or "frn" in n)) for i, n in enumerate(NETWORKS)]
)
def test_every_policy_on_real_networks(name):
    case = NETWORKS[name]
    layers = models.load(name.strip(), classes=7, weights="none", args=case.get("args", {}), empty=True).layers
    above = {layers.only(y): "all" for y in layers.layers[len(layers) // 2 :]}
    training = Training.of(
        config_of(name.strip(), batch=4, args=case.get("args"), **phases_of(above)), alone(), size=case.get("size")
    )
    net = training.backbone.module
    for phase in training.plan.phases:
        before = values(net)
        seen = a_step(training, phase)
        changed = moved(net, before)
        for one in training.plan.layers:
            state = phase.norm_state(one)
            running = {n for n in before if n.rpartition(".")[0] in one.norms and ".running_" in n}
            affine = {p.name for p in one.parameters if p.kind == "norm"}
            assert bool(running & changed) == (bool(running) and state.statistics == "moving"), one.name
            assert bool(affine & changed) == (bool(affine) and state.affine == "trained"), one.name
            for path in one.norms:
                expected = copy.deepcopy(seen[path].before).train(state.statistics == "moving")
                assert seen[path].input is None or torch.allclose(expected(seen[path].input), seen[path].output)


def test_what_is_random_in_a_norm_follows_its_layer_and_not_the_norm():
    backbone = {"name": "test_norms:dropping", "weights": "none", "layers": "module"}
    training = Training.of(
        config_of("unused", batch=4, backbone=backbone, **phases_of({"above*": "all", "head": "all"})), alone(), size=32
    )
    for phase in training.plan.phases:
        training.prepare_phase(phase)
        below, above = training.backbone.module.below[1], training.backbone.module.above[1]
        assert (below.training, above.training) == tuple(
            s.statistics == "moving" for s in (phase.norm.frozen, phase.norm.trained)
        )
        assert (below.drop.training, above.drop.training) == (False, True)


def dropping(classes: int) -> nn.Module:
    """timm puts a dropout of maps inside a norm."""
    net = Net(classes, "timm.layers.norm_act.GroupNormAct")
    for part in (net.below, net.above):
        part[1] = timms.BatchNormAct2d(WIDTH, drop_layer=nn.Dropout2d)
    return net


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, timms.EvoNorm2dB0, timms.BatchNormAct2d, nn.InstanceNorm2d])
def test_recomputed_statistics_move_once(norm):
    options = TRACKED if norm is nn.InstanceNorm2d else {}
    block = nn.Sequential(nn.Conv2d(3, WIDTH, 3), norm(WIDTH, **options))
    plain, again = nn.Sequential(block), nn.Sequential(copy.deepcopy(block))
    recompute_blocks(again, ["0"])
    images = torch.randn(4, 3, 8, 8)
    for net in (plain, again):
        net(images).square().sum().backward()
    assert same(plain.buffers(), again.buffers())
    assert same((p.grad for p in plain.parameters()), (p.grad for p in again.parameters()))


GPU = World(0, 1, torch.device("cuda"), False, Alone())
"""A world that says it has a GPU: enough for the conversion, which computes nothing."""

SYNCHRONISED = {nn.BatchNorm1d: nn.SyncBatchNorm, nn.BatchNorm2d: nn.SyncBatchNorm, nn.BatchNorm3d: nn.SyncBatchNorm}
SYNCHRONISED |= {timms.BatchNormAct2d: timms.SyncBatchNormAct}


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/mobilenetv2_035", "timm/levit_128s", "timm/test_nfnet"])
def test_synchronised_norms_keep_names_values_and_what_they_compute(name):
    backbone = models.load(name, classes=7, weights="none")
    net, before = backbone.module, copy.deepcopy(backbone.module)
    parameters, saved, classes = dict(net.named_parameters()), values(net), {n: type(m) for n, m in net.named_modules()}
    synchronise(net, GPU)
    assert {n: type(m) for n, m in net.named_modules()} == {n: SYNCHRONISED.get(c, c) for n, c in classes.items()}
    assert all(p is parameters[n] for n, p in net.named_parameters())
    assert list(weights_of(net)) == list(weights_of(before))
    assert not moved(net, saved)
    assert [n for y in backbone.layers for n in y.moving] == [n for n, m in net.named_modules() if moves(m)]
    images = torch.randn(2, 3, *backbone.input.size)
    with torch.no_grad():
        assert torch.equal(net.eval()(images), before.eval()(images))
        assert torch.equal(net.train()(images), before.train()(images))  # on one rank, statistics too
    assert same(net.buffers(), before.buffers())
    copied = copy.deepcopy(net)  # as the moving average of the weights is made
    assert not moved(copied, values(net))


def test_synchronised_norms_keep_hooks_and_stay_shared():
    norm = nn.BatchNorm2d(4)
    seen: list[str] = []
    norm.register_forward_hook(lambda *_: seen.append("called"))
    net = nn.Sequential(norm, nn.Sequential(norm))
    synchronise(net, GPU)
    assert net[0] is net[1][0]
    assert isinstance(net[0], nn.SyncBatchNorm)
    net.eval()(torch.randn(2, 4, 3, 3))
    assert seen == ["called"] * 2


def test_a_head_that_taps_a_norm_survives_synchronising():
    backbone = models.load("torchvision/densenet121", classes=7, weights="none", head="concat_pool")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = backbone.module.eval()(images)
        synchronise(backbone.module, GPU)
        assert torch.equal(backbone.module(images), before)


def test_what_cannot_be_synchronised_is_said():
    with pytest.raises(UserError, match="SyncBatchNorm needs GPUs"):
        synchronise(nn.BatchNorm2d(4), alone())
    with pytest.raises(UserError, match=r"SplitBatchNorm2d cannot be synchronised") as caught:
        synchronise(nn.Sequential(timms.SplitBatchNorm2d(4), nn.BatchNorm2d(4)), GPU)
    assert caught.value.where == "loop.sync_batchnorm"
    converted = nn.Sequential(nn.SyncBatchNorm(4))
    synchronise(converted, GPU)
    assert type(converted[0]) is nn.SyncBatchNorm


@pytest.mark.slow
def test_synchronising_without_a_gpu_is_refused_before_the_first_step(tmp_path):
    shards = make_shards(tmp_path / "s", classes=2, per_class=6, size=16)
    raw = {
        "run": str(tmp_path / "run"),
        "data": {"train": str(shards / "train"), "batch": 4, "workers": 0},
        "input": {"size": 16},
        "backbone": {"name": "toys:small", "weights": "none"},
        "phases": {"each": {"lr": 0.1, "duration": 2}},
        "loop": {"sync_batchnorm": True},
    }
    done = tlx("train", write_config(tmp_path / "c.yaml", raw), is_forked=True)
    assert done.returncode == 2
    assert "loop.sync_batchnorm: SyncBatchNorm needs GPUs: torch has none for CPUs" in done.stderr
    assert not (tmp_path / "run").exists()


def warnings(world: int, *, batch: int = 8, samples: int = 32, **loop: Any) -> str:
    config = config_of("toys:small", batch=batch, loop=loop)
    layers = LayerMap((layer("features", 0, norm=True), layer("fc", 1, role="head")))
    said = Plan.make(config, layers, samples=samples, world=world).warnings
    return "; ".join(warning for warning in said if "BatchNorm" in warning)


def test_the_plan_says_what_synchronised_statistics_are_of():
    assert warnings(2) == (
        "BatchNorm statistics move in fine_tuning: results depend on the micro-batch size (4 at 2 ranks)"
    )
    whole = "BatchNorm statistics move in fine_tuning: they are of the global batch of 8, whatever the number of ranks"
    assert {warnings(world, sync_batchnorm=True) for world in (1, 2, 8)} == {whole}
    assert warnings(2, sync_batchnorm=True, micro_batch=2) == (
        "BatchNorm statistics move in fine_tuning: they are of all ranks' micro-batches together, so results depend on "
        "the 2 parts of a global batch (4 samples at a time)"
    )


def test_one_sample_on_each_rank_is_enough_for_synchronised_statistics_and_none_is_refused():
    with pytest.raises(UserError, match="a batch of 8 on 8 ranks makes micro-batches of one sample"):
        warnings(8)
    assert warnings(8, sync_batchnorm=True)
    with pytest.raises(UserError, match="a batch of 3 on 8 ranks leaves a rank without a sample"):
        warnings(8, samples=35, sync_batchnorm=True)
    with pytest.raises(UserError, match="makes micro-batches of one sample"):
        warnings(1, samples=33, sync_batchnorm=True)


@pytest.mark.gpu
def test_two_ranks_that_synchronise_train_as_one(tmp_path):
    """Two ranks share a GPU over gloo; the statistics of both are those of the global batch."""
    shards = make_shards(tmp_path / "s", classes=3, per_class={"train": 16, "val": 8}, size=40)
    raw = {
        "run": "unset",
        "data": {"train": str(shards / "train"), "val": str(shards / "val"), "batch": 16, "workers": 0},
        "input": {"size": 32},
        "backbone": {"name": "toys:small", "weights": "none"},
        "unfreeze": "all",
        "phases": {"each": {"lr": 0.01, "duration": "4ep"}},
        "world": {"backend": "gloo"},
        "track": {"every": 1, "report": False},
    }
    config, losses = write_config(tmp_path / "c.yaml", raw), {}
    for name, ranks, words in [("one", 1, []), ("two", 2, ["loop.sync_batchnorm=true"]), ("apart", 2, [])]:
        done = tlx(
            "train", config, f"run={tmp_path / name}", *words, ranks=ranks, ACCELERATE_USE_CPU="false", is_forked=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        losses[name] = [row["train/loss"] for row in rows(tmp_path / name) if "train/lr_head" in row]
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-2)
    assert losses["apart"] != pytest.approx(losses["one"], rel=1e-2)
