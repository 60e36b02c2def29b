"""What the libraries say of their networks without building them."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

from tlx.base.inputs import InputSpec
from tlx.models.libraries.sources import Source


@dataclass(frozen=True)
class Facts:
    """Of one network with one set of weights; None where the library does not say.

    Attributes:
        family: the library's module that defines the network (``resnet``, ``vision_transformer``).
        parameters: with 1000 classes.
        accuracy: top-1 on ImageNet-1k, 0 to 1, as the weights' metadata hold it.
    """

    family: str | None = None
    input: InputSpec | None = None
    parameters: int | None = None
    accuracy: float | None = None


def facts(source: Source, tag: str | None) -> Facts:
    """Of `source` with the weights `tag`, its default ones if None."""
    from tlx.models.libraries.from_outside import Outside
    from tlx.models.libraries.from_timm import Timm
    from tlx.models.libraries.from_torchvision import Torchvision

    if isinstance(source, Torchvision):
        return _of_torchvision(source, tag)
    if isinstance(source, Timm):
        return _of_timm(source, tag)
    return Facts(family=source.function.__module__ if isinstance(source, Outside) else None)


def _of_torchvision(source: Any, tag: str | None) -> Facts:
    from torchvision.models import get_model_builder, get_model_weights

    builder, enum = get_model_builder(source.model), get_model_weights(source.model)
    meta = (enum[tag] if tag else enum.DEFAULT).meta
    top1 = meta.get("_metrics", {}).get("ImageNet-1K", {}).get("acc@1")
    return Facts(
        family=builder.__module__.rpartition(".")[2],
        input=source.input(cast(Any, None), {}, tag),  # of the weights, not of the network
        # torchvision counts auxiliary classifiers, which train here, for one network and not for the other
        parameters=None if "aux_logits" in source.arguments() else meta.get("num_params"),
        accuracy=None if top1 is None else round(top1 / 100, 6),
    )


def _of_timm(source: Any, tag: str | None) -> Facts:
    import timm
    from timm.models import model_entrypoint

    said = timm.get_pretrained_cfg(f"{source.model}.{tag}" if tag else source.model)
    net = SimpleNamespace(pretrained_cfg=said.to_dict())  # all that timm asks of a network here
    return Facts(
        family=model_entrypoint(source.model).__module__.rpartition(".")[2],
        input=source.input(cast(Any, net), {}, tag),
    )
