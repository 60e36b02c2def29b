"""Every network of both libraries against the committed table, and the order of layers against what data really do."""

from __future__ import annotations

import backbones
import pytest
import torch
from torch import nn

from tlx import models
from tlx.base.layers import LayerMap
from tlx.models.libraries import names

AUXILIARY = ["torchvision/googlenet", "torchvision/inception_v3"]
REFUSED = "nothing in this network is a classifier"


def test_the_table_names_every_network() -> None:
    """With another torchvision or timm than the pinned ones this says what is new: python tests/backbones.py"""
    assert sorted(backbones.stored()) == sorted(backbones.names())


@pytest.mark.parametrize("library", names.LIBRARIES)
def test_the_list_of_names_is_the_librarys(library) -> None:
    if names.listed_networks(library) is None:
        pytest.skip(f"no list of this version: python tests/backbones.py --names writes {names.list_of(library).name}")
    assert names.listed_networks(library) == names.imported(library)


def test_every_network_has_layers_but_encoders_without_a_classifier() -> None:
    table = backbones.stored()
    refused = {name: row["refused"] for name, row in table.items() if row["refused"]}
    assert {reason[: len(REFUSED)] for reason in refused.values()} <= {REFUSED}
    assert all(name.startswith("timm/") and name.endswith("_enc") for name in refused)
    for name, row in table.items():
        if not row["refused"]:
            assert 3 <= int(row["stages"]) <= int(row["blocks"]), name
            assert int(row["depths"]) >= 4, name


def different(names: list[str]) -> list[str]:
    """What is not as the table has it, as lines for a person."""
    table, found = backbones.stored(), []
    for row in backbones.rows(names, processes=1):  # the other cores have tests of their own
        was = table[row["name"]]
        found += [f"{row['name']} {key}: {was[key]} -> {value}" for key, value in row.items() if was[key] != value]
    return found


@pytest.mark.slow
def test_a_sample_is_as_in_the_table() -> None:
    names = [name for name, row in backbones.stored().items() if not row["refused"] and int(row["parameters"]) < 60e6]
    assert different([*names[::180], "timm/vit_tiny_patch16_224", "torchvision/vgg16_bn"]) == []


@pytest.mark.slow
def test_a_sixteenth_of_all_networks_is_as_in_the_table() -> None:
    """Neighbours by name are of one family; all of them: python tests/backbones.py, then git diff."""
    assert different([*backbones.names()[::16], *AUXILIARY]) == []


def first_changes(net: nn.Module, layers: LayerMap, images: torch.Tensor) -> list[int]:
    """Layer by layer, which call of a module is the first to return something else once the layer's values change.

    len(calls) where none does.
    """
    seen: list[torch.Tensor] = []

    def keep(_module: nn.Module, _args: object, output: object) -> None:
        if isinstance(output, torch.Tensor):
            seen.append(output.detach().clone())

    for module in net.modules():
        if not any(True for _ in module.children()):
            module.register_forward_hook(keep)

    def calls() -> list[torch.Tensor]:
        seen.clear()
        with torch.no_grad():
            net(images)
        return list(seen)

    tensors = dict(net.named_parameters())
    before, found = calls(), []
    for layer in layers:
        mine = [tensors[p.name] for p in layer.parameters]
        kept = [t.detach().clone() for t in mine]
        with torch.no_grad():
            for t in mine:
                t.add_(torch.randn_like(t) * 0.1)
            after = calls()
            for t, value in zip(mine, kept, strict=True):
                t.copy_(value)
        pairs = zip(before, after, strict=True)
        found.append(next((i for i, (a, b) in enumerate(pairs) if not torch.equal(a, b)), len(before)))
    return found


def check_order(name: str) -> None:
    torch.manual_seed(0)
    backbone = models.load(name, classes=5, weights="none")
    net = backbone.module.eval()
    with torch.no_grad():
        for parameter in net.parameters():  # no residual branch is switched off
            parameter.add_(torch.randn_like(parameter) * 0.02)
    images = torch.randn(1, backbone.input.channels, *backbone.input.size)
    changes = first_changes(net, backbone.layers, images)
    assert changes == sorted(changes), f"{name}: {list(zip(backbone.layers.names, changes, strict=True))}"
    assert len(set(changes)) == len(changes), name


@pytest.mark.parametrize(
    "name",
    [
        *("torchvision/mobilenet_v3_small", "torchvision/squeezenet1_1", "timm/test_resnet", "timm/test_vit3"),
        *("timm/test_convnext", "timm/coat_lite_tiny"),
    ],
)
def test_layers_stand_in_the_order_in_which_data_pass_them(name: str) -> None:
    check_order(name)


def smallest_of_each_family() -> list[str]:
    """Of networks up to 40 million parameters, the smallest for each word that timm's names begin with."""
    table = [row for row in backbones.stored().values() if not row["refused"]]
    found: dict[str, dict[str, str]] = {}
    for row in table:
        library, _, model = row["name"].partition("/")
        family = f"{library}/{model.removeprefix('test_').removeprefix('tf_').partition('_')[0].rstrip('0123456789')}"
        if family not in found or int(row["parameters"]) < int(found[family]["parameters"]):
            found[family] = row
    return sorted(row["name"] for row in found.values() if int(row["parameters"]) < 40e6)


@pytest.mark.slow
def test_layers_of_every_fourteenth_family_stand_in_order() -> None:
    names = smallest_of_each_family()[::14]
    assert len(names) == 15
    wrong = []
    for name in names:
        try:
            check_order(name)
        except AssertionError as error:
            wrong.append(str(error).splitlines()[0])
    assert wrong == []
