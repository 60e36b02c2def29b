"""How well `tlx embed` and `tlx neighbours` find copies: planted ones, among photographs that nobody has changed.

``python tests/bench/near_duplicates.py PICTURES BACKBONE WEIGHTS [--copies 100] [--seed 0]``

Of some pictures, drawn by the seed, copies are made: smaller, encoded anew, with a border cut off, mirrored.
Printed are, for each kind and threshold, the share of copies that are found (recall), and what else is found: pairs
of different originals, of which some are copies that were there before.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from tlx.use.embed import Options, embed
from tlx.use.embedder import EmbedderOptions
from tlx.use.inputs import pictures_of
from tlx.use.neighbours import Search
from tlx.use.vector_file import Embeddings

THRESHOLDS = (0.999, 0.99, 0.98, 0.97, 0.96, 0.95, 0.93, 0.9)


def resized(image, share):
    return image.resize((round(image.width * share), round(image.height * share)), Image.Resampling.BICUBIC)


def cropped(image, share):
    x, y = round(image.width * share), round(image.height * share)
    return image.crop((x, y, image.width - x, image.height - y))


KINDS = {
    "three quarters": lambda image: (resized(image, 0.75), 90),
    "half": lambda image: (resized(image, 0.5), 90),
    "JPEG, quality 50": lambda image: (image, 50),
    "5 % cut off each side": lambda image: (cropped(image, 0.05), 90),
    "mirrored": lambda image: (ImageOps.mirror(image), 90),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("pictures", type=Path)
    parser.add_argument("backbone")
    parser.add_argument("weights")
    parser.add_argument("--copies", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args()
    originals = list(pictures_of(wanted.pictures))
    chosen = np.random.default_rng(wanted.seed).choice(len(originals), wanted.copies, replace=False)
    with tempfile.TemporaryDirectory() as place:
        copies, kinds = [], []
        for number, at in enumerate(chosen.tolist()):
            kind = list(KINDS)[number % len(KINDS)]
            with Image.open(originals[at]) as image:
                changed, quality = KINDS[kind](image.convert("RGB"))
            copies.append(f"{place}/{number}.jpg")
            kinds.append((at, kind))
            changed.save(copies[-1], quality=quality)
        options, network = Options(Path(place) / "all.npy", workers=0), EmbedderOptions(weights=wanted.weights)
        embed(wanted.backbone, [*originals, *copies], options, network)
        vectors = Embeddings.read(options.out)
        report(vectors, len(originals), kinds)


def report(vectors, count, kinds) -> None:
    pairs = Search(vectors, threshold=min(THRESHOLDS)).run().pairs
    cosine = {(pair.a, pair.b): pair.cosine for pair in pairs}
    of = {kind: [cosine.get((at, count + n), 0) for n, (at, k) in enumerate(kinds) if k == kind] for kind in KINDS}
    others = [pair.cosine for pair in pairs if pair.b < count]
    print(f"{count} pictures and {len(kinds)} copies")
    print("| threshold | " + " | ".join(KINDS) + " | pairs of two originals |")
    print("|---" * (len(KINDS) + 2) + "|")
    for threshold in THRESHOLDS:
        shares = [f"{np.mean(np.array(own) >= threshold):.0%}" for own in of.values()]
        print(f"| {threshold} | " + " | ".join(shares) + f" | {sum(c >= threshold for c in others)} |")


if __name__ == "__main__":
    main()
