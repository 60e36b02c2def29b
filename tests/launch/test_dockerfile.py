"""launch/Dockerfile without Docker: what it copies and runs, in an environment of its own, and what its CMD answers."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
from commands import free_port
from composed import finished, raw_of
from images import encoded, make_shards, picture
from places import ROOT

from tlx.data.pixels.extension import extension

FILE = ROOT / "launch" / "Dockerfile"


def steps():
    """Its instructions and their words, lines joined, without comments."""
    lines = [line for line in FILE.read_text().splitlines() if line.strip() and not line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines()]


def words_of(instruction):
    """Of CMD, in its form as JSON."""
    (found,) = [json.loads(rest[rest.index("[") :]) for name, rest in steps() if name == instruction]
    return found


def test_nothing_of_it_is_run_by_root_or_kept_out_of_reach():
    names = [name for name, _ in steps()]
    assert names[:2] == ["ARG", "FROM"]
    assert names.index("USER") > max(at for at, name in enumerate(names) if name == "RUN")
    assert dict(steps())["USER"] == "10001:10001"
    assert words_of("CMD")[:3] == ["tlx", "serve", "/model"]
    for name, rest in steps():
        if name == "COPY":
            sources = rest.split()[:-1]
            assert [one for one in sources if not one.startswith("dist/") and not (ROOT / one).is_file()] == []


def environment_of(place):
    """An environment with this one's packages, but for tlx, so that only the wheel is installed."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True, timeout=120)
    (there,) = (place / "lib").glob("python*/site-packages")
    for folder in [Path(one) for one in sys.path if one.endswith("site-packages")]:
        for entry in folder.iterdir():
            is_left_out = re.match(r"tlx|__editable__|__pycache__|.*\.pth$", entry.name)
            if not is_left_out and not (there / entry.name).exists():
                (there / entry.name).symlink_to(entry)
    pip = place / "bin" / "pip"
    pip.write_text('#!/bin/sh\nexec python -m pip "$@"\n')
    pip.chmod(0o755)
    return place


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """The folder that stands for the image, after its steps; and variables of its processes."""
    root = tmp_path_factory.mktemp("image")
    context, venv = root / "context", environment_of(root / "venv")
    (context / "launch").mkdir(parents=True)
    shutil.copy(ROOT / "launch" / "constraints.txt", context / "launch")
    subprocess.run(["bash", "launch/wheel.sh", str(context / "dist")], cwd=ROOT, check=True, timeout=600)
    variables = {"PATH": f"{venv / 'bin'}:{os.environ['PATH']}", "HOME": str(root), "PIP_NO_INDEX": "1"}
    for name, rest in steps():
        if name == "COPY":
            *sources, target = rest.split()
            (root / target.strip("/")).mkdir(parents=True, exist_ok=True)
            files = [file for source in sources for file in glob.glob(str(context / source))]
            assert len(files) >= len(sources)
            for file in files:
                shutil.copy(file, root / target.strip("/"))
        elif name == "RUN":
            command = rest.replace("/opt/tlx", str(root / "opt/tlx"))
            done = subprocess.run(
                ["sh", "-c", command], cwd=root, env=variables, capture_output=True, text=True, timeout=600, check=False
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return root, variables


@pytest.mark.slow
@pytest.mark.skipif(extension is None or shutil.which("gcc") is None, reason="the wheel cannot be built here")
def test_its_steps_make_what_its_command_needs(image, tmp_path):
    root, variables = image
    said = subprocess.run(
        ["python", "-c", "import tlx; print(tlx.__file__)"],
        cwd=root, env=variables, capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip
    assert said.startswith(str(root / "venv"))
    shards = make_shards(tmp_path / "s", classes=3, per_class={"train": 8, "val": 4}, size=48)
    backbone = {"name": "timm/test_resnet", "weights": "none"}
    run, port = finished(raw_of(shards, tmp_path / "run", backbone=backbone, input={"size": 64})), free_port()
    words = [{"/model": str(run), "0.0.0.0": "127.0.0.1"}.get(word, word) for word in words_of("CMD")]
    server = subprocess.Popen([*words, "--port", str(port)], cwd=root, env=variables)
    try:
        health = [word.replace(":8000", f":{port}") for word in words_of("HEALTHCHECK")]
        until = time.monotonic() + 120
        while subprocess.run(health, env=variables, capture_output=True, check=False).returncode:
            assert server.poll() is None
            assert time.monotonic() < until
            time.sleep(0.5)
        answer = requests.post(
            f"http://127.0.0.1:{port}/predict", files={"file": encoded(picture(0, size=99))}, timeout=30
        )
        assert answer.json()["predictions"][0]["label"] in ("class0", "class1", "class2")
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
    finally:
        server.kill()
