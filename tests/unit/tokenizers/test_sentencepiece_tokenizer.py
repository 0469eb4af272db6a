"""The SentencePiece tokenizer: lossless encoding, few tokens for code, deterministic training."""

import hashlib
import io
import itertools
import json.decoder
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from infini_train.runtime.errors import UserError
from infini_train.tokenizers import sentencepiece_tokenizer as tokenizer_module
from infini_train.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer, train_tokenizer

CODE = Path(json.decoder.__file__).read_text(encoding="utf-8")
PROSE = "".join(
    f"The memory of segment {i} of 2024 reads before it writes, and \u2581 is a mark — „ja“ ½.\n\n" for i in range(60)
)
TRICKY = [
    "",
    "\u2581",
    " \u2581 \u2581\u2581x\u2581",
    "\0",
    "a\0\0b",
    "\r\n\r\n\n\n\n\t\t x",
    "<s>",
    "</s><unk><0x0A><0xE2>",
    "  leading, trailing and   many  ",
    "\U0001f600\U0001f469\u200d\U0001f4bb e\u0301 \u0301",
    "\ufeffé½ﬁⅣ\u00a0\u3000\u2028\ufffd\ufffe\U0010ffff",
    "\u2580\u2581\u2582\u2585 ⁇ ",
]

# Texts that mix the tricky fragments with arbitrary characters that UTF-8 can encode.
any_text = st.lists(
    st.one_of(st.text(st.characters(exclude_categories=["Cs"])), st.sampled_from([*TRICKY, " ", "\n", "self", "12"]))
).map("".join)


def foreign_model(**options: object) -> bytes:
    """Train a SentencePiece model with settings other than those of `train_tokenizer`."""
    model = io.BytesIO()
    settings = {"vocab_size": 400, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2} | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter((CODE + PROSE).split("\n")), model_writer=model, **settings)
    return model.getvalue()


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer([CODE, PROSE], path, 800)
    return SentencePieceTokenizer(path)


@pytest.fixture(scope="module")
def llama_like(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    """A model that puts a space before each text, as Llama's does."""
    path = tmp_path_factory.mktemp("llama") / "tokenizer.model"
    path.write_bytes(foreign_model(normalization_rule_name="identity", remove_extra_whitespaces=False))
    return SentencePieceTokenizer(path)


@pytest.mark.parametrize("name", ["ours", "llama_like"])
def test_round_trip(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: SentencePieceTokenizer = request.getfixturevalue(name)

    @settings(deadline=None, max_examples=300)
    @given(any_text)
    def check(text: str) -> None:
        assert tokenizer.decode(tokenizer.encode(text)) == text

    for text in TRICKY:
        check = example(text)(check)
    check()


@settings(deadline=None, max_examples=50)
@given(st.lists(any_text))
def test_batch_equals_one_by_one(ours: SentencePieceTokenizer, texts: list[str]) -> None:
    assert ours.encode_batch(texts, num_threads=2) == [ours.encode(text) for text in texts]


def test_begin_and_end_tokens_decode_to_nothing(ours: SentencePieceTokenizer) -> None:
    assert ours.decode([ours.bos_id, *ours.encode(" x"), ours.eos_id]) == " x"
    assert len({ours.bos_id, ours.eos_id}) == 2 and max(ours.bos_id, ours.eos_id) < ours.vocab_size == 800
    # The literal text "<s></s>" is encoded as text and not as the control tokens.
    assert not {ours.bos_id, ours.eos_id} & set(ours.encode("<s></s>"))


def test_invalid_utf8_decodes_to_replacement_character(ours: SentencePieceTokenizer) -> None:
    assert ours.decode(ours.encode("\u2581")[:2] + ours.encode("a")) == "\ufffda"


def test_code_takes_few_tokens(ours: SentencePieceTokenizer) -> None:
    assert len(ours.encode("\n")) == len(ours.encode("\n\n")) == len(ours.encode("\t")) == 1
    assert len(ours.encode(" " * 8)) == 1
    assert len(ours.encode("2024")) == 4, "each digit is one token"
    assert len(ours.encode(CODE)) < len(CODE) / 2


def test_training_is_deterministic_and_fingerprinted(ours: SentencePieceTokenizer, tmp_path: Path) -> None:
    train_tokenizer(iter([CODE, PROSE]), tmp_path / "again.model", 800)
    assert (tmp_path / "again.model").read_bytes() == ours.path.read_bytes()
    assert ours.fingerprint == hashlib.sha256(ours.path.read_bytes()).hexdigest()
    train_tokenizer(iter([PROSE]), tmp_path / "other.model", 320)
    assert SentencePieceTokenizer(tmp_path / "other.model").fingerprint != ours.fingerprint


def test_training_survives_awkward_text(tmp_path: Path) -> None:
    awkward = ["\0\0<s></s>\t\u2585\u2581 <unk><0x0A>" * 50, "x" * 50_000, *TRICKY, CODE]
    train_tokenizer(awkward, tmp_path / "t.model", 400)
    tokenizer = SentencePieceTokenizer(tmp_path / "t.model")
    for text in awkward:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sample_is_bounded_and_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "SAMPLE_CHARACTERS", 1000)
    monkeypatch.setattr(tokenizer_module, "CHUNK_CHARACTERS", 10)
    texts = [f"{i:04d}" * 5 for i in range(1000)]  # two chunks each
    sample = tokenizer_module._sample(iter(texts))
    assert 500 <= sum(map(len, sample)) <= 1000
    places = [int(chunk[:4]) for chunk in sample]
    gaps = {b - a for a, b in itertools.pairwise(places)}
    assert places[0] == 0 and places[-1] > 980 and len(gaps) == 1
    assert sum(map(len, tokenizer_module._sample(["y" * 5000]))) <= 1000, "a single long document is also sampled"


def test_vocabulary_too_big_names_key_and_maximum(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.vocab_size is 32000.* maximum for it is (\d+)") as caught:
        train_tokenizer([PROSE], tmp_path / "t.model", 32000)
    assert not (tmp_path / "t.model").exists()
    maximum = int(str(caught.value).split("maximum for it is ")[1].split(":")[0])
    train_tokenizer([PROSE], tmp_path / "t.model", maximum)
    assert SentencePieceTokenizer(tmp_path / "t.model").vocab_size == maximum


def test_vocabulary_too_small_names_key_and_bound(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.vocab_size is 200, too few.* at least \d+") as caught:
        train_tokenizer([PROSE], tmp_path / "t.model", 200)
    bound = int(str(caught.value).split("at least ")[1])
    train_tokenizer([PROSE], tmp_path / "t.model", bound)


def test_unusable_models_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.model"
    with pytest.raises(UserError, match=r"t\.model cannot be read.*data\.tokenizer"):
        SentencePieceTokenizer(path)
    for content in (b"", b"no model", foreign_model()[:2000]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"t\.model cannot be read.*data\.tokenizer"):
            SentencePieceTokenizer(path)
    path.write_bytes(foreign_model(byte_fallback=False))
    with pytest.raises(UserError, match=r"t\.model.*byte_fallback"):
        SentencePieceTokenizer(path)
    path.write_bytes(foreign_model(bos_id=-1))
    with pytest.raises(UserError, match=r"t\.model lacks a begin token"):
        SentencePieceTokenizer(path)
    path.write_bytes(foreign_model(normalization_rule_name="nfkc", remove_extra_whitespaces=False))
    with pytest.raises(UserError, match=r"t\.model changes the text"):
        SentencePieceTokenizer(path)
