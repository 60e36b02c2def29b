"""Layer maps and small things that several tests need."""

from __future__ import annotations

from tlx.base.layers import Layer, LayerMap, Parameter


def layer(name: str, depth: int, *, role: str = "backbone", norm: bool = False) -> Layer:
    weight = Parameter(f"{name}.weight", (4, 3), "weight")
    bias = Parameter(f"{name}.bias", (4,), "bias")
    norms = (Parameter(f"{name}.norm.weight", (4,), "norm"), Parameter(f"{name}.norm.bias", (4,), "norm"))
    return Layer(
        name=name,
        depth=depth,
        role=role,  # type: ignore[arg-type]
        parameters=(weight, bias, *(norms if norm else ())),
        modules=(name, f"{name}.norm") if norm else (name,),
        norms=(f"{name}.norm",) if norm else (),
        moving=(f"{name}.norm",) if norm else (),
    )


def resnet_like() -> LayerMap:
    """conv1, bn1, layer1-4, fc, as ResNet is cut at module granularity."""
    bn1 = Layer(
        "bn1",
        1,
        "backbone",
        (Parameter("bn1.weight", (4,), "norm"), Parameter("bn1.bias", (4,), "norm")),
        ("bn1",),
        ("bn1",),
        ("bn1",),
    )
    blocks = [layer(f"layer{i}", 1 + i, norm=True) for i in range(1, 5)]
    return LayerMap((layer("conv1", 0), bn1, *blocks, layer("fc", 6, role="head")))


def vgg_like(features: int = 44) -> LayerMap:
    """Feature modules each at a depth of its own, parameterless ones too; classifier and head share the last."""
    trunk = [
        layer(f"features.{i}", i) if i % 2 == 0 else Layer(f"features.{i}", i, "backbone", (), (f"features.{i}",), ())
        for i in range(features)
    ]
    block = [layer("classifier", features, role="classifier"), layer("classifier.6", features, role="head")]
    return LayerMap((*trunk, *block))
