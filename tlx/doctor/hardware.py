"""GPUs, cores, /dev/shm and limits of a node. `nvidia-smi` tells who uses a GPU and how much of its memory."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from tlx.doctor.findings import Finding, fault, first_line, ok, warning
from tlx.doctor.place import Place

SICK = "nvidia-smi -q -d ECC,PAGE_RETIREMENT tells of its errors; take another node"
_KERNELS = "install a torch whose CUDA build has kernels for it: https://pytorch.org/get-started/locally"
_SHM = 1 << 30  # NVIDIA's advice for NCCL in containers, whose default is 64 MiB


def gib(size: float) -> str:
    """Bytes in words."""
    return f"{size / 2**30:.1f} GiB"


def gpus(place: Place) -> Iterator[Finding]:
    """Whether each GPU that torch sees computes; under a launcher only this rank's own, as training takes it."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for number in [place.local % count] if count and not place.alone else range(count):
        try:
            about = torch.cuda.get_device_properties(number)
            free, total = torch.cuda.mem_get_info(number)
            torch.ones(8, device=f"cuda:{number}").sum().item()
        except RuntimeError as error:
            todo = _KERNELS if "no kernel image" in str(error) else SICK
            yield fault("GPU", f"GPU {number} cannot be used: {first_line(error)}", todo)
            continue
        said = f"{number}: {about.name}, compute capability {about.major}.{about.minor}, "
        yield ok("GPU", f"{said}{gib(free)} of {gib(total)} free")


def ranks_and_gpus(place: Place, count: int, *, backend: str | None) -> Iterator[Finding]:
    """The processes of this node against its GPUs.

    Args:
        count: GPUs that torch can use in this process.
        backend: world.backend of the configuration.
    """
    if place.alone and count == 1:
        return
    said = f"ranks on this node: {place.here}, GPUs: {count}"
    start = f"start {count} processes on a node (--nproc-per-node={count})"
    if place.here > count > 1 and backend != "gloo":  # with one visible GPU each rank may have its own
        yield fault("ranks and GPUs", said, f"{start}, or set world.backend=gloo")
    elif place.here < count and not place.alone:
        yield warning("ranks and GPUs", f"{said}: some are idle", f"{start}, or ask for fewer GPUs")
    else:
        yield ok("ranks and GPUs", said)


def judge_cores(
    cores: int, quota: float | None, *, ranks: int, workers: int, in_step: bool = False
) -> Iterator[Finding]:
    """Cores that the ranks of a node may use, against the processes that want to run there.

    Args:
        quota: of the control group, in cores.
        in_step: srun has started them.
    """
    usable, wanted = min(cores, quota or cores), ranks * (workers + 1)
    said = f"{usable:.3g} usable, processes: {wanted} (ranks: {ranks}, each with data.workers={workers})"
    if wanted > max(usable, 1) * 1.5:
        more = "--cpus-per-task, given to srun once more" if in_step else "more cores"
        yield warning("cores", said, f"data.workers={max(int(usable / ranks) - 1, 0)}, or {more}")
    else:
        yield ok("cores", said)


def shared_memory(total: int, *, ranks: int, gpus: bool) -> Finding:
    """Of /dev/shm, NCCL's between GPUs of a node; tlx's data workers share memory that is not there."""
    said = f"{gib(total)}; data workers do not use it"
    if gpus and ranks > 1 and total < _SHM:
        return warning(
            "/dev/shm",
            f"{said}, but NCCL between the {ranks} GPUs of this node does, and wants about {gib(_SHM)}",
            "in a container: --shm-size=1g (docker), or bind the host's; else: mount -o remount,size=8g /dev/shm",
        )
    return ok("/dev/shm", said)


def shm(place: Place, *, gpus: bool, path: Path = Path("/dev/shm")) -> Iterator[Finding]:
    if path.is_dir():
        yield shared_memory(shutil.disk_usage(path).total, ranks=place.here, gpus=gpus)


def limits(files: int, locked: int, *, size: int, workers: int, infiniband: bool) -> Iterator[Finding]:
    """``ulimit -n`` and ``ulimit -l``.

    Args:
        files, locked: the soft limits, in files and bytes; -1 is none.
        size: of the world; each rank has a connection to each other one, in the worst case several.
    """
    wanted = 256 + 4 * workers + 4 * size
    if 0 <= files < wanted:
        yield warning("open files", f"ulimit -n is {files}; {size} ranks may want {wanted}", f"ulimit -n {wanted}")
    if infiniband and 0 <= locked < 1 << 40:
        yield warning(
            "locked memory",
            f"ulimit -l is {locked // 1024} kB, and this node has InfiniBand, which registers memory",
            "LimitMEMLOCK=infinity for slurmd, PropagateResourceLimitsExcept=MEMLOCK; docker: --ulimit memlock=-1",
        )


def system_limits(place: Place, *, workers: int) -> Iterator[Finding]:
    files, locked = (resource.getrlimit(what)[0] for what in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK))
    fabric = os.path.isdir("/sys/class/infiniband") and bool(os.listdir("/sys/class/infiniband"))
    # RLIM_INFINITY is -1
    yield from limits(files, locked, size=place.size, workers=workers, infiniband=fabric)
