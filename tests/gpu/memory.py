"""What a phase takes: the estimate and the trial beside the peak of training: ``memory.py peaks NETWORK | words x``.

The goals: the estimate within 10 %, the trial within 3 %.
"""

from __future__ import annotations

import functools
import itertools

import torch
from rows import Setting, setting_of
from training import free

from tlx.data.stream.stream import Batch
from tlx.models import Backbone
from tlx.plan.config import Config, parse
from tlx.plan.plan import Phase, Plan
from tlx.ranks.rendezvous import join_ranks
from tlx.train import components as parts
from tlx.train.memory_estimate import Images, memory_by_phase
from tlx.train.memory_trial import Load, Trial, ran_out
from tlx.train.step import Updater, prepare_phase, set_rates

CLASSES = 10
ESTIMATE, TRIAL = 0.10, 0.03


def config_of(setting: Setting, name: str, precision: str, *, recomputes: bool) -> Config:
    """The head, then everything, on batches of 32."""
    return parse(
        {
            "run": "unused",
            "data": {"train": "unused", "batch": 2 if setting.dry else 32},
            "backbone": {"name": f"torchvision/{name}", "weights": "none"},
            "unfreeze": "two_phase",
            "phases": {"each": {"lr": 1e-4, "duration": 1 if setting.dry else 3}},
            "loop": {"precision": precision, "gradient_checkpointing": recomputes},
            "world": {"device": setting.device.type},
        }
    )


def peaks(setting: Setting, name: str) -> None:
    """A row for each precision, phase, with and without checkpointing."""
    # the largest differences first: what is cut off has shown least
    cases = list(itertools.product(("fp32", "bf16"), (False, True)))
    for precision, recomputes in cases[1:2] if setting.dry else cases:
        config = config_of(setting, name, precision, recomputes=recomputes)
        parts.seed_all(config)
        here = join_ranks(config)
        backbone, updater = parts.parts_of(config, here, [8] * CLASSES)
        plan = Plan.make(config, backbone.layers, samples=3 * config.data.batch, world=1)
        trial = parts.trial_of(config, backbone, updater, plan, classes=CLASSES, ranks=1)
        estimates = estimates_of(config, plan)
        for phase in plan.phases:
            compare(setting, f"{name} {precision}{' checkpointed' if recomputes else ''}, {phase.name}", trial, phase,
                    updater, estimates[phase.name])  # fmt: skip
        here.leave()
        del backbone, plan, trial, updater
        free(setting.device)


def estimates_of(config: Config, plan: Plan) -> dict[str, int | None]:
    backbone: Backbone = parts.backbone_of(config, CLASSES, empty=True)
    images = Images(config.data.batch, (3, *backbone.input.size), config.loop.precision)
    recomputed = backbone.blocks if config.loop.gradient_checkpointing else ()
    optimizer = functools.partial(parts.make, "optimizer", config.optimizer)
    found = memory_by_phase(plan, backbone.module, images, optimizer, averaged=False, recomputed=recomputed)
    return {name: memory.total for name, memory in found.items()}


def compare(setting: Setting, what: str, trial: Trial, phase: Phase, updater: Updater, estimate: int | None) -> None:
    attempt = trial.attempt(phase, Load(trial.plan.batch, False, 0))
    if attempt.fault or attempt.failed:
        setting.row(what, ok=False, why=attempt.fault or f"{attempt.failed} does not fit")
        return
    peak = peak_of(setting, trial, phase, updater)
    if setting.dry:  # a CPU does not tell
        setting.row(what, ok=None, estimate_mib=_mib(estimate))
        return
    apart = {"estimate": None if estimate is None else estimate / peak - 1, "trial": (attempt.peak or 0) / peak - 1}
    near = apart["estimate"] is not None and abs(apart["estimate"]) <= ESTIMATE and abs(apart["trial"]) <= TRIAL
    setting.row(what, ok=near, peak_mib=_mib(peak), estimate_mib=_mib(estimate), trial_mib=_mib(attempt.peak),
                estimate_off=apart["estimate"], trial_off=apart["trial"])  # fmt: skip


def peak_of(setting: Setting, trial: Trial, phase: Phase, updater: Updater) -> int:
    """Bytes of tensors at most in three steps, the next batch beside the one that trains."""
    free(setting.device)
    phase_model = prepare_phase(trial.net, phase, trial.plan, world=updater.world, compiled=False)
    if not setting.dry:
        torch.cuda.reset_peak_memory_stats(setting.device)
    coming = batch(setting, trial)
    for step in range(phase.start, phase.stop):
        now, coming = coming, batch(setting, trial)
        set_rates(updater.optimizer, phase, step)
        updater.update(phase_model, step, [now])
        del now
    return 0 if setting.dry else torch.cuda.max_memory_allocated(setting.device)


def batch(setting: Setting, trial: Trial) -> Batch:
    count = trial.plan.batch
    images = torch.randint(0, 256, (count, *trial.shape), dtype=torch.uint8, device=setting.device)
    labels = torch.arange(count, device=setting.device) % CLASSES
    return Batch(0, 0, 1, images, labels, torch.arange(count), total=float(count), targets={"label": labels})


def _mib(count: int | None) -> int | None:
    return None if count is None else round(count / 2**20)


def words(setting: Setting) -> None:
    """What the allocator, cuBLAS and cuDNN say when nothing is left, and whether it is known as a want of memory."""
    device = setting.device
    hoard: list[torch.Tensor] = []
    if setting.dry:
        tried = {"allocator": lambda: torch.empty(2**60, dtype=torch.uint8)}
    else:
        # their outputs have room, so that what fails is what the libraries want beside them
        a, out = torch.randn(512, 512, device=device), torch.empty(512, 512, device=device)
        weight, images = torch.randn(64, 64, 3, 3, device=device), torch.randn(8, 64, 56, 56, device=device)
        room = torch.empty_like(images)
        size, _ = torch.cuda.mem_get_info(device)
        while size >= 2**20:  # all that is there, in ever smaller pieces
            try:
                hoard.append(torch.empty(size, dtype=torch.uint8, device=device))
            except torch.OutOfMemoryError:
                size //= 2

        def convolve() -> None:
            nonlocal room
            del room
            torch.nn.functional.conv2d(images, weight, padding=1)

        tried = {
            "cuBLAS": lambda: torch.mm(a, a, out=out),
            "cuDNN": convolve,
            "allocator": lambda: torch.empty(2**40, dtype=torch.uint8, device=device),
        }
    for name, task in tried.items():
        try:
            task()
            if not setting.dry:
                torch.cuda.synchronize(device)
        except Exception as error:
            setting.row(name, ok=ran_out(error), says=f"{type(error).__name__}: {str(error).splitlines()[0][:120]}")
        else:
            setting.row(name, ok=None, says="it still had room")
    hoard.clear()


def main() -> None:
    setting, said = setting_of(["what", "network"])
    words(setting) if said.what == "words" else peaks(setting, said.network)


if __name__ == "__main__":
    main()
