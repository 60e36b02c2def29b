"""Going on with a run by a longer plan, or by further phases: the steps already made must be the same in the new plan.

The configuration may change in what shapes the plan (`SHAPE`), and in how often is evaluated. Both configurations are
compiled over the same layers and samples, with the recorded ends of phases; where every step up to the one that the run
has reached is the same in both plans, training goes on as if the new plan had been there from the start.

An example: four epochs at a constant rate become six (`duration: 4ep` -> `6ep`), and the run has reached its end::

    former   |------ 4 epochs ------|             the configuration in the run folder; `before`: as it is read today
    asked    |------ 4 epochs ------|-- 2 more --|    what the user says now; the same up to the run's step: goes on

With a cosine the second plan has other rates from the first step on, so that the run's past is none of its own. Then
`--rest` takes the new curve from the step reached, and writes the rates of the past into the configuration that is
trained by (`Extension.config`: `phases.NAME.before`), beside the words that were `asked`.

``extensions.json`` in the run's folder holds, for each extension, the configuration and result of before.
"""

from __future__ import annotations

import itertools
import json
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlx.base.differences import differences
from tlx.base.durations import Duration
from tlx.base.errors import ConfigError, UserError
from tlx.base.files import json_text, write_whole
from tlx.base.parsing import from_json, from_yaml_file, to_yaml
from tlx.plan.config import Config, parse, plain
from tlx.plan.phase_settings import EarlierRates, PhaseSettings
from tlx.plan.plan import Phase, Plan
from tlx.plan.saved_config import as_written, essential, from_table, hints, meant
from tlx.runs.older_meaning import refuse_other_meaning

if TYPE_CHECKING:
    from tlx.runs.progress import Progress

SHAPE = ("duration", "unfreeze", "phases", "further")
"""Keys that shape the plan."""

FUTURE = (*SHAPE, "evaluate.every", "evaluate.patience")
"""What may change when a run is extended."""

FILE = "extensions.json"
DEFAULTS = "defaults.json"
"""What the run's configuration has left to the table of defaults, and what that said then: only this is taken over by a
configuration that leaves it open as well. A run of before has no such file, and nothing is."""

Compile = Callable[[Config, Mapping[str, int]], Plan]
"""The plan of a configuration, for phases that ended early: name -> step."""


@dataclass(frozen=True)
class Extend:
    """The wish to extend a run.

    Attributes:
        compiler: opens shards and network of a configuration, and compiles over them.
        rest: where the past would have been another one, the rest of the new curve is taken, from the step reached.
    """

    compiler: Callable[[Config], Compile]
    rest: bool = False


@dataclass(frozen=True)
class Extension:
    """An extension that may be made.

    Attributes:
        asked: the configuration as it was given; `config`: what is trained by, with what is past written out.
        former: the configuration of before, as plain data.
        result: of before, where the run was done.
        step: that the run has reached; `steps`: of the plan before, and of the plan now.
        kept: checkpoints at multiples of so many steps stayed for good by the plan before; 0 for none.
    """

    config: Config
    asked: Config
    former: Mapping[str, Any]
    result: Mapping[str, Any] | None
    step: int
    steps: tuple[int, int]
    rest: bool
    kept: int = 0

    def record(self, folder: Path) -> None:
        """Notes down what was before. Only a config.yaml that says what is now makes it true: see :func:`earlier`."""
        entry = {
            "step": self.step,
            "steps": list(self.steps),
            "rest": self.rest,
            "kept": self.kept,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "before": {"config": self.former, "result": self.result},
            "asked": shape(self.asked),
            "now": shape(self.config),
        }
        known = _recorded(folder)
        if known and _is_pending(known[-1], folder):  # of a start that was killed in here
            killed = known.pop()
            entry["before"] = {"config": self.former, "result": self.result or killed["before"]["result"]}
        write_whole(folder / FILE, json_text([*known, entry]))

    def remove_result(self, folder: Path) -> None:
        """Of before: it is not that of the longer run. Killed after it, or before, the same command goes on."""
        for of_before in ("result.json", "report.html", "report.md"):
            (folder / of_before).unlink(missing_ok=True)


def earlier(folder: Path) -> list[dict[str, Any]]:
    """The extensions of a run so far, in order, without one that was killed before it took place.

    Raises:
        UserError: the file is not what tlx wrote.
    """
    entries = _recorded(folder)
    return entries[:-1] if entries and _is_pending(entries[-1], folder) else entries


def kept_for_good(folder: Path) -> list[tuple[int, int]]:
    """(interval, last step) of the checkpoints that stay for good by the plans before extensions."""
    entries = earlier(folder)
    return [(int(e["kept"]), int(e["step"])) for e in entries if e.get("kept")]


def _recorded(folder: Path) -> list[dict[str, Any]]:
    file = folder / FILE
    if not file.exists():
        return []
    try:
        entries = from_json(file.read_bytes())
        return [dict(e, before=dict(e["before"]), asked=dict(e["asked"]), now=dict(e["now"])) for e in entries]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"is not what tlx wrote: {error}", where=str(file), todo="restore it, or --fresh") from error


def _is_pending(entry: Mapping[str, Any], folder: Path) -> bool:
    """Whether config.yaml still says what it said before an extension."""
    try:
        written = _as_json(from_yaml_file(folder / "config.yaml"))
        before = entry["before"]["config"]
        same = essential(written) == essential(before)
        return same or essential(_as_json(plain(meant(written)))) == essential(_as_json(plain(meant(before))))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, UserError):
        return False  # that is told where it is read


def history(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Extensions as result.json tells them."""
    return [{key: entry[key] for key in ("step", "steps", "rest", "time")} for entry in entries]


def shape(config: Config) -> dict[str, Any]:
    """What shapes the plan of a configuration, as plain data."""
    raw = plain(config)
    return {key: _as_json(raw[key]) for key in SHAPE}


def _as_read_now(said: Mapping[str, Any], config: Config) -> Mapping[str, Any]:
    """What shapes a plan, as it is written down now: an earlier tlx kept numbers such as 1e-2 as text."""
    try:
        return shape(parse({**plain(config), **said}))
    except ConfigError:
        return said


def adopted(folder: Path, config: Config) -> Config:
    """The configuration with what the run had from the table of defaults for what is not said, and what an earlier
    `--rest` has written out for the same words: so that the same command, with or without --extend, means the same
    training."""
    entries = earlier(folder)
    config = as_written(config, _had_from_table(folder))
    if not entries:
        return config
    asked, now, own = _as_read_now(entries[-1]["asked"], config), entries[-1]["now"], shape(config)
    made = dict(own)
    if all(own[key] == asked[key] for key in SHAPE if key != "further"):
        made |= {key: now[key] for key in SHAPE if key != "further"}
    for name, said in own["further"].items():
        if name in now["further"] and said == asked["further"].get(name):
            made["further"] = {**made["further"], name: now["further"][name]}
    if made == own:
        return config
    filled = parse({**plain(config), **made})
    return config.model_copy(update={key: getattr(filled, key) for key in SHAPE})


def left_to_table(folder: Path, config: Config, *, anew: bool) -> dict[str, Any]:
    """The content of `DEFAULTS` for a configuration as it was given.

    Args:
        anew: the run begins, whatever lies in its folder.
    """
    return from_table(config, {} if anew else _had_from_table(folder))


def _had_from_table(folder: Path) -> Mapping[str, Any]:
    """Nothing where there is no run, or no such file that can be read."""
    try:
        known = from_json((folder / DEFAULTS).read_bytes()) if (folder / "config.yaml").exists() else {}
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def planned(folder: Path, config: Config, extend: Extend) -> Extension | None:
    """Whether, and how, the run in this folder goes on by another configuration; None where that is its own. Looks, and
    changes nothing.

    Args:
        config: after :func:`adopted`.

    Raises:
        UserError: there is no run; more has changed than may; an earlier tlx trained it by other rules; the past would
            have been another one; nothing is added.
    """
    from tlx.runs.run_folder import RunFolder

    former = _former(folder)
    before = meant(former)
    old, new = (essential(plain(c)) for c in (before, config))
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    if not changed:
        return None
    barred = [key for key in changed if not key.startswith(FUTURE)]
    if barred:
        raise _barred({k: old.get(k) for k in barred}, {k: new.get(k) for k in barred}, former, folder)
    refuse_other_meaning(folder, before, essential(former), extensions=earlier(folder))
    progress = _progress(folder)
    compiled = extend.compiler(config)
    plan = _as_it_was(before, compiled, progress, folder)
    result = RunFolder(folder).result()
    done = result is not None and result.get("finished") is True
    now = compile_from_here(config, compiled, progress)
    differ, made = past_differences(plan, now, progress.step), config
    if differ:
        found = with_rest(config, compiled, progress, plan)
        if found is None or not extend.rest:
            adds = found is not None and (not done or found[1].steps > progress.step)
            raise _refused(differ, before, config, plan, now, progress.step, rest=adds, folder=folder)
        made, now = found
    if done and now.steps <= progress.step:
        raise _nothing_added(now, progress.step, folder)
    steps = (plan.steps, now.steps)
    every = before.checkpoint.keep.every
    kept = plan.interval(every) if every else 0
    return Extension(made, config, former, result if done else None, progress.step, steps, made != config, kept)


def _as_it_was(before: Config, compiled: Compile, progress: Progress, folder: Path) -> Plan:
    try:
        return compiled(before, progress.ends)
    except UserError as error:
        raise UserError(
            f"the plan of this run so far cannot be made again, so that nothing can be said of its past: {error}",
            where=str(folder),
            todo="train on in another folder, from a checkpoint's weights (backbone.weights)",
        ) from error


def _barred(old: Mapping[str, Any], new: Mapping[str, Any], former: Mapping[str, Any], folder: Path) -> UserError:
    """Of keys that may not change."""
    later = hints(essential(former))
    lines = [line + later.get(line.partition(":")[0], "") for line in differences(old, new)]
    todo = "restore the values of before" if old.keys() <= later.keys() else "take them back"
    return UserError(
        "--extend changes the plan from here on, and these settings are of the whole training:\n    "
        + "\n    ".join(lines),
        where=str(folder),
        todo=f"{todo}; {', '.join(FUTURE)} may change",
    )


def _nothing_added(now: Plan, step: int, folder: Path) -> UserError:
    last = now.phase(step)
    early = last.stop - last.start < last.length
    ended = f"phase {last.name} has ended there for want of progress: give it more patience" if early else ""
    return UserError(
        f"there is nothing to add: the run has come to step {step}, and the new plan ends at step {now.steps}",
        where=str(folder),
        todo=f"{ended or 'make the last phase longer'}, or add a phase: "
        f"further.{_free(now)}.duration={_length(now.steps_per_epoch, now)}",
    )


def compile_from_here(config: Config, compiled: Compile, progress: Progress) -> Plan:
    """The plan that a run goes on by."""
    return compiled(config, lasting_ends(progress, compiled(config, progress.ends), config.evaluate.patience))


def lasting_ends(progress: Progress, plan: Plan, patience: int | None) -> dict[str, int]:
    """The recorded ends of phases, without one at the very step that the run has reached where the settings of now
    would let that phase go on.

    Args:
        plan: by those settings, with all recorded ends.
        patience: of `evaluate`.
    """
    ends = dict(progress.ends)
    for phase in plan.phases:
        if phase.start < progress.step and ends.get(phase.name) == progress.step:
            flat, stale = progress.plateau, progress.patience
            on_plateau = phase.plateau is not None and flat.phase == phase.name and flat.stale >= phase.plateau.patience
            out_of_patience = patience is not None and stale.phase == phase.name and stale.stale >= patience
            if not (on_plateau or out_of_patience):
                del ends[phase.name]
    return ends


def past_differences(before: Plan, now: Plan, step: int) -> list[str]:
    """Where the plan of now differs from the former one for the steps before `step`; a line for each such phase."""
    said: list[str] = []
    pairs = itertools.zip_longest(*([p for p in plan.phases if p.start < step] for plan in (before, now)))
    for old, new in pairs:
        if old is None or new is None or (old.name, old.start) != (new.name, new.start):
            was, would = (f"phase {p.name} from step {p.start}" if p is not None else "no phase" for p in (old, new))
            return [*said, f"{was}; would have been {would}"]
        if min(old.stop, step) != min(new.stop, step):
            return [*said, f"{old.name}: steps {old.start} to {old.stop}; would have been {new.start} to {new.stop}"]
        over = old.stop < step
        changed = [
            *_rules_changed(old, new, over=over),
            *(["optimizer_state"] if before.forgotten(old) != now.forgotten(new) else []),
        ]
        said += [f"{old.name}: {', '.join(changed)} is not what it was"] if changed else []
        said += _rate_changed(old, new, min(old.stop, step))
    return said


def _rules_changed(old: Phase, new: Phase, *, over: bool) -> list[str]:
    found = [key for key in ("stochastic", "start_from") if getattr(old.settings, key) != getattr(new.settings, key)]
    found += ["norm"] if old.norm != new.norm else []
    found += ["what trains"] if (dict(old.trains), old.learning) != (dict(new.trains), new.learning) else []
    if old.plateau and new.plateau:  # what its evaluations were counted by
        free = {"max"} if over else {"max", "patience"}
        same = old.plateau.model_dump(exclude=free) == new.plateau.model_dump(exclude=free)
        found += [] if same else ["duration (its plateau)"]
    return found


def _rate_changed(old: Phase, new: Phase, stop: int) -> list[str]:
    """The first step whose rates differ, with one of them."""
    learning = [y for y in old.layers if old.trained(y)]
    if old.before == new.before == () and all(old.factors[y.name] == new.factors[y.name] for y in learning):
        learning = [max(learning, key=lambda y: abs(old.factors[y.name]))]  # then the others' follow
    names = [y.name for y in learning]
    for step in range(old.start, stop):
        was, would = old.rates(step), new.rates(step)
        for name in names:
            if was[name] != would[name]:
                at = f"{old.name}: the rate of {name} at step {step} was {was[name]:.6g}"
                return [f"{at}; would have been {would[name]:.6g}"]
    return []


def with_rest(config: Config, compiled: Compile, progress: Progress, before: Plan) -> tuple[Config, Plan] | None:
    """The configuration that keeps what is past as it was, and takes the rest of the new curve from the step reached;
    with its plan. None where there is none: what has begun may not train other layers, or by other norms.

    Phases that are over get their settings of then; the one that is under way keeps its rates of then as `before`.
    """
    *over, last = [p for p in before.phases if p.start < progress.step]
    for phase in over:
        config = _with_settings(config, phase.name, _all_said(_counted(phase)))
    own = (config.further if last.name in config.further else config.phases).get(last.name, PhaseSettings())
    until = progress.step - last.start
    rates = EarlierRates(
        duration=Duration(last.length, "steps"),
        lr=last.lr,
        curve=last.settings.curve,
        warmup=Duration(last.warmup, "steps"),
        layer_decay=last.settings.layer_decay,
    )
    choices = [
        own.model_copy(update={"before": last.settings.before}),
        own.model_copy(update={"before": {**last.settings.before, until: rates}}),
        _all_said(_counted(last)),
    ]
    for settings in choices:
        made = _with_settings(config, last.name, settings)
        try:
            plan = compile_from_here(made, compiled, progress)
        except UserError:
            continue
        if not past_differences(before, plan, progress.step):
            return made, plan
    return None


def _counted(phase: Phase) -> PhaseSettings:
    length = Duration(phase.length, "steps")
    duration = phase.plateau.model_copy(update={"max": length}) if phase.plateau else length
    return phase.settings.model_copy(update={"duration": duration})


def _all_said(settings: PhaseSettings) -> PhaseSettings:
    return settings.model_copy(update=dict(settings))


def _with_settings(config: Config, phase: str, settings: PhaseSettings) -> Config:
    key = "further" if phase in config.further else "phases"
    return config.model_copy(update={key: {**getattr(config, key), phase: settings}})


def _refused(
    differ: Sequence[str],
    before: Config,
    config: Config,
    plan: Plan,
    now: Plan,
    step: int,
    *,
    rest: bool,
    folder: Path,
) -> UserError:
    """With the ways that work, each as words to add to the same command."""
    entries = earlier(folder)
    former = shape(before)
    if entries and entries[-1]["now"] == former:
        former = entries[-1]["asked"]
    longer = now.steps - plan.steps
    length = _length(longer if longer > 0 else plan.steps_per_epoch, plan)
    last, name = plan.phases[-1], _free(plan)
    words = [*_restoring(former, shape(config)), f"further.{name}.duration={length}", "--extend"]
    ways = [
        f"a further phase of {length} after step {plan.steps}, from the last weights, at lr {last.lr:g} by the curve "
        f"of {last.name} (further.{name}.lr=... for another):\n       {' '.join(map(shlex.quote, words))}"
    ]
    if rest:
        ways.append(f"the rest of the new curve, from step {step}:\n       --extend --rest")
    many = "two ways go" if rest else "one way goes"
    listed = "\n".join(f"     {number}. {way}" for number, way in enumerate(ways, 1))
    return UserError(
        f"the run has trained {step} steps, and by the new settings they would have been others:\n    "
        + "\n    ".join(differ),
        where=str(folder),
        todo=f"{many} on from there, by the same command with these words added:\n{listed}",
    )


def _restoring(former: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Words that set back what shapes the schedule's phases."""
    words = [f"{key}={to_yaml(former[key], flow=True)}" for key in ("duration", "unfreeze") if former[key] != now[key]]
    phases, others = former["phases"], now["phases"]
    differing = [name for name in {**phases, **others} if phases.get(name) != others.get(name)]
    if any("." in name for name in differing):  # which would be levels of a key
        return [*words, f"phases={to_yaml(phases, flow=True)}"]
    for name in differing:
        own, other = phases.get(name, {}), others.get(name, {})
        if name not in others or other.keys() - own.keys():
            words.append(f"phases.{name}={to_yaml(own, flow=True)}")
        else:
            words += [
                f"phases.{name}.{key}={to_yaml(value, flow=True)}"
                for key, value in own.items()
                if other.get(key) != value
            ]
    return words


def _length(steps: int, plan: Plan) -> str:
    epochs, odd = divmod(steps, plan.steps_per_epoch)
    return str(steps) if odd else f"{epochs}ep"


def _free(plan: Plan) -> str:
    """A name for one more phase."""
    names = itertools.chain(["more"], (f"more_{n}" for n in itertools.count(2)))
    return next(name for name in names if name not in [p.name for p in plan.phases])


def _former(folder: Path) -> dict[str, Any]:
    """config.yaml of the run, as plain data."""
    file = folder / "config.yaml"
    try:
        found = from_yaml_file(file)
    except FileNotFoundError as error:
        raise no_run(folder) from error
    except ValueError as error:
        raise UserError(f"is not what tlx wrote: {str(error).splitlines()[0]}", where=str(file)) from error
    if not isinstance(found, dict):
        raise UserError("is not what tlx wrote", where=str(file))
    return found


def no_run(folder: Path) -> UserError:
    return UserError(
        "there is no run to extend here",
        where=str(folder),
        todo="set run to the folder of one; without --extend a training begins here",
    )


def _progress(folder: Path) -> Progress:
    """Where the newest whole checkpoint stands; the beginning where there is none."""
    from tlx.runs.checkpoint import Checkpoints, read_state
    from tlx.runs.progress import Progress

    path = Checkpoints(folder / "checkpoints").newest(lambda _: None)
    return Progress() if path is None else Progress.of(read_state(path)["progress"])


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))
