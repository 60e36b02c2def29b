"""The tasks that a configuration can name. Nothing here imports torch before a task is made."""

from __future__ import annotations

__all__: list[str] = []
