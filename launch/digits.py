"""Writes scikit-learn's handwritten digits, 1,797 real scans of 8 x 8, as pictures: ``python launch/digits.py OUT``.

OUT/source/{train,val} is the task to pretrain on: digits 0 to 4, turned by quarters and mirrored, 40 classes. (Five
upright classes teach too little: what merely tells 0 to 4 apart hardly helps with 5 to 9.) OUT/target/{train,val} is
the task to transfer to: digits 5 to 9, FEW labels per class to learn from, all other scans to be judged by.

``python launch/digits.py OUT SEED FEW`` draws other scans, or another number of them; the same words, the same files.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

SIZE = 32


def views(scan: np.ndarray) -> list[np.ndarray]:
    """The eight ways to lay a square."""
    turned = [np.rot90(scan, quarters) for quarters in range(4)]
    return [*turned, *(np.fliplr(t) for t in turned)]


def write(scan: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(scan).resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(path)


def main(out: Path, seed: int = 0, few: int = 5) -> None:
    """Writes beside and renames, so that an interrupted start leaves nothing half done under the final name."""
    if out.exists():
        print(f"{out} is there already")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    write_all(beside, seed, few)
    beside.rename(out)
    print(f"{out}: digits 0-4 in eight views to learn from, then 5-9 from {few} labels per class")


def write_all(out: Path, seed: int, few: int) -> None:
    digits = load_digits()
    scans = (digits.images * 255 / 16).astype(np.uint8)
    random = np.random.default_rng(seed)
    for label in range(10):
        own = random.permutation(np.flatnonzero(digits.target == label))
        source = label < 5
        cut = len(own) * 4 // 5 if source else few
        for split, chosen in (("train", own[:cut]), ("val", own[cut:])):
            for i in chosen:
                if source:
                    for place, view in enumerate(views(scans[i])):
                        write(view, out / "source" / split / f"digit-{label}-view-{place}" / f"{i:04d}.png")
                else:
                    write(scans[i], out / "target" / split / f"digit-{label}" / f"{i:04d}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
