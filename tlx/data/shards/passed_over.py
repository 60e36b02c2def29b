"""What a folder, a tar or a CSV file holds besides samples: counted and named by kind, never dropped in silence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tlx.base.terminal import escaped

HIDDEN = "hidden"
SYSTEM = "made by a system or program"
OUTSIDE = "picture outside of the class folders"
LINK = "link to what is read elsewhere, or holds what is read"
DANGLING = "link to what is not in the tar"
SPECIAL = "neither a file, a folder nor a link"
UNUSED = "member that is not used"
COLUMN = "column that is not used"
EMPTY_ROW = "empty row"
OTHER_SPLIT = "split that is none of train, val and test"
NO_LABELS = "split without labels"
BELOW = "folder of tars below tars; index it on its own"

_SHOWN = 5
_NAMES_OF_SYSTEMS = frozenset(
    [
        "__macosx", ".ds_store", ".appledouble", ".trashes", ".spotlight-v100", ".fseventsd", "icon\r",
        "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information",
        "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", ".snapshot",
        "lost+found", ".ipynb_checkpoints", "__pycache__",
    ]
)  # fmt: skip
"""The names, in small letters, under which macOS, Windows, storage servers, file systems and notebooks keep things."""

_DOCUMENTS = frozenset(
    ["readme", "license", "licence", "copying", "notice", "citation", "authors", "changelog", "changes", "version"]
)


@dataclass(frozen=True)
class PassedOver:
    """Something that is no sample.

    Attributes:
        kind: why it is passed over; one of the texts of this module, or `no_picture`.
        name: its path, its name in a tar (``link -> target``), a line of a file; ``*.EXTENSION`` for many.
        count: how many `name` stands for.
    """

    kind: str
    name: str
    count: int = 1


def kind_of_name(name: str) -> str | None:
    """Why a file or folder of this name (without a path) is passed over wherever it lies; None where it is not."""
    if name.casefold() in _NAMES_OF_SYSTEMS or name.startswith("._"):
        return SYSTEM
    return HIDDEN if name.startswith(".") else None


def kind_of_path(path: str) -> str | None:
    """The same for a name in a tar, of which any part may be passed over; ``.`` and ``..`` are no names."""
    kinds = (kind_of_name(part) for part in path.split("/") if part not in ("", ".", ".."))
    return next((kind for kind in kinds if kind), None)


def no_picture(name: str) -> str:
    """The kind of a file whose name is not that of a picture."""
    extension = name.rpartition("/")[2].rpartition(".")[2].lower() if "." in name.rpartition("/")[2] else ""
    return f"no picture (.{extension})" if extension else "no picture"


def is_document(stem: str) -> bool:
    """Whether a file of this name, without its extension, describes others, as README and LICENSE do."""
    return stem.casefold() in _DOCUMENTS


def told(passed_over: Iterable[PassedOver]) -> list[str]:
    """A line for each kind, in the order in which they were met: how many, and some of their names."""
    by_kind: dict[str, list[PassedOver]] = {}
    for one in passed_over:
        by_kind.setdefault(one.kind, []).append(one)
    return [f"left out, {escaped(kind)}: {_listed(merged(ones))}" for kind, ones in by_kind.items()]


def merged(passed_over: Iterable[PassedOver]) -> tuple[PassedOver, ...]:
    """The same with one entry for each kind and name."""
    counts: dict[tuple[str, str], int] = {}
    for one in passed_over:
        counts[one.kind, one.name] = counts.get((one.kind, one.name), 0) + one.count
    return tuple(PassedOver(kind, name, count) for (kind, name), count in counts.items())


def _listed(ones: tuple[PassedOver, ...]) -> str:
    names = [escaped(o.name) + (f" {o.count:,} times" if o.count > 1 else "") for o in ones[:_SHOWN]]
    more = f" and {len(ones) - _SHOWN:,} more" if len(ones) > _SHOWN else ""
    return f"{sum(o.count for o in ones):,} ({', '.join(names)}{more})"
