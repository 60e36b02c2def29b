"""What accelerate is told, against what the configuration says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from tlx.base.launcher import Environment
from tlx.doctor.findings import Finding, fault, ok
from tlx.ranks.accelerate_settings import Source, conflicts

if TYPE_CHECKING:
    from tlx.plan.config import Config


def stand_in(env: Mapping[str, str]) -> Config:
    """Enough of a configuration to join the ranks, where none is given: it wants what accelerate is told."""
    from tlx.plan.config import parse

    precision = env.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    compiled = env.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() not in ("", "no")
    return parse(
        {
            "run": "doctor",
            "data": {"train": "none", "batch": 1},
            "backbone": {"name": "timm/resnet18", "weights": "none"},
            "loop": {"precision": precision if precision in ("bf16", "fp16") else "fp32", "compile": compiled},
        }
    )


def environment(config: Config, here: Environment) -> Iterator[Finding]:
    """What training refuses of accelerate's environment and file; asked before ranks meet, so that none waits."""
    problems = conflicts(config, here.variables, Source.of(here))
    for problem in problems:
        yield fault("accelerate", problem, "see launch/README.md: what accelerate's settings may say")
    if not problems:
        yield ok("accelerate", "its settings agree with the configuration")
