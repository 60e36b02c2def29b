"""Which phases may train from stored features, and what that saves; see :mod:`tlx.train.cached`."""

from __future__ import annotations

from collections.abc import Iterator

from tlx.plan.config import Config
from tlx.plan.plan import Phase, Plan

DETERMINISTIC = frozenset({"resize", "center_crop"})
"""Transforms that show a picture always in the same way."""


def why_not(config: Config, phase: Phase, steps_per_epoch: int) -> str | None:
    """Why a phase cannot, or need not, train from features; None where it may, if the network has a place for it."""
    wanted = config.cache
    if wanted.mode == "off":
        return "cache: off"
    if config.draws_targets:
        return f"task {config.task.name} draws anew what it shows of a picture"
    if config.mix is not None and (config.mix.mixup or config.mix.cutmix):
        return "mixed features are not those of mixed pictures (mix)"
    if phase.trains[next(iter(phase.layers)).name] != "frozen":
        return "its first layer trains"
    if wanted.mode != "views" and not is_deterministic(config):
        return "training pictures are drawn anew in each epoch (transforms); cache: {views: 4} keeps four of each"
    shown = (phase.stop - phase.start) / steps_per_epoch
    return f"it shows each picture {shown:.2g} times" if wanted.mode == "auto" and shown < 2 else None


def savings(config: Config, plan: Plan) -> Iterator[str]:
    """A line for each phase that trains from features, and for each that could if it were asked for."""
    for phase in plan.phases:
        epochs = (phase.stop - phase.start) / plan.steps_per_epoch
        kept = config.cache.kept
        why = why_not(config, phase, plan.steps_per_epoch)
        if why is None:
            views = f"{kept} view{'s' if kept > 1 else ''}"
            alike = is_deterministic(config) or (not phase.start and epochs <= kept)
            what = "the same training" if alike else "another training than from pictures drawn anew"
            yield (
                f"cache: {phase.name} trains from features of {views} of each picture, where the network can be cut: "
                f"frozen layers compute {kept:g} times in place of {epochs:g} ({what})"
            )
        elif "drawn anew" in why and epochs >= 2:
            what = "another training: the same four views again and again"
            yield f"cache: {phase.name} computes frozen layers {epochs:g} times; with cache: {{views: 4}} 4 ({what})"


def is_deterministic(config: Config) -> bool:
    return config.transforms is not None and DETERMINISTIC.issuperset(part.name for part in config.transforms)
