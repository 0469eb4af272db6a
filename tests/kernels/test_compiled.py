"""Kernels compiled without a GPU: no spilled registers, and no more shared memory than the GPU has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CODE = "import json; from benchmarks.compiled import measure; print('RESULT', json.dumps(measure()[0]))"


def test_kernels_do_not_spill_on_a100_and_h100(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)  # in a separate process, because triton reads it once
    ran = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    rows = json.loads(ran.stdout.split("RESULT ", 1)[1])
    assert {(row["width"], row["type"], row["sm"]) for row in rows} == {
        *((width, kind, sm) for width in (64, 128, 256) for kind in ("bf16", "fp32") for sm in (80, 90)),
        *((64, "bf16", 89), (64, "fp32", 89), (128, "fp32", 89), (256, "fp32", 89)),
    }
    assert all(row["registers"] > 0 and row["shared_bytes"] >= 0 for row in rows)
    assert not [row for row in rows if row["spilled_bytes"] or row["shared_bytes"] > row["shared_limit"]]
