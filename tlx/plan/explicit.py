"""The configuration with its schedule written out: the same training, as YAML that a person can edit."""

from __future__ import annotations

import textwrap

from tlx.base.parsing import to_yaml
from tlx.plan.config import Config, plain
from tlx.plan.plan import Plan

HEADER = """\
Written by: {command}
The same training as without --write, its schedule written out in steps ({epoch} steps are an epoch here).

What to edit, for each phase:
  under unfreeze.phases: `layers`, which layers train, and what of them (all, norms, biases); the others are frozen
  under phases: `duration` and `warmup` in steps (or "8ep"), `lr`, `curve`, `norm`, and in `layer_decay.rates` the
  factor of `lr` that each layer gets while it trains
A phase needs its name in both places. Give `run` another folder where {run} has been trained in already.
"""


def written_out(config: Config, plan: Plan, *, command: str) -> str:
    """A complete configuration whose plan is `plan`: explicit phases, each with all its settings, every default said.

    Args:
        command: what the header says it was written by.
    """
    raw = plain(config) | plan.explicit()
    header = HEADER.format(command=command, epoch=plan.steps_per_epoch, run=config.run)
    comment = textwrap.indent(header, "# ", lambda _: True)  # every line, whatever characters the names hold
    return comment.replace("# \n", "#\n") + to_yaml(raw)
