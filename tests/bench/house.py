"""Figures of a package's source: ``python tests/bench/house.py tlx [OTHER_PACKAGE ...]`` prints a table, a column each.

Code lines hold something besides blank space, comments and docstrings. A function's length is that of its lines from
`def` on, a docstring and functions inside included. The longest chain of imports follows those inside of functions,
too, and counts modules that import one another as one.
"""

from __future__ import annotations

import ast
import io
import statistics
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

LONG_LINES, MANY_ARGUMENTS = 60, 7
_LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One file: its lines of code and of docstrings, its lines that hold a comment alone."""

    tree: ast.Module
    code: int
    docstrings: int
    comments: int

    @classmethod
    def read(cls, file: Path) -> Source:
        text = file.read_text(encoding="utf-8")
        tree = ast.parse(text)
        documented = {line for node in _docstrings(tree) for line in range(node.lineno, (node.end_lineno or 0) + 1)}
        written, commented = set(), set()
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                commented.add(token.start[0])
            elif token.type not in _LAYOUT:
                written.update(range(token.start[0], token.end[0] + 1))
        return cls(tree, len(written - documented), len(documented), len(commented - written))


def _docstrings(tree: ast.AST) -> Iterator[ast.expr]:
    """Strings that stand for themselves: of modules, classes, functions, and below a constant."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value


def _arguments(function: Function) -> int:
    said = function.args
    own = [a.arg for a in (*said.posonlyargs, *said.args, *said.kwonlyargs)]
    return len([name for name in own if name not in ("self", "cls")])


def longest_chain(sources: dict[str, Source]) -> int:
    """Of modules that import the next one each."""
    uses = {name: _imports(source.tree, name, sources) - {name} for name, source in sources.items()}

    @cache
    def reached(name: str) -> frozenset[str]:
        seen, left = set(), [name]
        while left:
            for other in uses[left.pop()] - seen:
                seen.add(other)
                left.append(other)
        return frozenset(seen)

    @cache
    def chain(name: str) -> int:
        circle = {name, *(other for other in reached(name) if name in reached(other))}
        return 1 + max((chain(other) for member in circle for other in uses[member] - circle), default=0)

    return max(map(chain, sources))


def _imports(tree: ast.Module, name: str, known: dict[str, Source]) -> set[str]:
    found, folder = set(), name.split(".")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = (
                [*folder[: len(folder) - node.level], *filter(None, [node.module])]
                if node.level
                else [node.module or ""]
            )
            module = ".".join(base)
            found.update(f"{module}.{a.name}" if f"{module}.{a.name}" in known else module for a in node.names)
    return found & known.keys()


def figures(folder: Path) -> dict[str, str]:
    names = {f: ".".join(f.relative_to(folder.parent).with_suffix("").parts) for f in sorted(folder.rglob("*.py"))}
    sources = {name.removesuffix(".__init__"): Source.read(file) for file, name in names.items()}
    functions = [n for s in sources.values() for n in ast.walk(s.tree) if isinstance(n, Function)]
    lengths = sorted((f.end_lineno or f.lineno) - f.lineno + 1 for f in functions)
    long, wide = sum(n > LONG_LINES for n in lengths), sum(_arguments(f) > MANY_ARGUMENTS for f in functions)
    code = sum(s.code for s in sources.values())
    median, p90 = statistics.median_low(lengths), lengths[int(0.9 * len(lengths))]
    comments = sum(s.comments for s in sources.values())
    return {
        "code lines; with docstrings": f"{code}; {code + sum(s.docstrings for s in sources.values())}",
        "function lines: median / p90 / max": f"{median} / {p90} / {lengths[-1]}",
        f"functions over {LONG_LINES} lines; over {MANY_ARGUMENTS} arguments": f"{long}; {wide}",
        "modules; flat in the package": f"{len(sources)}; {len(list(folder.glob('*.py')))}",
        "longest chain of imports": str(longest_chain(sources)),
        "lines of comment alone per code line": f"{comments / code:.1%}",
    }


def main(folders: list[Path]) -> None:
    columns = [figures(folder.resolve()) for folder in folders]
    print("| | " + " | ".join(folder.resolve().name for folder in folders) + " |\n" + "|---" * (len(folders) + 1) + "|")
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(column[name] for column in columns) + " |")


if __name__ == "__main__":
    main([Path(word) for word in sys.argv[1:]] or sys.exit(__doc__))
