"""What differs between two mappings of plain data, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_LONG = 200


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots."""
    if isinstance(node, Mapping):
        return {k: v for key, below in node.items() for k, v in flat(below, f"{prefix}.{key}".strip(".")).items()}
    return {prefix: node}


def differences(before: Any, now: Any) -> list[str]:
    """A line for every key that has another value; of long lists only what they do not share."""
    old, new = flat(before), flat(now)
    return [
        _said(key, old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _said(key: str, before: Any, now: Any) -> str:
    if _is_list(before) and _is_list(now) and len(before) + len(now) > 8:
        gone, come = ([v for v in one if v not in other] for one, other in ((before, now), (now, before)))
        parts = [f"{what} {_listed(values)}" for what, values in (("without", gone), ("with", come)) if values]
        return f"{key}: {' and '.join(parts) or 'in another order'}"
    return f"{key}: {_short(before)} -> {_short(now)}"


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _listed(values: Sequence[Any]) -> str:
    rest = f" and {len(values) - 8} more" if len(values) > 8 else ""
    return ", ".join(_short(v) for v in values[:8]) + rest


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONG else text[:_LONG] + "..."
