"""The tokenizer.json tokenizer: lossless encoding, the same ids as transformers, and a copy that is a single file."""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import normalizers
from transformers import AutoTokenizer

from infini_train.runtime.errors import UserError
from infini_train.tokenizers.hugging_face_tokenizer import HuggingFaceTokenizer
from infini_train.tokenizers.tokenizer_file import read_tokenizer, tokenizer_of
from tests.support.llama3 import BEGIN, END, SPECIAL, write_llama_3_tokenizer
from tests.unit.tokenizers.test_sentencepiece_tokenizer import CODE, PROSE, TRICKY, any_text

SPELLED = [*TRICKY, BEGIN, f"a{END}{SPECIAL[2]} b", "1234567 don't\r\n  x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_3_tokenizer(tmp_path_factory.mktemp("llama-3"), [CODE, PROSE], 800).parent


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(folder / "tokenizer.json")


def test_round_trip(tokenizer: HuggingFaceTokenizer) -> None:
    special = set(range(796, 800))

    @settings(deadline=None, max_examples=300)
    @given(any_text)
    def check(text: str) -> None:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and not special & set(ids)

    for text in SPELLED:
        check = example(text)(check)
    check()


@settings(deadline=None, max_examples=50)
@given(st.lists(any_text))
def test_batch_equals_one_by_one(tokenizer: HuggingFaceTokenizer, texts: list[str]) -> None:
    assert tokenizer.encode_batch(texts, num_threads=2) == [tokenizer.encode(text) for text in texts]


def test_ids_equal_those_of_transformers(folder: Path, tokenizer: HuggingFaceTokenizer) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in (CODE, PROSE, *TRICKY):
        assert tokenizer.encode(text) == theirs(text, add_special_tokens=False).input_ids
    assert (tokenizer.bos_id, tokenizer.eos_id) == (theirs.bos_token_id, theirs.eos_token_id) == (796, 797)
    assert tokenizer.vocab_size == len(theirs) == 800
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode(" x"), tokenizer.eos_id]) == " x"


def test_copy_is_self_contained_and_reproducible(tokenizer: HuggingFaceTokenizer, tmp_path: Path) -> None:
    """A copy needs no tokenizer_config.json. Its fingerprint depends only on the file and is known before writing."""
    written = tokenizer.copy_to(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    assert hashlib.sha256(written.read_bytes()).hexdigest() == tokenizer.fingerprint
    copy = tokenizer_of(tmp_path)
    assert (copy.bos_id, copy.eos_id, copy.vocab_size) == (796, 797, 800)
    assert copy.fingerprint == tokenizer.fingerprint and copy.encode(CODE) == tokenizer.encode(CODE)
    again = tmp_path / "again"
    again.mkdir()
    assert copy.copy_to(again).read_bytes() == written.read_bytes()


def test_transformers_adds_the_begin_token(tokenizer: HuggingFaceTokenizer, tmp_path: Path) -> None:
    tokenizer.write_for_transformers(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("a", PROSE):
        assert theirs(text).input_ids == [tokenizer.bos_id, *tokenizer.encode(text)]
    assert theirs.eos_token_id == tokenizer.eos_id and len(theirs) == 800


def test_special_tokens_written_as_objects_are_read(folder: Path, tmp_path: Path) -> None:
    """Older versions of transformers wrote a special token as a JSON object."""
    shutil.copy(folder / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": BEGIN}, "eos_token": SPECIAL[3]}))
    assert read_tokenizer(tmp_path / "tokenizer.json").eos_id == 799


@pytest.mark.parametrize(
    "config,words",
    [
        (None, r"does not say which tokens begin and end a document, and \S*tokenizer_config\.json cannot be read"),
        ("{", r"tokenizer_config\.json cannot be read"),
        ("[]", r"tokenizer_config\.json is not a JSON object"),
        ('{"bos_token": "<|begin_of_text|>"}', r"eos_token is None, which is no token of tokenizer\.json"),
        ('{"bos_token": "<s>", "eos_token": "<|eot_id|>"}', r"bos_token is '<s>', which is no token"),
    ],
)
def test_missing_begin_or_end_tokens_are_refused(config: str | None, words: str, folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "tokenizer.json", tmp_path)
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(UserError, match=words):
        read_tokenizer(tmp_path / "tokenizer.json")


def test_unusable_files_are_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read .*No such file.*data\.tokenizer"):
        read_tokenizer(path)
    for content in ("", "{}", (folder / "tokenizer.json").read_text()[:2000]):
        path.write_text(content)
        with pytest.raises(UserError, match=r"tokenizer\.json cannot be read") as caught:
            read_tokenizer(path)
        assert "\n" not in str(caught.value)
    shutil.copy(folder / "tokenizer_config.json", tmp_path)
    lossy = Library.from_file(str(folder / "tokenizer.json"))
    lossy.normalizer = normalizers.NFKC()
    lossy.save(str(path))
    with pytest.raises(UserError, match=r"tokenizer\.json changes the text"):
        read_tokenizer(path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"needs the library tokenizers .*infini-train\[hf\]"):
        read_tokenizer(path)
