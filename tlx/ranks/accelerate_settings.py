"""What accelerate was told, by its config file, its command line or variables, against what the configuration says.

`accelerate launch` turns its config file and its options into variables; whoever has to change one of them needs to
know where it comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlx.base.launcher import Environment
from tlx.base.parsing import from_yaml_file
from tlx.base.terminal import escaped

if TYPE_CHECKING:
    from tlx.plan.config import Config

_YES = ("1", "true", "yes")
_DDP = "tlx trains with DistributedDataParallel"


@dataclass(frozen=True)
class Refused:
    """What tlx has not.

    Attributes:
        what: in words.
        option: of `accelerate launch`.
        kind: of `distributed_type` in its config file; None where `section` alone asks for it.
        section: of the config file.
    """

    what: str
    option: str
    kind: str | None
    section: str | None = None


_REFUSED = {
    "ACCELERATE_USE_FSDP": Refused("FSDP", "--use_fsdp", "FSDP", "fsdp_config"),
    "ACCELERATE_USE_DEEPSPEED": Refused("DeepSpeed", "--use_deepspeed", "DEEPSPEED", "deepspeed_config"),
    "ACCELERATE_USE_MEGATRON_LM": Refused("Megatron-LM", "--use_megatron_lm", "MEGATRON_LM", "megatron_lm_config"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": Refused(
        "accelerate's parallelism config (tensor, context or sequence parallel)",
        "--use_parallelism_config", None, "parallelism_config",
    ),
    "ACCELERATE_USE_TP": Refused("tensor parallel", "--use_tp", "TP", "tp_config"),
    "ACCELERATE_USE_SAGEMAKER": Refused("SageMaker's launcher", "--use_sagemaker", None),
    "ACCELERATE_USE_XLA": Refused("TPU", "--tpu", "XLA"),
}  # fmt: skip
_PRECISIONS = {"no": "fp32", "fp32": "fp32", "bf16": "bf16", "fp16": "fp16"}


@dataclass(frozen=True)
class Source:
    """Where accelerate's settings come from.

    Attributes:
        words: the command line of `accelerate launch`; empty where there was none.
        file: its config file, as it was named, or the one that it takes when none is named; None where there is none.
        content: of that file.
    """

    words: Sequence[str] = ()
    file: Path | None = None
    content: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, environment: Environment) -> Source:
        """That of the `accelerate launch` above this process; an empty one where there is none."""
        words = environment.accelerate
        if not words:
            return cls()
        named = option(words, "--config_file")
        file = Path(named).expanduser() if named else default_file()
        return cls(words, file, (read(file) if file is not None else None) or {})

    def key(self, *keys: str) -> str | None:
        """The first of some keys, ``section.key``, that the config file has, with its value: ``key: value``."""
        for key in keys:
            value: Any = self.content
            for step in key.split("."):
                value = value.get(step) if isinstance(value, Mapping) else None
            if value is not None:
                return f"{key}: {'no' if value is False and key.endswith(('precision', 'backend')) else value}"
        return None


def conflicts(config: Config, variables: Mapping[str, str], source: Source) -> list[str]:
    """What accelerate is told and the configuration does not say, each with the place that says it and what to write
    there."""
    return [
        *(_refusal(name, variables, source) for name, about in _REFUSED.items() if _asked(name, about, variables)),
        *_precision(config, variables, source),
        *_accumulation(variables, source),
        *_dynamo(config, variables, source),
    ]


def _asked(name: str, about: Refused, variables: Mapping[str, str]) -> bool:
    kind = variables.get("ACCELERATE_DISTRIBUTED_TYPE", "").upper()
    is_tpu = about.what == "TPU" and kind in ("XLA", "TPU")
    return is_tpu or variables.get(name, "false").lower() in _YES


def _refusal(name: str, variables: Mapping[str, str], source: Source) -> str:
    about = _REFUSED[name]
    what = f"{about.what} is not supported; {_DDP if about.what != 'TPU' else 'tlx trains on GPUs and CPUs'}"
    if option(source.words, about.option) is not None:
        return f"{about.option} of accelerate launch: {what}. Leave it out"
    kind = str(source.content.get("distributed_type", "")).upper()
    if source.file is not None and about.kind is not None and kind in (about.kind, about.kind.replace("XLA", "TPU")):
        several = source.content.get("num_processes", 1) != 1
        rest = f", and remove {about.section}" if about.section in source.content else ""
        todo = f"Set distributed_type: {'MULTI_GPU' if several else _quoted('NO')} there{rest}"
        return f"{_at(source)}: distributed_type: {kind}: {what}. {todo}"
    if source.file is not None and about.section and source.content.get(about.section):
        return f"{_at(source)}: {about.section}: {what}. Remove it there"
    shown = name if name in variables else "ACCELERATE_DISTRIBUTED_TYPE"
    return f"{shown}={variables.get(shown)}: {what}. Unset it"


def _precision(config: Config, variables: Mapping[str, str], source: Source) -> list[str]:
    asked, ours = variables.get("ACCELERATE_MIXED_PRECISION", "").lower(), config.loop.precision
    # accelerate launch exports "no" when nobody has asked for anything
    if asked in ("", "no") or _PRECISIONS.get(asked) == ours:
        return []
    where, undo = _place(source, "--mixed_precision", ("mixed_precision", "fp16"), "ACCELERATE_MIXED_PRECISION", asked)
    if asked not in _PRECISIONS:
        rest = " and remove fp8_config" if asked == "fp8" and "fp8_config" in source.content else ""
        choice = f"tlx computes in fp32, bf16 or fp16 (loop.precision); {undo('no')}{rest}"
    else:
        choice = f"{undo('no')}, which leaves it to the configuration, or set loop.precision={_PRECISIONS[asked]}"
    return [f"{where}, and the configuration says loop.precision={ours}: {choice}"]


def _accumulation(variables: Mapping[str, str], source: Source) -> list[str]:
    name = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
    steps = variables.get(name, "1")
    if steps in ("", "1"):
        return []
    keys = ("gradient_accumulation_steps", "deepspeed_config.gradient_accumulation_steps")
    where, undo = _place(source, "--gradient_accumulation_steps", keys, name, steps)
    return [
        f"{where}: accelerate is told to accumulate over {steps} steps, and would divide every gradient again: "
        f"{undo('1')}; data.batch is the global batch, loop.micro_batch what a rank takes at once"
    ]


def _dynamo(config: Config, variables: Mapping[str, str], source: Source) -> list[str]:
    name = "ACCELERATE_DYNAMO_BACKEND"
    backend = variables.get(name, "no").lower()
    if backend in ("", "no") or (backend == "inductor" and config.loop.compile):
        return []
    keys = ("dynamo_config.dynamo_backend", "dynamo_config.backend", "dynamo_backend")
    where, undo = _place(source, "--dynamo_backend", keys, name, backend)
    ours = "true" if config.loop.compile else "false"
    if backend == "inductor":
        choice = f"{undo('no')}, which leaves it to the configuration, or set loop.compile=true"
    else:
        choice = f"tlx compiles with inductor (loop.compile=true) or not at all; {undo('no')}"
    return [f"{where}, and the configuration says loop.compile={ours}: {choice}"]


def _place(source: Source, flag: str, keys: Sequence[str], name: str, value: str) -> tuple[str, Callable[[str], str]]:
    """Who says it, and from another value the words of how to write that there."""
    if option(source.words, flag) is not None:
        return f"{flag} {value} of accelerate launch", lambda to: f"leave it out, or write {flag} {to}"
    known = source.key(*keys)
    if source.file is not None and known is not None:
        key = known.partition(":")[0]

        def there(to: str) -> str:
            if key == "fp16":
                return "remove it there"
            return f"set {key}: {_quoted(to)} there"

        return f"{_at(source)}: {known}", there
    return f"{name}={value}", lambda to: f"unset it{'' if to == '1' else f', or set it to {to}'}"


def _quoted(value: str) -> str:
    return f"'{value}'" if value.lower() == "no" else value  # which YAML would read as false


def _at(source: Source) -> str:
    return escaped(source.file) if source.file is not None else ""


def default_file() -> Path | None:
    """What `accelerate config` has written, which `accelerate launch` takes when no file is named."""
    from accelerate.commands.config.config_args import default_config_file

    return Path(default_config_file) if Path(default_config_file).is_file() else None


def read(file: Path) -> Mapping[str, Any] | None:
    """A config file of accelerate, YAML or JSON; None where it cannot be read."""
    try:
        content = from_yaml_file(file)
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else {}


def option(words: Sequence[str], flag: str) -> str | None:
    """The value of an option in a command line, up to the program that it starts; empty where it has none."""
    names = (flag, flag.replace("_", "-"))
    for at, word in enumerate(words):
        after = words[at + 1] if at + 1 < len(words) else ""
        if word in ("-m", "--module") and not after.startswith("accelerate."):
            return None
        if word in names:
            return "" if after.startswith("-") else after
        if word.startswith(tuple(f"{name}=" for name in names)):
            return word.partition("=")[2]
    return None


def promised(source: Source) -> tuple[int, str] | None:
    """How many processes the `accelerate launch` above was asked for, and where it says so.

    Asked of its command line and file because accelerate, which starts a lone process for `--cpu --num_processes 2` or
    MULTI_CPU, leaves no trace of the number in the environment.
    """
    said = option(source.words, "--num_processes")
    if said and said.isdigit():
        return int(said), " ".join(source.words[1:])
    machines = option(source.words, "--num_machines")
    if machines and machines.isdigit() and int(machines) > 1:
        return int(machines), " ".join(source.words[1:])
    count = source.content.get("num_processes")
    return (int(count), str(source.file)) if isinstance(count, int) and source.words else None
