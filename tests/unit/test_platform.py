"""What is decided before anything else starts."""

from __future__ import annotations

import pytest
import torch

from infini_train import platform
from infini_train.errors import UserError


@pytest.mark.parametrize(
    ("rank", "processes", "fits"), [("0", "2", False), ("1", "2", False), ("1", "1", False), ("0", "1", True)]
)
def test_more_processes_than_gpus_are_refused(rank, processes, fits, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    if fits:
        for setting in ("allow_tf32", "deterministic"):  # given back at the end
            monkeypatch.setattr(torch.backends.cudnn, setting, getattr(torch.backends.cudnn, setting))
        platform.install()
        assert chosen == [0]
        assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.allow_tf32, "float32 as on a CPU"
        return
    with pytest.raises(UserError, match=r"2 processes were started here, but this machine has 1 GPU\(s\)"):
        platform.install()
    assert chosen == []
