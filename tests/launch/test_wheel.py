"""launch/wheel.sh: a wheel that brings its own libjpeg."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from places import ROOT

from tlx.data.pixels.extension import extension

LOADED = """
import tlx.data._jpeg as extension
print(extension.__file__)
print(*{line.split()[-1] for line in open("/proc/self/maps") if "libjpeg" in line}, sep="\\n")
"""


@pytest.mark.slow
@pytest.mark.skipif(extension is None or shutil.which("gcc") is None, reason="the extension cannot be built here")
def test_the_libjpeg_that_is_loaded_lies_in_the_wheel(tmp_path):
    subprocess.run(["bash", "launch/wheel.sh", str(tmp_path / "dist")], cwd=ROOT, check=True, timeout=600)
    (wheel,) = (tmp_path / "dist").glob("tlx-*manylinux*.whl")
    there = tmp_path / "there"
    shutil.unpack_archive(wheel, there, format="zip")  # as an installer does
    assert (there / "tlx" / "data" / "_jpeg.pyi").is_file()
    assert not list(there.rglob("*.c"))
    code = f"import sys; sys.path.insert(0, {str(there)!r})\n{LOADED}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    module, *libraries = done.stdout.splitlines()
    assert module.startswith(str(there))
    assert libraries
    assert all(library.startswith(str(there)) for library in libraries), libraries
