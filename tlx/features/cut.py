"""Where a network may be cut, so that what its frozen layers compute is computed once.

Below a cut nothing trains and nothing is drawn, so that features depend on the picture alone. From a cut on, the
network's own code runs: modules that end before it answer with what they gave for one black picture, which costs
nothing, and the features take the place of what the last of them gave. Code between modules runs as it is. Whether
that is the same function is not assumed: the outputs are compared, and the next place below is tried where they differ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_leaves, tree_map

from tlx.data.stream.randomness import own_randomness
from tlx.models.layers.trace import restoring_modes

Side = Literal["input", "output"]
Passed = Mapping[str, Sequence[Any]]
"""Modules that are passed over, by path, and what each of their calls gave for a black picture."""

_TRIED = 24  # places, from the last one down
_TRIED_INSIDE = 3  # of one module: inside of a block with a shortcut no place holds
_PICTURES = 4
_ROUNDING = 1e-3  # of the largest value: gradients of long sums differ most


@dataclass(frozen=True)
class Cut:
    """A place in a network.

    Attributes:
        path, side: features enter as the input of this module, or in place of its output.
        shape, dtype: of the features of one picture.
        passed: what is not computed again.
        repeated: what was passed over answers for as many pictures as there are features, not for one: code between
            modules has looked at how many there are.
        image: float32 [1, channels, height, width], the black picture of `passed`.
        state: names of the parameters and buffers that features depend on.
        difference: the largest between outputs from pictures and from features, as a share of the largest output.
    """

    path: str
    side: Side
    shape: tuple[int, ...]
    dtype: torch.dtype
    passed: Passed
    image: Tensor
    state: tuple[str, ...]
    repeated: bool = False
    difference: float = 0.0

    def __str__(self) -> str:
        shape, dtype = " x ".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")
        return f"{self.side} of {self.path}, {shape} {dtype}"

    @property
    def picture_bytes(self) -> int:
        """Of the features of one picture."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Rest(nn.Module):
    """A network from a cut on: features [N, ...] to what the network returns. Parameters, modules and modes are the
    network's own."""

    def __init__(self, net: nn.Module, cut: Cut) -> None:
        super().__init__()
        self.net, self.cut = net, cut

    def forward(self, features: Tensor) -> Any:
        image, passed = self.cut.image, self.cut.passed
        if self.cut.repeated:
            image, passed = tree_map(lambda of: _repeated(of, len(features)), (image, passed))
        with _passing_over(self.net, passed), _entering(self.net, self.cut, features):
            return self.net(image)


def _repeated(value: Any, count: int) -> Any:
    """A tensor of one picture, for so many; it takes no memory."""
    is_of_one = isinstance(value, Tensor) and value.ndim and len(value) == 1
    return value.expand(count, *value.shape[1:]) if is_of_one else value


def features_of(net: nn.Module, cut: Cut, images: Tensor) -> Tensor:
    """See :func:`features_at`."""
    return features_at(net, [cut], images)[0]


@torch.no_grad()
def features_at(net: nn.Module, cuts: Sequence[Cut], images: Tensor) -> list[Tensor]:
    """What the network has at each cut, [N, *cut.shape], of images [N, channels, height, width], in one pass; what
    follows the last of them does not run."""
    seen: dict[int, Tensor] = {}

    def keep(number: int, features: Tensor) -> None:
        seen[number] = features.contiguous()
        if len(seen) == len(cuts):
            raise _Reached

    with ExitStack() as undo:
        for number, cut in enumerate(cuts):
            module = net.get_submodule(cut.path)
            if cut.side == "input":
                hook = module.register_forward_pre_hook(lambda _module, args, n=number: keep(n, args[0]))
            else:
                hook = module.register_forward_hook(lambda _module, _args, output, n=number: keep(n, output))
            undo.callback(hook.remove)
        try:
            net(images)
        except _Reached:
            return [seen[number] for number in range(len(cuts))]
    raise RuntimeError(f"of {', '.join(cut.path for cut in cuts)} some were not reached")


class _Reached(Exception):
    """Whatever was wanted has been computed."""


@torch.no_grad()
def find_cut(
    net: nn.Module,
    image: tuple[int, int, int],
    *,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Cut | None:
    """The last place below everything that trains, or that is drawn or moves in training mode; None where none holds.

    Outputs are compared in fp32, in which rounding is small beside what a wrong place makes.

    Args:
        net: with gradients and modes as a phase has them; it is left as it is.
        image: channels, height, width.
        autocast: what forward passes run in, for the dtype of features.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(_PICTURES, *image, generator=generator).to(device)
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    cut = None
    with _drawing(device) as seed, restoring_modes(net):
        try:
            seed()
            walk = _walk(net, images)
            tried: Counter[str] = Counter()
            for place in walk.places():
                if tried.total() == _TRIED:
                    break
                if tried[place.inside] == _TRIED_INSIDE:
                    continue
                tried[place.inside] += 1
                cut = _proved(net, _made(net, walk, place, torch.zeros(1, *image, device=device)), images, seed)
                if cut is not None:
                    break
            if cut is not None:
                with autocast():
                    dtype = features_of(net, cut, images).dtype
                    given = _outputs(net, cut.image, {path: len(outputs) for path, outputs in cut.passed.items()})
                cut = replace(cut, dtype=dtype, passed=given)
        finally:
            for name, buffer in net.named_buffers():
                if name in buffers and not torch.equal(buffer, buffers[name]):
                    buffer.copy_(buffers[name])
    return cut


@contextmanager
def _drawing(device: torch.device) -> Iterator[Callable[[], None]]:
    """Gives what makes passes draw the same; afterwards all generators are as before."""
    with own_randomness() as seed, torch.random.fork_rng([device] if device.type == "cuda" else []):

        def again() -> None:
            seed(0)
            if device.type == "cuda":
                torch.cuda.manual_seed(0)

        yield again


# One pass, with the calls of modules in order


@dataclass
class _Call:
    path: str
    parent: _Call | None
    start: int
    end: int = 0
    input: Tensor | None = None
    output: Any = None


@dataclass(frozen=True)
class _Place:
    path: str
    side: Side
    inside: str
    time: int
    features: Tensor


@dataclass
class _Walk:
    """The calls of all modules in a pass.

    Attributes:
        begun: when the first module ran that trains, draws or moves.
        output: the network's.
    """

    calls: list[_Call] = field(default_factory=list)
    begun: int = 0
    output: Any = None

    def places(self) -> list[_Place]:
        """Where a cut could be, the last first: each a tensor with a row for each picture, past some computation."""
        counts: dict[str, int] = {}
        for call in self.calls:
            counts[call.path] = counts.get(call.path, 0) + 1
        first = min((call.end for call in self.calls if call.path), default=0)
        found: list[_Place] = []
        for call in self.calls:
            if not call.path or counts[call.path] > 1:
                continue
            inside = call.parent.path if call.parent is not None else ""
            if first < call.start <= self.begun and _by_picture(call.input):
                found.append(_Place(call.path, "input", inside, call.start, call.input))  # type: ignore[arg-type]
            if call.end < self.begun and _by_picture(call.output):
                found.append(_Place(call.path, "output", inside, call.end, call.output))
        return sorted(found, key=lambda place: -place.time)

    def before(self, place: _Place) -> list[_Call]:
        """The outermost calls that have ended there."""
        ended = [call for call in self.calls if call.end <= place.time and call.path != place.path]
        return [call for call in ended if call.parent is None or call.parent.end > place.time]


def _by_picture(value: Any) -> bool:
    is_tensor = isinstance(value, Tensor) and value.is_floating_point()
    return is_tensor and value.ndim > 1 and len(value) == _PICTURES


def _walk(net: nn.Module, images: Tensor) -> _Walk:
    walk, running, clock = _Walk(), list[_Call](), iter(range(1, 1 << 62))

    def enter(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            call = _Call(path, running[-1] if running else None, next(clock))
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            call.input = args[0] if len(tensors) == 1 and args and args[0] is tensors[0] else None
            running.append(call)
            walk.calls.append(call)

        return hook

    def leave(_module: nn.Module, _args: Any, output: Any) -> None:
        call = running.pop()
        call.end, call.output = next(clock), output

    with ExitStack() as undo:
        for path, module in net.named_modules():
            undo.callback(module.register_forward_pre_hook(enter(path), with_kwargs=True).remove)
            undo.callback(module.register_forward_hook(leave).remove)
        walk.output = net(images)
    modules = dict(net.named_modules())
    live = [call.start for call in walk.calls if _is_live(modules[call.path])]
    walk.begun = min(live, default=next(clock))
    return walk


def _is_live(module: nn.Module) -> bool:
    """Whether a module itself trains, or draws or moves something in its mode."""
    if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
        return True
    if not module.training:
        return False
    moves = isinstance(module, _NormBase) and module.track_running_stats
    return moves or any(getattr(module, name, None) for name in ("p", "drop_prob", "drop_path", "rate"))


# A place becomes a cut


def _made(net: nn.Module, walk: _Walk, place: _Place, image: Tensor) -> Cut:
    before = walk.before(place)
    before_it = {call.path for call in walk.calls if call.start < place.time}  # those around the place, too
    after = {call.path for call in walk.calls} - before_it
    state = [  # all but what is called afterwards: modules may read the tensors of others
        f"{path}.{name}" if path else name
        for path, module in net.named_modules()
        if path not in after
        for name, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    ]
    paths = {call.path for call in before}
    given = _outputs(net, image, {path: sum(call.path == path for call in before) for path in paths})
    shape, dtype = tuple(place.features.shape[1:]), place.features.dtype
    return Cut(place.path, place.side, shape, dtype, given, image, tuple(sorted(state)))


def _outputs(net: nn.Module, image: Tensor, calls: Mapping[str, int]) -> Passed:
    """What the first calls of these modules give."""
    found: dict[str, list[Any]] = {path: [] for path in calls}

    def keep(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if len(found[path]) < calls[path]:
                found[path].append(output)
            if all(len(outputs) == calls[name] for name, outputs in found.items()):
                raise _Reached  # what follows may not bear a single picture

        return hook

    with ExitStack() as undo:
        for path in calls:
            undo.callback(net.get_submodule(path).register_forward_hook(keep(path)).remove)
        undo.enter_context(suppress(_Reached))
        net(image)
    return found


def _proved(net: nn.Module, cut: Cut, images: Tensor, seed: Callable[[], None]) -> Cut | None:
    """The cut, if nothing below it is drawn or looks at a picture's neighbours, and outputs, gradients and evaluations
    from features are those from pictures, within rounding."""
    features = features_of(net, cut, images)
    others = torch.cat([images[:1], 3 - 2 * images[1:]])
    if not torch.equal(features, features_of(net, cut, images)):
        return None
    if _difference([features[:1]], [features_of(net, cut, others)[:1]]) is None:
        return None
    for repeated in (False, True):
        tried = replace(cut, repeated=repeated)
        try:
            difference = _largest_difference(net, tried, images, features, seed)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
            continue
        return None if difference is None else replace(tried, difference=difference)
    return None


def _largest_difference(
    net: nn.Module, cut: Cut, images: Tensor, features: Tensor, seed: Callable[[], None]
) -> float | None:
    """In training mode, with gradients, and in evaluation mode, without; None where it is more than rounding."""
    modes = {module: module.training for module in net.modules()}
    try:
        trained = _compared(net, cut, images, features, seed, gradients=True)
        for module in modes:
            module.training = False
        evaluated = _compared(net, cut, images, features, seed, gradients=False)
    finally:
        for module, training in modes.items():
            module.training = training
    return None if trained is None or evaluated is None else max(trained, evaluated)


def _compared(
    net: nn.Module, cut: Cut, images: Tensor, features: Tensor, seed: Callable[[], None], *, gradients: bool
) -> float | None:
    """How far outputs and gradients from features are from those from pictures; None where that is more than
    rounding."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    results = list[tuple[list[Tensor], Sequence[Tensor | None]]]()
    for module, given in ((net, images), (Rest(net, cut), features)):
        seed()
        with torch.set_grad_enabled(gradients):
            outputs = [output for output in _tensors(module(given)) if output.is_floating_point()]
            summed = torch.stack([output.float().square().sum() for output in outputs]).sum()
            learned: Sequence[Tensor | None] = ()
            if summed.requires_grad:
                learned = torch.autograd.grad(summed, parameters, allow_unused=True)
        results.append((outputs, learned))
    (of_pictures, wanted), (of_features, own) = results
    if [g is None for g in wanted] != [g is None for g in own]:
        return None
    same_outputs = _difference(of_pictures, of_features)
    same = [_difference([a], [b]) for a, b in zip(wanted, own, strict=True) if a is not None and b is not None]
    return same_outputs if all(value is not None for value in same) else None


def _difference(of_pictures: Sequence[Tensor], of_features: Sequence[Tensor]) -> float | None:
    """The largest, as a share of the largest value; None where that is more than rounding in fp32."""
    if [a.shape for a in of_pictures] != [b.shape for b in of_features]:
        return None
    pairs = list(zip(of_pictures, of_features, strict=True))
    largest = max((float(a.detach().abs().max()) for a, _ in pairs if a.numel()), default=0.0) or 1.0
    difference = max((float((a - b).detach().abs().max()) for a, b in pairs if a.numel()), default=0.0) / largest
    return difference if difference <= _ROUNDING else None


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


@contextmanager
def _passing_over(net: nn.Module, passed: Passed) -> Iterator[None]:
    """Modules answer with what they gave before, each as often as it did, and compute after that."""
    with ExitStack() as undo:
        for path, outputs in passed.items():
            module = net.get_submodule(path)
            undo.callback(_restore, module, module.__dict__.get("forward"))
            module.forward = _answer(list(outputs), module.forward)
        yield


def _answer(outputs: list[Any], forward: Callable[..., Any]) -> Callable[..., Any]:
    remaining = iter(outputs)
    missing = object()

    def answer(*args: Any, **kwargs: Any) -> Any:
        output = next(remaining, missing)
        return forward(*args, **kwargs) if output is missing else output

    return answer


def _restore(module: nn.Module, own: Any) -> None:
    del module.__dict__["forward"]
    if own is not None:
        module.__dict__["forward"] = own


@contextmanager
def _entering(net: nn.Module, cut: Cut, features: Tensor) -> Iterator[None]:
    module = net.get_submodule(cut.path)
    if cut.side == "input":
        handle = module.register_forward_pre_hook(lambda _module, _args: (features,))
        try:
            yield
        finally:
            handle.remove()
    else:
        own = module.__dict__.get("forward")
        module.__dict__["forward"] = lambda *_args, **_kwargs: features
        try:
            yield
        finally:
            _restore(module, own)
