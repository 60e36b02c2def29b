"""A network that gives a vector for each picture: what its head would take, or what one of its modules gives."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tlx import models
from tlx.base.errors import UserError, did_you_mean
from tlx.base.inputs import EVALUATION_BATCH, InputSpec
from tlx.data.stream.randomness import own_randomness
from tlx.features.digest import weights_digest
from tlx.models.surgery import layout_of
from tlx.use.forward import Forward
from tlx.use.load import Which, device_of, find_file, load

HEAD = "input of the head"


@dataclass(frozen=True)
class EmbedderOptions:
    """Which network, and where in it.

    Attributes:
        which: of a run: its best checkpoint, or the last.
        weights: of a backbone; see :func:`tlx.models.load`.
        layer: the path of a module; None: before the head.
        trusted: see :func:`tlx.use.load.load`.
    """

    which: Which = "best"
    weights: str | None = None
    layer: str | None = None
    device: str | None = None
    trusted: bool = False


@dataclass(frozen=True)
class Embedder:
    """What gives the vectors.

    Attributes:
        network: its name, for people.
        layer: where they are taken.
        weights: a hash of them, the head's left out.
    """

    forward: Forward
    network: str
    layer: str
    weights: str

    @property
    def width(self) -> int:
        return self.forward.width


def embedder_of(place: str, options: EmbedderOptions) -> Embedder:
    """
    Args:
        place: a run's folder, a checkpoint, a file of weights that tlx wrote; else the name of a backbone.

    Raises:
        UserError: none of these; weights that are missing or do not fit; no such layer, or one that gives no vectors.
    """
    made = _of_run(Path(place), options) if Path(place).exists() else _of_backbone(place, options)
    return replace(made, forward=replace(made.forward, width=_width(made)))


def _of_run(run: Path, options: EmbedderOptions) -> Embedder:
    if options.weights is not None:
        what = "a run has weights of its own; --weights is for a backbone"
        raise UserError(what, where=str(run), todo="--which best or last")
    model = load(run, which=options.which, device=options.device, trusted=options.trusted)
    name = str(model.description.backbone["name"])
    net, weights = model.module, _digest(model.module, model.heads)
    at = replace(model.forward, module=_vectors(net, model.heads, options.layer, model.description.input))
    return Embedder(at, f"{name} ({find_file(run, options.which)[0]})", options.layer or HEAD, weights)


def _of_backbone(name: str, options: EmbedderOptions) -> Embedder:
    device = device_of(options.device)
    try:
        models.source(name)
    except UserError as error:
        todo = "a run's folder, a checkpoint, model.safetensors, or a name that tlx models lists"
        raise UserError(f"there is no such file or folder, and {error.what}", where=name, todo=todo) from error
    with own_randomness() as seed:
        seed(0)  # of what no weights fill
        backbone = models.load(name, classes=2, weights=options.weights or "default")
    backbone.module.to(device).eval()
    weights = _digest(backbone.module, backbone.heads)
    module = _vectors(backbone.module, backbone.heads, options.layer, backbone.input)
    at = Forward(module, backbone.input, 0, EVALUATION_BATCH, device)
    where = backbone.loaded.where if backbone.loaded is not None else "no weights"
    return Embedder(at, f"{backbone.name} ({where})", options.layer or HEAD, weights)


def _digest(net: nn.Module, heads: tuple[str, ...]) -> str:
    below = tuple(f"{head}." for head in heads)
    return weights_digest(net, [name for name in net.state_dict() if not name.startswith(below)])


class Vectors(nn.Module):
    """float32 [N, channels, H, W] to [N, width]; maps and tokens are averaged over their positions.

    Args:
        layer: whose output it is, in its first call; None: that of the network.
        entering: what the layer takes, in place of its output.
    """

    def __init__(self, net: nn.Module, layer: str | None, spec: InputSpec, *, entering: bool = False) -> None:
        super().__init__()
        self.net, self.layer, self.size, self.entering = net, layer, spec.size, entering

    def forward(self, images: Tensor) -> Tensor:
        return self._pooled(self.net(images) if self.layer is None else self._output(self.layer, images))

    def _output(self, layer: str, images: Tensor) -> Any:
        def keep(_module: nn.Module, args: Any, output: Any = None) -> None:
            raise _Reached(args[0] if self.entering else output)  # what follows need not run

        module = self.net.get_submodule(layer)
        handle = module.register_forward_pre_hook(keep) if self.entering else module.register_forward_hook(keep)
        try:
            self.net(images)
        except _Reached as reached:
            return reached.output
        finally:
            handle.remove()
        raise UserError("the network does not call this module", where=f"--layer {layer}")

    def _pooled(self, output: Any) -> Tensor:
        """
        Raises:
            UserError: it is no vector, tokens [N, L, width] or map of each picture.
        """
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if not tensors or not tensors[0].is_floating_point() or not 2 <= tensors[0].ndim <= 4:
            shape = f"a tensor of shape {tuple(tensors[0].shape)}" if tensors else "no tensor"
            raise UserError(f"it gives {shape}", where=self.layer or HEAD, todo="--layer: a module that gives features")
        found = tensors[0]
        if found.ndim == 4:
            is_map = layout_of(tuple(found.shape), self.size) == "map"
            return found.mean((2, 3) if is_map else (1, 2))
        return found.mean(1) if found.ndim == 3 else found


class _Reached(Exception):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


def _vectors(net: nn.Module, heads: tuple[str, ...], layer: str | None, spec: InputSpec) -> nn.Module:
    """
    Raises:
        UserError: there is no such layer; nothing says which modules are the head.
    """
    if layer is not None:
        known = [name for name, _ in net.named_modules() if name]
        if layer not in known:
            raise UserError(f'there is no module "{layer}"{did_you_mean(layer, known)}', where="--layer")
        return Vectors(net, layer, spec)
    if not heads:
        raise UserError("nothing says which module is its head", todo="--layer: the module before it")
    for path in heads:  # the network puts several together as it puts their logits
        parent, _, name = path.rpartition(".")
        setattr(net.get_submodule(parent), name, nn.Identity())
    return Vectors(net, None, spec)


def _width(made: Embedder) -> int:
    """Of the vectors.

    Raises:
        UserError: the network gives none.
    """
    spec = made.forward.input
    black = torch.zeros(1, spec.channels, *spec.size, dtype=torch.uint8)
    return int(made.forward.outputs(black, batch=1).shape[1])
