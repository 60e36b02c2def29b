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
from timm import layers as timms
from timm.layers import grn, inplace_abn, norm_act
from timm.models import hgnet, metaformer, mlp_mixer
from torch import nn
from torch.nn.modules import batchnorm, instancenorm
from torchvision.models import convnext
from torchvision.ops import FrozenBatchNorm2d
from trainings import Training, alone, bits, config_of

from tlx.models.kinds import is_norm, moves
from tlx.norms import POLICIES, NormState
from tlx.plan import Phase

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
    """A backbone for `backbone: {name: "test_models_norms:net"}`."""
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


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: o["name"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_policy_on_every_norm(variant, optimizer):
    backbone = {"name": "test_models_norms:net", "args": {"variant": variant}, "weights": "none", "layers": "module"}
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
    trainee = training.dress(phase)
    norms = {path: m for path, m in trainee.net.named_modules() if is_norm(m)}
    seen = {path: Seen(copy.deepcopy(norm), norm) for path, norm in norms.items()}
    hooks = [norm.register_forward_hook(functools.partial(_keep, seen=seen[path])) for path, norm in norms.items()]
    training.step(trainee, phase, phase.start)
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
