"""Where things lie. The folder of this file is on the path of tests, and of the processes that they start."""

from __future__ import annotations

from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
TESTS = SUPPORT.parent
ROOT = TESTS.parent
