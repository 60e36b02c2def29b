"""tlx: transfer learning for images at cluster scale. data -> plan -> loop.

What is public is listed here (`__all__`); CONTRIBUTING.md says how it may change. Nothing is imported before it is
asked for: ``import tlx`` takes no library.

A whole training is ``tlx.fit("mine.yaml")``. For a loop of one's own there are :func:`open_shards`,
:func:`load_backbone`, :func:`make_plan`, :func:`parameter_groups`, :func:`steps` and :func:`evaluate`; `steps` is made
of :class:`ShardStream`, :func:`begin_phase` and :func:`set_rates`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.2.0"  # pyproject.toml takes it from here: a checkout and what is installed cannot disagree

_PUBLIC = {
    # a whole training
    "fit": "tlx.train.command:train",
    "load_config": "tlx.plan.config:load",
    "Config": "tlx.plan.config:Config",
    # what was trained
    "load": "tlx.use.load:load",
    "Model": "tlx.use.model:Model",
    # a loop of one's own
    "open_shards": "tlx.data.shards.manifest:Manifest.open",
    "load_backbone": "tlx.models:load",
    "adopt_backbone": "tlx.models:adopt",
    "make_plan": "tlx.train.own_loop:make_plan",
    "timetable": "tlx.plan.timetable:timetable",
    "parameter_groups": "tlx.train.own_loop:parameter_groups",
    "steps": "tlx.train.own_loop:steps",
    "evaluate": "tlx.train.own_loop:evaluate",
    "begin_phase": "tlx.train.own_loop:begin_phase",
    "set_rates": "tlx.train.step:set_rates",
    "ShardStream": "tlx.data.stream.stream:ShardStream",
    # what these give and take
    "Backbone": "tlx.models:Backbone",
    "LayerMap": "tlx.base.layers:LayerMap",
    "Plan": "tlx.plan.plan:Plan",
    "Phase": "tlx.plan.plan:Phase",
    "Shards": "tlx.data.shards.manifest:Manifest",
    "Batch": "tlx.data.stream.stream:Batch",
    "Step": "tlx.train.own_loop:Step",
    # parts of one's own
    "Assignment": "tlx.plan.unfreeze:Assignment",
    "Length": "tlx.base.durations:Length",
    "InputSpec": "tlx.base.inputs:InputSpec",
    "RunInfo": "tlx.tracking:RunInfo",
    "Task": "tlx.tasks:Task",
    "TaskData": "tlx.tasks:TaskData",
    "Truth": "tlx.tasks:Truth",
    "Ranks": "tlx.tasks:Ranks",
    "needs": "tlx.base.plug:needs",
    # mistakes of users, and faults
    "UserError": "tlx.base.errors:UserError",
    "ConfigError": "tlx.base.errors:ConfigError",
    "TlxError": "tlx.base.errors:TlxError",
}
"""Public name -> where it is made."""

__all__ = sorted([*_PUBLIC, "__version__"])

if TYPE_CHECKING:
    from tlx import models
    from tlx.base.durations import Length as Length
    from tlx.base.errors import ConfigError as ConfigError
    from tlx.base.errors import TlxError as TlxError
    from tlx.base.errors import UserError as UserError
    from tlx.base.inputs import InputSpec as InputSpec
    from tlx.base.layers import LayerMap as LayerMap
    from tlx.base.plug import needs as needs
    from tlx.data.shards import manifest
    from tlx.data.stream.stream import Batch as Batch
    from tlx.data.stream.stream import ShardStream as ShardStream
    from tlx.models import Backbone as Backbone
    from tlx.plan import config
    from tlx.plan.config import Config as Config
    from tlx.plan.plan import Phase as Phase
    from tlx.plan.plan import Plan as Plan
    from tlx.plan.timetable import timetable as timetable
    from tlx.plan.unfreeze import Assignment as Assignment
    from tlx.tasks import Ranks as Ranks
    from tlx.tasks import Task as Task
    from tlx.tasks import TaskData as TaskData
    from tlx.tasks import Truth as Truth
    from tlx.tracking import RunInfo as RunInfo
    from tlx.train import command
    from tlx.train.own_loop import Step as Step
    from tlx.train.own_loop import begin_phase as begin_phase
    from tlx.train.own_loop import evaluate as evaluate
    from tlx.train.own_loop import make_plan as make_plan
    from tlx.train.own_loop import parameter_groups as parameter_groups
    from tlx.train.own_loop import steps as steps
    from tlx.train.step import set_rates as set_rates
    from tlx.use import load as use_load
    from tlx.use.model import Model as Model

    fit, load_config, load_backbone, adopt_backbone = command.train, config.load, models.load, models.adopt
    load = use_load.load
    Shards = manifest.Manifest
    open_shards = Shards.open


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tlx' has no attribute {name!r}")
    import importlib
    import operator

    module, _, path = _PUBLIC[name].partition(":")
    return operator.attrgetter(path)(importlib.import_module(module))


def __dir__() -> list[str]:
    return __all__
