"""A sweep before its first trial: what was asked for, checked as `tlx plan` would check each trial, or joined."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tlx.base.errors import ConfigError, Problems, UserError, below
from tlx.base.plug import check_packages, needs
from tlx.base.terminal import clock, escaped, say
from tlx.plan import config as configs
from tlx.plan.config import Config
from tlx.runs.run_files import RunFiles, number
from tlx.sweep import space as spaces
from tlx.sweep.grammar import Dimension, Range, parse
from tlx.sweep.progress import short
from tlx.sweep.spec import FILE, Pruner, Sampler, Spec

if TYPE_CHECKING:
    from tlx.plan.plan import Plan

_NEVER = {
    "run": "each trial has a folder of its own in the sweep's, which --out names",
    "task": "trials must be compared by one metric",
    "evaluate.metric": "trials must be compared by one metric",
    "data.val": "trials must be compared on the same pictures",
    "data.test": "test data stay out of a sweep",
    "data.expected": "it is what the shards hold",
    "track": "it does not change what is trained",
}
"""Keys that no sweep varies, and those below them."""


@needs("optuna", install='pip install "tlx[sweep]"')
def optuna() -> None:
    """What a sweep needs."""


@dataclass(frozen=True)
class Asked:
    """What a command says of a sweep; None where it leaves that to the sweep that is there, or to the defaults."""

    config: Path
    words: tuple[str, ...]
    out: Path | None = None
    trials: int | None = None
    seed: int | None = None
    sampler: Sampler | None = None
    pruner: Pruner | None = None


def check_installed() -> None:
    """
    Raises:
        UserError: Optuna is not here.
    """
    check_packages(optuna, label="tlx sweep")


def folder_of(asked: Asked) -> Path:
    """Where the sweep is, or is to be.

    Raises:
        UserError: mistakes in the words or in the configuration.
    """
    if asked.out is not None:
        return asked.out
    _, fixed = parse(asked.words)
    run = configs.load(asked.config, fixed, libraries=False).run
    return run.with_name(f"{run.name}-sweep")


def joined(asked: Asked) -> Spec | None:
    """The sweep that has begun in the folder, where it is the one that was asked for; None where none has.

    Raises:
        UserError: it is another one.
    """
    if asked.config.is_dir():
        if asked.words or asked.out is not None:
            raise UserError("a sweep's folder takes neither key=value nor --out", where=str(asked.config))
        there = Spec.read(asked.config)
        if there is None:
            raise UserError(
                f"has no {FILE}: no sweep has begun there", where=str(asked.config), todo="tlx sweep CONFIG ..."
            )
        space, fixed = there.space, there.fixed
        text = there.text
    else:
        there = Spec.read(folder_of(asked))
        if there is None:
            return None
        found, words = parse(asked.words)
        space, fixed, text = _like(found, there.space), tuple(words), _text(asked.config)
    wish = replace(
        there, space=space, fixed=fixed, text=text,
        sampler=asked.sampler or there.sampler, pruner=asked.pruner or there.pruner,
        seed=there.seed if asked.seed is None else asked.seed,
    )  # fmt: skip
    there.refuse_other(wish)
    return replace(there, trials=asked.trials or there.trials)


def _like(space: Sequence[Dimension], there: Sequence[Dimension]) -> tuple[Dimension, ...]:
    """The same, in the order of the sweep that is there."""
    keys = [d.key for d in there]
    return tuple(sorted(space, key=lambda d: keys.index(d.key) if d.key in keys else len(keys)))


def _text(config: Path) -> str:
    configs.read(config)  # tells what is wrong with it
    return config.read_text(encoding="utf-8-sig")


def checked(asked: Asked) -> tuple[Spec, str]:
    """A new sweep, and a text for people: the plan of one trial, and what all of them cost.

    Each key is tried with each of its choices or at both ends, as `tlx plan` tries a configuration, the other keys half
    way. Combinations that go wrong are found when they are drawn.

    Raises:
        UserError: every mistake that was found.
    """
    space, fixed = parse(asked.words)
    if not space:
        raise UserError(
            "there is nothing to vary", todo="name a range or choices: phases.each.lr=1e-4..1e-2:log backbone.name=a,b"
        )
    _refuse_fixed_keys(space)
    folder = folder_of(asked)
    spec = Spec(
        folder=folder, space=space, fixed=tuple(fixed), text=_text(asked.config), metric="", trials=0,
        sampler=asked.sampler or "tpe", pruner=asked.pruner or "median", seed=asked.seed or 0,
    )  # fmt: skip
    load = functools.partial(_config, asked.config, spec)
    spec = replace(spec, space=tuple(_settled(d, spec, load) for d in space))
    made = _tried(spec, load)
    config, plan = made
    alone = configs.load(asked.config, fixed, libraries=False)
    spec = replace(
        spec, metric=config.evaluate.chooses, run=str(alone.run), evaluations=evaluations(plan, config),
        trials=_trials(asked, spec),
    )  # fmt: skip
    return spec, _text_of(spec, config, plan, alone)


def _refuse_fixed_keys(space: Sequence[Dimension]) -> None:
    found = Problems()
    for key in (d.key for d in space):
        why = next((why for name, why in _NEVER.items() if key == name or key.startswith(f"{name}.")), None)
        if why is not None and not key.startswith("task."):
            found.add(UserError(f"a sweep cannot vary it: {why}", where=key))
    found.refuse()


def _config(file: Path, spec: Spec, point: Sequence[str]) -> Config:
    return configs.load(file, spec.words(tuple(point), spec.run_of(0)))


def _settled(dimension: Dimension, spec: Spec, load: functools.partial[Config]) -> Dimension:
    """A range of whole numbers is one of any numbers where the key takes these; a range of any numbers stays one."""
    if not isinstance(dimension, Range) or not dimension.whole or dimension.step is not None:
        return dimension
    any_number = replace(dimension, whole=False)
    between = {
        **spaces.middle(spec.space),
        dimension.key: dimension.low + 0.37 * min(dimension.high - dimension.low, 1),
    }
    space = [any_number if d.key == dimension.key else d for d in spec.space]
    try:
        load(spaces.point(space, between))
    except UserError:
        return dimension
    return any_number


def _tried(spec: Spec, load: functools.partial[Config]) -> tuple[Config, Plan]:
    """The configuration and the plan half way, with every point of :func:`tlx.sweep.space.varied` tried.

    Raises:
        UserError: the mistakes of all of them.
    """
    from tlx.train.build import prepared

    found, first = dict[str, UserError](), None
    tried = sum(1 for _ in spaces.varied(spec.space))
    say(f"{spec.folder}: looking at {tried} configurations ...", error=True)
    for values in spaces.varied(spec.space):
        try:
            config = load(spaces.point(spec.space, values))
            if not found:  # the rest of them takes seconds, and there is something to mend already
                plan = prepared(config)[2]
                first = first or (config, plan)
        except UserError as error:
            for mistake in below(error):
                found.setdefault(f"{mistake.where}: {mistake.what}", mistake)
    for dimension in spec.space:
        if isinstance(dimension, Range) and not dimension.whole and not found:
            _refuse_fractions(dimension, spec, load)
    if found:
        raise ConfigError(found.values())
    assert first is not None
    config = first[0]
    if config.data.val is None:
        raise UserError("a sweep chooses by validation data, and there are none", where="data.val")
    return first


def _refuse_fractions(dimension: Range, spec: Spec, load: functools.partial[Config]) -> None:
    """
    Raises:
        UserError: numbers between the ends are none for this key.
    """
    if dimension.step is not None:
        return
    between = dimension.low + 0.3719 * (dimension.high - dimension.low)
    try:
        load(spaces.point(spec.space, {**spaces.middle(spec.space), dimension.key: between}))
    except UserError as error:
        why = next((m.what for m in below(error) if m.where == dimension.key), str(error).splitlines()[-1].strip())
        raise UserError(
            f"{dimension.text}: a number in between, {between:.4g}, is refused: {why}", where=dimension.key,
            todo=f"whole numbers are written {dimension.low:.0f}..{dimension.high:.0f}",
        ) from error  # fmt: skip


def _trials(asked: Asked, spec: Spec) -> int:
    points = spaces.count(spec.space)
    if spec.sampler == "grid" and points is None:
        endless = next(d for d in spec.space if d.count is None)
        raise UserError(
            f"a grid needs steps or choices, and {endless.text} is any number", where=endless.key,
            todo="write 0..1/0.1 or 1e-4,1e-3,1e-2; or --sampler random",
        )  # fmt: skip
    if asked.trials is not None:
        return asked.trials
    if spec.sampler == "grid" and points is not None:
        return points
    raise UserError("how many trials in all is not said", where="--trials", todo="for instance --trials 30")


def evaluations(plan: Plan, config: Config) -> int:
    """How many evaluations a trial has that runs to its end."""
    every = plan.interval(config.evaluate.every)
    stops = {phase.stop for phase in plan.phases}
    return len(stops | set(range(every, plan.steps + 1, every)))


def _text_of(spec: Spec, config: Config, plan: Plan, alone: Config) -> str:
    from tlx.plan.timetable import timetable

    points = spaces.count(spec.space)
    trials = spec.trials if points is None else min(spec.trials, points)
    lines = [f"sweep {escaped(spec.folder)}: {trials} trials, {spec.sampler}, pruner {spec.pruner}, seed {spec.seed}"]
    lines += [f"  {line}" for line in spaces.described(spec.space)]
    lines += [f"  = {points:,} combinations" + ("" if spec.trials <= points else ", each once")] if points else []
    best = "highest" if spec.direction == "maximize" else "lowest"
    lines.append(f"chosen: the {best} {spec.metric} on {escaped(str(config.data.val))}")
    if alone.data.test is not None:
        lines.append("data.test is left out of all trials: what is chosen must not have seen it")
    half_way = ", ".join(short(spec.space, spaces.point(spec.space, spaces.middle(spec.space))))
    lines += ["", f"one trial, half way ({half_way}):", timetable(plan)]
    pictures, saved = plan.steps * plan.batch, "" if spec.pruner == "none" else "; pruning saves some"
    lines += ["", f"{trials} trials: at most {_count(trials * pictures)} training pictures ({pictures:,} a trial) and "]
    lines[-1] += f"{trials * spec.evaluations:,} evaluations{saved}"
    took = number(RunFiles(alone.run).result.get("wall_time_s"))
    if took > 0:
        lines.append(f"by the run in {escaped(alone.run)}, {clock(took)}: about {clock(trials * took)} for one worker")
    else:
        lines.append("how long that takes is said after the first trial")
    return "\n".join(lines)


def _count(pictures: int) -> str:
    return f"{pictures / 1e6:.1f} million" if pictures >= 2e6 else f"{pictures:,}"
