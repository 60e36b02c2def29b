"""Where the numbers of a run go. ``metrics.jsonl`` is the truth; trackers come after it and may fail."""

from tlx.tracking.phase_end import PhaseEnd as PhaseEnd
from tlx.tracking.tracker import RunInfo as RunInfo
from tlx.tracking.tracker import Tracker as Tracker
from tlx.tracking.tracker import guarded as guarded
from tlx.tracking.trackers import mlflow, tensorboard, wandb
from tlx.tracking.trained import TrainedModel as TrainedModel

__all__ = ["mlflow", "tensorboard", "wandb"]
