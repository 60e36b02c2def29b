"""The plan: a complete, printable timetable. Which layers train in which phase, at which rate, on which samples.

Pure: made from the configuration, the layers and the number of samples; the loop obeys it and nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tlx import plug
from tlx.config import Config, Part, PhaseSettings, Plateau
from tlx.data.location import shown
from tlx.data.order import micro_batches, share
from tlx.durations import Duration
from tlx.errors import ConfigError, UserError, did_you_mean
from tlx.layers import Layer, LayerMap, Parameter
from tlx.norms import POLICIES, NormPolicy, NormState
from tlx.unfreeze import Assignment, Mode

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
        warmup: steps of linear rise before the curve begins.
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
        """The learning rate of every layer at a global step."""
        top = self.lr * self.shape(step)
        return {name: float(top * self.factors[name]) if learns else 0.0 for name, learns in self._trained.items()}

    def shape(self, step: int) -> float:
        """What `lr` is multiplied by at a global step: the warm-up, then the curve."""
        at = step - self.start
        if at < self.warmup:
            return (at + 1) / self.warmup
        return self.curve(at - self.warmup, max(self.length - self.warmup, 1))

    def parts(self, most: int) -> Iterator[tuple[int, int]]:
        """Start and stop of at most so many parts of about equal length, for drawing; single steps where those do."""
        steps = self.stop - self.start
        count = min(steps, most)
        return itertools.pairwise(self.start + steps * i // count for i in range(count + 1))

    @functools.cached_property
    def _trained(self) -> dict[str, tuple[Parameter, ...]]:
        return {layer.name: tuple(p for p in layer.parameters if self._learns(p, layer)) for layer in self.layers}

    def _learns(self, p: Parameter, layer: Layer) -> bool:
        if p.idle:
            return False
        mode = self.trains[layer.name]
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
        cls, config: Config, layers: LayerMap, *, samples: int, world: int = 1, ends: Mapping[str, int] | None = None
    ) -> Plan:
        """Compiles a configuration.

        Args:
            samples: in the training shards.
            world: ranks, for what depends on the size of a micro-batch.
            ends: phases that a plateau or early stopping has ended, by name: the global step they ended at.

        Raises:
            UserError: settings for phases that do not exist, a phase without length or rate, nothing that trains, ...
        """
        epoch = _steps_per_epoch(config, samples)
        phases: list[Phase] = []
        problems: list[str] = []
        for assignment in _assignments(config, layers, problems):
            start = phases[-1].stop if phases else 0
            try:
                phase = _phase(config, layers, assignment, start=start, epoch=epoch)
            except UserError as error:
                problems.append(str(error).replace("\n  ->", ";"))
                continue
            phases.append(dataclasses.replace(phase, stop=(ends or {}).get(phase.name, phase.stop)))
        if problems:
            raise ConfigError(problems)
        plan = cls(layers, tuple(phases), samples, config.data.batch, epoch)
        return dataclasses.replace(plan, warnings=tuple(_warnings(config, plan, world)))

    @property
    def steps(self) -> int:
        return self.phases[-1].stop

    @property
    def epochs(self) -> float:
        return self.steps / self.steps_per_epoch

    def phase(self, step: int) -> Phase:
        """The phase of a global step; the last one for the step after the end."""
        return next((p for p in self.phases if p.start <= step < p.stop), self.phases[-1])

    def lr(self, layer: Layer, step: int) -> float:
        """The learning rate of a layer at a global step."""
        return self.phase(step).rate(layer, step)

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
        """The schedule written out, for a person to edit: values for the configuration's `unfreeze` and `phases`.

        The plan of a configuration with these values is the same plan.
        """
        trains = [
            {"name": p.name, "layers": {self._only[y]: mode for y, mode in p.trains.items() if mode != "frozen"}}
            for p in self.phases
        ]
        settings = {p.name: self.settings(p) for p in self.phases}
        return {"unfreeze": {"name": "explicit", "phases": trains}, "phases": settings}

    def settings(self, phase: Phase) -> dict[str, Any]:
        """All that a phase does, as a configuration says it: lengths in steps, the factor of each layer's rate."""
        length, plateau = _steps(phase.length), phase.plateau
        rates = {self._only[y.name]: phase.factors[y.name] for y in self.layers if y.parameters}
        said = phase.settings.model_copy(
            update={
                "duration": plateau.model_copy(update={"max": length}) if plateau else length,
                "curve": _curve_in_steps(phase.settings.curve, epoch=self.steps_per_epoch, length=phase.length),
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
    """What `lr` is multiplied by over the phase, for drawing: steps counted from its start, exact where it has at most
    `SAMPLED`; else of the middle of each part, and of its first and last step."""
    steps = [phase.start, *((start + stop - 1) // 2 for start, stop in phase.parts(SAMPLED)), phase.stop - 1]
    steps = sorted(set(steps))
    return {
        "steps": [step - phase.start for step in steps],
        "factors": [float(f"{phase.shape(step):.6g}") for step in steps],
    }


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
    assignments: list[Assignment] = schedule(layers, **arguments)
    names = [a.name for a in assignments]
    for name in config.phases:
        if name not in names and name != "each":
            made = f"{config.unfreeze.name} makes the phases {', '.join(names)}"
            near = did_you_mean(name, [*names, "each"])
            problems.append(f'phases.{name}: there is no phase "{name}"{near}; {made}')
    if len(set(names)) < len(names) or not names:
        raise UserError(f"{config.unfreeze.name} must make at least one phase, each with a name of its own: {names}")
    return assignments


def _phase(config: Config, layers: LayerMap, assignment: Assignment, *, start: int, epoch: int) -> Phase:
    settings = config.settings(assignment.name)
    where = f"phases.{assignment.name}"
    if settings.lr is None:
        raise UserError("the phase has no learning rate", where=where, todo="set lr there or in phases.each")
    length = _length(config, settings, assignment, epoch=epoch)
    warmup = settings.warmup.steps(epoch=epoch, whole=length)
    if warmup >= length:
        raise UserError(f"the warm-up of {warmup} steps fills the phase of {length}", where=where)
    unknown = [name for name in assignment.trains if name not in layers.names]
    if unknown:
        raise UserError(f"{config.unfreeze.name} names layers that are not there: {unknown[:5]}", where=where)
    phase = Phase(
        name=assignment.name,
        start=start,
        stop=start + length,
        length=length,
        layers=layers,
        trains={y.name: assignment.trains.get(y.name, "frozen") for y in layers},
        lr=settings.lr,
        factors=_factors(settings, layers),
        settings=settings,
        warmup=warmup,
        curve=_curve(settings.curve, epoch=epoch, length=length),
    )
    if not any(phase.trained(y) for y in layers):
        raise UserError("nothing trains in this phase", where=where)
    return phase


def _length(config: Config, settings: PhaseSettings, assignment: Assignment, *, epoch: int) -> int:
    said = settings.duration or assignment.duration
    duration = said.max if isinstance(said, Plateau) else said
    where = f"phases.{assignment.name}"
    if duration is None:
        raise UserError(
            "the phase has no duration", where=where, todo='set it there or in phases.each: "8ep", 400, "50%"'
        )
    if duration.unit == "%" and config.duration is None:
        raise UserError(f"duration {duration} of what?", where=where, todo='set the whole: duration: "24ep"')
    whole = config.duration.steps(epoch=epoch, whole=0) if config.duration else 0
    steps = duration.steps(epoch=epoch, whole=whole)
    if steps < 1:
        raise UserError(f"a duration of {duration} is less than a step", where=where)
    return steps


def _factors(settings: PhaseSettings, layers: LayerMap) -> dict[str, float]:
    rule = plug.find("layer_decay", settings.layer_decay.name)
    label = f"layer_decay {settings.layer_decay.name}"
    factors: dict[str, float] = rule(layers, **plug.arguments(rule, settings.layer_decay.args, label=label))
    missing = [name for name in layers.names if name not in factors]
    if missing:
        raise UserError(f"{label} gives no factor for {', '.join(missing[:5])}")
    return {name: float(factors[name]) for name in layers.names}


def _curve(curve: Part, *, epoch: int, length: int) -> Callable[[int, int], float]:
    shape = plug.find("curve", curve.name)
    arguments = plug.arguments(shape, curve.args, label=f"curve {curve.name}")
    return functools.partial(shape, **{k: _counted(v, epoch=epoch, whole=length) for k, v in arguments.items()})


def _curve_in_steps(curve: Part, *, epoch: int, length: int) -> Part:
    """The curve as a configuration says it, its lengths counted."""
    checked = plug.arguments(plug.find("curve", curve.name), curve.args, label=f"curve {curve.name}")
    counted = {k: _counted(v, epoch=epoch, whole=length) for k, v in checked.items() if _holds_lengths(v)}
    return Part(name=curve.name, args={**curve.args, **counted})


def _counted(value: Any, *, epoch: int, whole: int) -> Any:
    if isinstance(value, list):
        return [_counted(v, epoch=epoch, whole=whole) for v in value]
    return value.steps(epoch=epoch, whole=whole) if isinstance(value, Duration) else value


def _holds_lengths(value: Any) -> bool:
    return any(_holds_lengths(v) for v in value) if isinstance(value, list) else isinstance(value, Duration)


def _steps(count: int) -> Duration:
    return Duration(count, "steps")


def _warnings(config: Config, plan: Plan, world: int) -> list[str]:
    said = []
    if config.data.batch < world:
        raise UserError(
            f"data.batch={config.data.batch} cannot be dealt to {world} ranks", todo=f"set it to at least {world}"
        )
    moving = [(p, y) for p in plan.phases for y in plan.layers if y.moving and p.norm_state(y).statistics == "moving"]
    if moving:
        _refuse_lone_samples(config, plan, world)
        said.append(_of_moving(config, list(dict.fromkeys(p.name for p, _ in moving)), world))
    idle = [p.name for layer in plan.layers for p in layer.parameters if p.idle]
    if idle:
        names = ", ".join(idle[:4]) + (" ..." if len(idle) > 4 else "")
        said.append(
            f"{len(idle)} tensors never train, since no gradient reaches them or the network fixes them: {names}"
        )
    if plan.samples < config.data.batch:
        said.append(f"an epoch is one short batch: {plan.samples} samples, data.batch={config.data.batch}")
    return said


def _of_moving(config: Config, phases: list[str], world: int) -> str:
    """What results depend on where statistics move."""
    batch, most = config.data.batch, config.loop.micro_batch
    moving, parts = f"BatchNorm statistics move in {', '.join(phases)}", micro_batches(batch, world, most)
    if not config.loop.sync_batchnorm:
        of = f"the micro-batch size ({_micro_batch(batch, world, most)[1]} at {world} ranks)"
        return f"{moving}: results depend on {of}"
    if parts == 1:
        return f"{moving}: they are of the global batch of {batch}, whatever the number of ranks"
    of = f"they are of all ranks' micro-batches together, so results depend on the {parts} parts of a global batch"
    return f"{moving}: {of} ({-(-batch // parts)} samples at a time)"


def _refuse_lone_samples(config: Config, plan: Plan, world: int) -> None:
    """BatchNorm on one sample may have one value per channel, and raises.

    Synchronised over ranks it may have one on each, but must not see the stand-in of a rank that has none.
    """
    rest = plan.samples % config.data.batch
    short = rest if rest and not config.data.drop_last else config.data.batch
    synchronised = config.loop.sync_batchnorm and world > 1
    for size in {short, min(config.data.batch, plan.samples)}:
        if _micro_batch(size, world, config.loop.micro_batch)[0] <= (0 if synchronised else 1):
            made = "leaves a rank without a sample" if synchronised else "makes micro-batches of one sample"
            raise UserError(
                f"a batch of {size} on {world} ranks {made}, and BatchNorm statistics move",
                todo="set data.drop_last=true, another data.batch or loop.micro_batch, or norm: frozen_is_frozen"
                " / statistics_fixed in that phase",
            )


def _micro_batch(batch: int, world: int, most: int | None) -> tuple[int, int]:
    """The smallest and the largest micro-batch that a global batch is dealt in; 0 where a rank goes without."""
    parts = micro_batches(batch, world, most)
    shares = [len(share(batch, world, rank)) for rank in (0, world - 1)]
    sizes = {len(share(size, parts, part)) for size in shares for part in (0, parts - 1)}
    return min(sizes), max(sizes)
