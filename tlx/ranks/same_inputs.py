"""Whether all ranks have the same inputs: configuration, code, versions, weights, shards; else nobody trains.

Each rank makes a digest of every topic; only where those differ are the details exchanged, and compared with rank 0's.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import sys
import zlib
from collections.abc import Callable, Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlx.base.differences import flat
from tlx.base.errors import UserError
from tlx.base.location import without_credentials
from tlx.plan.config import Config, plain
from tlx.runs.run_folder import versions

if TYPE_CHECKING:
    from torch import nn

    from tlx.data.shards.manifest import Manifest
    from tlx.ranks.collectives import World

Topics = Mapping[str, Mapping[str, str]]
"""By topic the details: what is compared -> its value, or a digest of it."""

Exchange = Callable[..., list[Any]]
"""Every rank's value by rank; takes the value and `topic`, a name of this exchange."""

CONFIG, CODE, PARTS, VERSIONS = "configuration", "tlx's code", "code of your own", "versions"
WEIGHTS, SHARDS = "weights as loaded", "shards"
_TODO = {
    CONFIG: "start every rank with the same file and the same key=value words",
    CODE: "install the same tlx on every machine",
    PARTS: "let every rank import the same files: look at PYTHONPATH and the working folder",
    VERSIONS: "use the same environment on every machine",
    WEIGHTS: "see that backbone.weights is the same file everywhere, and that nothing random depends on the rank",
    SHARDS: "see that data.train, data.val and data.test hold the same shards on every machine",
}
_OF_A_MACHINE = ("data.cache.folder",)  # which $TMPDIR may have named
_OURS = ("tlx", "torchvision", "timm")
_SHOWN = 12


def check_start(config: Config, exchange: Exchange) -> None:
    """Compares what is known before ranks compute together.

    Raises:
        UserError: on every rank, with what differs and where.
    """
    said = flat(plain(config))
    values = {key: json.dumps(value, sort_keys=True) for key, value in said.items() if key not in _OF_A_MACHINE}
    compare({CONFIG: values, CODE: package(), PARTS: parts_of(config), VERSIONS: versions()}, exchange, name="start")


def check_parts(world: World, net: nn.Module, manifests: Mapping[str, Manifest | None]) -> str | None:
    """Compares what ranks have loaded, before they take it from rank 0 or from a checkpoint.

    Returns:
        a warning where JPEGs are decoded by different libraries: allowed, but pixels differ by rounding.

    Raises:
        UserError: on every rank, with what differs and where.
    """
    from tlx.data.pixels.jpeg_region import decoder

    if world.size == 1:
        return None
    shards = {key: _shards(manifest) for key, manifest in manifests.items() if manifest is not None}
    compare({WEIGHTS: weights(net), SHARDS: shards}, lambda value, *, topic: world.gather(value), name="parts")
    found = world.gather(decoder())
    if len(set(found)) == 1:
        return None
    return f"WARNING: ranks decode JPEGs differently, so that their pixels differ by rounding: {_by_value(found)}"


def compare(topics: Topics, exchange: Exchange, *, name: str) -> None:
    """Compares every rank's topics with rank 0's.

    Raises:
        UserError: on every rank alike, so that none waits for another.
    """
    summaries = {topic: _digest(details) for topic, details in topics.items()}
    everybody = exchange([socket.gethostname(), summaries], topic=name)
    hosts = [host for host, _ in everybody]
    differing = [t for t in topics if any(one[t] != everybody[0][1][t] for _, one in everybody)]
    if not differing:
        return
    details = exchange({t: dict(topics[t]) for t in differing}, topic=f"{name}-details")
    lines = [line for topic in differing for line in _lines(topic, [d[topic] for d in details], hosts)]
    raise UserError(
        "ranks have different inputs:\n    " + "\n    ".join(lines),
        where="ranks",
        todo="; ".join(_TODO[t] for t in differing),
    )


def package() -> dict[str, str]:
    """Digests of tlx's own files."""
    root = Path(__file__).parents[1]
    files = sorted(root.rglob("*.py"))  # an extension that one machine could not build is told by its decoder
    return {p.relative_to(root).as_posix(): _of_file(p) for p in files}


def parts_of(config: Config) -> dict[str, str]:
    """Digests of what is loaded of packages from outside: those that the configuration names, or that offer parts."""
    named = re.findall(r'"([\w.]+):[A-Za-z_][\w.]*"', json.dumps(plain(config), ensure_ascii=False))
    offered = [e.module for d in distributions() for e in d.entry_points if e.group.startswith("tlx.")]
    packages = {name.partition(".")[0] for name in (*named, *offered)} - {*_OURS}
    loaded = {name: getattr(module, "__file__", None) for name, module in sorted(sys.modules.items())}
    return {name: _of_file(Path(file)) for name, file in loaded.items() if file and name.partition(".")[0] in packages}


def weights(net: nn.Module) -> dict[str, str]:
    """Checksums (CRC-32, against accidents) of all parameters and buffers, of their bits as they are."""
    import torch

    found = {}
    for name, tensor in net.state_dict().items():
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        shape = "x".join(map(str, tensor.shape))
        found[name] = f"{shape} {zlib.crc32(flat.view(torch.uint8).numpy()):08x}"
    return found


def _shards(manifest: Manifest) -> str:
    hashes = f", content {manifest.content[:12]}" if manifest.content else ""
    return f"{len(manifest)} samples, digest {manifest.digest[:12]}{hashes}"


def _of_file(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _digest(details: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(dict(details), sort_keys=True).encode()).hexdigest()


def _lines(topic: str, details: list[Mapping[str, str]], hosts: list[str]) -> list[str]:
    keys = sorted({key for one in details for key in one})
    lines = []
    for key in keys:
        values = [one.get(key, "nothing") for one in details]
        if len(set(values)) > 1:
            lines.append(f"{topic}, {key}: {_by_value(values, hosts)}")
    more = [f"{topic}: {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return lines[:_SHOWN] + more


def _by_value(values: list[str], hosts: list[str] | None = None) -> str:
    """Such as ``5 on rank 0 (here), 6 on ranks 1, 2 (there)``."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    said = []
    for value, own in ranks.items():
        where = sorted({hosts[r] for r in own}) if hosts else []
        place = f" ({_few(where)})" if where else ""
        ranked = f"rank{'s' if len(own) > 1 else ''} {_few(list(map(str, own)))}"
        said.append(f"{without_credentials(value)[:120]} on {ranked}{place}")
    return ", ".join(said)


def _few(words: list[str]) -> str:
    return ", ".join(words[:8]) + (f" and {len(words) - 8} more" if len(words) > 8 else "")
