"""What the programs in this folder have in common: their words, and the rows that they leave."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))  # the tests' own modules

import torch


@dataclass(frozen=True)
class Setting:
    """Where a step runs.

    Attributes:
        dry: on a CPU, at toy size: the same code, figures of no interest.
        rows: a file that gets one JSON object per line.
        work: a folder for what several steps share, such as shards.
    """

    dry: bool
    rows: Path
    work: Path

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda", None if self.dry else 0)

    def row(self, what: str, *, ok: bool | None, **figures: Any) -> None:
        """One line of the table.

        Args:
            ok: whether it is as it must be; None for a figure that nothing is demanded of.
        """
        with self.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"what": what, "ok": ok, **figures}) + "\n")
        print(what, "" if ok is None else "ok" if ok else "FAILED", figures, flush=True)


def setting_of(words: Sequence[str], **asked: Any) -> tuple[Setting, argparse.Namespace]:
    """Reads a program's words.

    Args:
        words: its positional arguments, by name.
        asked: further flags.
    """
    parser = argparse.ArgumentParser()
    for word in words:
        parser.add_argument(word)
    for flag in asked:
        parser.add_argument(f"--{flag}", action="store_true")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--dry", action="store_true")
    said = parser.parse_args()
    return Setting(said.dry, said.rows, said.work), said
