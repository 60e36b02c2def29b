"""Arithmetic on the device: waits, overflows, reduced precision, compiled code: ``precision.py waits|overflow|...``."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Sequence

import torch
from rows import Setting, setting_of
from training import composed, config_of, losses, one_step

from tlx.train.loop import begin, steps_of, train_step
from tlx.train.step import prepare_phase

OPTIMIZERS = ("adamw", "sgd", "rmsprop", "adam")
WAITING = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaMemcpy",
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
)
"""Calls with which the host waits for all that the device has to do. The late exchange waits for an event instead."""
LATE = "cudaEventSynchronize"


def waits(setting: Setting) -> None:
    """No step but the first waits, but for the late exchange: one event for each step, and one for each batch."""
    precisions = ("fp32",) if setting.dry else ("bf16", "fp16", "fp32")
    for precision, name in itertools.product(precisions, OPTIMIZERS):
        loop = {"precision": precision, "clip": 1.0, "ema": {}, "nonfinite": "skip", "fit_micro_batch": "never"}
        config = config_of(
            setting, loop=loop, optimizer={"name": name}, track={"every": 1000}, evaluate={"every": 1000}
        )
        with composed(config) as run:
            counts = waits_of(run)
        waited = sum(counts[call] for call in WAITING) / STEPS
        # on a CPU the plain optimizers ask for the flag
        ok = None if setting.dry else waited == 0 and counts[LATE] <= 3 * STEPS
        setting.row(f"{name} {precision}", ok=ok, waits_per_step=waited, events_per_step=counts[LATE] / STEPS)


STEPS = 3


def waits_of(run) -> Counter[str]:
    """Calls of the host in the second to fourth step of the first phase."""
    phase = run.plan.phases[0]
    begin(run, phase)
    phase_model = prepare_phase(run.net, phase, run.plan, world=run.world, compiled=False)
    each = steps_of(run.stream, phase, run.progress.step, run.world.device)
    train_step(run, phase, phase_model, *next(each))
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if run.world.cuda else []
    with torch.profiler.profile(activities=kinds) as profile, torch.profiler.record_function("steps"):
        for _ in range(STEPS):
            train_step(run, phase, phase_model, *next(each))
    each.close()
    events = profile.events()
    (steps,) = [e.time_range for e in events if e.name == "steps" and e.device_type == torch.autograd.DeviceType.CPU]
    # the profiler itself waits at its end
    return Counter(e.name for e in events if steps.start <= e.time_range.start <= steps.end)


def overflow(setting: Setting) -> None:
    """The gradient of the first step is infinite: nothing moves, and the second step moves all that trains."""
    for precision, name in itertools.product(("fp32",) if setting.dry else ("fp16", "bf16", "fp32"), OPTIMIZERS):
        loop = {"precision": precision, "clip": 1.0, "nonfinite": "skip", "fit_micro_batch": "never"}
        config = config_of(setting, loop=loop, optimizer={"name": name}, unfreeze="all")
        with composed(config) as run:
            phase = run.plan.phases[0]
            begin(run, phase)
            phase_model = prepare_phase(run.net, phase, run.plan, world=run.world, compiled=False)
            each = steps_of(run.stream, phase, run.progress.step, run.world.device)
            spoilt = phase_model.parameters[0].register_hook(lambda g: g * float("inf"))
            before = [t.clone() for t in run.net.state_dict().values()]
            one_step(run, phase_model, *next(each))
            still = all(torch.equal(t, b) for t, b in zip(run.net.state_dict().values(), before, strict=True))
            spoilt.remove()
            found = [one_step(run, phase_model, *next(each)) for _ in range(3)]
            each.close()
            moves = sum(not torch.equal(p, b) for p, b in zip(run.net.state_dict().values(), before, strict=True))
            finite = all(map(math.isfinite, found)) and all(p.isfinite().all() for p in run.net.parameters())
        setting.row(f"{name} {precision}", ok=still and finite and moves > 0, nothing_moved=still, then_moved=moves)


def train(setting: Setting, *, dropout: float = 0.0, optimizer: str = "adamw", **loop: object) -> list[float]:
    args = ({"dropout": dropout} if setting.dry else {"drop_rate": dropout}) if dropout else {}
    name = "toys:small" if setting.dry else "timm/resnet18"
    backbone = {"name": name, "weights": "none", "args": args}
    loop = {"fit_micro_batch": "never", **loop}
    torch.use_deterministic_algorithms(False)  # what a training before this one asked for
    with composed(config_of(setting, loop=loop, backbone=backbone, optimizer={"name": optimizer})) as run:
        return losses(run)


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def losses_of_precisions(setting: Setting) -> None:
    """Losses of 16 steps over a phase change, beside those in fp32."""
    plain = train(setting)
    clipped = train(setting, clip=1.0)
    setting.row("fp32", ok=all(map(math.isfinite, plain)), first=plain[0], last=plain[-1])
    again = train(setting)
    setting.row("fp32 again", ok=None, differs=distance(again, plain))
    tried = {"bf16": 0.1, "fp16": 0.1} if not setting.dry else {"bf16": 0.1}
    for precision, bound in tried.items():
        for channels_last in (False, True):
            found = train(setting, precision=precision, channels_last=channels_last, clip=1.0)
            # a step that overflows in fp16 is skipped, and the curve comes one step later from there
            apart = statistics.mean(abs(a - b) for a, b in zip(found, clipped, strict=True))
            name = f"{precision}{' channels_last' if channels_last else ''}, clipped"
            setting.row(name, ok=apart <= bound, differs=apart, bound=bound)
    same = [train(setting, precision="bf16", deterministic=True) for _ in range(2)]
    setting.row("bf16, deterministic, twice", ok=same[0] == same[1], differs=distance(*same))


def compiled(setting: Setting) -> None:
    """Compiled code over a phase change beside eager code, with and without dropout."""
    cases = ((0.0, False), (0.3, True), (0.3, False))
    for dropout, deterministic in cases[1:2] if setting.dry else cases:
        eager, found = (
            train(setting, dropout=dropout, deterministic=deterministic, compile=compiles) for compiles in (False, True)
        )
        apart, drawn = distance(found, eager), bool(dropout) and not deterministic
        name = f"compiled, dropout {dropout}{', deterministic' if deterministic else ''}"
        # compiled dropout draws other numbers unless determinism is asked for
        setting.row(name, ok=all(map(math.isfinite, found)) and (drawn or apart <= 1e-2), differs=apart)
    torch._dynamo.reset()


def main() -> None:
    setting, said = setting_of(["what"])
    what = {"waits": waits, "overflow": overflow, "losses": losses_of_precisions, "compile": compiled}
    what[said.what](setting)


if __name__ == "__main__":
    main()
