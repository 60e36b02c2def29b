"""Versions, torch against the driver, and the decoder. `pip check` tells what is missing or too old,
`python -m torch.utils.collect_env` everything about torch and the system."""

from __future__ import annotations

import os
import platform
import re
import warnings
from collections.abc import Iterator, Mapping
from importlib.metadata import metadata
from pathlib import Path

from tlx import __version__
from tlx.doctor.findings import Finding, fault, ok, warning


def versions() -> Iterator[Finding]:
    """Of Python, the libraries that matter, NCCL and NVIDIA's driver."""
    import torch  # its own word names the CUDA build, too

    shown = {"python": platform.python_version(), "tlx": __version__, "torch": torch.__version__}
    shown |= {name: metadata(name)["Version"] for name in ("torchvision", "timm", "accelerate")}
    if torch.cuda.is_available() and torch.distributed.is_nccl_available():
        shown["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    if (number := driver()[1]) is not None:
        shown["NVIDIA's driver"] = number
    yield ok("versions", ", ".join(f"{name} {found}" for name, found in shown.items()))


def driver() -> tuple[int, str | None]:
    """GPUs that have a device file here, and the version of NVIDIA's driver, without torch."""
    devices = sum(re.fullmatch(r"nvidia\d+", name) is not None for name in os.listdir("/dev"))
    file = Path("/proc/driver/nvidia/version")
    found = re.search(r"Kernel Module[^\d]*?(\d+\.\d+[\d.]*)", file.read_text("utf-8") if file.exists() else "")
    return devices, found[1] if found else None


def torch_and_driver(env: Mapping[str, str], *, on_cpu: bool, wanted: bool, in_job: bool) -> Iterator[Finding]:
    """Whether torch can use the GPUs that there are; the arguments are those of :func:`judge_cuda`."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    why = next((str(w.message).splitlines()[0] for w in caught), "")
    built, visible = torch.version.cuda, env.get("CUDA_VISIBLE_DEVICES")
    if usable or on_cpu:
        yield ok("torch and driver", f"CUDA {built}, GPUs that torch can use: {usable}")
    else:
        yield judge_cuda(built, driver()[0], visible, why=why, wanted=wanted, in_job=in_job)


def judge_cuda(
    built: str | None, devices: int, visible: str | None, *, why: str = "", wanted: bool = False, in_job: bool = False
) -> Finding:
    """Why torch can use no GPU.

    Args:
        built: the CUDA version that torch was built with.
        devices: GPUs of this machine.
        visible: CUDA_VISIBLE_DEVICES.
        why: what torch has to say about it.
        wanted: the configuration asks for a GPU.
        in_job: the training is to be here, and not on another machine.
    """
    name, of_torch = "torch and driver", f"torch is built with CUDA {built}" if built else "torch is built without CUDA"
    hidden = visible is not None and visible.strip() in ("", "-1", "NoDevFiles")
    said = f"there is no GPU that torch can use ({of_torch}"
    said += f"; CUDA_VISIBLE_DEVICES={visible!r})" if visible is not None else ")"
    if devices and not hidden:
        return fault(
            name,
            f"this machine has a GPU, and torch cannot use it ({of_torch}{': ' + why if why else ''})",
            "a newer driver, or a torch built for it: https://pytorch.org/get-started/locally; in a container: is it "
            "started with GPUs (--gpus all, apptainer exec --nv)? Does nvidia-smi work? Or world.device=cpu",
        )
    if wanted and in_job:
        return fault(name, said, "ask for GPUs (sbatch --gpus-per-node), or set world.device=auto")
    if wanted:
        return warning(name, f"{said}; a compute node may have one", "look there: tlx doctor in a job with GPUs")
    if visible is not None:
        todo = "ask for GPUs (sbatch --gpus-per-node), unset the variable, or set world.device=cpu if that is meant"
        return warning(name, f"{said}; training would be on the CPU", todo)
    return ok(name, f"{said}: training is on the CPU")


def decoder() -> Iterator[Finding]:
    """What decodes JPEGs."""
    from tlx.data.pixels import jpeg_region as regions

    said = regions.decoder()
    if said.startswith("tlx"):
        yield ok("decoder", said)
    else:
        yield warning(
            "decoder",
            f"{said}: tlx's own extension is not built; training reads pictures more slowly",
            "install gcc, python3-dev and libjpeg-dev (libjpeg-turbo-devel), then: bash launch/env.sh, "
            "or: pip install --force-reinstall --no-deps -e .",
        )
