"""Kept for packages that were written for 0.2: what was here is in `tlx.base.durations`."""

from tlx.base.durations import *  # noqa: F403
