"""Kept for packages that were written for 0.2: what was here is in `tlx.base.layers`."""

from tlx.base.layers import *  # noqa: F403
