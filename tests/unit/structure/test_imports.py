"""Imports point one way between the folders of infini_train."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
PACKAGE = ROOT / "infini_train"

ORDER = (
    ("infini_kernels",),
    ("runtime",),
    ("config",),
    ("tokenizers",),
    ("tasks",),
    ("data",),
    ("attention",),
    ("model",),
    ("parallel",),
    ("checkpoint",),
    ("reference", "measurement"),
    ("resilience",),
    ("training",),
    ("report",),
    ("evaluation", "planning", "convert"),
    ("cluster",),
    ("cli",),
    ("__main__",),
)
"""Folders of infini_train, from the bottom to the top. A folder imports only from folders of earlier entries."""
LEVEL = {folder: level for level, folders in enumerate(ORDER) for folder in folders}


def imported_folders(path: Path) -> set[str]:
    folders = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "infini_train" else [f"infini_train.{a.name}" for a in node.names]
        for name in names:
            if name.startswith("infini_train."):
                folders.add(name.split(".")[1])
            elif name.split(".")[0] in ("infini_kernels", "infini_train"):
                folders.add(name.split(".")[0])
    return folders - {"__version__"}  # of the package itself


def test_imports_point_one_way():
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 150
    assert {path.name.removesuffix(".py") for path in PACKAGE.iterdir()} - {"__pycache__", "__init__"} == set(LEVEL) - {
        "infini_kernels"
    }
    for path in files:
        folder = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if folder == "__init__":
            assert not imported_folders(path)
            continue
        wrong = {name for name in imported_folders(path) - {folder} if LEVEL[name] >= LEVEL[folder]}
        assert not wrong, f"{path.relative_to(ROOT)} must not import {sorted(wrong)}"


def test_launchers_need_only_the_standard_library():
    """They start before anything heavy is imported, and say what is missing. Only the preflight measures with torch."""
    files = sorted((ROOT / "launch").glob("*.py"))
    assert len(files) > 5
    for path in files:
        allowed = {
            "cli.command_list",
            "cluster.environment",
            "runtime.errors",
            "runtime.signals",
            "runtime.standard_streams",
        } | ({"torch"} if path.name.startswith("preflight") else set())
        names = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module)
        names = {
            name.removeprefix("infini_train.") if name.startswith("infini_train.") else name.split(".")[0] for name in names
        }
        wrong = names - allowed - set(sys.stdlib_module_names) - {"launch"}
        assert not wrong, f"{path.relative_to(ROOT)} must not import {sorted(wrong)}"


def test_kernels_know_only_torch():
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not imported_folders(path) - {"infini_kernels"}, path


def test_nothing_but_config_reads_yaml():
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "config":
            assert "import yaml" not in path.read_text(encoding="utf-8"), path


def test_every_group_has_a_time_limit_of_its_own():
    """One that is given none takes the default of its backend, NCCL's ten minutes, and not the run's."""
    found = 0
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "launch").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "new_group":
                found += 1
                assert "timeout" in {keyword.arg for keyword in node.keywords}, f"{path.relative_to(ROOT)}: {node.lineno}"
    assert found > 2
