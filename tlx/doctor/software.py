"""Versions, torch against the driver, and the decoder."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

from tlx import __version__
from tlx.doctor.findings import Finding, fault, ok, warning

_SHOWN = ("torch", "torchvision", "timm", "accelerate", "wandb")


def versions() -> Iterator[Finding]:
    """Of Python and of every package that tlx requires, against the minimum of pyproject.toml."""
    wanted: list[tuple[str, str, str | None]] = [
        ("python", metadata("tlx")["Requires-Python"] or "", platform.python_version())
    ]
    for line in requires("tlx") or ():
        name, specifier, marker = _requirement(line)
        if not marker:
            wanted.append((name, specifier, _installed(name)))
    have = {name: found for name, _, found in wanted}
    import torch  # its own word names the CUDA build, too

    have["torch"] = torch.__version__
    shown = {"python": have["python"], "tlx": __version__, **{n: have[n] for n in _SHOWN if have.get(n)}}
    yield ok("versions", ", ".join(f"{name} {found}" for name, found in shown.items()))
    yield from too_old(wanted)


def too_old(wanted: Sequence[tuple[str, str, str | None]]) -> Iterator[Finding]:
    """Of (name, specifier, installed version), the ones that do not fit."""
    from packaging.specifiers import SpecifierSet

    for name, specifier, found in wanted:
        install = f"pip install '{name}{specifier}'" if name != "python" else "make the environment with a newer Python"
        if found is None:
            yield fault("versions", f"{name} is not installed", install)
        elif not SpecifierSet(specifier).contains(found, prereleases=True):
            yield fault("versions", f"{name} {found}, and tlx needs {specifier}", install)


def _requirement(line: str) -> tuple[str, str, bool]:
    """Name, specifier, and whether it is only of an extra."""
    from packaging.requirements import Requirement

    said = Requirement(line)
    return said.name, str(said.specifier), said.marker is not None and not said.marker.evaluate({"extra": ""})


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Driver:
    """What is known of NVIDIA's driver without torch.

    Attributes:
        devices: GPUs that have a device file here, or that nvidia-smi lists.
        version: of the driver.
    """

    devices: int
    version: str | None = None


def driver() -> Driver:
    devices = len([f for f in os.listdir("/dev") if re.fullmatch(r"nvidia\d+", f)]) if os.path.isdir("/dev") else 0
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"Kernel Module[^\d]*?(\d+\.\d+[\d.]*)", text)
    if not devices and shutil.which("nvidia-smi"):  # WSL has no device files
        said = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, encoding="utf-8", errors="replace", timeout=10, check=False
        )
        devices = sum(line.startswith("GPU ") for line in said.stdout.splitlines()) if said.returncode == 0 else 0
    return Driver(devices, found[1] if found else None)


def torch_and_driver(env: Mapping[str, str], *, on_cpu: bool, wanted: bool, in_job: bool) -> Iterator[Finding]:
    """Whether torch can use the GPUs that there are.

    Args:
        on_cpu: the configuration, or accelerate's environment, asks for the CPU.
        wanted: the configuration asks for a GPU.
        in_job: the training is to be here, and not on another machine.
    """
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    why = next((str(w.message).splitlines()[0] for w in caught), "")
    yield judge_cuda(
        torch.version.cuda, usable, driver(), env.get("CUDA_VISIBLE_DEVICES"), why=why, on_cpu=on_cpu, wanted=wanted,
        in_job=in_job,
    )  # fmt: skip


def judge_cuda(
    built: str | None, usable: int, driver: Driver, visible: str | None, *, why: str = "", on_cpu: bool = False,
    wanted: bool = False, in_job: bool = False,
) -> Finding:  # fmt: skip
    """
    Args:
        built: the CUDA version that torch was built with.
        usable: GPUs that torch can use.
        visible: CUDA_VISIBLE_DEVICES.
        why: what torch has to say about it.
        wanted, in_job: as for :func:`torch_and_driver`.
    """
    name = "torch and driver"
    of_torch = f"torch is built with CUDA {built}" if built else "torch is built without CUDA"
    of_driver = f", driver {driver.version}" if driver.version else ""
    hidden = visible is not None and visible.strip() in ("", "-1", "NoDevFiles")
    if usable:
        return ok(name, f"{of_torch}{of_driver}; torch can use {usable} {'GPU' if usable == 1 else 'GPUs'}")
    if on_cpu:
        return ok(name, f"{of_torch}; the CPU is asked for")
    if driver.devices and not hidden:
        if not built:
            return fault(
                name,
                f"this machine has a GPU, and {of_torch}",
                "install torch's build with CUDA: https://pytorch.org/get-started/locally; or world.device=cpu",
            )
        return fault(
            name,
            f"this machine has a GPU, and torch cannot use it ({of_torch}{of_driver}{': ' + why if why else ''})",
            "a newer driver, or a torch built with an older CUDA; in a container: is it started with GPUs "
            "(--gpus all, apptainer exec --nv)? Does nvidia-smi work?",
        )
    if wanted:
        said = f"cuda is asked for (world.device), and there is no GPU that torch can use ({of_torch}"
        said += f"; CUDA_VISIBLE_DEVICES={visible!r})" if visible is not None else ")"
        if in_job:
            return fault(name, said, "ask for GPUs (sbatch --gpus-per-node), or set world.device=auto")
        return warning(name, f"{said}; a compute node may have one", "look there: tlx doctor in a job with GPUs")
    if visible is not None:
        return warning(
            name,
            f"CUDA_VISIBLE_DEVICES={visible!r}, and there is no GPU that torch can use; training would be on the CPU",
            "ask for GPUs (sbatch --gpus-per-node), unset the variable, or set world.device=cpu if that is meant",
        )
    return ok(name, f"{of_torch}; no GPU here: training is on the CPU")


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
