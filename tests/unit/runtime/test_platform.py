"""Platform set-up: device selection, determinism settings and the kernel cache."""

from __future__ import annotations

import os
import tempfile

import pytest
import torch

from infini_train.runtime import platform
from infini_train.runtime.errors import UserError


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
        for setting in ("allow_tf32", "deterministic"):  # monkeypatch restores them
            monkeypatch.setattr(torch.backends.cudnn, setting, getattr(torch.backends.cudnn, setting))
        platform.install()
        assert chosen == [0]
        assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.allow_tf32, "float32 as on a CPU"
        return
    with pytest.raises(UserError, match=r"2 processes were started here, but this machine has 1 GPU\(s\)"):
        platform.install()
    assert chosen == []


@pytest.mark.parametrize("cuda", [True, False])
def test_deterministic_algorithms_are_required_on_cuda_only(cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # monkeypatch restores it
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    try:
        platform.set_deterministic(True)
        assert torch.are_deterministic_algorithms_enabled() is cuda
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ, "it costs the host time at every matrix product"
        monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.10.1+cu128"))
        platform.set_deterministic(True)
        assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) is cuda, "PyTorch 2.10 requires it"
        platform.set_deterministic(False)
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", "")  # monkeypatch restores it
    monkeypatch.delenv("TRITON_CACHE_DIR")
    return tmp_path / f"triton-{os.getuid()}"


def test_compiled_kernels_stay_on_this_machine(temporary, monkeypatch):
    for _ in range(2):  # at the second call the folder exists
        platform.use_local_kernel_cache()
        assert os.environ.pop("TRITON_CACHE_DIR") == str(temporary)
    assert temporary.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    platform.use_local_kernel_cache()
    assert os.environ["TRITON_CACHE_DIR"] == "/mine"


def make_world_writable(folder):
    folder.mkdir()
    folder.chmod(0o777)


@pytest.mark.parametrize("make", [lambda folder: folder.symlink_to("/tmp"), lambda folder: folder.touch(), make_world_writable])
def test_a_cache_folder_that_others_can_write_is_not_used(make, temporary):
    make(temporary)
    platform.use_local_kernel_cache()
    assert "TRITON_CACHE_DIR" not in os.environ


@pytest.mark.skipif(os.getuid() != 0, reason="only root can change a folder's owner")
def test_a_cache_folder_of_another_user_is_not_used(temporary):
    temporary.mkdir(mode=0o700)
    os.chown(temporary, 65534, 65534)
    platform.use_local_kernel_cache()
    assert "TRITON_CACHE_DIR" not in os.environ


@pytest.mark.parametrize("processes,kept", [("1", False), ("2", True)])
def test_a_single_process_does_not_move_the_cache(processes, kept, temporary, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    for setting in ("allow_tf32", "deterministic"):  # monkeypatch restores them
        monkeypatch.setattr(torch.backends.cudnn, setting, getattr(torch.backends.cudnn, setting))
    monkeypatch.setenv("WORLD_SIZE", processes)
    platform.install()
    assert ("TRITON_CACHE_DIR" in os.environ) == kept
