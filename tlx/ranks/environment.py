"""Whether what the launcher has said fits the configuration: number of ranks, device, accelerate's settings."""

from __future__ import annotations

import torch

from tlx.base.errors import ConfigError, UserError
from tlx.base.launcher import Environment, export
from tlx.plan.config import Config
from tlx.ranks.accelerate_settings import Source, conflicts, promised


def check_settings(config: Config, here: Environment) -> None:
    """
    Raises:
        ConfigError: accelerate's environment or config file conflicts with the configuration.
    """
    if problems := conflicts(config, here.variables, Source.of(here)):
        raise ConfigError(problems)


def check_size(config: Config, here: Environment) -> None:
    """
    Raises:
        UserError: the number of ranks is not what was asked for.
    """
    size = here.size
    if config.world.size is not None and config.world.size != size:
        raise UserError(
            f"the configuration expects {config.world.size} ranks, the launcher has started {size}",
            where="world.size",
            todo="see launch/README.md for launch commands that give the number they name",
        )
    refuse_unranked(here)
    asked = promised(Source.of(here)) if size == 1 else None
    if asked is not None and asked[0] != size:
        raise UserError(
            f"the launcher was asked for {asked[0]} processes and has started {size}",
            where=asked[1],
            todo="on CPU: ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N, or torchrun; "
            "see launch/README.md",
        )


def refuse_unranked(here: Environment) -> None:
    """
    Raises:
        UserError: srun has started several tasks that do not know of each other.
    """
    if not here.ranked and here.step_tasks > 1:
        raise UserError(
            f"srun has started {here.step_tasks} tasks, and nothing tells them that they are ranks of one training: "
            "each would train alone, in the same folder",
            where="WORLD_SIZE",
            todo="use slurm/train.sbatch; or, in the task, export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS "
            "LOCAL_RANK=$SLURM_LOCALID and the same MASTER_ADDR and MASTER_PORT everywhere; or, where each task is "
            "a training with a folder of its own, export WORLD_SIZE=1",
        )


def choose_device(config: Config, here: Environment) -> torch.device:
    """This rank's device, which accelerate is told; two ranks may share a GPU over gloo.

    Raises:
        UserError: there is no GPU, or none for this precision.
    """
    asked, has_gpu = config.world.device, torch.cuda.is_available()
    if asked == "cuda" and not has_gpu:
        raise UserError("there is no GPU that torch can use", where="world.device=cuda", todo="set auto or cpu")
    if asked == "cpu" or (asked == "auto" and (here.on_cpu or not has_gpu)):
        return torch.device("cpu")
    device = torch.device("cuda", here.local_rank % torch.cuda.device_count())
    export("ACCELERATE_TORCH_DEVICE", str(device))
    torch.cuda.set_device(device)
    return device


def choose_backend(config: Config, here: Environment, device: torch.device) -> str:
    """Of the process group: ``gloo`` or ``nccl``.

    Raises:
        UserError: nccl has not a GPU for each rank.
    """
    backend = config.world.backend or ("gloo" if device.type == "cpu" else "nccl")
    gpus = torch.cuda.device_count()
    # asked alike on every rank of a machine
    if backend == "nccl" and (device.type == "cpu" or here.local_size > gpus):
        raise UserError(
            f"nccl needs a GPU for each rank; this machine has {gpus} for {here.local_size}",
            where="world.backend",
            todo=f"start at most {gpus} processes here, or set world.backend=gloo",
        )
    return backend
