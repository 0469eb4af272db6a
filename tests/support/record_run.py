"""Record the numbers that a source tree computes, to compare two revisions bit by bit.

    python -m tests.support.record_run TREE OUTPUT.json     # once for each revision, on the same machine
    python -m tests.support.record_run --compare BEFORE.json AFTER.json

The record holds losses and gradient norms of 20 steps of configs/tiny.yaml in six layouts, digests of the prepared shards, the
results of `evaluate` and `generate`, and digests of the golden job scripts. It uses the tree's command line alone, so it also
reads revisions with other modules. Floating-point results depend on the processor: record both revisions on one machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

STEPS = 20
COMMON = [
    "--training.steps",
    str(STEPS),
    "--training.self_test",
    "false",
    "--optimizer.warmup_steps",
    "5",
    "--evaluation.every",
    "20",
    "--logging.wandb",
    "off",
]
ONE_STAGE = ["--layout.pipeline_parallel_size", "1"]
LAYOUTS = {
    "one_process": (1, ONE_STAGE),
    "tp2": (2, [*ONE_STAGE, "--layout.tensor_parallel_size", "2"]),
    "pp2_virtual2": (2, ["--layout.virtual_stages", "2"]),
    "cp2": (2, [*ONE_STAGE, "--layout.context_parallel_size", "2", "--training.segments_per_micro_batch", "2"]),
    "dp2_zero2": (2, [*ONE_STAGE, "--layout.zero_stage", "2"]),
    "tp2_pp2_bfloat16": (4, ["--layout.tensor_parallel_size", "2", "--training.precision", "bfloat16"]),
}
"""Number of processes and options of each layout; configs/tiny.yaml has two pipeline stages."""
LEFT_OUT = {"tokens_per_second", "mfu", "peak_memory", "checkpoint"}
"""Keys of metrics and results that hold times, sizes in GPU or host memory, or paths."""


def record(tree: Path, folder: Path) -> dict[str, Any]:
    """Run every layout of a tree and return its numbers."""
    environment = {**os.environ, "PYTHONPATH": f"{tree}:{tree / 'kernels'}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    data = ["--config", str(tree / "configs" / "tiny.yaml"), "--data.path", str(folder / "data"), "--data.max_text_mb", "3"]

    def run(*words: str) -> None:
        print("+", *words, flush=True)
        subprocess.run([sys.executable, *words], cwd=tree, env=environment, check=True, stdout=subprocess.DEVNULL)

    run("-m", "infini_train", "prepare", *data)
    result: dict[str, Any] = {
        "shards": _digests(folder / "data", "*.tar"),
        "golden": _digests(tree / "tests", "**/golden/**/*.sh"),
    }
    for name, (processes, options) in LAYOUTS.items():
        run_dir = folder / name
        run("launch/local.py", str(processes), "pretrain", *data, *COMMON, *options, "--run_dir", str(run_dir))
        lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        result[name] = [_numbers(json.loads(line)) for line in lines]
    one = [*data, *COMMON, *ONE_STAGE, "--run_dir", str(folder / "one_process")]
    run("-m", "infini_train", "evaluate", *one)
    run("-m", "infini_train", "generate", *one, "--max_new_tokens", "100")
    for name in ("evaluation", "generation"):
        result[name] = _numbers(json.loads((folder / "one_process" / f"{name}.json").read_text(encoding="utf-8")))
    return result


def _digests(folder: Path, pattern: str) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob(pattern))}


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(each) for key, each in value.items() if key not in LEFT_OUT and "seconds" not in key}
    if isinstance(value, list):
        return [_numbers(each) for each in value]
    return value


def differences(before: Any, after: Any, path: str = "") -> list[str]:
    """Return the paths at which two records differ in any bit, or in their keys."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = sorted(before.keys() | after.keys())
        return [line for key in keys for line in differences(before.get(key), after.get(key), f"{path}/{key}")]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [line for index, (one, other) in pairs for line in differences(one, other, f"{path}/{index}")]
    return [] if before == after else [f"{path}: {str(before)[:80]} != {str(after)[:80]}"]


def main() -> int:
    """Record a tree, or compare two records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", action="store_true", help="compare two records in place of recording a tree")
    parser.add_argument("first", type=Path, metavar="TREE|BEFORE")
    parser.add_argument("second", type=Path, metavar="OUTPUT|AFTER")
    arguments = parser.parse_args()
    if arguments.compare:
        found = differences(*(json.loads(path.read_text(encoding="utf-8")) for path in (arguments.first, arguments.second)))
        print("\n".join(found[:50]) or "the records are equal bit by bit")
        return 1 if found else 0
    with tempfile.TemporaryDirectory() as folder:
        result = record(arguments.first.resolve(), Path(folder))
    arguments.second.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
