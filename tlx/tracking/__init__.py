"""Where the numbers of a run go. ``metrics.jsonl`` is the truth; trackers come after it and may fail."""

from tlx.tracking.tracker import RunInfo as RunInfo
from tlx.tracking.tracker import Tracker as Tracker
from tlx.tracking.tracker import guarded as guarded
from tlx.tracking.trackers import tensorboard, wandb

__all__ = ["tensorboard", "wandb"]
