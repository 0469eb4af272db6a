"""A tokenizer from its file, of whichever kind it is."""

from __future__ import annotations

from pathlib import Path

from infini_train.tokenizers.hugging_face_tokenizer import HuggingFaceTokenizer
from infini_train.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from infini_train.tokenizers.tokenizer import Tokenizer, tokenizer_file


def read_tokenizer(path: Path) -> Tokenizer:
    """A SentencePiece .model file, or a Hugging Face tokenizer.json.

    Raises:
        UserError: it cannot be read, or cannot give every text back.
    """
    return HuggingFaceTokenizer(path) if Path(path).suffix == ".json" else SentencePieceTokenizer(path)


def tokenizer_of(folder: str | Path) -> Tokenizer:
    """The tokenizer of a prepared folder.

    Raises:
        UserError: it has none, or one that cannot be read.
    """
    return read_tokenizer(tokenizer_file(Path(folder)))
