"""What is known of a shard that was just written: kept beside it until the whole build is done."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tlx.base.parsing import from_json
from tlx.data.build.content import Rewrite
from tlx.data.shards.statistics import FACT


@dataclass(frozen=True)
class Rewrites:
    """What writing JPEGs again without loss did.

    Attributes:
        rewritten, kept, failed: JPEGs (see `tlx.data.build.content.Stored`).
        before, after: bytes of those that were rewritten.
    """

    rewritten: int = 0
    kept: int = 0
    failed: int = 0
    before: int = 0
    after: int = 0

    def and_one(self, outcome: Rewrite, before: int, after: int) -> Rewrites:
        """With one more picture."""
        if outcome == "rewritten":
            return replace(self, rewritten=self.rewritten + 1, before=self.before + before, after=self.after + after)
        if outcome == "kept":
            return replace(self, kept=self.kept + 1)
        return replace(self, failed=self.failed + 1) if outcome == "failed" else self

    def __add__(self, other: Rewrites) -> Rewrites:
        return Rewrites(**{k: v + getattr(other, k) for k, v in asdict(self).items()})


@dataclass(frozen=True, eq=False)
class Note:
    """One finished shard.

    Attributes:
        size: of the tar in bytes; 0 if there is none, because no picture of it could be read.
        sha256: of the tar, as it was written.
        bad: what was left out, and why.
        records, pixels: as `tlx.data.shards.statistics.Facts.packed` gives them.
    """

    size: int
    sha256: str
    bad: tuple[str, ...]
    records: NDArray[np.void]
    pixels: tuple[float, ...]
    rewrites: Rewrites

    def text(self) -> str:
        """As a file's content."""
        return json.dumps(
            {
                "size": self.size,
                "sha256": self.sha256,
                "bad": self.bad,
                "records": self.records.tobytes().hex(),
                "pixels": self.pixels,
                "rewrites": asdict(self.rewrites),
            }
        )


def read_note(path: Path) -> Note:
    """
    Raises:
        OSError, ValueError, KeyError, TypeError: it is missing, or not one of ours.
    """
    said = from_json(path.read_bytes())
    records = np.frombuffer(bytes.fromhex(said["records"]), FACT)
    pixels, rewrites = tuple(said["pixels"]), Rewrites(**said["rewrites"])
    return Note(said["size"], said["sha256"], tuple(said["bad"]), records, pixels, rewrites)
