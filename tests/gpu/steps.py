"""The steps of `launch/gpu.sh`: what each shows, how it is started, how long it may take. The most telling come first.

A step is a process of its own, so that a crash, a hang or a full memory is that step's; it leaves rows as it goes, so
that one that is cut off has shown what it got to.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

HERE = Path(__file__).parent
TESTS = HERE.parent
Part = Literal["tests", "precision", "memory", "speed"]
PARTS: Sequence[Part] = get_args(Part)
FIRST = (
    ("train/test_precision.py", "nccl or two_ranks"),
    ("data/stream/test_dealing.py", ""),
    ("train/test_gpu.py", "waits or overflows or pinned or checkpoint"),
    ("train/test_gpu.py", "rank_on_a_gpu"),
)
"""Files of tests, and which of them, that show most; the rest follows."""


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        shows: in a few words.
        module: a program in this folder.
        words: its arguments; that it is a dry run, and where rows go, is added.
        limit_s: after which it is ended.
    """

    part: Part
    name: str
    shows: str
    module: str
    words: Sequence[str] = ()
    limit_s: float = 100.0

    def command(self, rows: Path, *, dry: bool, work: Path) -> list[str]:
        said = [sys.executable, str(HERE / f"{self.module}.py"), *self.words, "--rows", str(rows), "--work", str(work)]
        return [*said, "--dry"] if dry else said


def files_of_tests() -> list[str]:
    """Of all tests marked gpu."""
    files = sorted(TESTS.rglob("test_*.py"))
    return [str(f.relative_to(TESTS)) for f in files if "mark.gpu" in f.read_text(encoding="utf-8")]


def tests() -> list[tuple[str, str]]:
    """Files and words for pytest's ``-k``; each test is in one of them."""
    chosen: dict[str, list[str]] = {}
    for file, words in FIRST:
        chosen.setdefault(file, []).append(words)
    left = [file for file in files_of_tests() if "" not in chosen.get(file, ())]
    return [*FIRST, *((file, f"not ({' or '.join(chosen[file])})" if file in chosen else "") for file in left)]


def steps() -> list[Step]:
    """All of them, by part and in the order in which they are run."""
    networks = ("resnet50", "vit_b_16", "convnext_tiny", "swin_t", "efficientnet_b0")
    return [
        *(
            Step(
                "tests",
                f"{Path(file).stem} {words}".rstrip(),
                "tests marked gpu",
                "run_tests",
                [file, words],
                90,
            )
            for file, words in tests()
        ),
        Step("precision", "waits", "calls that wait for the device, by a profile", "precision", ["waits"], 70),
        Step("precision", "overflow", "a first step that overflows moves nothing", "precision", ["overflow"], 40),
        Step("precision", "losses", "bf16, fp16, channels_last beside fp32", "precision", ["losses"], 50),
        Step("precision", "compile", "compiled over a phase change, beside eager", "precision", ["compile"], 110),
        Step("memory", "words", "what libraries say when memory is full", "memory", ["words", "all"], 30),
        *(Step("memory", n, "estimate and trial beside the peak", "memory", ["peaks", n], 60) for n in networks),
        Step("speed", "resnet50", "the loop beside a bare one", "speed", ["loop", "resnet50"], 80),
        Step("speed", "vit_b_16", "the loop beside a bare one", "speed", ["loop", "vit_b_16"], 80),
        Step("speed", "data", "what the data path gives a core", "speed", ["data", "all"], 50),
        Step("speed", "resnet50 compiled", "the same, compiled", "speed", ["loop", "resnet50", "--compile"], 110),
        Step("speed", "vit_b_16 compiled", "the same, compiled", "speed", ["loop", "vit_b_16", "--compile"], 110),
    ]
