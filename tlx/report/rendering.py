"""Templates to pages that need no other file: pictures are inside, and everything that comes from files is escaped."""

from __future__ import annotations

import base64
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlx.base.terminal import escaped
from tlx.runs.history import ACCURACY, falls, is_share, shown

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, **said: Any) -> str:
    """
    Args:
        template: of `TEMPLATES`.
        said: what it names; pictures are bytes, shown by the filters ``png`` and ``jpeg``.
    """
    return _environment().get_template(template).render(**said)


@functools.cache
def _environment() -> Environment:
    import jinja2

    # what a file does not hold is shown as nothing: a run may be of another version, or its files torn
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printable,
    )
    environment.filters |= {
        "png": lambda data: _inline("png", data),
        "jpeg": lambda data: _inline("jpeg", data),
        "percent": lambda share: shown(ACCURACY, share),
        "of_list": lambda value, key: shown(key, value),
        "falls": falls,
        "is_share": is_share,
    }
    return environment


def _inline(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _printable(value: Any) -> Any:
    return escaped(value, lines=True) if type(value) is str else value
