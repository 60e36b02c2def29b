"""Tars as others make them, for `tlx shards index`."""

from __future__ import annotations

import io
import tarfile

from images import encoded, picture


def tar_of(path, members, format=tarfile.USTAR_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(labels, extension="cls", image="jpg", prefix=""):
    for i, label in enumerate(labels):
        yield f"{prefix}{i:04d}.{image}", encoded(picture(i % 3, size=16, seed=i))
        yield f"{prefix}{i:04d}.{extension}", label if isinstance(label, bytes) else str(label).encode()
