"""The plan as a person reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from tlx.base import terminal
from tlx.base.layers import Layer
from tlx.base.terminal import drawn, escaped, tables
from tlx.plan.plan import Phase, Plan

if TYPE_CHECKING:
    from tlx.plan.memory import Memory

_FEW = 4
"""Entries of an argument that are written out; of more their number is."""


def timetable(
    plan: Plan,
    *,
    memory: Mapping[str, Memory] | None = None,
    measured: Mapping[str, int | None] | None = None,
    width: int | None = None,
) -> str:
    """Samples and steps, phases, layers with what trains at which rate, and warnings, as plain text.

    Args:
        memory: of each phase, where it was estimated.
        measured: bytes that each phase took at most, where a device has told.
        width: columns; by default COLUMNS, or those of the terminal, or 150 where there is none. What does not fit
            goes into a further table.
    """
    width = width or terminal.width()
    summary = (
        f"{plan.samples:,} training samples, global batch {plan.batch}, {plan.steps_per_epoch} steps per epoch, "
        f"{plan.steps} steps, {plan.epochs:g} epochs"
    )
    parts: list[Table | Text] = [Text(summary), *_phases(plan, width)]
    if memory:
        parts += _memory(memory, {name: n for name, n in (measured or {}).items() if n is not None}, width)
    parts += [*_layers(plan, width), *(Text(f"warning: {warning}") for warning in plan.warnings)]
    return drawn(*parts, columns=width)


def _phases(plan: Plan, width: int) -> Iterator[Table]:
    rows = [{**_when(plan, phase), **_how(phase)} for phase in plan.phases]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    yield from tables("phases", {"phase": columns.pop("phase")}, columns, width, more="phases, further settings")


def _when(plan: Plan, phase: Phase) -> dict[str, str]:
    span = f"{(phase.stop - phase.start) / plan.steps_per_epoch:g}"
    return {
        "phase": escaped(phase.name),
        "epochs": f"<= {span}" if phase.plateau else span,
        "steps": f"{phase.start}-{phase.stop}",
        "trained": f"{sum(p.size for layer in plan.layers for p in phase.trained(layer)):,}",
    }


def _how(phase: Phase) -> dict[str, str]:
    said = phase.settings
    return {
        "curve": _curve(phase),
        "warm-up": str(phase.warmup) if phase.warmup else "-",
        "layer decay": _part(said.layer_decay.name, said.layer_decay.args),
        "norms": said.norm if isinstance(said.norm, str) else "own policy",
        "optimizer": said.optimizer_state + (", from best" if said.start_from == "best" else ""),
    }


def _memory(memory: Mapping[str, Memory], measured: Mapping[str, int], width: int) -> Iterator[Table]:
    names = ("weights", "gradients", "optimizer", "activations", "total", *(["measured"] if measured else []))
    columns: dict[str, list[str]] = {name: [] for name in names}
    for phase, needs in memory.items():
        parts = (needs.weights, needs.gradients, needs.optimizer, needs.activations, needs.total, measured.get(phase))
        for name, count in zip(names, parts, strict=False):
            columns[name].append("unknown" if count is None else f"{count / 2**20:,.0f}")
    title = "memory of a rank in MiB, estimated (tlx/train/memory_estimate.py)"
    yield from tables(title, {"phase": [*map(escaped, memory)]}, columns, width, more=title)


def _layers(plan: Plan, width: int) -> Iterator[Table]:
    about = {
        "depth": [str(layer.depth) for layer in plan.layers],
        "layer": [_name(layer) for layer in plan.layers],
        "parameters": [f"{layer.size:,}" if layer.size else "-" for layer in plan.layers],
    }
    rates = {escaped(phase.name): [_rate(phase, layer) for layer in plan.layers] for phase in plan.phases}
    title = "layers and their rates (- is frozen)"
    yield from tables(title, about, rates, width, more=f"{title}, further phases")


def _name(layer: Layer) -> str:
    return escaped(layer.name) + ("" if layer.role in ("backbone", layer.name) else f" ({layer.role})")


def _rate(phase: Phase, layer: Layer) -> str:
    trained = phase.trained(layer)
    if not trained:
        return "-"
    rate = f"{phase.lr * phase.factors[layer.name]:.4g}"
    if len(trained) == len(layer.parameters):
        return rate
    kinds: Sequence[str] = list(dict.fromkeys(p.kind for p in trained))
    return f"{rate} ({kinds[0] + 's' if len(kinds) == 1 else 'part'})"


def _curve(phase: Phase) -> str:
    now = _part(phase.settings.curve.name, phase.settings.curve.args)
    if not phase.before:
        return now
    until, earlier = phase.before[-1]
    former = earlier.settings.curve
    was = f"{_part(former.name, former.args)} over {earlier.length} steps"
    return f"{now} from step {phase.start + until}; before: {was}"


def _part(name: str, args: Mapping[str, object]) -> str:
    return escaped(f"{name}({', '.join(f'{k}={_short(v)}' for k, v in args.items())})" if args else name)


def _short(value: object) -> object:
    many = isinstance(value, (Mapping, list, tuple)) and len(value) > _FEW
    return f"<{len(value)} values>" if many and isinstance(value, (Mapping, list, tuple)) else value
