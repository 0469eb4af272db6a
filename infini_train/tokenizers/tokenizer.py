"""Interface of the tokenizers. All are lossless: decoding returns exactly the text that was encoded."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

SENTENCEPIECE_FILE = "tokenizer.model"
HUGGING_FACE_FILE = "tokenizer.json"
TOKENIZER_FILES = SENTENCEPIECE_FILE, HUGGING_FACE_FILE
"""Names of the tokenizer file in a prepared folder; it holds one of them."""
LOSSLESS_PROBE = "  a \t b\r\n\n\n <s></s> <unk><0x0A> \0 \u2581 \u2581x\ufeff ﬁ é e\u0301 Ⅳ 12 \U0001f600 "


class Tokenizer(ABC):
    """A lossless tokenizer: `decode(encode(text)) == text` for every text that can be encoded in UTF-8.

    Attributes:
        path: the file that the tokenizer was read from.
        vocab_size: number of token ids.
        bos_id: id that begins a document.
        eos_id: id that ends a document.
        fingerprint: SHA-256 of the file that `copy_to` writes, in hexadecimal.
    """

    path: Path
    vocab_size: int
    bos_id: int
    eos_id: int
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without begin and end tokens."""
        return self.encode_batch([text], num_threads=1)[0]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str], num_threads: int) -> list[list[int]]:
        """Return the token ids of each text, without begin and end tokens.

        Args:
            texts: strings that can be encoded in UTF-8.
            num_threads: number of threads; for values above 1, an implementation may use all cores.
        """

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids. Begin and end tokens are dropped; bytes that are not UTF-8 become U+FFFD."""

    @abstractmethod
    def copy_to(self, folder: Path) -> Path:
        """Write the tokenizer into a folder of shards or weights, and return the path of the file."""

    @abstractmethod
    def write_for_transformers(self, folder: Path) -> None:
        """Write files for transformers' AutoTokenizer. It gives the same ids and puts the begin token before a text."""


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def tokenizer_file(folder: Path) -> Path:
    """Return the path of the tokenizer in a folder; the path of a SentencePiece file if there is none."""
    return next((folder / name for name in TOKENIZER_FILES if (folder / name).is_file()), folder / SENTENCEPIECE_FILE)
