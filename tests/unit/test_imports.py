"""Imports point one way: infini_kernels <- attention <- model <- parallel <- training <- cli; data and config at the side."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "infini_train"

# What each part may import from this project besides itself.
SIDE = {"config", "errors", "hardware", "platform", "results"}
ALLOWED = {
    "errors": set(),
    "commands": set(),
    "stop_signals": set(),
    "standard_streams": set(),
    "config": set(),
    "hardware": {"errors"},
    "validation": {"config", "errors"},
    "platform": {"errors"},
    "results": {"errors"},
    "storage": set(),
    "data": {"config", "errors", "storage", "tasks", "validation"},
    "tasks": {"config", "data", "errors"},
    "attention": {"infini_kernels", *SIDE},
    "model": {"infini_kernels", "attention", *SIDE},
    "checkpoint": {"config", "errors", "results", "storage"},
    "parallel": {"infini_kernels", "attention", "model", "data", *SIDE},
    "training": {"checkpoint", "infini_kernels", "attention", "model", "parallel", "data", "evaluation", "stop_signals", *SIDE},
    "evaluation": {"checkpoint", "attention", "model", "parallel", "data", "overrides", "tasks", "training", *SIDE},
    "planning": {"infini_kernels", "model", "parallel", "data", "training", "validation", *SIDE},
    "convert": {"attention", "checkpoint", "config", "data", "errors", "results"},
    "cluster": {"checkpoint", "config", "errors", "overrides", "parser_errors", "planning", "validation"},
    "parser_errors": {"config"},
    "overrides": {"config", "errors", "parser_errors"},
    "parser": {"cluster", "commands", "config", "errors", "parser_errors", "planning", "validation"},
    "cli": {
        *("checkpoint", "cluster", "convert", "data", "parser", "training", "evaluation", "planning", "standard_streams"),
        *("validation", *SIDE),
    },
    "__main__": {"cli"},
    "__init__": set(),
}


def imported_parts(path: Path) -> set[str]:
    parts = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "infini_train" else [f"infini_train.{a.name}" for a in node.names]
        for name in names:
            if name.startswith("infini_train."):
                parts.add(name.split(".")[1])
            elif name.split(".")[0] in ("infini_kernels", "infini_train"):
                parts.add(name.split(".")[0])
    return parts - {"__version__"}  # of the package itself


def test_every_file_imports_only_what_its_part_may():
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 30
    for path in files:
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        wrong = imported_parts(path) - ALLOWED[part] - {part}
        assert not wrong, f"{path.relative_to(ROOT)} must not import {sorted(wrong)}"


def test_launchers_need_only_the_standard_library():
    """They start before anything heavy is imported, and say what is missing. Only the preflight measures with torch."""
    files = sorted((ROOT / "launch").glob("*.py"))
    assert len(files) > 5
    for path in files:
        allowed = {"cluster.environment", "commands", "errors", "standard_streams", "stop_signals"} | (
            {"torch"} if path.name.startswith("preflight") else set()
        )
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


def test_training_and_evaluation_form_no_cycle_of_files():
    """Training measures held-out loss, and the evaluation commands load what training saved: by file it still goes one way."""
    assert "training" not in imported_parts(PACKAGE / "evaluation" / "perplexity.py")
    assert "training" not in imported_parts(PACKAGE / "evaluation" / "generation.py")


def test_data_and_tasks_form_no_cycle_of_files():
    """`prepare` writes a task's samples, and they need a tokenizer: of data, tasks know that alone."""
    for path in (PACKAGE / "tasks").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
        assert {name for name in modules if name.startswith("infini_train.data")} <= {"infini_train.data.tokenizer"}, path
    assert "tasks" not in imported_parts(PACKAGE / "data" / "tokenizer.py")


def test_kernels_know_only_torch():
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not imported_parts(path) - {"infini_kernels"}, path


def test_nothing_but_config_reads_yaml():
    for path in PACKAGE.rglob("*.py"):
        if path.name != "config.py":
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
