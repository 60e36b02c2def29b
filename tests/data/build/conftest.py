"""The folder of pictures that is built."""

from __future__ import annotations

import pytest
from images import make_folder


@pytest.fixture
def src(tmp_path):
    return make_folder(tmp_path / "src", per_class=15, size=24)
