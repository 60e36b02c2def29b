"""The plan: a complete, printable timetable. Which layers train in which phase, at which rate, on which samples.

Pure: made from the configuration, the layers and the number of samples; the loop obeys it and nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tlx.base import plug
from tlx.base.durations import Duration, Mark
from tlx.base.errors import ConfigError, UserError, below, did_you_mean, lines
from tlx.base.layers import Layer, LayerMap, Parameter
from tlx.base.location import shown
from tlx.base.norms import POLICIES, NormPolicy, NormState
from tlx.data.stream.order import micro_batch_sizes
from tlx.plan import defaults, returned_values
from tlx.plan import warnings as plan_warnings
from tlx.plan.config import Config
from tlx.plan.parts import Part
from tlx.plan.phase_settings import PhaseSettings, Plateau
from tlx.plan.unfreeze import Assignment, Mode

SAMPLED = 200
"""Points of a phase's curve in plan.json, about."""


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one assignment of what trains.

    Attributes:
        start, stop: global steps, `stop` exclusive.
        length: steps over which the curve runs; more than stop - start where a plateau ended the phase early.
        layers: all of them, in order.
        trains: mode of every layer.
        lr: the rate of the head at the curve's 1.
        factors: of every layer, from the layer-decay rule.
        settings: what the configuration says of it, and the duration that else the schedule gives.
        warmup: steps of linear rise before the curve begins.
        before: how it ran until the run was extended: until so many of its steps, the rates were those of this phase.
    """

    name: str
    start: int
    stop: int
    length: int
    layers: LayerMap = field(repr=False)
    trains: Mapping[str, Mode]
    lr: float
    factors: Mapping[str, float]
    settings: PhaseSettings
    warmup: int
    curve: Callable[[int, int], float] = field(compare=False)
    before: tuple[tuple[int, Phase], ...] = ()

    @property
    def norm(self) -> NormPolicy:
        return POLICIES[self.settings.norm] if isinstance(self.settings.norm, str) else self.settings.norm

    @property
    def plateau(self) -> Plateau | None:
        return self.settings.duration if isinstance(self.settings.duration, Plateau) else None

    def norm_state(self, layer: Layer) -> NormState:
        """Of the norms of a layer. The head's are new: they learn whenever it trains."""
        frozen = self.trains[layer.name] == "frozen"
        if layer.role == "head":
            return NormState("fixed", "frozen") if frozen else NormState("moving", "trained")
        return self.norm.frozen if frozen else self.norm.trained

    def trained(self, layer: Layer) -> tuple[Parameter, ...]:
        """The parameters of a layer that learn in this phase."""
        return self._trained[layer.name]

    def rate(self, layer: Layer, step: int) -> float:
        """The learning rate of a layer at a global step; 0.0 where nothing of it trains."""
        return self.rates(step)[layer.name]

    def rates(self, step: int) -> dict[str, float]:
        """The learning rate of every layer at a global step.

        Raises:
            UserError: the curve gives a negative value there, or one that is not finite. Of a long phase not every step
                was looked at when the plan was made.
        """
        at = step - self.start
        for until, earlier in self.before:
            if at < until:
                return earlier.rates(step)
        if at < self.warmup:
            shape = (at + 1) / self.warmup
        else:
            shape = self.curve(at - self.warmup, max(self.length - self.warmup, 1))
            if not 0 <= shape < math.inf:  # a negative rate would climb
                raise returned_values.no_rate(shape, at, self.length, label=f"curve {self.settings.curve.name}")
        top = self.lr * shape
        return {name: float(top * self.factors[name]) if learns else 0.0 for name, learns in self._trained.items()}

    def parts(self, most: int) -> Iterator[tuple[int, int]]:
        """Start and stop of at most so many parts of about equal length, for drawing; single steps where those do."""
        steps = self.stop - self.start
        count = min(steps, most)
        return itertools.pairwise(self.start + steps * i // count for i in range(count + 1))

    @functools.cached_property
    def learning(self) -> frozenset[str]:
        """Names of all parameters that learn in this phase."""
        return frozenset(p.name for own in self._trained.values() for p in own)

    @functools.cached_property
    def _trained(self) -> dict[str, tuple[Parameter, ...]]:
        return {layer.name: tuple(p for p in layer.parameters if self._learns(p, layer)) for layer in self.layers}

    def _learns(self, p: Parameter, layer: Layer) -> bool:
        mode = self.trains[layer.name]
        if p.idle or (p.auxiliary and mode != "all"):  # no gradient reaches it
            return False
        if p.kind == "norm":
            by_mode = mode in ("all", "norms", "frozen") or (mode == "biases" and p.is_bias)
            return by_mode and self.norm_state(layer).affine == "trained"
        return mode == "all" or (mode == "biases" and p.is_bias)


@dataclass(frozen=True)
class Plan:
    """Phases one after another over the layers of one backbone."""

    layers: LayerMap
    phases: tuple[Phase, ...]
    samples: int
    batch: int
    steps_per_epoch: int
    warnings: tuple[str, ...] = ()

    @classmethod
    def make(
        cls,
        config: Config,
        layers: LayerMap,
        *,
        samples: int,
        world: int = 1,
        ends: Mapping[str, int] | None = None,
        noticed: Sequence[str] = (),
    ) -> Plan:
        """Compiles a configuration.

        Args:
            samples: of a training epoch, repeated ones counted again.
            world: ranks, for what depends on the size of a micro-batch.
            ends: phases that a plateau or early stopping has ended, by name: the global step they ended at.
            noticed: warnings about what a plan does not see, the data for one; they come before the plan's own.

        Raises:
            UserError: settings for phases that do not exist, a phase without length or rate, nothing that trains, ...
        """
        epoch = _steps_per_epoch(config, samples)
        phases: list[Phase] = []
        problems: list[str] = []
        if config.data.batch < world:
            problems.append(
                f"data.batch={config.data.batch} cannot be split across {world} ranks; set it to at least {world}"
            )
        config, assignments = _with_further(config, _assignments(config, layers, problems), problems)
        for assignment in assignments:
            start = phases[-1].stop if phases else 0
            try:
                phase = _phase(config, layers, assignment, start=start, epoch=epoch)
            except UserError as error:
                problems += lines(error)
                continue
            phases.append(dataclasses.replace(phase, stop=(ends or {}).get(phase.name, phase.stop)))
        if problems:
            raise ConfigError(problems)
        plan = cls(layers, tuple(phases), samples, config.data.batch, epoch)
        if plan.moving:
            _refuse_lone_samples(config, plan, world)
        return dataclasses.replace(plan, warnings=(*noticed, *plan_warnings.of(config, plan, world)))

    @property
    def steps(self) -> int:
        return self.phases[-1].stop

    @property
    def planned(self) -> int:
        """Steps as they were planned, whatever phases have ended early since: what a percentage of the plan is of."""
        return sum(phase.length for phase in self.phases)

    @property
    def epochs(self) -> float:
        return self.steps / self.steps_per_epoch

    @property
    def moving(self) -> tuple[str, ...]:
        """Names of the phases in which running statistics of the batches move."""
        norms = [y for y in self.layers if y.moving]
        return tuple(p.name for p in self.phases if any(p.norm_state(y).statistics == "moving" for y in norms))

    def interval(self, every: Duration) -> int:
        """In steps, at least 1; percent is of the plan as it was planned, so that a phase that ends early changes
        nothing. A longer plan (`--extend`) has another interval."""
        return max(every.steps(epoch=self.steps_per_epoch, whole=self.planned), 1)

    def phase(self, step: int) -> Phase:
        """The phase of a global step; the last one for the step after the end."""
        return next((p for p in self.phases if p.start <= step < p.stop), self.phases[-1])

    def index(self, phase: Phase) -> int:
        """A phase's place among the phases, from 0; also where the plan was remade since."""
        return [own.name for own in self.phases].index(phase.name)

    def lr(self, layer: Layer, step: int) -> float:
        """The learning rate of a layer at a global step."""
        return self.phase(step).rate(layer, step)

    def forgotten(self, phase: Phase) -> frozenset[str]:
        """Parameters whose optimizer state is dropped at the first step of a phase, by its `optimizer_state`."""
        rule, place = phase.settings.optimizer_state, self.phases.index(phase)
        if rule == "keep" or place == 0:
            return frozenset()
        if rule == "reset":
            return frozenset(p.name for layer in self.layers for p in layer.parameters)
        return phase.learning - self.phases[place - 1].learning

    def ended(self, step: int) -> Mapping[str, int]:
        """What `ends` must say so that the phase before `step` ends there."""
        return {p.name: min(p.stop, step) for p in self.phases if p.start < step}

    def data(self) -> dict[str, Any]:
        """Plain data, for plan.json."""
        return {
            "steps": self.steps,
            "steps_per_epoch": self.steps_per_epoch,
            "epochs": self.epochs,
            "samples": self.samples,
            "batch": self.batch,
            "phases": [
                {
                    "name": p.name,
                    "start": p.start,
                    "stop": p.stop,
                    "epochs": (p.stop - p.start) / self.steps_per_epoch,
                    "warmup": p.warmup,
                    "lr": p.lr,
                    "curve": _sampled(p),
                    "settings": self.settings(p),
                    "layers": {
                        y.name: {
                            "trains": p.trains[y.name],
                            "trained": sum(q.size for q in p.trained(y)),
                            "lr": p.lr * p.factors[y.name] if p.trained(y) else 0.0,
                        }
                        for y in self.layers
                    },
                }
                for p in self.phases
            ],
            "layers": [{"name": y.name, "depth": y.depth, "role": y.role, "parameters": y.size} for y in self.layers],
            "warnings": list(self.warnings),
        }

    def explicit(self) -> dict[str, Any]:
        """The schedule written out, for a person to edit: values for the configuration's `unfreeze`, `phases` and
        `further`.

        The plan of a configuration with these values is the same plan.
        """
        trains = [
            {"name": p.name, "layers": {self._only[y]: mode for y, mode in p.trains.items() if mode != "frozen"}}
            for p in self.phases
        ]
        settings = {p.name: self.settings(p) for p in self.phases}
        return {"unfreeze": {"name": "explicit", "phases": trains}, "phases": settings, "further": {}}

    def settings(self, phase: Phase) -> dict[str, Any]:
        """All that a phase does, as a configuration says it: lengths in steps, the factor of each layer's rate."""
        length, plateau = _steps(phase.length), phase.plateau
        rates = {self._only[y.name]: phase.factors[y.name] for y in self.layers if y.parameters}
        said = phase.settings.model_copy(
            update={
                "duration": plateau.model_copy(update={"max": length}) if plateau else length,
                "curve": _curve_in_steps(phase.settings.curve, Clock(self.steps_per_epoch, phase.length, phase.warmup)),
                "warmup": _steps(phase.warmup),
                "layer_decay": Part(name="table", args={"rates": rates, "rest": 1.0}),
            }
        )
        return said.model_dump(mode="json")

    @functools.cached_property
    def _only(self) -> dict[str, str]:
        """Layer by layer, a pattern for the configuration that means it alone."""
        return {layer.name: self.layers.only(layer) for layer in self.layers}


def _sampled(phase: Phase) -> dict[str, list[float]]:
    """Rates of the head and of the lowest layer that trains over the phase, for drawing: steps counted from its start,
    exact where it has at most `SAMPLED`; else of the middle of each part, and of its first and last step."""
    steps = [phase.start, *((start + stop - 1) // 2 for start, stop in phase.parts(SAMPLED)), phase.stop - 1]
    steps = sorted(set(steps))
    lowest = next(layer for layer in phase.layers if phase.trained(layer))
    rates = [phase.rates(step) for step in steps]
    return {
        "steps": [step - phase.start for step in steps],
        "head": [_short(rate[phase.layers.head.name]) for rate in rates],
        "lowest": [_short(rate[lowest.name]) for rate in rates],
    }


def _short(rate: float) -> float:
    """As many digits as a picture shows."""
    return float(f"{rate:.6g}")


def _steps_per_epoch(config: Config, samples: int) -> int:
    whole, rest = divmod(samples, config.data.batch)
    steps = whole + (rest > 0 and not config.data.drop_last)
    if samples and not steps:
        raise UserError(
            f"data.batch={config.data.batch} is more than the {samples} training samples, and drop_last drops them all",
            todo=f"set data.batch to at most {samples}, or data.drop_last=false",
        )
    if not samples:
        raise UserError("there is no training sample", where=shown(config.data.train), todo="see tlx shards show")
    return steps


def _assignments(config: Config, layers: LayerMap, problems: list[str]) -> list[Assignment]:
    schedule = plug.find("unfreeze", config.unfreeze.name)
    arguments = plug.arguments(schedule, config.unfreeze.args, label=f"unfreeze {config.unfreeze.name}")
    label = f"unfreeze {config.unfreeze.name}"
    assignments = returned_values.assignments(plug.call(label, schedule, layers, **arguments), layers, label=label)
    names = [a.name for a in assignments]
    for name in config.phases:
        if name not in names and name != "each":
            made = f"{config.unfreeze.name} makes the phases {', '.join(names)}"
            near = did_you_mean(name, [*names, "each"])
            problems.append(f'phases.{name}: there is no phase "{name}"{near}; {made}')
    return assignments


def _with_further(
    config: Config, assignments: list[Assignment], problems: list[str]
) -> tuple[Config, list[Assignment]]:
    """The phases of `further` as if the schedule had made them: each trains what its last one does, with its settings
    but for the length, from the last weights and with the optimizer's state."""
    last, phases = assignments[-1], dict(config.phases)
    over: dict[str, Any] = {"duration": None, "start_from": "last", "optimizer_state": "keep", "before": {}}
    base = config.settings(last.name).model_copy(update=over)
    for name, said in config.further.items():
        if name == "each" or name in [a.name for a in assignments]:
            problems.append(f'further.{name}: there is a phase "{name}" already; give it another name')
            continue
        settings = said.over(base)
        phases[name] = settings.model_copy(update=dict(settings))  # all of it said: nothing comes from `each`
        assignments = [*assignments, Assignment(name, last.trains)]
    return config.model_copy(update={"phases": phases}), assignments


def _key(config: Config, phase: str) -> str:
    return f"{'further' if phase in config.further else 'phases'}.{phase}"


def _earlier(config: Config, layers: LayerMap, phase: Phase, *, epoch: int) -> tuple[tuple[int, Phase], ...]:
    """The phase as it ran until the run was extended, with how many of its steps did, in order."""
    made = []
    for until, rates in sorted(phase.settings.before.items()):
        if until >= phase.length:
            raise UserError(
                f"until step {until} of the phase, which has {phase.length}",
                where=f"{_key(config, phase.name)}.before",
                todo="take it away, or make the phase longer",
            )
        settings = phase.settings.model_copy(update={**dict(rates), "before": {}})
        then = config.model_copy(update={"phases": {**config.phases, phase.name: settings}})
        assignment = Assignment(phase.name, phase.trains)
        made.append((until, _phase(then, layers, assignment, start=phase.start, epoch=epoch)))
    return tuple(made)


def _phase(config: Config, layers: LayerMap, assignment: Assignment, *, start: int, epoch: int) -> Phase:
    settings = config.settings(assignment.name)
    where = _key(config, assignment.name)
    if settings.lr is None:
        todo = f"set lr there or in phases.each ({' and '.join(defaults.OPTIMIZERS)} have default rates)"
        raise UserError("the phase has no learning rate", where=where, todo=todo)
    lr = settings.lr
    settings = settings.model_copy(update={"duration": settings.duration or assignment.duration})
    length = _length(config, settings, where=where, epoch=epoch)
    warmup = settings.warmup.steps(epoch=epoch, whole=length)
    if warmup >= length:
        what = f"the warm-up of {warmup} steps ({settings.warmup}) fills the phase of {length} ({settings.duration})"
        todo = f"a longer duration (a bare number is steps, 3ep are epochs), or {where}.warmup=0"
        raise UserError(what, where=where, todo=todo)
    phase = Phase(
        name=assignment.name,
        start=start,
        stop=start + length,
        length=length,
        layers=layers,
        trains={y.name: assignment.trains.get(y.name, "frozen") for y in layers},
        lr=lr,
        factors=_factors(settings, layers, where=f"{where}.layer_decay"),
        settings=settings,
        warmup=warmup,
        curve=_curve(settings.curve, Clock(epoch, length, warmup), where=f"{where}.curve"),
    )
    learning = [y for y in layers if phase.trained(y)]
    if not learning:
        raise UserError("nothing trains in this phase", where=where)
    _refuse_without_effect(phase, config.unfreeze.name, where)
    if not any(phase.factors[y.name] for y in learning):
        raise UserError(
            "nothing trains in this phase: the layer decay gives every layer that is not frozen a rate of 0",
            where=where,
        )
    return dataclasses.replace(phase, before=_earlier(config, layers, phase, epoch=epoch))


def _refuse_without_effect(phase: Phase, schedule: str, where: str) -> None:
    """A schedule that asks for more than the head must get more."""
    asked = [y for y in phase.layers if phase.trains[y.name] != "frozen" and y.role != "head"]
    if not asked or any(phase.trained(y) for y in asked):
        return
    modes = dict.fromkeys(phase.trains[y.name] for y in asked)
    wanted = " and ".join({"norms": "their norms", "biases": "their biases", "all": "all of them"}[m] for m in modes)
    kept = any(p.kind == "norm" for y in asked for p in y.parameters) and phase.norm.trained.affine == "frozen"
    policy = phase.settings.norm if isinstance(phase.settings.norm, str) else "its trained.affine"
    layers = f"{len(asked)} layers" if len(asked) > 1 else asked[0].name
    raise UserError(
        f"{schedule} asks to train {layers} ({wanted}), but nothing of that is there to train"
        + (f" under the norm policy ({policy})" if kept else "")
        + "; only the head would train",
        where=where,
        todo=("set norm: frozen_is_frozen or statistics_fixed; or " if kept else "")
        + "unfreeze: head_only says that the head trains alone, unfreeze: all trains the backbone",
    )


def _length(config: Config, settings: PhaseSettings, *, where: str, epoch: int) -> int:
    duration = settings.duration.max if isinstance(settings.duration, Plateau) else settings.duration
    if duration is None:
        raise UserError(
            "the phase has no duration", where=where, todo='set it there or in phases.each: "8ep", 400, "50%"'
        )
    if duration.unit == "%" and config.duration is None:
        raise UserError(
            f"duration {duration} is a percentage, and the whole is not known",
            where=where,
            todo='set the whole: duration: "24ep"',
        )
    whole = config.duration.steps(epoch=epoch, whole=0) if config.duration else 0
    steps = duration.steps(epoch=epoch, whole=whole)
    if steps < 1:
        raise UserError(f"a duration of {duration} is less than a step", where=where)
    return steps


def _factors(settings: PhaseSettings, layers: LayerMap, *, where: str) -> dict[str, float]:
    rule = plug.find("layer_decay", settings.layer_decay.name)
    label = f"layer_decay {settings.layer_decay.name}"
    with _at(where):
        arguments = plug.arguments(rule, settings.layer_decay.args, label=label)
        return returned_values.factors(plug.call(label, rule, layers, **arguments), layers, label=label)


@contextlib.contextmanager
def _at(where: str) -> Iterator[None]:
    """Adds the key to a mistake that does not say it."""
    try:
        yield
    except UserError as error:
        if isinstance(error, ConfigError):
            raise ConfigError(below(error, where)) from error
        if error.where is not None:
            raise
        raise UserError(error.what, where=where, todo=error.todo) from error


@dataclass(frozen=True)
class Clock:
    """What a phase counts its curve by: steps of an epoch, of the phase, of the warm-up it begins with."""

    epoch: int
    length: int
    warmup: int

    def steps(self, length: Duration | Mark) -> int:
        """On the phase's own axis, which begins with its warm-up; percent is of the phase."""
        return length.steps(epoch=self.epoch, whole=self.length)

    def places(self, mark: Mark, *, label: str) -> range:
        """The steps that are meant, ascending, in the curve's count: its 0 is the first step after the warm-up.

        Of a period they may be none, and those within the warm-up are negative: they have passed when the curve begins.

        Raises:
            UserError: a place is within the warm-up, at the phase's first step, or not before its end.
        """
        first = self.steps(mark)
        if mark.repeated:
            return range(first - self.warmup, self.length - self.warmup, first)
        if first >= self.length:
            raise UserError(
                f"{label}: {mark} is step {first} of the phase, whose last is step {self.length - 1}: never reached",
                todo="write an earlier one, or make the phase longer",
            )
        if first < max(self.warmup, 1):
            part = f"within its warm-up of {self.warmup} steps" if self.warmup else "its first"
            raise UserError(
                f"{label}: {mark} is step {first} of the phase, {part}: the rate has not risen yet",
                todo="write a later one, or make the warm-up shorter",
            )
        return range(first - self.warmup, first - self.warmup + 1)


def _curve(curve: Part, clock: Clock, *, where: str) -> Callable[[int, int], float]:
    shape, label = plug.find("curve", curve.name), f"curve {curve.name}"

    def received(value: Any) -> Any:
        if not isinstance(value, Mark):
            return clock.steps(value)
        places = clock.places(value, label=label)
        return places if value.repeated else places[0]

    with _at(where):
        arguments = plug.arguments(shape, curve.args, label=label)
        made = functools.partial(shape, **{k: _each_length(v, received) for k, v in arguments.items()})
        returned_values.check_curve(made, warmup=clock.warmup, length=clock.length, label=label)
    return made


def _curve_in_steps(curve: Part, clock: Clock) -> Part:
    """The curve as a configuration says it, its lengths and places counted in steps of the phase."""
    checked = plug.arguments(plug.find("curve", curve.name), curve.args, label=f"curve {curve.name}")
    counted = {k: _each_length(v, clock.steps) for k, v in checked.items() if _holds_lengths(v)}
    return Part(name=curve.name, args={**curve.args, **counted})


def _each_length(value: Any, count: Callable[[Any], Any]) -> Any:
    """The value with `count` of every length and place in it."""
    if isinstance(value, (list, tuple)):
        return [_each_length(v, count) for v in value]
    if isinstance(value, dict):
        return {k: _each_length(v, count) for k, v in value.items()}
    return count(value) if isinstance(value, (Duration, Mark)) else value


def _holds_lengths(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_lengths, value.values()))
    return any(map(_holds_lengths, value)) if isinstance(value, (list, tuple)) else isinstance(value, (Duration, Mark))


def _steps(count: int) -> Duration:
    return Duration(count, "steps")


def _refuse_lone_samples(config: Config, plan: Plan, world: int) -> None:
    """BatchNorm on one sample may have one value per channel, and raises.

    Synchronised over ranks it may have one on each, but must not see the stand-in of a rank that has none.
    """
    rest = plan.samples % config.data.batch
    short = rest if rest and not config.data.drop_last else config.data.batch
    synchronised = config.loop.sync_batchnorm and world > 1
    for size in {short, min(config.data.batch, plan.samples)}:
        if micro_batch_sizes(size, world, config.loop.micro_batch)[0] <= (0 if synchronised else 1):
            made = "leaves a rank without a sample" if synchronised else "makes micro-batches of one sample"
            raise UserError(
                f"a batch of {size} on {world} ranks {made}, and BatchNorm statistics move",
                todo="set data.drop_last=true, another data.batch or loop.micro_batch, or norm: frozen_is_frozen"
                " / statistics_fixed in that phase",
            )
