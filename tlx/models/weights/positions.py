"""Position embeddings: a table has a row for each place of a grid, and does not say how many rows and columns that has.

64 places are 8 x 8 of a picture of 64 x 64 pixels, or 4 x 16 of one of 32 x 128; taken for the other grid, a table is
scrambled and no shape tells. So a file's grid comes from the size of the pictures that it was trained on: that the
configuration says, or the file, or the run that wrote it. Where nobody says it, the grid is square, or of the shape
that the network's own has; where both are possible, or neither, the user is asked.
"""

from __future__ import annotations

import inspect
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from tlx.base.errors import UserError
from tlx.models.weights.provenance import Size

Grid = tuple[int, int]
"""Rows and columns of places."""

KEY = "backbone.weights_size"

_TABLE = re.compile(r"(.*\.)?(pos_embed(ding)?(_\d+)?|position_embeddings?|patch_pos)$")
_PREFIX = 5
"""The most tokens before the grid: of the class, of distillation, four registers."""

_ASKED = 4  # grids that an error lists


@dataclass(frozen=True)
class Table:
    """A position embedding [1, prefix + rows * columns, C], or a table of biases by distance on that grid.

    Attributes:
        prefix: tokens that are no places; of biases, entries that are no distances.
        patch: height and width of a place in pixels.
        of_distances: biases [(2 * rows - 1) * (2 * columns - 1) + prefix, heads] (BEiT).
    """

    name: str
    grid: Grid
    prefix: int
    patch: Size
    of_distances: bool = False


@dataclass
class Positions:
    """The tables of a network, and what is known of the pictures that a file was trained on.

    Attributes:
        name: of the network, for messages.
        said: their size by the configuration.
        sizes: by the file, or what lies beside it; the likeliest first.
        same: whether the file was written by a run whose network was built like this one.
        alone: whether the network's library resizes none, so that all is done here.
        assumed: grids that nobody has said, by name, as they were taken.
    """

    name: str
    tables: Sequence[Table]
    said: Size | None = None
    sizes: Sequence[Size] = ()
    same: bool = False
    alone: bool = False
    assumed: dict[str, Grid] = field(default_factory=dict)

    @classmethod
    def of(cls, net: nn.Module, name: str, image: Size) -> Positions:
        """Of a network for pictures of `image`, of whose file nothing is known yet."""
        return cls(name, tuple(_tables(net, image)))

    def placed(
        self,
        state: Mapping[str, torch.Tensor],
        net: nn.Module,
        *,
        remaining: bool,
        beside: Mapping[str, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """The tables of `state` that are to be resized, on the network's grid.

        Args:
            beside: what else the file holds, where `state` holds tables alone.
            remaining: also those of another number of places; else these are left to the library of the network.

        Raises:
            UserError: a grid that cannot be known, or another one than the configuration says.
        """
        shapes = dict(net.named_parameters())
        made = {}
        for table in self.tables:
            given, wanted = state.get(table.name), shapes[table.name]
            if given is None or given.dim() != wanted.dim() or given.shape[-1] != wanted.shape[-1]:
                continue
            grid = self._grid(_in_file(table, beside or state, shapes), given)
            if grid is None or grid == table.grid:
                continue
            square = grid[0] == grid[1]
            if remaining or self.alone or not square or given.shape == wanted.shape:
                made[table.name] = _resized(given, table, grid, resampling(self.name))
        return made

    def _grid(self, table: Table, given: torch.Tensor) -> Grid | None:
        """The file's, None where it is not this table's to tell."""
        count = given.shape[0 if table.of_distances else 1] - table.prefix
        if self.said is not None:
            grid = _of_size(self.said, table)
            if _entries(grid, table) != count:
                fits = "" if table.of_distances else f": {_choices(count, table)}"
                raise UserError(
                    f"pictures of {_by(self.said)} are {_by(grid)} patches of {_by(table.patch)}, and {table.name} of "
                    f"these weights, with {count} entries, is of another number",
                    where=KEY,
                    todo=f"height and width of the pictures that they were trained on{fits}",
                )
            return grid
        for size in self.sizes:
            grid = _of_size(size, table)
            if _entries(grid, table) == count:
                return grid
        if self.same and count == _entries(table.grid, table):
            return table.grid
        if table.of_distances:
            return None
        likely = _likely(count, table.grid)
        if len(likely) == 1 and self._has_shape(likely[0]):
            self.assumed[table.name] = likely[0]
            return likely[0]
        if not likely and _of_other_tokens(count + table.prefix):
            return None
        raise UserError(
            f"the position embeddings ({table.name}) are of {count} places, and nothing says on how many rows and "
            f"columns they lie; {self.name} has {_by(table.grid)}",
            todo=f"set {KEY} to height and width of the pictures that these weights were trained on: "
            + _choices(count, table),
        )

    def _has_shape(self, grid: Grid) -> bool:
        """Whether a grid is of the shape of what is said of the pictures, where something is."""
        return not self.sizes or any(grid[0] * width == grid[1] * height for height, width in self.sizes)


def resampling(network: str) -> dict[str, Any]:
    """How the library resizes the tables of a network, where it is not its usual way."""
    other = "flexi" in network or "radio" in network
    return {"interpolation": "bilinear", "antialias": False} if other else {}


def _in_file(table: Table, state: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Tensor]) -> Table:
    """With the patch that the file's network cuts pictures into: its convolution's, where the network's own is one."""
    before = table.name.rpartition(".")[0]
    for name in (f"{before}.patch_embed.proj.weight".strip("."), "patch_embed.proj.weight", "conv_proj.weight"):
        given, own = state.get(name), shapes.get(name)
        if given is not None and own is not None and given.dim() == 4 and tuple(own.shape[2:]) == table.patch:
            return replace(table, patch=(given.shape[2], given.shape[3]))
    return table


def _tables(net: nn.Module, image: Size) -> Iterator[Table]:
    grids = list(_grids(net, image))
    for name, parameter in net.named_parameters():
        if parameter.dim() == 3 and parameter.shape[0] == 1 and _TABLE.fullmatch(name):
            fitting = [(parameter.shape[1] - r * c, (r, c), patch) for (r, c), patch in grids]
            fitting = [found for found in fitting if 0 <= found[0] <= _PREFIX]
            if fitting:
                prefix, grid, patch = min(fitting, key=lambda found: found[0])
                yield Table(name, grid, prefix, patch)
        elif parameter.dim() == 2 and name.endswith("relative_position_bias_table"):
            window = _pair(getattr(net.get_submodule(name.rpartition(".")[0]), "window_size", None))
            whole = [(grid, patch) for grid, patch in grids if grid == window]  # not a window that moves over the map
            for grid, patch in whole[:1]:
                extra = parameter.shape[0] - (2 * grid[0] - 1) * (2 * grid[1] - 1)
                if extra >= 0:
                    yield Table(name, grid, extra, patch, of_distances=True)


def _grids(net: nn.Module, image: Size) -> Iterator[tuple[Grid, Size]]:
    """What modules say of the grid that they cut pictures into, and the size of a place."""
    side, patch = getattr(net, "image_size", None), getattr(net, "patch_size", None)
    if isinstance(side, int) and isinstance(patch, int):  # torchvision's
        yield (side // patch, side // patch), (patch, patch)
    for module in net.modules():
        grid = _pair(getattr(module, "grid_size", None)) or _pair(getattr(module, "tokens_spatial_shape", None))
        if grid is not None:
            own = _pair(getattr(module, "patch_size", None)) or grid
            exact = (image[0] // own[0], image[1] // own[1]) == grid  # else of a map, or of a branch's smaller picture
            yield grid, own if exact else (max(image[0] // grid[0], 1), max(image[1] // grid[1], 1))


def _pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(n, int) and n > 0 for n in value):
        return (value[0], value[1])
    return None


def _of_size(size: Size, table: Table) -> Grid:
    return size[0] // table.patch[0], size[1] // table.patch[1]


def _entries(grid: Grid, table: Table) -> int:
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) if table.of_distances else grid[0] * grid[1]


def _likely(count: int, own: Grid) -> list[Grid]:
    """Grids of so many places that are square, or of the shape of `own`."""
    found: dict[Grid, None] = {}
    shared = math.gcd(*own)
    for rows, columns in ((1, 1), (own[0] // shared, own[1] // shared)):
        times = math.isqrt(max(count, 0) // (rows * columns))
        if times and rows * columns * times**2 == count:
            found[rows * times, columns * times] = None
    return list(found)


def _of_other_tokens(length: int) -> bool:
    """Whether a table is that of a square grid behind another number of tokens, which no size mends."""
    return any(length > n and math.isqrt(length - n) ** 2 == length - n for n in range(_PREFIX + 1))


def _choices(count: int, table: Table) -> str:
    """Sizes of pictures that have so many places, those next to a square first."""
    grids = [(rows, count // rows) for rows in range(1, min(count, 10_000) + 1) if count % rows == 0]
    near = sorted(grids, key=lambda grid: abs(math.log(grid[0] / grid[1])))[:_ASKED]
    sizes = [f"[{r * table.patch[0]}, {c * table.patch[1]}] for {r} x {c}" for r, c in near]
    return " or ".join(sizes) or "none has so many places"


def _resized(given: torch.Tensor, table: Table, grid: Grid, how: Mapping[str, Any]) -> torch.Tensor:
    from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table

    if not table.of_distances:
        made: torch.Tensor = resample_abs_pos_embed(
            given, list(table.grid), old_size=list(grid), num_prefix_tokens=table.prefix, **how
        )
        return made
    if "old_window_size" not in inspect.signature(resize_rel_pos_bias_table).parameters:  # timm before 1.0.31
        raise UserError(
            f"{table.name} is for {_by(grid)} places, the network for {_by(table.grid)}",
            todo="install a newer timm, which resizes it; or the size of pictures that the weights were trained with",
        )
    shape = (_entries(table.grid, table) + table.prefix, given.shape[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old habits in timm's code
        biases: torch.Tensor = resize_rel_pos_bias_table(given, table.grid, shape, old_window_size=grid)
    return biases


def _by(pair: tuple[int, int]) -> str:
    return f"{pair[0]} x {pair[1]}"
