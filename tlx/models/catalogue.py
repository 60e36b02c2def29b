"""What there is to choose from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import get_args

from tlx.errors import UserError
from tlx.layers import Granularity
from tlx.models import Backbone, Description, Row, surgery
from tlx.models import source as find
from tlx.models.assemble import Plain, Wish, examine
from tlx.models.sources import Source
from tlx.models.trace import build_empty

CLASSES = 1000


def rows(names: Sequence[str], pattern: str, *, details: int) -> Iterator[Row]:
    """See :func:`tlx.models.search`."""
    shell = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    found = sorted(n for n in names if fnmatchcase(n, shell) or fnmatchcase(n.partition("/")[2], shell))
    for name in found:
        source = find(name)
        yield row(source) if len(found) <= details else Row(name, source.tags())


def row(source: Source) -> Row:
    """One line with everything in it, or with the name alone where the network cannot be used."""
    try:
        plain = _plain(source)
    except Exception:  # one network that cannot be built must not hide the others
        return Row(source.name, source.tags())
    return _row(source, plain)


def description(source: Source) -> Description:
    """See :func:`tlx.models.describe`."""
    plain = _plain(source)
    anatomy = plain.anatomy()
    layers = {granularity: anatomy.layers(granularity) for granularity in get_args(Granularity)}
    return Description(_row(source, plain), source.arguments(), anatomy.blocks, layers)


def _plain(source: Source) -> Plain:
    args, tags = source.check({}), source.tags()
    tag = tags[0] if tags else None
    net = build_empty(lambda: source.build(CLASSES, args, tag))
    if isinstance(net, Backbone):
        raise UserError(f"{source.name} describes itself: load it")
    return examine(source, net, Wish(CLASSES, "none", args, "linear", {}, True), tag)


def _row(source: Source, plain: Plain) -> Row:
    return Row(
        name=source.name,
        weights=source.tags(),
        parameters=sum(p.numel() for p in plain.net.parameters()),
        head=plain.running[0],
        auxiliary=plain.heads[1:],
        features=surgery.features(plain.net, plain.running[0]),
        input=plain.spec,
    )
