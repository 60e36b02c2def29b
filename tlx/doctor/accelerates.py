"""What accelerate believes, against what the launcher has set and the configuration says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlx.base.launcher import Environment
from tlx.doctor.findings import Finding, fault, ok, warning
from tlx.ranks import accelerate_settings as settings
from tlx.ranks.accelerate_settings import Source, conflicts

if TYPE_CHECKING:
    from tlx.plan.config import Config

_TODO = "see launch/README.md: what accelerate's settings may say"


def stand_in(env: Mapping[str, str]) -> Config:
    """Enough of a configuration to join the world, where none is given: it wants what accelerate is told."""
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
    """What training refuses of accelerate's environment, set by hand or by `accelerate launch`."""
    problems, env = conflicts(config, here.variables, Source.of(here)), here.variables
    for problem in problems:
        yield fault("accelerate", problem, _TODO)
    if not problems:
        told = {name.removeprefix("ACCELERATE_").lower(): env[name] for name in sorted(env) if name in _TOLD}
        said = ", ".join(f"{name} {value}" for name, value in told.items())
        yield ok("accelerate", f"its environment says {said}" if said else "its environment says nothing")


_TOLD = (
    "ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_USE_CPU",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
)  # fmt: skip


def default_file(config: Config | None) -> Iterator[Finding]:
    """What `accelerate config` has written, which `accelerate launch` takes when no file is named.

    Args:
        config: of the user; without one nothing is expected of precision and compilation.
    """
    path = settings.default_file()
    if path is None:
        yield ok("accelerate's file", "there is no default config file")
        return
    content = settings.read(path)
    if content is None:
        yield warning("accelerate's file", f"{path} cannot be read", f"mend or remove {path}")
        return
    yield judge_file(config or stand_in(exported(content)), content, path)


def judge_file(config: Config, content: Mapping[str, Any], path: Path) -> Finding:
    """Only a warning: it matters to `accelerate launch` without --config_file and nothing else."""
    kind = str(content.get("distributed_type", "NO")).upper()
    count = content.get("num_processes", 1)
    said = f"{path}: {kind}, {count} {'process' if count == 1 else 'processes'}"
    problems = conflicts(config, exported(content), Source(file=path, content=content))
    if kind == "MULTI_CPU" and count != 1:
        problems.append("distributed_type: MULTI_CPU starts one process and says nothing: use launch/cpu.yaml")
    if problems:
        todo = f"accelerate launch --config_file launch/one_node.yaml, or change {path}"
        return warning("accelerate's file", f"{said}; training under it is refused: {'; '.join(problems)}", todo)
    return ok("accelerate's file", said)


def exported(content: Mapping[str, Any]) -> dict[str, str]:
    """The environment that `accelerate launch` makes of a config file, as far as tlx compares it."""
    kind = str(content.get("distributed_type", "NO")).upper()
    dynamo = content.get("dynamo_config")
    dynamo = dynamo if isinstance(dynamo, dict) else {}
    compiler = content.get("dynamo_backend") or dynamo.get("dynamo_backend") or dynamo.get("backend")
    env = {
        "ACCELERATE_MIXED_PRECISION": str(content.get("mixed_precision") or "no"),  # YAML reads an unquoted no as false
        "ACCELERATE_DYNAMO_BACKEND": str(compiler or "no"),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": str(content.get("gradient_accumulation_steps") or 1),
        "ACCELERATE_DISTRIBUTED_TYPE": kind,
    }
    asked = {"FSDP", "DEEPSPEED", "MEGATRON_LM", "TP"} & {kind}
    asked |= {"PARALLELISM_CONFIG"} if content.get("parallelism_config") else set()
    return env | {f"ACCELERATE_USE_{name}": "true" for name in asked}
