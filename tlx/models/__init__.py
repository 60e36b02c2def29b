"""Backbones: any network of torchvision, timm or another package, with a new head and ordered layers.

Importing this module imports neither torch nor a library of networks; calling its functions does.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tlx.base.errors import UserError, did_you_mean
from tlx.base.inputs import InputSpec
from tlx.base.layers import Granularity, LayerMap
from tlx.models.libraries.names import LIBRARIES, Names, has, imported, listed_networks

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from tlx.models.libraries.sources import Source

__all__ = [
    "ORDERS",
    "Backbone",
    "ClassVectors",
    "Description",
    "Loaded",
    "Only",
    "Outputs",
    "Row",
    "WeightsOptions",
    "adopt",
    "check_args",
    "describe",
    "load",
    "owner",
    "search",
    "source",
]

_EMPTY: Mapping[str, object] = {}


@dataclass(frozen=True)
class Backbone:
    """A network with its new head, ready to train, and what it tells about itself.

    Attributes:
        name: where it comes from, ``timm/resnet50``.
        module: takes float32 images [N, channels, H, W], returns logits [N, classes]; in training mode, where it has
            auxiliary classifiers, a tuple that begins with them and goes on with auxiliary logits.
        layers: every parameter in exactly one layer, from the input to the head.
        input: what the network wants to see.
        features: how many numbers per image (or channels of the map) reach the head.
        blocks: paths of the repeated blocks, for gradient checkpointing.
        auxiliary: paths of classifiers that the logits are not made of; part of the layer that their branch reads.
        heads: paths of the modules that make the logits, in the order in which they run.
        loaded: what became of the weights; None where there were none to load.
    """

    name: str
    module: nn.Module
    layers: LayerMap
    input: InputSpec
    features: int
    blocks: tuple[str, ...] = ()
    auxiliary: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    loaded: Loaded | None = None


@dataclass(frozen=True)
class ClassVectors:
    """What stands for each class: its attributes, a word's vector, what a text encoder says of its name.

    Attributes:
        values: float32 [classes, width], in the order of the classes.
        source: where they come from, in words.
        scale: that a text encoder multiplies cosines by, where it says so.
    """

    values: NDArray[np.float32]
    source: str
    scale: float | None = None

    @property
    def width(self) -> int:
        return int(self.values.shape[1])


@dataclass(frozen=True)
class Outputs:
    """What a head gives for each image.

    Attributes:
        heads: how many outputs by head; one whose name is "", or several beside each other on the same features.
        constants: learned numbers, further columns behind those of the heads, the same for every image.
        vectors: of the classes that a single head's outputs are; only heads that say ``starts = "vectors"`` take them.
        views: images that belong together, where the network takes [N, views, channels, H, W], too.
        joined: the head takes the features of all views beside each other; else it answers to each, and the answers
            stand beside each other. A lone image is taken for each of them (`joined`), or answered alone.
    """

    heads: Mapping[str, int]
    constants: int = 0
    views: int = 1
    joined: bool = True
    vectors: ClassVectors | None = field(default=None, compare=False)

    @property
    def count(self) -> int:
        return sum(self.heads.values()) + self.constants

    @property
    def is_single(self) -> bool:
        """Whether one head gives all of them."""
        return list(self.heads) == [""] and not self.constants

    @property
    def features_joined(self) -> int:
        """How many images' features the head takes at once."""
        return self.views if self.joined else 1


@dataclass(frozen=True)
class WeightsOptions:
    """What a file of weights does not say of itself, and what may differ between it and the network.

    Attributes:
        key: of the dict in the file that is meant (``teacher``), or what its names begin with (``encoder_q``); "" for
            the one that there is.
        size: height and width of the pictures that it was trained on: for position embeddings.
        new: shell patterns of parameters of the network that the file need not have, or has in another shape; they
            keep their initial values.
        unused: shell patterns of what the file holds beside the network.
        keep_head: whether the head is the file's, a checkpoint of tlx with the same classes.
        projection: whether the head's map is what stands in the place of a classifier in the file: a CLIP tower's
            projection.
    """

    key: str = ""
    size: tuple[int, int] | None = None
    new: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    keep_head: bool = False
    projection: bool = False

    @property
    def patterns(self) -> tuple[str, ...]:
        return (*self.new, *self.unused)


@dataclass(frozen=True)
class Loaded:
    """What became of the weights that a network got. As a string, one line for people.

    Attributes:
        where: the file, or the library's name for them.
        tensors: how many of the network got values.
        resized: names of those that were made for another image size.
        left: names in the file that were not taken: the old classifier, and what is not of this network.
        new: names of parameters that keep their initial values, the new head's above all.
        notes: what else there is to know of it: the dict inside the file, a low precision, a grid that was assumed.
    """

    where: str
    tensors: int
    resized: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lists = {"resized": self.resized, "not taken": self.left, "new": self.new}
        said = [f"{what}: {_few(names)}" for what, names in lists.items() if names]
        return "; ".join([f"weights: {self.tensors} tensors of {self.where}", *said, *self.notes])


@dataclass(frozen=True)
class Row:
    """A line of the catalogue. What needs the network to be built is None where it was not.

    Attributes:
        head: path of the classifier, under which a `linear` head stays.
        auxiliary: paths of further classifiers.
        parameters: with 1000 classes.
        weights: tags of pretrained weights, the default first.
        family: the library's module that defines the network, ``resnet``.
        accuracy: top-1 on ImageNet-1k, 0 to 1, of the first of `weights`, where their metadata hold it.
    """

    name: str
    weights: tuple[str, ...]
    parameters: int | None = None
    head: str | None = None
    auxiliary: tuple[str, ...] = ()
    features: int | None = None
    input: InputSpec | None = None
    family: str | None = None
    accuracy: float | None = None


ORDERS = ("name", "params", "accuracy")
"""Of rows: by name, the smallest network first, the most accurate first."""


@dataclass(frozen=True)
class Only:
    """Which networks are wanted of the catalogue; what is not said does not matter.

    Attributes:
        library: ``torchvision`` or ``timm``.
        family: as in a :class:`Row`, or a shell pattern.
        parameters, size: least and most, None for no limit; the size is that of either side of the image in pixels.
        weights: a shell pattern, or a part, of the tags of pretrained weights, in any case. Rows then have those alone.
        pretrained: only networks that have pretrained weights.
    """

    library: str | None = None
    family: str | None = None
    parameters: tuple[int | None, int | None] = (None, None)
    size: tuple[int | None, int | None] = (None, None)
    weights: str | None = None
    pretrained: bool = False


@dataclass(frozen=True)
class Description:
    """One network in full: its row, the arguments it takes, its blocks, and its layers at every granularity.

    Attributes:
        norms: class name of a norm -> how many there are.
        shapes, flops: empty where they were not measured.
        shapes: granularity -> layer -> what it returns for one image (channels first or last, or tokens).
        flops: granularity -> layer -> floating-point operations for one image; a multiply-add counts two.
    """

    row: Row
    args: tuple[str, ...]
    blocks: tuple[str, ...]
    layers: Mapping[Granularity, LayerMap] = field(default_factory=dict)
    norms: Mapping[str, int] = field(default_factory=dict)
    shapes: Mapping[Granularity, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)
    flops: Mapping[Granularity, Mapping[str, int]] = field(default_factory=dict)


def load(
    name: str,
    *,
    classes: int | Outputs,
    weights: str = "default",
    args: Mapping[str, object] = _EMPTY,
    head: str = "linear",
    head_args: Mapping[str, object] = _EMPTY,
    granularity: Granularity = "block",
    channels: int = 3,
    empty: bool = False,
    options: WeightsOptions = WeightsOptions(),
) -> Backbone:
    """The network `name` with a new head for `classes`.

    Args:
        name: ``torchvision/resnet50``, ``timm/resnet50``, either without its library where only one has it, an entry
            point of the group ``tlx.backbone``, or ``package.module:function``.
        classes: how many outputs; with several heads, those of each: a head of the same kind for each, under its name.
        weights: ``default``, a tag of the library, a file (.safetensors, or a torch file read with weights_only), a
            folder that `tlx weights fetch` filled, ``hf-hub:OWNER/REPO[@REVISION]``, or ``none``. The classifier's own
            values are not taken: the head is new, but with `options.keep_head`.
        args: for the network's class (drop_path_rate, img_size ...).
        head, head_args: a part of the group ``head`` and the user's arguments for it.
        channels: of the images. Pretrained values of the first convolution, which see RGB, are summed for one channel,
            stand beside zeros for alpha where there are four, and are repeated and scaled for others, as timm does; a
            file that was trained on as many is taken as it is.
            `input` of the Backbone then has as many means (see :meth:`tlx.base.inputs.InputSpec.for_channels`).
        empty: no weights and no initialisation; parameters on the meta device. For plans.
        options: how a file of weights is read.

    Raises:
        UserError: unknown names or arguments, weights that are missing or do not fit, a head that does not suit.
    """
    from tlx.models.assemble import BuildOptions, assemble

    outputs = classes if isinstance(classes, Outputs) else Outputs({"": classes})
    wish = BuildOptions(outputs, str(weights), args, head, head_args, empty, channels, options)
    return assemble(source(name), wish, granularity)


def adopt(
    module: nn.Module,
    heads: tuple[str, ...],
    *,
    name: str = "own",
    input: InputSpec = InputSpec(),  # noqa: B008  # frozen
    granularity: Granularity = "block",
) -> Backbone:
    """A Backbone of any network that already has its head: for functions of other packages that bring their own.

    Args:
        module: takes images [N, input.channels, *input.size], returns logits [N, classes].
        heads: paths of the modules that make the classes, the main one first.
    """
    from tlx.models.assemble import adopt as adopted

    return adopted(module, heads, name=name, spec=input, granularity=granularity)


def check_args(name: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a backbone, checked against its class and converted, without building it.

    Raises:
        UserError: no such network, or arguments that it does not take, with suggestions.
    """
    if not args and (owner(name) or "").startswith(("torchvision/", "timm/")):  # which need none
        return {}
    return source(name).check(args)


def owner(name: str, *, libraries: bool = True) -> str | None:
    """The one full name of a network, ``timm/resnet50``.

    Args:
        libraries: whether a library may be imported of whose version there is no list of names
            (:mod:`tlx.models.libraries.names`).

    Returns:
        None where only an import can tell, which a path of a package (``package.module:function``) always needs.

    Raises:
        UserError: nobody's, or two libraries' (say which).
    """
    from tlx.base import plug

    library, _, model = name.partition("/")
    if ":" in name:
        return None
    if model and library not in LIBRARIES:
        todo = "write torchvision/NAME, timm/NAME, an entry point of the group tlx.backbone, or package.module:function"
        raise UserError(f'there is no library "{library}"', where=f"backbone {name}", todo=todo)
    known = {one: _networks(one, libraries=libraries) for one in ([library] if model else LIBRARIES)}
    if None in known.values():
        return None
    found = [f"{one}/{model or name}" for one, names in known.items() if names and has(names, model or name)]
    own = [] if model else plug.names("backbone")
    found += [name] if name in own else []
    if len(found) > 1:
        raise UserError(
            f'several libraries have "{name}", with weights of their own', todo=f"write {' or '.join(found)}"
        )
    if not found:
        every = [*(f"{one}/{network}" for one, names in known.items() for network in names or ()), *own]
        raise UserError(f'there is no backbone "{name}"{did_you_mean(name, every)}')
    return found[0]


def source(name: str) -> Source:
    """Whose network `name` is.

    Raises:
        UserError: nobody's, or two libraries' (say which).
    """
    library, _, model = (owner(name) or name).partition("/")
    found: Source | None = None
    if model and library == "timm":
        from tlx.models.libraries import from_timm

        found = from_timm.find(model)
    elif model and library == "torchvision":
        from tlx.models.libraries import from_torchvision

        found = from_torchvision.find(model)
    if found is not None:
        return found
    from tlx.models.libraries import from_outside

    return from_outside.find(name)


def search(
    pattern: str = "*",
    only: Only = Only(),
    *,
    order: str = "name",
    details: int = 40,
    counted: int = 0,
) -> Iterator[Row]:
    """Rows of networks whose name matches `pattern` (a shell pattern, or a part of the name).

    Args:
        order: one of :data:`ORDERS`.
        details: how many networks are built (without weights) to know their head and features, at most; with more
            none is.
        counted: how many are built to count their parameters, at most. They are counted in any case where `only` or
            `order` asks; the numbers are remembered in the user's cache folder.

    Raises:
        UserError: nothing is left, and which filter took the last; no such library, family or order.
    """
    from tlx.base import plug
    from tlx.models.filters import rows

    names = [f"{one}/{network}" for one in LIBRARIES for network in _networks(one, libraries=True) or ()]
    return rows([*names, *plug.names("backbone")], pattern, only, order=order, details=details, counted=counted)


def describe(name: str, *, measured: bool = True) -> Description:
    """Everything about one network, without its weights.

    Args:
        measured: whether also to find shapes, operations, and parameters that no gradient reaches; takes twice as long.

    Raises:
        UserError: there is no such network.
    """
    from tlx.models.catalogue import description

    return description(source(name), measured=measured)


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _networks(library: str, *, libraries: bool) -> Names | None:
    if library in sys.modules:  # which may have been given further networks
        return imported(library)
    found = listed_networks(library)
    return imported(library) if found is None and libraries else found
