"""Figures of the source tree: circles of imports, repeated file names, lengths of files and functions."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PACKAGES = {"infini_train": ROOT / "infini_train", "infini_kernels": ROOT / "kernels" / "infini_kernels"}
LONGEST_FILE = 500
LONGEST_FUNCTION = 80
LONG_FUNCTIONS = {"validate_layout", "infini_attention"}
"""Functions over LONGEST_FUNCTION lines. `infini_attention` is mostly its docstring."""
MIRRORED = {"gradient_sum.py", "operation.py", "rotary.py"}
"""Files of infini_kernels that have a counterpart of the same name in its folder triton."""


def module_name(package: str, path: Path) -> str:
    words = path.relative_to(PACKAGES[package]).with_suffix("").parts
    return ".".join([package, *words]).removesuffix(".__init__")


def imports_of(tree: ast.Module, modules: set[str]) -> set[str]:
    """Return the modules that a file imports, at its head or inside a function."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & modules


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Return the sets of modules that import each other, directly or through others."""
    reached = {}
    for start in graph:
        reached[start], waiting = set(), [start]
        while waiting:
            for after in graph[waiting.pop()] - reached[start]:
                reached[start].add(after)
                waiting.append(after)
    found = {frozenset(one for one in reached[start] if start in reached[one]) for start in graph}
    return [set(circle) for circle in found if circle]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_modules_import_each_other(package):
    trees = {
        module_name(package, path): ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGES[package].rglob("*.py")
    }
    # A package imports its own modules to offer their names; modules import the package as a whole.
    graph = {name: imports_of(tree, set(trees)) - {name, package} for name, tree in trees.items() if name != package}
    assert len(graph) > 25
    assert not circles(graph)


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [{"b", "c"}]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_file_name_occurs_once(package):
    names = Counter(path.name for path in PACKAGES[package].rglob("*.py") if path.name != "__init__.py")
    repeated = {name for name, count in names.items() if count > 1}
    assert repeated == (MIRRORED if package == "infini_kernels" else set())


def test_files_and_functions_are_short():
    long_files, long_functions = [], set()
    for path in [*(ROOT / "launch").glob("*.py"), *(path for folder in PACKAGES.values() for path in folder.rglob("*.py"))]:
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > LONGEST_FILE:
            long_files.append(path.name)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= LONGEST_FUNCTION:
                long_functions.add(node.name)
    assert not long_files
    assert long_functions <= LONG_FUNCTIONS
