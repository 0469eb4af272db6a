"""The manifest `dataset.json` of a prepared data folder.

It holds only plain JSON and numpy types, so that any program can read the shards.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from infini_train.runtime.errors import UserError

FORMAT_VERSION = 2
SPLITS = ("train", "held_out")
MANIFEST_FILE = "dataset.json"
WEIGHT_MEMBER = "weights.u8"
"""Extension of the optional tar member that holds a document's loss weights."""
REMEDY = "run `infini-train prepare --config FILE --overwrite` again"


def token_format(vocab_size: int) -> tuple[str, str]:
    """Return the smallest numpy type for ids below vocab_size, and the extension of its tar member."""
    return ("<u2", "u16") if vocab_size <= 1 << 16 else ("<u4", "u32")


def index_file(split: str) -> str:
    """Return the name of a split's index.

    The index holds the arrays `shard`, `offset` (bytes from the start of the tar) and `tokens`, with one entry per document.
    A split with loss weights also has `weight_offset`.
    """
    return f"{split}.index.npz"


@dataclass
class Shard:
    file: str
    bytes: int
    sha256: str


@dataclass
class SplitFacts:
    """Sizes and shards of one split. `tokens` includes the begin and end token of every document."""

    documents: int
    tokens: int
    characters: int
    shards: list[Shard]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the shards' checksums. It identifies the documents and their order, independent of the folder's path."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()


@dataclass
class Manifest:
    """Contents of `dataset.json`."""

    source: str
    tokenizer_fingerprint: str
    vocab_size: int
    bos_id: int
    eos_id: int
    token_type: str
    """numpy type of the token members: <u2 or <u4 (little-endian)."""
    token_member: str
    """Extension of the tar member that holds a document's tokens: u16 or u32."""
    splits: dict[str, SplitFacts]
    format_version: int = FORMAT_VERSION
    weight_levels: list[float] | None = None
    """Distinct loss weights, float32; None if every token has weight 1.

    With weights, each document has a second member of type u8 that holds an index into this list for each token. The weight
    multiplies the loss of predicting that token.
    """
    task: dict[str, Any] | None = None
    """The task section of the configuration, if the documents are samples of a task."""

    def save(self, folder: Path) -> None:
        record = {key: value for key, value in asdict(self).items() if value is not None}
        (folder / MANIFEST_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def load_manifest(folder: Path) -> Manifest:
    """Read `dataset.json`.

    Raises:
        UserError: if the folder or the file is missing, damaged or has another format version.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise UserError(
            f"data.path {folder} holds no prepared data ({MANIFEST_FILE} is missing); "
            "run `infini-train prepare --config FILE` first"
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version = record["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format_version {version}; this program reads {FORMAT_VERSION}: {REMEDY}")
    try:
        splits = {
            name: SplitFacts(**{**record["splits"][name], "shards": [Shard(**s) for s in record["splits"][name]["shards"]]})
            for name in SPLITS
        }
        manifest = Manifest(**{**record, "splits": splits})
        if (manifest.token_type, manifest.token_member) != token_format(manifest.vocab_size):
            raise ValueError(f"{manifest.token_type} cannot hold a vocabulary of {manifest.vocab_size}")
        return manifest
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is damaged ({type(error).__name__}: {error}); {REMEDY}")
