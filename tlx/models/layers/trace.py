"""One forward pass on shapes alone: which modules run, in which order, where the data fork and join, what outputs are
made of.

Runs on torch's meta device, so that it costs neither memory nor arithmetic, whatever the size of the network.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from tlx.data.stream.randomness import own_randomness

Shape = tuple[int, ...]

SEQUENCES = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""Modules that only hold others."""

BATCH = 2
"""Images in the traced batch; more than one, so that nothing mistakes the batch for a dimension of size one."""


@dataclass
class Trace:
    """What one forward pass showed.

    Attributes:
        order: module path -> when it was first called (a counter that parameters share).
        ended: module path -> when that call returned.
        used: parameter name -> when it was first an argument of a function.
        joins: paths of modules at whose own level (or that of a sequence inside) two activations were added,
            multiplied or concatenated -> when that was last.
        inputs, outputs: module path -> shape of the first tensor in or out, of the first call.
        output: shape of what the network returned first.
        made_of: for everything that the network returned, in order, the paths of the modules that computed it; nothing
            for what is no tensor.
        returned_by: likewise, the outermost module that returned that very tensor; "" where none did.
        image: height and width that went in.
        flops: module path -> floating-point operations of one image at its own level (a multiply-add counts two),
            where they were counted.
    """

    order: dict[str, int] = field(default_factory=dict)
    ended: dict[str, int] = field(default_factory=dict)
    used: dict[str, int] = field(default_factory=dict)
    joins: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, Shape] = field(default_factory=dict)
    outputs: dict[str, Shape] = field(default_factory=dict)
    output: Shape = ()
    made_of: tuple[frozenset[str], ...] = ()
    returned_by: tuple[str, ...] = ()
    image: tuple[int, int] = (0, 0)
    flops: dict[str, int] = field(default_factory=dict)


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


def trace(
    net: nn.Module, size: tuple[int, int], channels: int = 3, *, count: bool = False, training: bool = False
) -> Trace:
    """Runs `net` once on images [BATCH, channels, *size]; `net` itself stays untouched.

    Args:
        count: whether to count operations.
        training: in training mode; as a rule in evaluation mode.
    """
    state = without_storage(net)
    names = {id(state[name]): name for name, _ in net.named_parameters()}
    recorder = _Recorder(names)
    images = torch.empty(BATCH, channels, *size, device="meta")
    with ExitStack() as undo:
        for path, module in net.named_modules():
            if path:
                undo.callback(module.register_forward_pre_hook(recorder.enter(path, module), with_kwargs=True).remove)
                undo.callback(module.register_forward_hook(recorder.leave(path)).remove)
        undo.enter_context(restoring_modes(net))
        undo.enter_context(own_randomness())
        net.train(training)
        if count:
            undo.enter_context(_Counter(recorder))
        with recorder, torch.no_grad():
            output = torch.func.functional_call(net, state, (recorder.data(images),), tie_weights=False)
    recorder.trace.image = size
    returned = output if isinstance(output, tuple | list) and output else (output,)
    recorder.trace.output = tuple(returned[0].shape) if isinstance(returned[0], torch.Tensor) else ()
    recorder.trace.made_of = tuple(recorder.made_of(value) for value in returned)
    recorder.trace.returned_by = tuple(recorder.returned_by(value) for value in returned)
    return recorder.trace


_NO_VALUES = re.compile(
    r"\bmeta\b|only integer tensors of a single element|not supported for tensor subclasses", re.IGNORECASE
)


def needs_values(error: BaseException | None) -> bool:
    """Whether a pass on tensors without storage fails for that reason alone: the network looks at values, or uses what
    has no rule for shapes. With values it may run."""
    while error is not None:
        of_shapes_alone = type(error).__module__.startswith(("torch._subclasses", "torch.fx"))
        if isinstance(error, NotImplementedError) or of_shapes_alone or _NO_VALUES.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def without_storage(net: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers on the meta device, once for each module that has them.

    A module that stands in several places has one name here: torch.func.functional_call, given two, would not put its
    own parameters back. Parameters that several modules share stay one tensor; call it with ``tie_weights=False``.
    """
    shared: dict[int, torch.Tensor] = {}
    state = {}
    for path, module in net.named_modules():
        for name, t in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            state[f"{path}.{name}" if path else name] = shared.setdefault(id(t), t.detach().to("meta"))
    return state


@contextmanager
def restoring_modes(net: nn.Module) -> Iterator[None]:
    """Every module of `net` is afterwards in training or evaluation mode as it was before."""
    modes = {module: module.training for module in net.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


class _Recorder(TorchFunctionMode):
    """Follows activations (whatever was computed from the images) through torch's functions."""

    def __init__(self, parameters: Mapping[int, str]) -> None:
        super().__init__()
        self.trace = Trace()
        self._parameters = parameters
        self._clock = 0
        self._path = [""]  # of the modules that are running, and below without the sequences
        self._joining = [""]
        self._activations: dict[int, torch.Tensor] = {}  # kept alive, so that no id is used twice
        self._bits: dict[str, int] = {}
        self._made_of: dict[int, int] = {}  # activation -> a bit for each module that had a part in it
        self._returned_by: dict[int, str] = {}

    def data(self, tensor: torch.Tensor, made_of: int = 0) -> torch.Tensor:
        self._activations[id(tensor)] = tensor
        self._made_of[id(tensor)] = made_of
        return tensor

    def made_of(self, value: object) -> frozenset[str]:
        bits = self._made_of.get(id(value), 0)
        return frozenset(path for path, bit in self._bits.items() if bits & bit)

    def returned_by(self, value: object) -> str:
        return self._returned_by.get(id(value), "")

    def enter(self, path: str, module: nn.Module) -> Callable[..., None]:
        sequence = isinstance(module, SEQUENCES)

        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            self._path.append(path)
            self._joining.append(self._joining[-1] if sequence else path)
            if path not in self.trace.order:
                self.trace.order[path] = self._tick()
                shape = _first_shape((args, kwargs))
                if shape:
                    self.trace.inputs[path] = shape

        return hook

    def leave(self, path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            self._path.pop()
            self._joining.pop()
            self.trace.ended.setdefault(path, self._tick())
            if isinstance(output, torch.Tensor):
                self._returned_by[id(output)] = path
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
            made_of = self._bits.setdefault(self.running, 1 << len(self._bits))
            for key in active:
                made_of |= self._made_of[key]
            for t in tree_leaves(result):
                if isinstance(t, torch.Tensor):
                    self.data(t, made_of)
            if getattr(function, "__name__", "") == "__setitem__" and id(args[0]) in active:
                self._made_of[id(args[0])] = made_of
        if len(active) > 1 and not reads_attribute and _joins(function, list(active.values())):
            self.trace.joins[self._joining[-1]] = self._tick()
        return result

    @property
    def running(self) -> str:
        """The path of the module that runs now."""
        return self._path[-1]

    def _tick(self) -> int:
        self._clock += 1
        return self._clock


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations with torch's own formulas, for the module that runs.

    torch's FlopCounterMode counts a module that several share once for each place it has.
    """

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            flops, path = self._recorder.trace.flops, self._recorder.running
            flops[path] = flops.get(path, 0) + formula(*args, **(kwargs or {}), out_val=result) // BATCH
        return result


def _joins(function: Any, tensors: list[torch.Tensor]) -> bool:
    """Equal partners; a gate broadcast over a map (squeeze and excitation) and slices of one tensor are not."""
    if len({t.untyped_storage()._cdata for t in tensors}) < 2:
        return False
    if getattr(function, "__name__", "") in {"cat", "concat", "concatenate", "stack"}:
        return True
    return len({t.shape for t in tensors}) < len(tensors)


def _first_shape(value: Any) -> Shape | None:
    return next((tuple(t.shape) for t in tree_leaves(value) if isinstance(t, torch.Tensor)), None)
