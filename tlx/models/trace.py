"""One forward pass on shapes alone: which modules run, in which order, and where the data fork and join.

Runs on torch's meta device, so that it costs neither memory nor arithmetic, whatever the size of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

Shape = tuple[int, ...]

BATCH = 2
"""Images in the traced batch; more than one, so that nothing mistakes the batch for a dimension of size one."""


@dataclass
class Trace:
    """What one forward pass in evaluation mode showed.

    Attributes:
        order: module path -> when it was first called (a counter that parameters share).
        used: parameter name -> when it was first an argument of a function.
        joins: paths of modules at whose own level two activations were added, multiplied or concatenated.
        inputs, outputs: module path -> shape of the first tensor in or out, of the first call.
        output: shape of what the network returned first.
        image: height and width that went in.
    """

    order: dict[str, int] = field(default_factory=dict)
    used: dict[str, int] = field(default_factory=dict)
    joins: set[str] = field(default_factory=set)
    inputs: dict[str, Shape] = field(default_factory=dict)
    outputs: dict[str, Shape] = field(default_factory=dict)
    output: Shape = ()
    image: tuple[int, int] = (0, 0)


def build_empty(build: Callable[[], nn.Module]) -> nn.Module:
    """The network without weights: parameters have no storage and cost no initialisation; buffers are real."""
    try:
        with _parameters_on_meta():
            return build()
    except (RuntimeError, NotImplementedError):  # some constructors compute with what they have just made
        with Uninitialised():
            return _strip(build())


def _strip(net: nn.Module) -> nn.Module:
    for module in net.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.to("meta"), parameter.requires_grad))
    return net


class Uninitialised(TorchFunctionMode):
    """Networks built inside draw no random numbers; NaN stands where they would, so that what nobody fills shows."""

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function in (torch.Tensor.normal_, torch.Tensor.uniform_):
            return args[0].fill_(torch.nan)
        return args[0] if function is torch.Tensor.erfinv_ else function(*args, **(kwargs or {}))


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    def empty(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:  # already empty: a shared parameter stays shared
            return parameter
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(empty)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def trace(net: nn.Module, size: tuple[int, int]) -> Trace:
    """Runs `net` once on images [BATCH, 3, *size] in evaluation mode; `net` itself stays untouched."""
    state = {name: t.detach().to("meta") for name, t in [*net.named_parameters(), *net.named_buffers()]}
    names = {id(state[name]): name for name, _ in net.named_parameters()}
    modes = {module: module.training for module in net.modules()}
    recorder = _Recorder(names)
    images = torch.empty(BATCH, 3, *size, device="meta")
    with ExitStack() as undo:
        for path, module in net.named_modules():
            if path:
                undo.callback(module.register_forward_pre_hook(recorder.enter(path), with_kwargs=True).remove)
                undo.callback(module.register_forward_hook(recorder.leave(path)).remove)
        undo.callback(_restore, modes)
        net.eval()
        with recorder, torch.no_grad():
            output = torch.func.functional_call(net, state, (recorder.data(images),))
    recorder.trace.image = size
    recorder.trace.output = _first_shape(output) or ()
    return recorder.trace


def _restore(modes: Mapping[nn.Module, bool]) -> None:
    for module, training in modes.items():
        module.training = training


class _Recorder(TorchFunctionMode):
    """Follows activations (whatever was computed from the images) through torch's functions."""

    def __init__(self, parameters: Mapping[int, str]) -> None:
        super().__init__()
        self.trace = Trace()
        self._parameters = parameters
        self._clock = 0
        self._path = [""]
        self._activations: dict[int, torch.Tensor] = {}  # kept alive, so that no id is used twice

    def data(self, tensor: torch.Tensor) -> torch.Tensor:
        self._activations[id(tensor)] = tensor
        return tensor

    def enter(self, path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            self._path.append(path)
            if path not in self.trace.order:
                self.trace.order[path] = self._tick()
                shape = _first_shape((args, kwargs))
                if shape:
                    self.trace.inputs[path] = shape

        return hook

    def leave(self, path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            self._path.pop()
            shape = _first_shape(output)
            if shape:
                self.trace.outputs.setdefault(path, shape)

        return hook

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        reads_attribute = getattr(function, "__name__", "") == "__get__"
        for t in tensors:
            if id(t) in self._parameters and not reads_attribute:
                self.trace.used.setdefault(self._parameters[id(t)], self._tick())
        active = {id(t): t for t in tensors if id(t) in self._activations}
        if active:
            for t in tree_leaves(result):
                if isinstance(t, torch.Tensor):
                    self.data(t)
        if len(active) > 1 and not reads_attribute and _joins(function, list(active.values())):
            self.trace.joins.add(self._path[-1])
        return result

    def _tick(self) -> int:
        self._clock += 1
        return self._clock


def _joins(function: Any, tensors: list[torch.Tensor]) -> bool:
    """Equal partners; a gate broadcast over a map (squeeze and excitation) and slices of one tensor are not."""
    if len({t.untyped_storage()._cdata for t in tensors}) < 2:
        return False
    if getattr(function, "__name__", "") in {"cat", "concat", "concatenate", "stack"}:
        return True
    return len({t.shape for t in tensors}) < len(tensors)


def _first_shape(value: Any) -> Shape | None:
    return next((tuple(t.shape) for t in tree_leaves(value) if isinstance(t, torch.Tensor)), None)
