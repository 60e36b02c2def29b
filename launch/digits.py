"""Writes scikit-learn's handwritten digits (1,797 real scans of 8 x 8) as picture files: ``python launch/digits.py OUT [SEED]``.

OUT/source/{train,val}/digit-0 ... 4 is the task to pretrain on, OUT/target/{train,val}/digit-5 ... 9 the one to transfer to: ten
labels per class to learn from, all others to be judged by. The same SEED gives the same files; what is there stays.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

FEW = 10
SIZE = 32


def main(out: Path, seed: int) -> None:
    digits = load_digits()
    random = np.random.default_rng(seed)
    for label in range(10):
        own = random.permutation(np.flatnonzero(digits.target == label))
        task, cut = ("source", len(own) * 4 // 5) if label < 5 else ("target", FEW)
        for split, chosen in (("train", own[:cut]), ("val", own[cut:])):
            folder = out / task / split / f"digit-{label}"
            folder.mkdir(parents=True, exist_ok=True)
            for i in chosen:
                scan = Image.fromarray((digits.images[i] * 255 / 16).astype(np.uint8))
                scan.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(folder / f"{i:04d}.png")
    print(f"digits: {len(digits.target)} scans in {out}, {FEW} labels per class of the target task")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
