"""metrics.jsonl on a full disk and after a crash."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from infini_train.config import RunConfig
from infini_train.runtime.errors import UserError
from infini_train.training.metrics import MetricsWriter, _wandb_id, truncate_metrics


def run_in(folder: Path) -> RunConfig:
    run = RunConfig(run_dir=str(folder))
    run.logging.wandb = "off"
    return run


def test_records_are_kept_until_the_disk_has_space(tmp_path, capsys):
    """The system writes 5 bytes of the second record, then fails until the fourth record."""
    with MetricsWriter(run_in(tmp_path), 0, enabled=True) as metrics:
        metrics.write({"step": 1})
        there, allowed = metrics._file, [5]

        class Full:
            def write(self, content: bytes) -> int:
                if not allowed:
                    raise OSError(28, "No space left on device")
                return there.write(content[: allowed.pop()])

            def close(self) -> None:
                there.close()

        metrics._file: Any = Full()
        metrics.write({"step": 2})
        metrics.write({"step": 3})
        metrics._file = there
        metrics.write({"step": 4})
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert records == [{"step": step} for step in (1, 2, 3, 4)]
    said = capsys.readouterr().err
    assert said.count("cannot be written: No space left on device; training goes on") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_lost_records_are_an_error_at_the_end(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    metrics = MetricsWriter(run_in(tmp_path), 0, enabled=True)
    metrics.write({"step": 1})
    with pytest.raises(
        UserError, match=r"metrics\.jsonl cannot be written: No space left on device; the newest records are lost"
    ):
        metrics.__exit__(None)
    metrics = MetricsWriter(run_in(tmp_path), 0, enabled=True)
    metrics.write({"step": 1})
    metrics.__exit__(ValueError)  # the exception is reported instead


def test_unwritable_path_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written: Is a directory"):
        MetricsWriter(run_in(tmp_path), 0, enabled=True)


def test_resumed_run_drops_invalid_lines(tmp_path):
    """A machine crash can leave zeros, other bytes, or half a line."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\0\0\0\n\xff\xfe\n5\n[]\n{"step": null}\n{"step": 2}\n{"step": 3}\n{"st')
    truncate_metrics(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("left", [None, b"", b"\0\0\0\0", b"\xff\xfe"])
def test_wandb_id_is_created_once(left, tmp_path):
    """An id file damaged by a crash must not end pretrain."""
    if left is not None:
        (tmp_path / "wandb_id").write_bytes(left)
    name = _wandb_id(tmp_path)
    assert re.fullmatch("[0-9a-f]{12}", name) and _wandb_id(tmp_path) == name
    (tmp_path / "wandb_id").write_text("my-run_1.a\n")
    assert _wandb_id(tmp_path) == "my-run_1.a"
