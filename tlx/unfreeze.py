"""Kept for packages that were written for 0.2: what was here is in `tlx.plan.unfreeze`."""

from tlx.plan.unfreeze import *  # noqa: F403
from tlx.plan.unfreeze import Assignment as Assignment
