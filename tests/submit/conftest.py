"""A Slurm cluster of this machine's own."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    import slurm_cluster

    with slurm_cluster.running(tmp_path_factory.mktemp("slurm") / "c") as made:
        yield made
