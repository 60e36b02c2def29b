"""What may be said of the network and its weights."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Field,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)

from tlx.base import plug
from tlx.base.layers import Granularity
from tlx.base.paths import written
from tlx.plan.parts import WITHOUT_IMPORTS, WITHOUT_LIBRARIES, Model, Pixels, expanded_path, is_file, of_value


def _weights(value: Any) -> Any:
    return expanded_path(value) if is_file(str(value)) else value


class Allow(Model):
    """Where weights and network may differ, as shell patterns of names. A pattern that matches nothing is an error."""

    new: list[Annotated[str, Field(min_length=1)]] = []
    """Parameters of the network that the file need not have, or has in another shape, and that keep their initial
    values."""
    unused: list[Annotated[str, Field(min_length=1)]] = []
    """Tensors of the file that the network does not have, and that are left out."""


class BackboneConfig(Model):
    """The network and its weights."""

    name: str
    """timm/NAME, torchvision/NAME, an entry point of the group tlx.backbone, or ``package.module:function``."""
    weights: Annotated[str, BeforeValidator(_weights)] = "default"
    """`default`, a tag of the library, a file, the folder of a run, a folder that `tlx weights fetch` filled,
    hf-hub:OWNER/REPO[@REVISION], or `none`."""
    weights_key: Annotated[str, Field(min_length=1)] | None = None
    """In a file with several state dicts: the key of the one to read, or the prefix of its names."""
    weights_size: Pixels | tuple[Pixels, Pixels] | None = None
    """The image size that a file's weights were trained at (a side, or height and width), for its position embeddings,
    where the file does not say it."""
    allow: Allow = Allow()
    args: dict[str, Any] = {}
    """Arguments of the network's constructor: drop_path_rate, img_size ..."""
    layers: Granularity = "block"
    """How finely the network is cut into layers."""

    @model_validator(mode="before")
    @classmethod
    def opened(cls, value: Any) -> Any:
        """Its long form."""
        return {"name": value} if isinstance(value, str) else value

    @field_validator("name")
    @classmethod
    def _named(cls, name: str, info: ValidationInfo) -> str:
        from tlx import models

        if info.context != WITHOUT_LIBRARIES:
            owner = of_value(lambda: models.owner(name, libraries=info.context != WITHOUT_IMPORTS))
            if owner is None and info.context != WITHOUT_IMPORTS:
                of_value(lambda: models.source(name))
        return name

    @field_validator("args")
    @classmethod
    def _known(cls, args: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        from tlx import models

        if (odd := plug.not_finite(args)) is not None:
            raise ValueError(f"{odd} is not a finite number")
        if "name" not in info.data or info.context is not None:  # the former is told
            return args
        checked = of_value(lambda: models.check_args(info.data["name"], args))
        return {name: plug.as_written(value, checked.get(name, value)) for name, value in args.items()}

    @property
    def trained_size(self) -> tuple[int, int] | None:
        """`weights_size` as height and width."""
        return (self.weights_size, self.weights_size) if isinstance(self.weights_size, int) else self.weights_size

    @field_serializer("weights")
    def _as_a_path(self, weights: str) -> str:
        return written(weights) if is_file(weights) else weights
