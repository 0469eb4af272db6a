"""Read tensors of a checkpoint without executing code from it.

torch.distributed.checkpoint describes the tensors in a pickle, `.metadata`. The reader here unpickles only the classes that a
description of tensors needs, and accepts only files listed in the manifest. It refuses BytesStorageMetadata, the class for
entries of arbitrary bytes, because torch would unpickle those bytes.
"""

from __future__ import annotations

import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from infini_train.checkpoint.folder import read_manifest
from infini_train.runtime.errors import UserError

_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
_ALLOWED = {
    *(("torch", name) for name in ("Size", *_DTYPES)),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    *(("pathlib", name) for name in ("Path", "PosixPath", "PurePosixPath")),
    *(("pathlib._local", name) for name in ("Path", "PosixPath", "PurePosixPath")),
    ("collections", "OrderedDict"),
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which does not belong into a description of tensors")
        return super().find_class(module, name)


class TensorReader(dcp.FileSystemReader):
    """A `FileSystemReader` of one folder that accepts only descriptions of tensors."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Read the description of all tensors.

        Raises:
            UserError: `.metadata` cannot be unpickled, or refers to another class or to a file outside the manifest.
        """
        folder = Path(self.path)
        try:
            with (folder / ".metadata").open("rb") as file:
                metadata = _MetadataUnpickler(file).load()
            if not isinstance(metadata, Metadata):
                raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}")
        except Exception as error:  # a damaged pickle can raise any exception
            raise UserError(f"checkpoint {folder}: .metadata is refused: {error}; use another checkpoint") from error
        files = read_manifest(folder)
        for info in (metadata.storage_data or {}).values():
            if info.relative_path not in files:
                raise UserError(
                    f"checkpoint {folder}: .metadata is refused: {info.relative_path} is not in the manifest; "
                    "use another checkpoint"
                )
        metadata.storage_meta = metadata.storage_meta or dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def read_tensors(path: Path, entries: dict[str, Tensor], *, no_dist: bool = False) -> None:
    """Fill the given tensors, by their names in the checkpoint. A collective over all ranks unless `no_dist`.

    Raises:
        UserError: the checkpoint lacks one of the tensors, or cannot be read.
    """
    try:
        dcp.load(entries, storage_reader=TensorReader(path), no_dist=no_dist)
    except UserError:
        raise
    except (Exception, CheckpointException) as error:  # CheckpointException is not a subclass of Exception
        cause = next(iter(failed_ranks(error).values()), error)
        if isinstance(cause, UserError):
            raise cause from error
        lines = str(cause).strip().splitlines()
        first = lines[0] if lines else type(cause).__name__
        raise UserError(f"checkpoint {path} cannot be read: {first}; delete the folder to use an older one") from error


def failed_ranks(error: BaseException) -> dict[int, BaseException]:
    """Return the original exception of each failed rank, from the one that torch.distributed.checkpoint raises on all ranks."""
    if not isinstance(error, CheckpointException):
        return {}
    return {rank: failure[0] if isinstance(failure, tuple) else failure for rank, failure in sorted(error.failures.items())}


def describe_tensors(path: Path) -> dict[str, TensorStorageMetadata]:
    """Return the shape, dtype and chunks of every tensor of a checkpoint, by name."""
    return dict(TensorReader(os.fspath(path)).read_metadata().state_dict_metadata)  # type: ignore[arg-type]


def read_whole(path: Path, names: list[str]) -> dict[str, Tensor]:
    """Read some tensors of a checkpoint in full, in this process alone."""
    described = describe_tensors(path)
    entries = {name: torch.empty(described[name].size, dtype=described[name].properties.dtype) for name in names}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process reads on purpose
        read_tensors(path, entries, no_dist=True)
    return entries
