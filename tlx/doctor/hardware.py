"""GPUs, cores, memory, /dev/shm and limits of a node."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tlx.doctor.findings import Finding, fault, ok, warning
from tlx.doctor.needs import Needs
from tlx.doctor.place import Place
from tlx.doctor.shown import gib

SICK = "nvidia-smi -q -d ECC,PAGE_RETIREMENT tells of its errors; take another node"
_OWN = 1 << 30  # bytes that this process's own context may take on a GPU
_SHM = 1 << 30  # NVIDIA's advice for NCCL in containers, whose default is 64 MiB


@dataclass(frozen=True)
class Gpu:
    """Bytes of memory, compute capability; whether this torch has kernels for it, and bf16."""

    number: int
    name: str
    total: int
    free: int
    capability: tuple[int, int]
    supported: bool
    bf16: bool


def look_at_gpus(place: Place) -> tuple[list[Gpu], list[Finding]]:
    """Those that torch sees, and faults of those that cannot be used; under a launcher only this rank's own, as
    training takes it."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    numbers = [place.local % count] if count and not place.alone else range(count)
    found, sick = [], []
    for number in numbers:
        try:
            about = torch.cuda.get_device_properties(number)
            free, total = torch.cuda.mem_get_info(number)
        except RuntimeError as error:
            said = next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
            sick.append(fault("GPU", f"GPU {number} cannot be used: {said}", SICK))
            continue
        capability = (about.major, about.minor)
        runs = supported(capability, torch.cuda.get_arch_list())
        found.append(Gpu(number, about.name, total, free, capability, runs, bf16=capability >= (8, 0)))
    return found, sick


def supported(capability: tuple[int, int], built_for: Sequence[str]) -> bool:
    """Whether a torch built for ``sm_80``, ``compute_90`` and so on runs on a GPU: its own major version, a minor one
    not above its own, or PTX of any that is not newer."""
    for word in built_for:
        kind, _, digits = word.partition("_")
        digits = digits.rstrip("af")
        if not digits.isdigit():
            continue
        major, minor = divmod(int(digits), 10)
        if (kind == "sm" and major == capability[0] and minor <= capability[1]) or (
            kind == "compute" and (major, minor) <= capability
        ):
            return True
    return not built_for


def gpus(found: Sequence[Gpu], *, precision: str | None = None, needed: int | None = None) -> Iterator[Finding]:
    """
    Args:
        precision: of the configuration.
        needed: bytes that a rank's training needs, estimated.
    """
    kinds: dict[str, list[Gpu]] = {}
    for gpu in found:
        bf16 = "bf16" if gpu.bf16 else "no bf16"
        text = f"{gpu.name}, {gib(gpu.total)}, compute capability {gpu.capability[0]}.{gpu.capability[1]}, {bf16}"
        kinds.setdefault(text, []).append(gpu)
    if kinds:
        yield ok("GPU", "; ".join(f"{len(same)} x {text}" for text, same in kinds.items()))
    for gpu in found:
        if not gpu.supported:
            yield fault(
                "GPU",
                f"this torch has no kernels for {gpu.name} (compute capability {'.'.join(map(str, gpu.capability))})",
                "install a torch whose CUDA build has them",
            )
        if precision == "bf16" and not gpu.bf16:
            yield warning("GPU", f"{gpu.name} computes bf16 slowly", "set loop.precision=fp16 or fp32")
        used = gpu.total - gpu.free
        if used > _OWN + gpu.total // 20:
            yield warning(
                "GPU memory",
                f"{gib(used)} of GPU {gpu.number} are in use, {gib(gpu.free)} are free: another process?",
                "nvidia-smi shows whose it is; end it, or take another GPU (CUDA_VISIBLE_DEVICES)",
            )
        if needed is not None and needed > gpu.free:
            yield warning(
                "GPU memory",
                f"the training needs about {gib(needed)} on GPU {gpu.number}, and {gib(gpu.free)} are free",
                "tlx plan CONFIG --measure tells what fits; a smaller loop.micro_batch",
            )


def ranks_and_gpus(place: Place, count: int, *, on_cpu: bool, backend: str | None) -> Iterator[Finding]:
    """The processes of this node against its GPUs.

    Args:
        count: GPUs that torch can use in this process.
        backend: world.backend of the configuration.
    """
    if place.alone and count > 1:
        yield ok(
            "ranks and GPUs",
            f"one process takes one of {count} GPUs; all: torchrun --standalone --nproc-per-node={count} -m tlx ...",
        )
    elif place.alone or not count or on_cpu:
        return
    elif place.here > count and count > 1 and backend != "gloo":  # with one visible GPU each rank may have its own
        yield fault(
            "ranks and GPUs",
            f"{place.here} ranks and {count} GPUs on this node",
            f"start {count} processes on a node (--nproc-per-node={count}), or set world.backend=gloo",
        )
    elif place.here < count:
        yield warning(
            "ranks and GPUs",
            f"{place.here} ranks and {count} GPUs on this node: some are idle",
            f"start {count} processes on a node (--nproc-per-node={count}), or ask for fewer GPUs",
        )
    else:
        yield ok("ranks and GPUs", f"{place.here} ranks, and each sees {count} on this node")


def judge_cores(
    cores: int, quota: float | None, *, ranks: int, workers: int, threads: int, on_cpu: bool, in_step: bool = False
) -> Iterator[Finding]:
    """Cores that the ranks of a node may use, against the processes that want to run there.

    Args:
        quota: of the control group, in cores.
        threads: of torch, in each rank.
        in_step: srun has started them.
    """
    usable = min(cores, quota) if quota else float(cores)
    of = f"{cores} {'core' if cores == 1 else 'cores'}" + (
        f" (a quota of {quota:.3g} of them)" if quota and quota < cores else ""
    )
    wanted = ranks * (workers + 1)
    need = f"{ranks} {'rank' if ranks == 1 else 'ranks'} x ({workers} data workers + 1) = {wanted} processes"
    if wanted > max(usable, 1) * 1.5:
        fit = max(int(usable / ranks) - 1, 0)
        yield warning(
            "cores",
            f"{of} for {need}",
            f"data.workers={fit}, or more cores" + (": --cpus-per-task, given to srun once more" if in_step else ""),
        )
    else:
        yield ok("cores", f"{of} for {need}")
    if ranks * threads > max(usable, 1) * 1.5:
        fit = max(int(usable / ranks) - (workers if on_cpu else 0), 1)
        yield warning(
            "threads",
            f"{ranks} {'rank' if ranks == 1 else 'ranks'} x {threads} threads of torch on {of}: they get in each "
            "other's way",
            f"export OMP_NUM_THREADS={fit}",
        )


def shared_memory(total: int, free: int, *, ranks: int, gpus: bool, where: str = "/dev/shm") -> Iterator[Finding]:
    """Of /dev/shm, NCCL's between GPUs of a node; tlx's data workers share memory that is not there."""
    said = f"{gib(total)}, {gib(free)} free; data workers do not use it"
    if gpus and ranks > 1 and min(total, free) < _SHM:
        yield warning(
            where,
            f"{said}, but NCCL between the {ranks} GPUs of this node does, and wants about {gib(_SHM)}",
            "in a container: --shm-size=1g (docker), or bind the host's /dev/shm; else: mount -o remount,size=8g "
            f"{where}, or remove what is left there",
        )
    else:
        yield ok(where, said)


def shm(place: Place, *, gpus: bool, path: Path = Path("/dev/shm")) -> Iterator[Finding]:
    if not path.is_dir():
        yield ok(str(path), "there is none; data workers do not use it")
        return
    usage = shutil.disk_usage(path)
    yield from shared_memory(usage.total, usage.free, ranks=place.here, gpus=gpus, where=str(path))


def memory(available: int, left: int | None, *, ranks: int, needs: Needs | None) -> Iterator[Finding]:
    """Of the machine and of the control group, against the batches under way of all ranks of a node.

    Args:
        available: bytes of the machine; `left`: of the control group.
    """
    have = min(available, left) if left is not None else available
    of = f"{gib(have)} available" + (" (limit of the control group)" if left is not None and left < available else "")
    if needs is None:
        yield ok("memory", of)
        return
    wanted = ranks * needs.batches
    said = f"batches under way take {gib(wanted)} ({ranks} x {gib(needs.batches)}), {of}"
    if wanted > have:
        yield fault("memory", said, "fewer data.workers, a smaller loop.micro_batch, or more memory (sbatch --mem)")
    elif wanted > have / 2:
        yield warning("memory", said, "fewer data.workers, a smaller loop.micro_batch, or more memory (sbatch --mem)")
    else:
        yield ok("memory", said)


def limits(
    files: int, locked: int, *, size: int, workers: int, infiniband: bool, raised: int | None = None
) -> Iterator[Finding]:
    """``ulimit -n`` and ``ulimit -l``.

    Args:
        files, locked: the soft limits, in files and bytes; -1 is none.
        size: ranks of the world; each has a connection to each other one, in the worst case several.
        raised: the hard limit of files, up to which a user may go.
    """
    wanted = 256 + 4 * workers + 4 * size
    if 0 <= files < wanted:
        higher = f"ulimit -n {wanted}" if raised is None or raised < 0 or raised >= wanted else "ask for a higher limit"
        yield warning("open files", f"ulimit -n is {files}; {size} ranks may want about {wanted}", higher)
    else:
        yield ok("open files", f"ulimit -n is {'unlimited' if files < 0 else files}")
    if infiniband and 0 <= locked < 1 << 40:
        yield warning(
            "locked memory",
            f"ulimit -l is {locked // 1024} kB, and this node has InfiniBand, which registers memory",
            "LimitMEMLOCK=infinity for slurmd, PropagateResourceLimitsExcept=MEMLOCK; docker: --ulimit memlock=-1",
        )
    else:
        yield ok("locked memory", f"ulimit -l is {'unlimited' if locked < 0 else f'{locked // 1024} kB'}")


def system_limits(place: Place, *, workers: int) -> Iterator[Finding]:
    import resource

    def read(what: int) -> tuple[int, int]:
        soft, hard = resource.getrlimit(what)
        return tuple(-1 if v == resource.RLIM_INFINITY else v for v in (soft, hard))  # type: ignore[return-value]

    files, raised = read(resource.RLIMIT_NOFILE)
    fabric = os.path.isdir("/sys/class/infiniband") and bool(os.listdir("/sys/class/infiniband"))
    locked = read(resource.RLIMIT_MEMLOCK)[0]
    yield from limits(files, locked, size=place.size, workers=workers, infiniband=fabric, raised=raised)
