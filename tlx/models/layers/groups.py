"""Units brought together: pure functions over runs of units in execution order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tlx.base.layers import Role
from tlx.models.layers.trace import BATCH, Shape
from tlx.models.layers.units import Cut, Unit, ancestors


@dataclass
class Group:
    """A layer to be: where `last` is set, it shares the head's depth."""

    name: str
    units: list[Unit]
    role: Role = "backbone"
    last: bool = False


def until_block(units: list[Unit], stages: Sequence[str]) -> list[list[Unit]]:
    """A run per block: what leads to it, itself, and what first runs inside it (a module that blocks share).

    Args:
        stages: modules whose end, after their last block, belongs to that block (what joins the branches again).
    """
    runs: list[list[Unit]] = [[]]
    over = 0
    for i, unit in enumerate(units):
        started = unit.start or 0
        if started > over and any(u.block for u in runs[-1]) and not ends_stage(units, i, stages):
            runs.append([])
        runs[-1].append(unit)
        if unit.block:
            over = max(over, unit.stop or started)
    return [run for run in runs if run]


def ends_stage(units: Sequence[Unit], index: int, stages: Sequence[str]) -> bool:
    """Whether a unit lies in a stage behind all of its blocks."""
    unit = units[index]
    around = [s for s in stages if within(unit.path, s)]
    inside = [j for j, u in enumerate(units) if u.block and any(within(u.path, s) for s in around)]
    return bool(inside) and max(inside) < index


def outermost(blocks: Sequence[Unit]) -> list[Unit]:
    """Blocks that do not run inside another one; `blocks` are in execution order."""
    found: list[Unit] = []
    for block in blocks:
        if not found or (block.start or 0) > (found[-1].stop or 0):
            found.append(block)
    return found


def runs(units: list[Unit], labels: Sequence[int | None]) -> list[list[Unit]]:
    runs: list[list[Unit]] = []
    for i, unit in enumerate(units):
        if i and labels[i] == labels[i - 1]:
            runs[-1].append(unit)
        else:
            runs.append([unit])
    return runs


def pairs(units: list[Unit]) -> list[Group]:
    """A group per unit, a norm joined to the convolution before it."""
    return joined_norms([Group(u.path, [u]) for u in units])


def joined_norms(groups: list[Group]) -> list[Group]:
    pairs: list[Group] = []
    for group in groups:
        if pairs and all(u.norm for u in group.units) and not any(u.norm for u in pairs[-1].units):
            pairs[-1].units += group.units
        else:
            pairs.append(group)
    return pairs


def shared_path(units: Sequence[Unit], pieces: Cut, also: Sequence[Unit] = ()) -> str:
    """The module that holds these units and no other parameters (those of `also` aside), else the first one's path."""
    if len(units) == 1:
        return units[0].path
    path = common(u.path for u in units)
    mine = {u.path for u in [*units, *also]}
    others = [u for u in pieces.units if u.parameters and u.path not in mine]
    return path if path and not any(within(u.path, path) for u in others) else units[0].path


def stage_names(stages: list[Group], pieces: Cut) -> list[str]:
    """The containers' own names if every stage has one to itself, else stage1, stage2 ..."""
    names = []
    for stage in stages:
        path = common(u.path.rpartition(".")[0] + "." for u in stage.units if u.block or len(stage.units) == 1)
        mine = {u.path for u in stage.units}
        others = [u.path for u in pieces.units if u.parameters and u.path not in mine]
        alone = [a for a in (path, *ancestors(path)) if a and not any(within(p, a) for p in others)]
        names.append(alone[-1] if alone else "")
    return names if all(names) else [f"stage{i + 1}" for i in range(len(stages))]


def common(paths: Iterable[str]) -> str:
    shared: list[str] = []
    for level in zip(*[p.rstrip(".").split(".") for p in paths], strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)


def positions(output: Shape, image: tuple[int, int]) -> float:
    """Positions of an image in a map (channels first or last) or in tokens; 0 for anything else.

    Parts of an image may stand in the batch's dimension (MobileViT's patches).
    """
    share = output[0] / BATCH if output else 0
    if len(output) == 3:
        return output[1] * share
    if len(output) != 4:
        return 0
    pairs = [(output[2], output[3]), (output[1], output[2])]
    height, width = min(pairs, key=lambda p: abs(p[0] * image[1] - p[1] * image[0]))
    if height != width and image[0] == image[1]:  # windows of tokens [N, windows, tokens, C]
        return output[1] * output[2] * share
    return height * width * share


def first_start(path: str, starts: Mapping[str, int | None]) -> float:
    return min((s for p, s in starts.items() if s is not None and within(p, path)), default=float("inf"))


def within(path: str, container: str) -> bool:
    """Whether a module path lies at or below another."""
    return path == container or path.startswith(f"{container}.")
