"""The report of `tlx bench train`, for people."""

from __future__ import annotations

from tlx.bench.train import Report, verdict


def text(report: Report) -> str:
    """The table and the verdict, for people."""
    low, high = report.interval
    lines = [
        f"phase {report.phase}, {report.device}, {report.precision}, batch {report.batch}, {report.workers} workers, "
        f"{report.steps} steps of each loop",
        f"{'':<38}{'ms/step':>10}{'images/s':>12}",
    ]
    for name, label in (
        ("shards", "the loop, from shards"),
        ("resident", "the loop, batches on the device"),
        ("bare", "a bare PyTorch loop on those"),
    ):
        seconds = getattr(report, name)
        lines.append(f"{label:<38}{1e3 * seconds:>10.2f}{report.batch / seconds:>12,.0f}")
    lines += [
        f"waiting for data: {report.waiting:.1%} of the time",
        f"over a bare loop: {report.overhead:+.1%} (95 % of the median of rounds: {low:+.1%} to {high:+.1%})",
        *report.notes,
        "",
        verdict(report),
    ]
    return "\n".join(lines)
