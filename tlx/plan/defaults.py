"""What a training does where its configuration does not say: one table, by the number of training samples and the kind
of backbone.

A configuration alone means the same wherever it lies, so that it gets the row of `USUAL`, whatever the number of its
samples; `tlx init` has counted them, and writes what their row says into the file. Either way a run's config.yaml has
every value; its defaults.json says which were from here, and by those it goes on when the table has changed since.

Sources, and what was measured here:

- Head first, then everything, at rates that fall toward the input: "A Practical Guide to Transfer Learning using
  PyTorch" (16 and 8 epochs of 6,149 pictures), BEiT and MAE (0.75 per block), ConvNeXt (AdamW, decay per stage). A
  rate of its own for each block of a deep convolutional network would leave its first ones next to none: a line from 1
  to a tenth does not depend on the depth.
- More data, fewer epochs and more steps: BiT's rule (Kolesnikov et al. 2020: 500 steps below 20,000 samples, 10,000
  steps below 500,000), and ConvNeXt's and DeiT's 30 epochs of ImageNet.
- 3e-3 for the head and 3e-4 for everything with AdamW and batches of 32: `configs/flowers17/deit_tiny.yaml` (95.6 %,
  then 98.2 %).
- Crops of at least 0.35 of a picture, label smoothing 0.1: the same. Gentler than ImageNet's 0.08, since crops cost a
  head of 3 epochs 1.4 to 2.4 points. Weight decay 0.05, gradients clipped to 1: timm, DeiT.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

Kind = Literal["convolutional", "transformer"]
Role = Literal["head", "part", "all"]
"""What of the network trains in a phase: the new head, a few parameters of every layer too, or whole layers."""


@dataclass(frozen=True)
class Row:
    """Of the table.

    Attributes:
        below: for fewer training samples than that.
        batch: the global batch.
        head, rest: epochs of feature extraction, and of every other phase.
        crop: the least share of a picture that a training crop shows.
    """

    below: float
    batch: int
    head: int
    rest: int
    crop: float


TABLE = (
    Row(below=1_000, batch=32, head=16, rest=16, crop=0.35),
    Row(below=5_000, batch=32, head=8, rest=12, crop=0.35),
    Row(below=50_000, batch=64, head=4, rest=12, crop=0.25),
    Row(below=500_000, batch=128, head=2, rest=12, crop=0.2),
    Row(below=math.inf, batch=256, head=1, rest=10, crop=0.2),
)
USUAL = TABLE[1]
"""The row of a configuration whose samples nobody has counted."""

RATES: Mapping[Role, float] = {"head": 3e-3, "part": 1e-3, "all": 3e-4}
"""Learning rates of the optimizers below."""

OPTIMIZERS = ("adamw", "adam")
"""Those that the rates are of; with another one, rates must be said."""

DECAYS: Mapping[Kind, Mapping[str, Any]] = {
    "transformer": {"name": "exponential", "factor": 0.75},
    "convolutional": {"name": "linear", "ratio": 0.1},
}

BACKBONE = "timm/deit_tiny_patch16_224"
"""Of `tlx init` without --backbone, with or without a GPU, so that what is learned on a laptop and on a cluster may be
compared: 5.7 million parameters, 23 MB, 1.3 GFLOPs at 224 pixels, known to every timm; the recipe above was measured
with it. Nor are pictures smaller without a GPU: with 128 pixels a head on ants and bees came to 87.6 % where 224 give
95.4 %."""

_ROLES: Mapping[str, Mapping[str, Role]] = {
    "two_phase": {"feature_extraction": "head", "fine_tuning": "all"},
    "head_only": {"feature_extraction": "head"},
    "all": {"fine_tuning": "all"},
    "classifier": {"classifier": "all"},
    "norms_only": {"norms_only": "part"},
    "biases_only": {"biases_only": "part"},
    "gradual": {"head": "head", "each": "all"},
}
_WORDS = (
    "vit deit beit eva swin cait xcit volo pit pvt twins tnt mvit crossvit levit davit hiera nest aim samvit flexivit "
    "naflexvit vitamin coat convit visformer gcvit"
)
_TRANSFORMERS = frozenset(_WORDS.split())
_SPLITS = ("train", "training", "val", "test")


def row_of(samples: int | None) -> Row:
    """The row for a number of training samples."""
    return USUAL if samples is None else next(row for row in TABLE if samples < row.below)


def kind_of(backbone: str) -> Kind:
    """By the name of a network: ``timm/swinv2_tiny...`` is a transformer. What nobody knows counts as convolutional."""
    words = re.split(r"[/:_.]", backbone.lower())
    return "transformer" if any(re.sub(r"(v?\d+)?$", "", word) in _TRANSFORMERS for word in words) else "convolutional"


def roles_of(schedule: str, args: Mapping[str, Any]) -> Mapping[str, Role]:
    """The phases of an unfreeze schedule and what trains in them; ``each`` is any other. None of a schedule whose
    phases the user has made."""
    return {f"last_{args.get('n')}": "all"} if schedule == "last_n" else _ROLES.get(schedule, {})


def phase_of(role: Role, kind: Kind, row: Row = USUAL) -> dict[str, Any]:
    """Settings of a phase, as a configuration says them."""
    epochs = row.head if role == "head" else row.rest
    said = {"duration": f"{epochs}ep", "lr": RATES[role], "curve": "cosine"}
    return said if role == "head" else {**said, "warmup": "10%", "layer_decay": dict(DECAYS[kind])}


def share_of(role: Role, roles: Mapping[str, Role]) -> int:
    """How many percent of the whole a phase lasts, where only its length is said: as in `USUAL`."""
    head = round(100 * USUAL.head / (USUAL.head + USUAL.rest))
    return 100 if len(roles) == 1 else head if role == "head" else 100 - head


def run_of(train: str, backbone: str) -> str:
    """The run's folder: ``runs/photos-resnet50`` of ``data/photos/train`` and ``torchvision/resnet50``."""
    place = "pipe" if train.startswith("pipe:") else urlsplit(train).path if "://" in train else train
    parts = [part for part in re.split(r"[/\\]", place) if part.strip(".")]
    named = parts[:-1] if len(parts) > 1 and parts[-1].lower() in _SPLITS else parts
    return f"runs/{plain_name(named[-1] if named else '', 'data')}-{network_name(backbone)}"


def network_name(backbone: str) -> str:
    """Without its library, for names of files."""
    return plain_name(re.split(r"[/:]", backbone)[-1], "network")


def plain_name(name: str, otherwise: str) -> str:
    """A name of a file that needs no quotes anywhere."""
    return re.sub(r"[^\w.+-]+", "-", name).strip("-.") or otherwise
