"""Tokenizer from a tokenizer.json file of the Hugging Face library tokenizers, such as Llama 3's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from infini_train.runtime.errors import UserError, one_line
from infini_train.tokenizers.tokenizer import HUGGING_FACE_FILE, LOSSLESS_PROBE, Tokenizer

CONFIG_FILE = "tokenizer_config.json"


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the Hugging Face library tokenizers.

    The begin and end tokens come from the file's own post-processor if it puts one token before a text and one after it, as in
    files that `copy_to` writes. Published files often add no end token. For them, bos_token and eos_token are read from the
    tokenizer_config.json in the same folder.

    The library records the position of each token, so encoding takes about 110 bytes of host memory per character.

    Args:
        path: the .json file.

    Raises:
        UserError: if the file cannot be read, if no begin or end token is defined, if encoding is not lossless, or if the
            package tokenizers is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        try:
            import tokenizers
        except ImportError as error:
            raise UserError(
                f"{path} needs the library tokenizers ({one_line(error)}); install the extra infini-train[hf]"
            ) from error
        try:
            content = self.path.read_text(encoding="utf-8")
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library raises plain Exception
            raise UserError(
                f"{path} cannot be read as a tokenizer of Hugging Face ({one_line(error)}); set data.tokenizer to a "
                "tokenizer.json, or to a SentencePiece .model file"
            ) from error
        around: list[int] = self._tokenizer.encode("").ids
        complete = len(around) == 2
        self.bos_id, self.eos_id = around if complete else self._configured_ids()
        # Encode the text "<|end_of_text|>" inside a document as characters and not as the special token.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._content = content if complete else self._json_with_template([self.bos_id, "$A", self.eos_id])
        self.fingerprint = hashlib.sha256(self._content.encode("utf-8")).hexdigest()
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        probe = LOSSLESS_PROBE + self._token_text(self.bos_id) + self._token_text(self.eos_id)
        if self.decode(self.encode(probe)) != probe:
            raise UserError(
                f"{path} changes the text that it encodes (a normalizer, a space before it, or unknown characters); use one "
                "that works on bytes, as Llama 3's does, or a SentencePiece .model file"
            )

    def _configured_ids(self) -> tuple[int, int]:
        path = self.path.with_name(CONFIG_FILE)
        try:
            config: Any = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.path} does not say which tokens begin and end a document, and {path} cannot be read "
                f"({one_line(error)}); put the {CONFIG_FILE} of the model beside it"
            ) from error
        if not isinstance(config, dict):
            raise UserError(f"{path} is not a JSON object; get the file again")
        found = []
        for key in ("bos_token", "eos_token"):
            named = config.get(key)
            text = named.get("content") if isinstance(named, dict) else named
            number = self._tokenizer.token_to_id(text) if isinstance(text, str) else None
            if number is None:
                raise UserError(f"{path}: {key} is {named!r}, which is no token of {self.path.name}; name one that is")
            found.append(number)
        return found[0], found[1]

    def _token_text(self, number: int) -> str:
        return str(self._tokenizer.id_to_token(number))

    def _json_with_template(self, template: Sequence[int | str]) -> str:
        """Return the content of tokenizer.json with a post-processor that puts these token ids around a text ("$A")."""
        from tokenizers import Tokenizer as Library
        from tokenizers.processors import TemplateProcessing

        special = [(self._token_text(item), item) for item in template if isinstance(item, int)]
        single = [self._token_text(item) if isinstance(item, int) else item for item in template]
        changed = Library.from_str(self._tokenizer.to_str())
        changed.post_processor = TemplateProcessing(single=single, special_tokens=special)
        return changed.to_str(pretty=True)

    def encode_batch(self, texts: Sequence[str], num_threads: int) -> list[list[int]]:
        if num_threads == 1:
            return [self._tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        return [found.ids for found in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def copy_to(self, folder: Path) -> Path:
        target = folder / HUGGING_FACE_FILE
        target.write_text(self._content, encoding="utf-8")
        return target

    def write_for_transformers(self, folder: Path) -> None:
        (folder / HUGGING_FACE_FILE).write_text(self._json_with_template([self.bos_id, "$A"]), encoding="utf-8")
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self._token_text(self.bos_id),
            "eos_token": self._token_text(self.eos_id),
            "clean_up_tokenization_spaces": False,
        }
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
