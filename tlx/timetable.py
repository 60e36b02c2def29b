"""The plan as a person reads it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, JustifyMethod
from rich.table import Table

from tlx.layers import Layer
from tlx.plan import Phase, Plan

if TYPE_CHECKING:
    from tlx.memory import Memory


def timetable(
    plan: Plan,
    *,
    memory: Mapping[str, Memory] | None = None,
    measured: Mapping[str, int | None] | None = None,
    width: int = 150,
) -> str:
    """Samples and steps, phases, layers with what trains at which rate, and warnings, as plain text.

    Args:
        memory: of each phase, where it was estimated.
        measured: bytes that each phase took at most, where a device has told.
    """
    out = Console(file=io.StringIO(), width=width, highlight=False, color_system=None, force_terminal=False)
    out.print(
        f"{plan.samples:,} training samples, global batch {plan.batch}, {plan.steps_per_epoch} steps per epoch, "
        f"{plan.steps} steps, {plan.epochs:g} epochs",
        markup=False,
    )
    out.print(_phases(plan))
    if memory:
        out.print(_memory(memory, {name: n for name, n in (measured or {}).items() if n is not None}))
    out.print(_layers(plan))
    for warning in plan.warnings:
        out.print(f"warning: {warning}", markup=False)
    assert isinstance(out.file, io.StringIO)
    return "\n".join(line.rstrip() for line in out.file.getvalue().splitlines())


def _phases(plan: Plan) -> Table:
    table = Table(box=box.SIMPLE, title="phases", title_justify="left")
    for column in ("phase", "epochs", "steps", "curve", "warm-up", "layer decay", "norms", "optimizer", "trained"):
        justify: JustifyMethod = "right" if column in ("epochs", "trained") else "left"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=column in ("phase", "steps", "norms"))
    for phase in plan.phases:
        said = phase.settings
        span = f"{(phase.stop - phase.start) / plan.steps_per_epoch:g}"
        table.add_row(
            phase.name,
            f"<= {span}" if phase.plateau else span,
            f"{phase.start}-{phase.stop}",
            _curve(phase),
            str(phase.warmup) if phase.warmup else "-",
            _part(said.layer_decay.name, said.layer_decay.args),
            said.norm if isinstance(said.norm, str) else "own policy",
            said.optimizer_state + (", from best" if said.start_from == "best" else ""),
            f"{sum(p.size for layer in plan.layers for p in phase.trained(layer)):,}",
        )
    return table


def _memory(memory: Mapping[str, Memory], measured: Mapping[str, int]) -> Table:
    table = Table(box=box.SIMPLE, title="memory of a rank in MiB, estimated (tlx/memory.py)", title_justify="left")
    table.add_column("phase", no_wrap=True)
    for column in ("weights", "gradients", "optimizer", "activations", "total", *(["measured"] if measured else [])):
        table.add_column(column, justify="right")
    for name, needs in memory.items():
        parts = (needs.weights, needs.gradients, needs.optimizer, needs.activations, needs.total)
        shown = (*parts, measured.get(name)) if measured else parts
        table.add_row(name, *("unknown" if n is None else f"{n / 2**20:,.0f}" for n in shown))
    return table


def _layers(plan: Plan) -> Table:
    table = Table(box=box.SIMPLE, title="layers and their rates (- is frozen)", title_justify="left")
    table.add_column("depth", justify="right")
    table.add_column("layer")
    table.add_column("parameters", justify="right")
    for phase in plan.phases:
        table.add_column(phase.name, justify="right", overflow="fold")
    for layer in plan.layers:
        role = "" if layer.role == "backbone" else f" ({layer.role})"
        rates = [_rate(phase, layer) for phase in plan.phases]
        table.add_row(str(layer.depth), layer.name + role, f"{layer.size:,}" if layer.size else "-", *rates)
    return table


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


def _part(name: str, args: dict[str, object]) -> str:
    return f"{name}({', '.join(f'{k}={v}' for k, v in args.items())})" if args else name
