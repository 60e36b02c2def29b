"""Users' networks that do what no library does: a right layer map, or an error that says what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tlx import models
from tlx.base.errors import UserError

LAYERS = {
    "weight_normed": ["stem", "net.1", "net.4"],
    "dropping": ["stem", *[f"rows.{i}" for i in range(6)], "fc"],
    "fixed": ["stem", "block", "fc"],
    "directions": ["stem", "block", "fc"],
    "transposed": ["stem", "1", "4"],
    "normed_logits": ["stem", "1", "4"],
}


def load(name: str, head: str = "linear", weights: str = "none") -> models.Backbone:
    return models.load(f"odd:{name}", classes=7, weights=weights, head=head)


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    assert list(load(name).layers.names) == LAYERS[name]


def test_names_that_mean_something_else() -> None:
    """The child called stem is a block, and the first convolution is called head."""
    layers = load("misnamed").layers
    holders = {p.name.partition(".")[0]: y for y in layers for p in y.parameters}
    assert holders["stem"].name == "stem"
    assert holders["out"] == layers.head
    assert len(set(layers.names)) == len(layers) == 4


@pytest.mark.parametrize("head", ["mlp", "cosine", "attention_pool"])
@pytest.mark.parametrize("name", ["weight_normed", "dropping", "fixed", "transposed", "misnamed"])
def test_other_heads(name: str, head: str) -> None:
    backbone = load(name, head)
    assert backbone.features == 8
    assert backbone.module.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 7)


def test_what_never_trains() -> None:
    """A layer that is dropped at random trains; a parameter that the network fixes does not."""
    idle = {name: [p.name for y in load(name).layers for p in y.parameters if p.idle] for name in ("dropping", "fixed")}
    assert idle == {"dropping": [], "fixed": ["pos"]}


@pytest.mark.parametrize(
    ("name", "head", "said"),
    [
        ("wordy", "linear", "returns no tensor"),
        ("normed_logits", "mlp", "use linear"),
        ("directions", "mlp", "fails"),
    ],
)
def test_what_cannot_be_is_said(name: str, head: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load(name, head)


def test_adopting_needs_a_module_with_parameters() -> None:
    net = load("transposed").module
    for heads in ((), ("",), ("2",), ("nowhere",), "4"):
        with pytest.raises(UserError, match=r"no such modules|heads is"):
            models.adopt(net, heads)  # type: ignore[arg-type]
    assert models.adopt(net, ("4",)).layers.names == ("stem", "1", "4")


def test_weights_of_a_parametrized_network_arrive(tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    torch.save(load("weight_normed").module.state_dict(), file)
    loaded = load("weight_normed", weights=str(file)).loaded
    assert loaded is not None
    assert loaded.tensors == 9  # two convolutions with a bias, a norm with five values


def test_a_file_that_holds_itself(tmp_path: Path) -> None:
    content: dict[str, object] = {}
    content["model"] = content
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match="holds no state dict"):
        load("transposed", weights=str(tmp_path / "w.pth"))


@pytest.mark.parametrize("value", [float("inf"), 1j, "int"])
def test_values_that_are_no_weights(tmp_path: Path, value: float | complex | str) -> None:
    state = load("transposed").module.state_dict()
    weight = state["0.weight"]
    state["0.weight"] = weight.long() if value == "int" else weight * value  # type: ignore[operator]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"not finite or no real numbers \(0\.weight\)"):
        load("transposed", weights=str(tmp_path / "w.pth"))
