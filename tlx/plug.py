"""Kept for packages that were written for 0.2: what was here is in `tlx.base.plug`."""

from tlx.base.plug import *  # noqa: F403
