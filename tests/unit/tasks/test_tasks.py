"""Retrieval samples: exact lengths and positions, context-independent number tokens, separate seeds, low host memory."""

import re
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from infini_train.config import TASK_KINDS, RunConfig, TaskConfig
from infini_train.config.validation import MOST_WORDS, WORDS_OF_A_FACT, validate_task
from infini_train.data.task_samples import task_texts
from infini_train.runtime.errors import UserError
from infini_train.tasks import STORIES, Purpose, RepeatedFiller, Sample, Task, TextFiller, at_depth, training_placement
from infini_train.tasks.draws import Draws, sample_seed
from infini_train.tasks.filler import SENTENCES
from infini_train.tasks.placement import Haystack, Placement
from infini_train.tasks.task import draw_story
from infini_train.tasks.words import OBJECTS
from infini_train.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer, train_tokenizer
from infini_train.tokenizers.tokenizer_file import read_tokenizer
from tests.support.llama3 import write_llama_3_tokenizer

KEYS = {"passkey": 1, "multi_key": 4, "multi_value": 3, "associative_recall": 5, "babi": 6}
Make = Callable[..., Sample]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    texts = [text for kind in TASK_KINDS for text in list(task_texts(TaskConfig(kind=kind, keys=KEYS[kind])))[:100]]
    train_tokenizer(texts, path, 512)
    return SentencePieceTokenizer(path)


@pytest.fixture(scope="module")
def make(tokenizer: SentencePieceTokenizer) -> Make:
    def sample(kind: str, number: int = 0, length: int = 700, place: Placement | float = 0.5, filler: object = None) -> Sample:
        config = TaskConfig(kind=kind, keys=KEYS[kind])
        task = Task(config, tokenizer, filler or RepeatedFiller(tokenizer))
        return task.sample(3, Purpose.TRAIN, (number,), length, place if callable(place) else at_depth(place))

    return sample


def text_of(tokenizer: SentencePieceTokenizer, sample: Sample) -> str:
    return tokenizer.decode(sample.tokens.tolist())


@pytest.mark.parametrize("kind,depth", product(TASK_KINDS, [0.0, 0.37, 1.0]))
@pytest.mark.parametrize("length", [400, 401, 4097])
def test_length_position_and_answer_are_exact(
    make: Make, tokenizer: SentencePieceTokenizer, kind: str, depth: float, length: int
) -> None:
    for number in range(5):
        sample = make(kind, number, length, depth)
        tokens = sample.tokens
        assert len(tokens) == sample.length == length and tokens.dtype == np.int64 and tokens[0] == tokenizer.bos_id
        assert tokens[sample.answer_start :].tolist() == sample.answer.tolist() and len(sample.scored) == sample.answer_length
        assert tokenizer.decode(sample.answer.tolist()).strip() == sample.facts["answer"]
        start, count = sample.facts["needle_start"], sample.facts["needle_tokens"]
        assert tokenizer.decode(tokens[start : start + count].tolist()).strip() == sample.facts["needle"]
        assert text_of(tokenizer, sample).rstrip().endswith(sample.facts["question"] + " " + sample.facts["answer"])


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 0.93, 1.0])
def test_depth_is_the_fraction_of_filler_before_the_needle(make: Make, depth: float) -> None:
    first, last, between = (make("passkey", place=d).facts["needle_start"] for d in (0.0, 1.0, depth))
    assert between == first + round(depth * (last - first)) and last - first > 500


def test_passkey_text_matches_the_paper(make: Make, tokenizer: SentencePieceTokenizer) -> None:
    sample = make("passkey", length=700, place=1.0)
    key = sample.facts["answer"]
    text = text_of(tokenizer, sample)
    assert len(key) == 5 and key.isdigit() and sample.answer_length == 5 and sample.scored.all()
    assert f"The pass key is {key}. Remember it. {key} is the pass key." in text and text.count(key) == 3
    assert f"{SENTENCES} {SENTENCES}" in text
    # At depth 1, only a line end is between needle and question.
    assert f"{key} is the pass key.\n\nWhat is the pass key? The pass key is {key}" in text
    assert tokenizer.decode(make("passkey", place=0.0).tokens.tolist()).index("The pass key is") < 200


@pytest.mark.parametrize("kind", ["multi_key", "associative_recall"])
def test_several_questions_follow_each_other(tokenizer: SentencePieceTokenizer, kind: str) -> None:
    task = Task(TaskConfig(kind=kind, keys=5), tokenizer, RepeatedFiller(tokenizer))
    one, three = (task.sample(3, Purpose.TRAIN, (0,), 700, at_depth(0.5), questions) for questions in (1, 3))
    assert three.length == 700 and three.facts["question"] == one.facts["question"]
    before, after = (tokenizer.decode(tokens.tolist()) for tokens in np.split(three.tokens, [three.answer_start]))
    assert after.startswith(tokenizer.decode(one.answer.tolist())) and before.rstrip().endswith(one.facts["question"])
    spans = np.flatnonzero(np.diff(np.concatenate(([0], three.scored.astype(int), [0])))).reshape(-1, 2)
    answers = [tokenizer.decode(three.answer[start:end].tolist()).strip() for start, end in spans]
    assert len(answers) == 3 == len(set(answers))
    for (start, _), answer in zip(spans[1:], answers[1:], strict=True):
        question = tokenizer.decode(three.answer[:start].tolist()).rsplit("\n", 1)[1]
        if kind == "multi_key":
            name = question.split(" of the ")[1].split("?")[0]
            assert f"The pass key of the {name} is {answer}. Remember it." in before
        else:
            assert f"The word {question.split(' goes with ')[1].split('?')[0]} goes with the word {answer}." in before


def test_digits_are_single_tokens(make: Make, tokenizer: SentencePieceTokenizer) -> None:
    digits = {tokenizer.encode(digit)[0] for digit in "0123456789"}
    assert len(digits) == 10
    assert set(make("passkey").answer.tolist()) <= digits
    sample = make("multi_value")
    assert sample.answer_length == 3 * 5 + 2 and sample.scored.sum() == 15
    assert set(sample.answer[sample.scored].tolist()) <= digits and not set(sample.answer[~sample.scored].tolist()) & digits


def test_multi_digit_tokens_of_the_answer_are_in_the_text(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(write_llama_3_tokenizer(tmp_path, [f"{SENTENCES} {n}" for n in range(100, 999, 7)], 480))
    task = Task(TaskConfig(kind="multi_value", keys=3), tokenizer, RepeatedFiller(tokenizer))
    sample = task.sample(0, Purpose.EVALUATION, (0,), 500, at_depth(0.5))
    tokens, found = sample.tokens.tolist(), tokenizer.decode(sample.answer).split(" ")
    assert sample.scored.sum() == len(sample.answer) - 2 < 15
    for number, starts in zip(found, sample.facts["needle_starts"], strict=True):
        alone = tokenizer.encode(number)
        needle = tokens[starts : starts + 40]
        assert sum(needle[at : at + len(alone)] == alone for at in range(40)) == 2, "the needle states the number twice"


def test_tokenizer_that_joins_numbers_with_spaces_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "joined.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"{SENTENCES} is {n}" for n in range(1000, 9999, 7)]),
        model_prefix=str(path.with_suffix("")),
        vocab_size=480,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n", "\n\n", "\t"],
        minloglevel=2,
    )
    joined = SentencePieceTokenizer(path)
    with pytest.raises(UserError, match=r"joined\.model joins a number with the characters before.*split_digits"):
        Task(TaskConfig(kind="passkey"), joined, RepeatedFiller(joined))


def test_stories_can_be_answered_from_their_text(make: Make, tokenizer: SentencePieceTokenizer) -> None:
    """An independent parser finds the answer in the text by the rules of the task."""
    for number in range(20):
        place = training_placement(0.2, 0.2, 0.1, 64)
        text = text_of(tokenizer, make("multi_key", number, 900, place))
        name = text.rsplit("The pass key of the ", 1)[1].split(" is ")[0]
        told = [line for line in text.split("\n") if "Remember it." in line]
        keys = dict(line.split("The pass key of the ")[1].split(". Rem")[0].split(" is ") for line in told)
        assert len(keys) == 4 and keys[name] == text[-5:]

        text = text_of(tokenizer, make("multi_value", number, 900, place))
        values = [line.split("One pass key is ")[1][:5] for line in text.split("\n") if line.startswith("One pass key")]
        assert " ".join(values) == text[-17:]

        text = text_of(tokenizer, make("associative_recall", number, 900, place))
        told = [line for line in text.split("\n") if line.startswith("The word") and line.endswith(".")]
        pairs = dict(line[9:-1].split(" goes with the word ") for line in told)
        assert len(pairs) == 5 and pairs[text.rsplit("The word ", 1)[1].split()[0]] == text.rsplit(" ", 1)[1]

        text = text_of(tokenizer, make("babi", number, 900, place))
        person = text.rsplit("Where is ", 1)[1].split("?")[0]
        moves = [line for line in text.split("\n") if line.startswith(person + " ") and line.endswith(".")]
        assert len(moves) == 4 and moves[-1].split(" the ")[1] == text.rsplit(" ", 1)[1] + "."
        assert moves[0].split(" the ")[1] != moves[-1].split(" the ")[1], "an earlier fact must mislead"


def test_read_matches_the_whole_text(make: Make) -> None:
    sample = make("multi_key", length=3001)
    whole = sample.tokens
    for start, count in [(0, 1), (0, 3001), (17, 900), (2990, 11), (1500, 0)]:
        assert sample.read(start, count).tolist() == whole[start : start + count].tolist()
    for size in (1, 7, 64, 5000):
        assert np.concatenate([sample.read(at, min(size, 3001 - at)) for at in range(0, 3001, size)]).tolist() == whole.tolist()
    for start, count in [(-1, 2), (3000, 2), (0, -1)]:
        with pytest.raises(IndexError, match="a text of 3001"):
            sample.read(start, count)


def test_ten_million_tokens_are_read_with_little_host_memory(make: Make) -> None:
    tracemalloc.start()
    sample = make("passkey", length=10_000_000, place=0.5)
    total = sum(len(sample.read(at, min(65_536, sample.length - at))) for at in range(0, sample.length, 65_536))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 10_000_000
    assert peak < 8_000_000, f"{peak:,} bytes for chunks of half a megabyte"


def test_text_filler_starts_at_random_positions(make: Make) -> None:
    filler = TextFiller(np.arange(1000, 1300, dtype=np.int32))
    starts = set()
    for number in range(20):
        tokens = make("passkey", number, 900, 1.0, filler).tokens
        body = tokens[(tokens >= 1000) & (tokens < 1300)]
        assert (np.diff(body) % 300 == 1).all() and len(body) > 600
        starts.add(int(body[0]))
    assert len(starts) > 15
    with pytest.raises(UserError, match=r"task\.filler is text"):
        TextFiller(np.empty(0, dtype=np.int64))


def test_seeds_are_deterministic_and_separate_per_purpose(make: Make) -> None:
    assert make("babi", 5).tokens.tobytes() == make("babi", 5).tokens.tobytes()
    assert make("babi", 5).tokens.tobytes() != make("babi", 6).tokens.tobytes()
    seen = {}
    for purpose, number in product(Purpose, range(500)):
        for index in [(number,), (number, 0), (number, 1)]:
            state = tuple(sample_seed(7, purpose, *index).generate_state(4).tolist())
            assert state not in seen, f"{purpose, index} is {seen[state]}"
            seen[state] = (purpose, index)


def test_choices_are_stable_between_numpy_versions() -> None:
    """Data generated with another numpy version is the same, because numpy keeps the raw bits of PCG64 stable."""
    draws = Draws(sample_seed(0, Purpose.TRAIN, 0))
    assert (draws.digits(8), draws.between(5, 9), draws.distinct("abcde", 3)) == FROZEN
    values = [draws.fraction() for _ in range(2000)]
    assert 0 <= min(values) < 0.01 < 0.99 < max(values) < 1


FROZEN = ("00504239", 8, ["b", "a", "c"])


def test_training_placement_follows_late_and_border_shares(make: Make) -> None:
    samples = [make("multi_key", n, 1000, training_placement(0.2, 0.4, 0.0, 64)) for n in range(600)]
    facts = [sample.facts for sample in samples]
    crossing = [f["needle_start"] // 64 != (f["needle_start"] + f["needle_tokens"] - 1) // 64 for f in facts]
    question = 1000 - 64  # about
    near = np.array([f["needle_start"] > question - 4 * 64 - 40 for f in facts])
    assert 0.5 < near.mean() < 0.75, "40% near the question, plus some of the late and some of the uniform needles"
    only_border = [make("multi_key", n, 1000, training_placement(0.0, 1.0, 0.0, 64)).facts for n in range(300)]
    crossed = np.mean([f["needle_start"] // 64 != (f["needle_start"] + f["needle_tokens"] - 1) // 64 for f in only_border])
    assert crossed > np.mean(crossing)
    assert min(f["needle_start"] for f in only_border) > question - 4 * 64 - 64
    assert np.mean([f["needle_start"] for f in facts]) < np.mean([f["needle_start"] for f in only_border])


def test_needles_are_in_the_answers_segment_if_they_fit(make: Make) -> None:
    fitted = 0
    for length in range(900, 1000):
        sample = make("passkey", length, length, training_placement(0.0, 0.0, 1.0, 64))
        start, tokens = sample.facts["needle_start"], sample.facts["needle_tokens"]
        border = (sample.answer_start - 1) // 64 * 64
        latest = make("passkey", length, length, at_depth(1.0)).facts["needle_start"]
        if latest < border:
            assert start == latest, "a needle that does not fit is directly before the question"
        else:
            fitted += 1
            assert border <= start <= latest and start + tokens <= sample.answer_start
    assert 10 < fitted < 90


def test_haystack_finds_offsets_for_positions() -> None:
    haystack = Haystack(head=10, filler=100, needle=7, before=3, others=((20, 5), (60, 9)))
    assert [haystack.start(offset) for offset in (0, 19, 20, 100)] == [13, 32, 38, 127]
    assert haystack.last_start == 127
    for offset in range(101):
        assert haystack.offset(haystack.start(offset)) == offset
    assert haystack.offset(35) == 19, "a position inside another needle gives the offset before that needle"
    assert haystack.offset(0) == 0 and haystack.offset(500) == 100


def test_too_short_texts_are_refused(make: Make) -> None:
    with pytest.raises(UserError, match=r"a text of 60 tokens is too short for the task multi_key.*it takes \d+.*task\.keys"):
        make("multi_key", length=60)


def test_too_short_texts_name_min_keys_if_set(tokenizer: SentencePieceTokenizer) -> None:
    task = Task(TaskConfig(kind="multi_key", keys=5, min_keys=2), tokenizer, RepeatedFiller(tokenizer))
    with pytest.raises(UserError, match=r"a text of 60 tokens .* or a smaller task\.min_keys$"):
        task.sample(3, Purpose.TRAIN, (0,), 60, at_depth(0.5), 1, range(5, 1, -1))


def test_text_has_as_many_facts_as_fit(tokenizer: SentencePieceTokenizer) -> None:
    task = Task(TaskConfig(kind="multi_key", keys=8), tokenizer, RepeatedFiller(tokenizer))

    def sample(length: int, keys: Sequence[int]) -> Sample:
        return task.sample(3, Purpose.TRAIN, (0,), length, at_depth(0.5), 8, keys)

    assert [len(sample(2000, keys).facts["needle_starts"]) for keys in ((8, 7), (3, 2), ())] == [8, 3, 8]
    found = [len(sample(length, range(8, 0, -1)).facts["needle_starts"]) for length in (150, 250, 350, 600, 2000)]
    assert found == sorted(found) and found[0] < found[2] < found[-1] == 8
    assert sample(350, range(8, 0, -1)).length == 350 and sample(150, (8, found[0])).scored.sum() == 5 * found[0]
    with pytest.raises(UserError, match=r"a text of 350 tokens is too short"):
        sample(350, (8,))


def test_validation_constants_match_the_stories() -> None:
    assert set(STORIES) == set(TASK_KINDS)
    assert len(OBJECTS) == MOST_WORDS == TaskConfig().words
    for kind, words in WORDS_OF_A_FACT.items():
        story = draw_story(TaskConfig(kind=kind, keys=3, words=3 * words), Draws(sample_seed(0, Purpose.TRAIN, 0)))
        told = "".join([story.needle, *story.anywhere])
        found = re.findall(r"The pass key of the (\w+) is|The word (\w+) goes with the word (\w+)", told)
        assert {word for words_of_one in found for word in words_of_one if word} == set(OBJECTS[: 3 * words])


@pytest.mark.parametrize(
    "change,words",
    [
        ({"keys": 2}, "task.keys is 2 with task.kind passkey, which has at most 1"),
        ({"kind": "associative_recall", "keys": 80}, "task.keys is 80"),
        (
            {"kind": "associative_recall", "keys": 5, "words": 9},
            "task.keys is 5 with task.kind associative_recall, which has at most 4 with task.words 9",
        ),
        ({"words": 110}, "task.words is 110; it must lie between 1 and 109"),
        (
            {"kind": "multi_key", "keys": 4, "questions": 5},
            "task.questions is 5, but a text of task.kind multi_key with task.keys 4 asks for at most 4",
        ),
        (
            {"kind": "babi", "keys": 4, "questions": 2},
            "task.questions is 2, but a text of task.kind babi with task.keys 4 asks for at most 1",
        ),
        (
            {"kind": "multi_key", "keys": 4, "min_keys": 5},
            "task.min_keys is 5; it must lie between 1 and task.keys (4)",
        ),
        ({"min_tokens": 600}, "task.max_tokens is 512"),
        ({"late_share": -0.1}, "task.late_share is -0.1"),
        ({"late_share": 0.6, "border_share": 0.3, "own_segment_share": 0.2}, "own_segment_share 0.2 is more than 1"),
        ({"other_weight": 0.0}, "task.other_weight is 0.0; it must be positive"),
        ({"depths": [1.5]}, "task.depths is [1.5]"),
        ({"lengths": []}, "task.lengths is []"),
        ({"seed": -1}, "task.seed is -1"),
    ],
)
def test_impossible_tasks_are_refused(change: dict, words: str) -> None:
    run = RunConfig()
    validate_task(run)
    with pytest.raises(UserError) as refused:
        validate_task(replace(run, task=replace(run.task, **change)))
    assert words in str(refused.value)
