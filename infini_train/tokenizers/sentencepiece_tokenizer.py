"""Lossless SentencePiece tokenizer: decoding returns exactly the text that was encoded."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from infini_train.runtime.errors import UserError, one_line
from infini_train.tokenizers.tokenizer import LOSSLESS_PROBE, SENTENCEPIECE_FILE, Tokenizer

SPACE_MARK = "\u2581"
"""Character that SentencePiece uses for a space. In a text it is encoded as its three UTF-8 bytes and not by SentencePiece."""
GUARD = "\0"
"""Prefix of texts for models that add a space before a text.

SentencePiece's trainer refuses NUL in pieces, so NUL never merges with the characters after it.
"""
USER_SYMBOLS = ["\n", "\n\n", "\t"]
"""SentencePiece's trainer drops line ends and tabs. As user-defined symbols they take one token instead of byte pieces."""
SAMPLE_CHARACTERS = 20_000_000
CHUNK_CHARACTERS = 16_384
LINE_CHARACTERS = 4_096
TRAINING_THREADS = 16
"""A constant, because SentencePiece stores the number in the model file, which determines the fingerprint."""


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model with byte fallback.

    Args:
        path: a SentencePiece .model file.

    Raises:
        UserError: if the file cannot be read as a model, or if encoding is not lossless.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        try:
            model = self.path.read_bytes()
            if not model:  # SentencePiece accepts an empty model without an error
                raise RuntimeError("the file is empty")
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{path} cannot be read as a SentencePiece model ({one_line(error)}); run `infini-train prepare`, or set "
                "data.tokenizer to a .model file"
            ) from error
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._model.vocab_size()
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()
        self._piece_bytes = [self._bytes_of(piece) for piece in range(self.vocab_size)]
        self._byte_ids = {self._piece_bytes[i][0]: i for i in range(self.vocab_size) if self._model.is_byte(i)}
        if self.bos_id < 0 or self.eos_id < 0 or len(self._byte_ids) != 256:
            raise UserError(
                f"{path} lacks a begin token, an end token or the 256 byte pieces; use a SentencePiece model trained with "
                "byte_fallback"
            )
        self._space_mark_ids = [self._byte_ids[byte] for byte in SPACE_MARK.encode("utf-8")]
        # A model with add_dummy_prefix puts a space before each text. With a guard, the space is before the guard, whose
        # tokens `encode_batch` removes.
        adds_space = self._model.encode("a", out_type=str)[0].startswith(SPACE_MARK)
        self._guard = GUARD if adds_space else ""
        self._guard_tokens = len(self._model.encode(self._guard))
        if self.decode(self.encode(LOSSLESS_PROBE)) != LOSSLESS_PROBE:
            raise UserError(
                f"{path} changes the text that it encodes (a normalisation rule or removed white space); use a "
                "SentencePiece model trained with normalization_rule_name=identity and remove_extra_whitespaces=false"
            )

    def _bytes_of(self, piece: int) -> bytes:
        if self._model.is_control(piece):
            return b""
        if self._model.is_unknown(piece):
            return "\ufffd".encode()
        text: str = self._model.id_to_piece(piece)
        if self._model.is_byte(piece):
            return bytes([int(text[3:-1], 16)])  # spelled <0xE2>
        return text.replace(SPACE_MARK, " ").encode("utf-8")

    def encode_batch(self, texts: Sequence[str], num_threads: int) -> list[list[int]]:
        split_texts = [text.split(SPACE_MARK) for text in texts]
        guarded = [self._guard + fragment for fragments in split_texts for fragment in fragments]
        # For a list the model starts threads, even if only one. For a short text this takes much longer than encoding.
        one_by_one = num_threads == 1 or not guarded
        encoded = map(self._model.encode, guarded) if one_by_one else iter(self._model.encode(guarded, num_threads=num_threads))
        result = []
        for fragments in split_texts:
            ids = next(encoded)[self._guard_tokens :]
            for _ in fragments[1:]:
                ids += self._space_mark_ids
                ids += next(encoded)[self._guard_tokens :]
            result.append(ids)
        return result

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join([self._piece_bytes[i] for i in ids]).decode("utf-8", errors="replace")

    def copy_to(self, folder: Path) -> Path:
        return Path(shutil.copyfile(self.path, folder / SENTENCEPIECE_FILE))

    def write_for_transformers(self, folder: Path) -> None:
        self.copy_to(folder)
        config = {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": True,  # every training document begins with this token
            "add_eos_token": False,
            "bos_token": self._model.id_to_piece(self.bos_id),
            "eos_token": self._model.id_to_piece(self.eos_id),
            "unk_token": self._model.id_to_piece(self._model.unk_id()),
            "legacy": False,
            "add_prefix_space": False,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def train_tokenizer(texts: Iterable[str], path: Path, vocab_size: int) -> None:
    """Train a byte-pair model with byte fallback on a sample of at most 20 million characters, and write it to `path`.

    The same texts give the same file on every machine.

    Args:
        texts: the corpus, read once.
        path: the .model file to write.
        vocab_size: number of token ids, including 3 control tokens, 3 white space symbols and 256 bytes.

    Raises:
        UserError: if vocab_size is too large or too small for the texts; names data.vocab_size and the bound.
    """
    sample = _sample(texts)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_lines(sample),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,
            # Without this option, indentation takes one token per space.
            allow_whitespace_only_pieces=True,
            user_defined_symbols=USER_SYMBOLS,
            # In bytes. The trainer drops longer lines. A character has at most 4 bytes.
            max_sentence_length=4 * LINE_CHARACTERS,
            num_threads=TRAINING_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _training_error(error, vocab_size) from error
    path.write_bytes(model.getvalue())


def _sample(texts: Iterable[str]) -> list[str]:
    """Return at most SAMPLE_CHARACTERS of the corpus, spread evenly over it. One pass; deterministic.

    Keep every stride-th chunk. When the sample exceeds the limit, drop every second chunk and double the stride.
    """
    kept: list[str] = []
    size, stride, number = 0, 1, 0
    for text in texts:
        for start in range(0, len(text), CHUNK_CHARACTERS):
            if number % stride == 0:
                kept.append(text[start : start + CHUNK_CHARACTERS])
                size += len(kept[-1])
                while size > SAMPLE_CHARACTERS and len(kept) > 1:
                    kept = kept[::2]
                    stride *= 2
                    size = sum(map(len, kept))
            number += 1
    return kept


def _training_lines(sample: list[str]) -> Iterator[str]:
    for chunk in sample:
        for line in chunk.split("\n"):
            # The trainer treats SPACE_MARK as a space, and drops a line that contains NUL.
            line = line.replace(SPACE_MARK, " ").replace("\0", " ")
            for start in range(0, len(line), LINE_CHARACTERS):
                yield line[start : start + LINE_CHARACTERS]


def _training_error(error: RuntimeError, vocab_size: int) -> UserError:
    message = one_line(error)
    if found := re.search(r"too high \(\d+\).*<= (\d+)", message):
        return UserError(
            f"data.vocab_size is {vocab_size}, more than this text can fill; SentencePiece's maximum for it is "
            f"{found[1]}: set data.vocab_size to at most that, or give more text"
        )
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return UserError(
            f"data.vocab_size is {vocab_size}, too few for the characters and bytes of this text; set data.vocab_size to "
            f"at least {found[1]}"
        )
    return UserError(f"SentencePiece could not train data.vocab_size {vocab_size} on this data.source: {message}")
