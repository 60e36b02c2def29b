"""Built shards: options of a quick build, and whether two folders hold the same files."""

from __future__ import annotations

from tlx.data.build.write import BuildOptions


def options(**settings):
    return BuildOptions(**{"val": 0.2, "shard_samples": 10, "jobs": 0} | settings)


def names(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def assert_same_files(one, other):
    assert names(one) == names(other)
    for file in names(other):
        assert (one / file).read_bytes() == (other / file).read_bytes(), file
