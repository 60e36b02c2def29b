"""Imports go down: a package uses what stands below it. Lazy imports and those of types alone count too."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest
from places import ROOT, TESTS

import tlx

ORDER = [
    "base",
    "data",
    "models",
    "tasks",
    "features",
    "plan",
    "runs",
    "report",
    "tracking",
    "ranks",
    "use",
    "ship",
    "serve",
    "train",
    "init",
    "probe",
    "bench",
    "doctor",
    "submit",
    "sweep",
    "cli",
]
FORMER = {"durations": "Length", "layers": "LayerMap", "plug": "needs", "unfreeze": "Assignment"}
"""What README and CONTRIBUTING of 0.2.0 showed to packages of others: a module, and what they import from it."""
TLX = ROOT / "tlx"


def modules() -> dict[str, Path]:
    files = {".".join(f.relative_to(TLX.parent).with_suffix("").parts): f for f in TLX.rglob("*.py")}
    return {name.removesuffix(".__init__"): file for name, file in files.items()}


def imported(file: Path, known) -> set[str]:
    """Modules of tlx that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tlx":
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in known else str(node.module) for name in whole}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("tlx.")}
    return found


def package(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_imports_go_down():
    known = modules()
    assert {package(m) for m in known} - {""} == {*ORDER, "__main__", *FORMER}
    upward = [
        f"{module} imports {other}"
        for module, file in known.items()
        for other in imported(file, known)
        if package(module) in ORDER and package(other) in ORDER
        if ORDER.index(package(other)) > ORDER.index(package(module))
    ]
    assert upward == []


@pytest.mark.parametrize("module", FORMER)
def test_former_paths_give_the_same_objects(module):
    name = FORMER[module]
    assert getattr(importlib.import_module(f"tlx.{module}"), name) is getattr(tlx, name)


def test_a_plan_needs_no_library():
    """Whatever plan, config and schedules import, directly or not, but inside of functions, is none of torch's."""
    known = modules()
    start = {m for m in known if package(m) == "plan"}
    assert len(start) > 10
    seen, left = set(), [*start]
    while left:
        module = left.pop()
        if module in seen or module not in known:
            continue
        seen.add(module)
        for node in ast.parse(known[module].read_text(encoding="utf-8")).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not {n.split(".")[0] for n in names} & {"torch", "torchvision", "timm", "accelerate"}, module
            if isinstance(node, ast.ImportFrom) and names[0].startswith("tlx"):
                left += [f"{node.module}.{a.name}" for a in node.names] + names


def test_no_test_imports_another():
    """What several share is in tests/support. Names are unique: a module is imported by its own."""
    files = [f for f in TESTS.rglob("test_*.py") if "outside" not in f.parts]
    names = [f.stem for f in files]
    assert len(set(names)) == len(names) > 80
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            found = {a.name for a in node.names} if isinstance(node, ast.Import) else set()
            found |= {str(node.module)} if isinstance(node, ast.ImportFrom) else set()
            assert not found & set(names), file
