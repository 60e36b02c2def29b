"""The report of `tlx bench data`, for people."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tlx.bench.clock import Spent
from tlx.bench.data import Report, verdict
from tlx.data.pixels import jpeg_region as regions


def text(report: Report) -> str:
    data = report.data
    return "\n".join([*_head(report, data), "", *_parts(report), "", *_rates(report), "", verdict(report)])


def _head(report: Report, data: dict[str, Any]) -> Iterable[str]:
    shards, images = data["shards"], data["images"]
    height, width = report.setup.spec.size
    yield (
        f"{shards['location']}: {shards['samples']:,} samples in {shards['shards']} shards, "
        f"{shards['bytes'] / 2**20:,.1f} MB"
    )
    yield (
        f"pictures of {images['width']:.0f} x {images['height']:.0f} pixels and {images['bytes'] / 1024:.1f} KB on "
        f"average ({images['measured']} measured), shown as {width} x {height}"
    )
    yield f"decoder: {regions.decoder()}"


def _parts(report: Report) -> Iterable[str]:
    yield _row("ms per image, one process", *(f"{name}: CPU    wall" for name in report.views))
    yield _row("all of it", *(_cell(view.parts.whole) for view in report.views.values()))
    yield _row("floor", *(_cell(view.parts.floor) for view in report.views.values()))
    yield _row("ratio to the floor", *(f"{view.ratio:.2f}        " for view in report.views.values()))
    for name, view in report.views.items():
        yield f"floor ({name}): {view.parts.floor_is}"


def _rates(report: Report) -> Iterable[str]:
    for name, view in report.views.items():
        yield f"{name:<7}workers  images/s  per worker  CPU ms/image"
        for rate in view.rates:
            yield f"{rate.workers:>14}  {rate.images:>8,.0f}  {rate.per_worker:>10,.0f}  {1e3 * rate.cpu:>12.3f}"


def _row(label: str, *cells: str) -> str:
    return f"{label:<48}" + "".join(f"{cell:>24}" for cell in cells)


def _cell(spent: Spent) -> str:
    return f"{1e3 * spent.cpu:.3f}   {1e3 * spent.wall:.3f}"
