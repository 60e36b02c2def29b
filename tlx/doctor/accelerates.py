"""What accelerate believes, against what the launcher has set and the configuration says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlx.doctor.findings import Finding, fault, ok, warning
from tlx.parsing import from_yaml_file

if TYPE_CHECKING:
    from tlx.config import Config

_TODO = "see launch/README.md: what accelerate's settings may say"


def stand_in(env: Mapping[str, str]) -> Config:
    """Enough of a configuration to join the world, where none is given: it wants what accelerate is told."""
    from tlx.config import parse

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


def environment(config: Config, env: Mapping[str, str]) -> Iterator[Finding]:
    """What training refuses of accelerate's environment, set by hand or by `accelerate launch`."""
    from tlx.world import accelerate_conflicts

    problems = accelerate_conflicts(config, env)
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
    from accelerate.commands.config.config_args import default_config_file

    path = Path(default_config_file)
    if not path.is_file():
        yield ok("accelerate's file", "there is no default config file")
        return
    try:
        content = from_yaml_file(path)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        yield warning("accelerate's file", f"{path} cannot be read: {why}", f"mend or remove {path}")
        return
    content = content if isinstance(content, dict) else {}
    yield judge_file(config or stand_in(exported(content)), content, path)


def judge_file(config: Config, content: Mapping[str, Any], path: Path) -> Finding:
    """Only a warning: it matters to `accelerate launch` without --config_file and nothing else."""
    from tlx.world import accelerate_conflicts

    kind = str(content.get("distributed_type", "NO")).upper()
    count = content.get("num_processes", 1)
    said = f"{path}: {kind}, {count} {'process' if count == 1 else 'processes'}"
    problems = accelerate_conflicts(config, exported(content))
    if kind == "MULTI_CPU" and count != 1:
        problems.append("MULTI_CPU starts one process and says nothing: use launch/cpu.yaml")
    if problems:
        todo = f"accelerate launch --config_file launch/one_node.yaml, or change {path}"
        return warning("accelerate's file", f"{said}; training under it is refused: {'; '.join(problems)}", todo)
    return ok("accelerate's file", said)


def exported(content: Mapping[str, Any]) -> dict[str, str]:
    """The environment that `accelerate launch` makes of a config file, as far as tlx compares it."""
    kind = str(content.get("distributed_type", "NO")).upper()
    dynamo = content.get("dynamo_config") or {}
    env = {
        "ACCELERATE_MIXED_PRECISION": str(content.get("mixed_precision") or "no"),
        "ACCELERATE_DYNAMO_BACKEND": str(
            content.get("dynamo_backend") or (dynamo.get("dynamo_backend") if isinstance(dynamo, dict) else "") or "no"
        ),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": str(content.get("gradient_accumulation_steps") or 1),
        "ACCELERATE_DISTRIBUTED_TYPE": kind,
    }
    if env["ACCELERATE_MIXED_PRECISION"] == "False":  # YAML's reading of an unquoted no
        env["ACCELERATE_MIXED_PRECISION"] = "no"
    if env["ACCELERATE_DYNAMO_BACKEND"] == "False":
        env["ACCELERATE_DYNAMO_BACKEND"] = "no"
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if kind == name:
            env[f"ACCELERATE_USE_{name}"] = "true"
    return env
