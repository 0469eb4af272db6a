"""Loading of a tokenizer file of either kind."""

from __future__ import annotations

from pathlib import Path

from infini_train.tokenizers.hugging_face_tokenizer import HuggingFaceTokenizer
from infini_train.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from infini_train.tokenizers.tokenizer import Tokenizer, tokenizer_file


def read_tokenizer(path: Path) -> Tokenizer:
    """Read a SentencePiece .model file or a Hugging Face tokenizer.json.

    Raises:
        UserError: if the file cannot be read or the tokenizer is not lossless.
    """
    return HuggingFaceTokenizer(path) if Path(path).suffix == ".json" else SentencePieceTokenizer(path)


def tokenizer_of(folder: str | Path) -> Tokenizer:
    """Read the tokenizer of a prepared folder.

    Raises:
        UserError: if the folder has no tokenizer, or it cannot be read.
    """
    return read_tokenizer(tokenizer_file(Path(folder)))
