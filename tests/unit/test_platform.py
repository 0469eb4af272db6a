"""What is decided before anything else starts."""

from __future__ import annotations

import os

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


@pytest.mark.parametrize("cuda", [True, False])
def test_equal_bits_are_asked_for_on_cuda_alone(cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # given back at the end
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    try:
        platform.set_deterministic(True)
        assert torch.are_deterministic_algorithms_enabled() is cuda
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ, "it costs the host time at every matrix product"
        monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.10.1+cu128"))
        platform.set_deterministic(True)
        assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) is cuda, "which PyTorch 2.10 asks for"
        platform.set_deterministic(False)
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
