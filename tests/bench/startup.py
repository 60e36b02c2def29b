"""What commands cost before they do anything: CPU seconds of whole processes, as ratios to `import torch` here.

    python tests/bench/startup.py [ROUNDS]

Each is run ROUNDS times (3), one after another, and the least counts. Goals are of one slow idle core: a mistake in
keys, types or names 1 s, status below 1, building 36 pictures 2, a plan at most 1.5 times the import of torchvision, or
1.3 times that of timm; and on a terminal, the first line within a second.
"""

from __future__ import annotations

import os
import pty
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

TLX = [sys.executable, "-m", "tlx"]
GOALS = {
    "tlx status RUN": "1 s",
    "a mistake in tlx train": "1 s",
    "tlx shards build, 36 pictures": "2 s",
    "tlx plan, torchvision/resnet18": "1.5 x import torchvision",
    "tlx plan, timm/vit_tiny": "1.3 x import timm",
}
CONFIG = """
run: {folder}/run
data: {{train: {folder}/shards/train, batch: 8, expected: {{classes: 3, train: 36}}}}
backbone: {{name: {name}, weights: none}}
phases: {{each: {{duration: 1ep, lr: 1e-3}}}}
"""


def cpu_s(words: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def first_line_s(words: list[str]) -> float:
    """Until something stands on a terminal, in seconds of the clock."""
    began, (pid, terminal) = time.monotonic(), pty.fork()
    if pid == 0:
        os.execv(words[0], words)
    os.read(terminal, 1)
    took = time.monotonic() - began
    os.kill(pid, 15)
    os.waitpid(pid, 0)
    return took


def commands(folder: Path) -> dict[str, list[str]]:
    from images import make_folder

    make_folder(folder / "pictures", 3, 12, 64)
    for name in ("torchvision/resnet18", "timm/vit_tiny_patch16_224"):
        (folder / f"{name.partition('/')[0]}.yaml").write_text(CONFIG.format(folder=folder, name=name))
    config = str(folder / "timm.yaml")
    imports = {f"import {name}": [sys.executable, "-c", f"import {name}"] for name in ("torch", "torchvision", "timm")}
    build = [*TLX, "shards", "build", str(folder / "pictures"), str(folder / "shards")]
    return imports | {
        "tlx --version": [*TLX, "--version"],
        "tlx status RUN": [*TLX, "status", str(folder)],
        "a mistake in tlx train": [*TLX, "train", config, "sed=1", "backbone.name=timm/resnet19"],
        "tlx shards build, 36 pictures": ["sh", "-c", f'rm -rf {folder}/shards; exec "$0" "$@"', *build],
        "tlx plan, torchvision/resnet18": [*TLX, "plan", str(folder / "torchvision.yaml")],
        "tlx plan, timm/vit_tiny": [*TLX, "plan", config],
    }


def main(rounds: str = "3") -> None:
    with tempfile.TemporaryDirectory() as made:
        wanted = commands(Path(made))
        found = {name: min(cpu_s(words) for _ in range(int(rounds))) for name, words in wanted.items()}
        torch = found["import torch"]
        print(f"{'':32} {'CPU s':>6} {'/ torch':>8}  goal")
        for name, seconds in found.items():
            print(f"{name:32} {seconds:6.2f} {seconds / torch:8.2f}  {GOALS.get(name, '')}")
        for name in ("a mistake in tlx train", "tlx plan, timm/vit_tiny"):
            print(f"first line of {name}: {first_line_s(wanted[name]):.2f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
