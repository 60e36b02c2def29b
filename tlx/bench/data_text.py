"""The report of `tlx bench data`, for people."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tlx.bench.data import Report, verdict
from tlx.data.pixels import jpeg_region as regions

_LABELS = {
    "read": "read, from the system's memory",
    "header": "header",
    "decode": "decode",
    "resize": "crop and resize",
    "crop": "choose the crop (Python)",
    "batch": "batch: keys, order, labels, memory",
}


def text(report: Report) -> str:
    data = report.data
    return "\n".join([*_head(report, data), "", *_parts(report), "", *_rates(report), "", *_ends(report)])


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
    if not report.extension:
        yield f"  -> {data['decoder']['todo']}"


def _parts(report: Report) -> Iterable[str]:
    views, train = report.views, report.views["train"]
    decoded = " the region that is shown" if train.parts.regions else " the whole picture"
    yield _row("ms per image, one process", *(f"{name}: CPU    wall" for name in views))
    for part in dict.fromkeys(name for view in views.values() for name in view.parts.parts):
        label = _LABELS.get(part, f"transform {part}")
        label += decoded if part == "decode" else ""
        yield _row(f"  {label}", *(_cell(view.parts.parts.get(part)) for view in views.values()))
    yield _row("all of it", *(_cell(view.parts.whole) for view in views.values()))
    yield _row("floor", *(_cell(view.parts.floor) for view in views.values()))
    yield _row("ratio to the floor", *(f"{view.ratio:.2f}        " for view in views.values()))
    for name, view in views.items():
        yield f"floor ({name}): {view.parts.floor_is}"
    if train.parts.regions:
        yield "decode and resize are one call; what a call without resizing costs less counts as resizing"
    if train.parts.cold_read is not None:
        yield f"read from where the tars lie, not from memory: {1e3 * train.parts.cold_read:.3f} ms by the clock"
    if train.between_processes is not None:
        yield f"from a worker to this process: {1e3 * train.between_processes:.3f} ms CPU per image"
    if train.to_device is not None:
        yield f"to the GPU: {1e3 * train.to_device:.3f} ms per image, beside the computation"


def _rates(report: Report) -> Iterable[str]:
    for name, view in report.views.items():
        yield f"{name:<7}workers  images/s  per worker  CPU ms/image  first batch  memory for batches"
        for rate in view.rates:
            over = "  (more than cores)" if rate.workers > report.cores else ""
            yield (
                f"{'':<7}{rate.workers:>7}  {rate.images:>8,.0f}  {rate.per_worker:>10,.0f}  {1e3 * rate.cpu:>12.3f}  "
                f"{rate.first:>9.2f} s  {rate.memory / 2**20:>15,.1f} MB{over}"
            )


def _ends(report: Report) -> Iterable[str]:
    train = report.views["train"]
    for gpu in report.gpus:
        count = train.workers_for(gpu)
        over = f" (this machine has {report.cores} cores)" if count > report.cores else ""
        yield f"a GPU that trains {gpu:>6,.0f} images/s needs {count:>3} worker{'s' if count > 1 else ' '}{over}"
    for saving in report.savings:
        if saving.share > 0.02:
            yield (
                f"tlx shards build {saving.option}: decoding and resizing {1e3 * saving.before:.2f} -> "
                f"{1e3 * saving.after:.2f} ms ({saving.share:.0%} less), files {saving.bytes_before / 1024:.0f} -> "
                f"{saving.bytes_after / 1024:.0f} KB"
            )
    if any(saving.option.startswith("--resize") for saving in report.savings):
        yield "  (smaller pictures show less detail where a random crop enlarges a part of them)"
    yield ""
    yield verdict(report)


def _row(label: str, *cells: str) -> str:
    return f"{label:<48}" + "".join(f"{cell:>24}" for cell in cells)


def _cell(spent: Any) -> str:
    return f"{1e3 * spent.cpu:.3f}   {1e3 * spent.wall:.3f}" if spent is not None else "-       -  "
