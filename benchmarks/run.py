"""Run a benchmark: `python -m benchmarks.run NAME` prints its table and appends a record to benchmarks/results/NAME.jsonl."""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from infini_train.runtime.platform import processor

NAMES = ("stream", "window", "pipeline", "checkpoint", "peers", "ageing", "host", "compiled", "tiles", "operation", "step")
ON_CUDA = ("tiles", "operation", "step")
LIBRARIES = ("torch", "triton", "megatron-core", "deepspeed", "flash-attn", "liger-kernel", "flash-linear-attention")
RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """Return the conditions of a measurement: date, commit, device, cores and library versions."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    changed = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit + ("+changes" if changed else ""),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES if _is_installed(name)},
    }


def _is_installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def show(name: str, rows: list[dict[str, Any]]) -> None:
    """Print a plain-text table, without a table library, which a minimal GPU machine may lack."""
    head = list(rows[0])
    cells = [head, *([f"{value:,.4g}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    print(name)
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


_rows: list[dict[str, Any]] = []


def progress(row: dict[str, Any]) -> dict[str, Any]:
    """Print a row of a slow benchmark at once, and keep it so that it is recorded even if the benchmark is stopped."""
    print({name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}, flush=True)
    _rows.append(row)
    return row


def run(name: str) -> None:
    """Run one benchmark, print its table and conclusions, and record them."""
    _rows.clear()
    previous = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        rows, conclusions = importlib.import_module(f"benchmarks.{name}").measure()
    except (KeyboardInterrupt, SystemExit):
        if _rows:
            record(name, _rows, [f"stopped after {len(_rows)} rows"])
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)
    show(name, rows)
    print(*conclusions, sep="\n")
    record(name, rows, conclusions)


def record(name: str, rows: list[dict[str, Any]], conclusions: list[str]) -> None:
    """Append a record to benchmarks/results/NAME.jsonl."""
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"name": name, **environment(), "rows": rows, "conclusions": conclusions}) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    name = parser.parse_args(arguments).name
    if name in ON_CUDA and not torch.cuda.is_available():
        print(f"python -m benchmarks.run {name} needs a CUDA device, but torch finds none", file=sys.stderr)
        return 2
    run(name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
