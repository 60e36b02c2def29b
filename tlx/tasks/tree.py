"""A tree of classes: each is a path from the root, such as animal/dog/poodle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from tlx.base.errors import UserError, did_you_mean

Path = tuple[str, ...]


@dataclass(frozen=True)
class Tree:
    """Nodes are counted with the root, which is 0 and has the path ().

    Attributes:
        classes: the path of each class, in the order of the index.
        names: of classes.
        separator: between the parts of a path.
    """

    classes: tuple[Path, ...]
    names: tuple[str, ...]
    separator: str

    @cached_property
    def nodes(self) -> tuple[Path, ...]:
        """By depth, those of equal depth in the order of the index."""
        found = dict.fromkeys(path[:depth] for path in self.classes for depth in range(len(path) + 1))
        return tuple(sorted(found, key=len))

    @cached_property
    def position(self) -> dict[Path, int]:
        """Of nodes, by path."""
        return {path: i for i, path in enumerate(self.nodes)}

    @cached_property
    def leaves(self) -> tuple[int, ...]:
        """Classes, by their positions in the index, that are above no other class."""
        above = {path[:depth] for path in self.classes for depth in range(len(path))}
        return tuple(i for i, path in enumerate(self.classes) if path not in above)

    @property
    def depth(self) -> int:
        return len(self.nodes[-1])

    @cached_property
    def heights(self) -> tuple[int, ...]:
        """Of nodes: the steps down to the farthest leaf below."""
        heights = dict.fromkeys(self.nodes, 0)
        for path in self.classes:
            for depth in range(len(path)):
                heights[path[:depth]] = max(heights[path[:depth]], len(path) - depth)
        return tuple(heights[path] for path in self.nodes)

    def line(self, path: Path) -> list[int]:
        """The nodes at depths 0, 1 ... on the way to a node, which stands for what would be below it, too."""
        return [self.position[path[:depth]] for depth in range(self.depth + 1)]

    def name(self, node: int) -> str:
        return self.separator.join(self.nodes[node])


def tree_of(names: Sequence[str], separator: str, levels: Mapping[str, str] | None) -> Tree:
    """The tree of classes.

    Args:
        levels: what is above each class, where names are not paths: ``{poodle: animal/dog}``, "" for nothing.

    Raises:
        UserError: names that make no tree.
    """
    if levels is None:
        paths = [tuple(name.split(separator)) for name in names]
    else:
        _refuse_other_names(names, levels)
        paths = [(*(levels[name].split(separator) if levels[name] else ()), name) for name in names]
    where = "task.separator" if levels is None else "task.levels"
    if empty := [name for name, path in zip(names, paths, strict=True) if not all(path)]:
        raise UserError(f'the path of class "{empty[0]}" has an empty part', where=where)
    if max(map(len, paths), default=0) < 2:
        raise UserError(
            f'no class is below another name: none holds "{separator}"' if levels is None else "no class is below one",
            where=where,
            todo="name classes by their paths, such as animal/dog/poodle, set task.separator to what stands between "
            "the parts, or say in task.levels what is above each class; classes without a hierarchy: task "
            "classification",
        )
    tree = Tree(tuple(paths), tuple(names), separator)
    if len(tree.leaves) < 2:
        raise UserError("all classes are above or below each other, so there is nothing to tell apart", where="task")
    return tree


def _refuse_other_names(names: Sequence[str], levels: Mapping[str, str]) -> None:
    if unknown := [name for name in levels if name not in names]:
        raise UserError(f'there is no class "{unknown[0]}"{did_you_mean(unknown[0], names)}', where="task.levels")
    if missing := [name for name in names if name not in levels]:
        listed = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        what = f"{len(missing)} of {len(names)} classes are missing: {listed}"
        raise UserError(what, where="task.levels", todo='"" says that nothing is above a class')
