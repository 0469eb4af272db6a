"""The text of each task: needles, question and answer. `task.py` encodes it into tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from infini_train.tasks.draws import Draws
from infini_train.tasks.words import MOVES, PERSONS, PLACES

KEY_INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n"
)
"""Start of the prompt in the passkey task of Mohtashami and Jaggi."""
FACTS_INTRODUCTION = "Remember the facts that are hidden in this text.\n"


@dataclass(frozen=True)
class Story:
    """Needles, a question and its answer.

    `needle` is the queried needle. It is placed after all needles of `before`, which keep their order. The needles of
    `anywhere` can be at any position.
    """

    introduction: str
    needle: str
    question: str
    """Question and the start of the reply; the answer's first token follows directly."""
    answer: str
    before: tuple[str, ...] = ()
    anywhere: tuple[str, ...] = ()
    unscored: str = ""
    """Separator characters in the answer; their tokens are not scored."""
    further: tuple[tuple[str, str], ...] = ()
    """Question and answer of each further fact, for texts that ask several questions."""


def passkey(draws: Draws, keys: int, digits: int, words: Sequence[str]) -> Story:
    """The passkey task of the Infini-attention paper, from Mohtashami and Jaggi (arXiv 2305.16300). `keys` is 1."""
    key = draws.digits(digits)
    return Story(
        introduction=KEY_INTRODUCTION,
        needle=f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n",
        question="\nWhat is the pass key? The pass key is ",
        answer=key,
    )


def multi_key(draws: Draws, keys: int, digits: int, words: Sequence[str]) -> Story:
    """Several named keys. The question asks for one of them."""
    names = draws.distinct(words, keys)
    pairs = [(name, draws.digits(digits)) for name in names]
    needles = [
        f"\nThe pass key of the {name} is {value}. Remember it. {value} is the pass key of the {name}.\n"
        for name, value in pairs
    ]
    asked, *further = [
        (f"\nWhat is the pass key of the {name}? The pass key of the {name} is ", value) for name, value in pairs
    ]
    return Story(
        introduction=KEY_INTRODUCTION,
        needle=needles[0],
        anywhere=tuple(needles[1:]),
        question=asked[0],
        answer=asked[1],
        further=tuple(further),
    )


def multi_value(draws: Draws, keys: int, digits: int, words: Sequence[str]) -> Story:
    """Several values of one key. The answer is all values in the order of the text; the depth applies to the last value."""
    values = [draws.digits(digits) for _ in range(keys)]
    needles = tuple(f"\nOne pass key is {value}. Remember it. {value} is a pass key.\n" for value in values)
    return Story(
        introduction=KEY_INTRODUCTION,
        needle=needles[-1],
        before=needles[:-1],
        question="\nWhat are the pass keys? The pass keys are ",
        answer=" ".join(values),
        unscored=" ",
    )


def associative_recall(draws: Draws, keys: int, digits: int, words: Sequence[str]) -> Story:
    """Pairs of random words. The question gives the first word of one pair and asks for the second."""
    drawn = draws.distinct(words, 2 * keys)
    pairs = list(zip(drawn[:keys], drawn[keys:], strict=True))
    needles = tuple(f"\nThe word {first} goes with the word {second}.\n" for first, second in pairs)
    asked, *further = [
        (f"\nWhich word goes with {first}? The word {first} goes with the word", f" {second}") for first, second in pairs
    ]
    return Story(
        introduction=FACTS_INTRODUCTION,
        needle=needles[0],
        anywhere=needles[1:],
        question=asked[0],
        answer=asked[1],
        further=tuple(further),
    )


def babi(draws: Draws, keys: int, digits: int, words: Sequence[str]) -> Story:
    """Persons move between places. The question asks for the last place of one person.

    This is the first task of bAbI (Weston et al., arXiv 1502.05698) in long text, as in BABILong (Kuratov et al., arXiv
    2406.10149). keys // 2 of the `keys` facts are earlier moves of the queried person; the other facts except the last move
    are about other persons.
    """
    person, *others = draws.distinct(PERSONS, len(PERSONS))
    place = draws.one_of(PLACES)
    elsewhere = [other for other in PLACES if other != place]

    def fact(who: str, where: str) -> str:
        return f"\n{who} {draws.one_of(MOVES)} the {where}.\n"

    return Story(
        introduction=FACTS_INTRODUCTION,
        needle=fact(person, place),
        before=tuple(fact(person, draws.one_of(elsewhere)) for _ in range(keys // 2)),
        anywhere=tuple(fact(draws.one_of(others), draws.one_of(PLACES)) for _ in range(keys - 1 - keys // 2)),
        question=f"\nWhere is {person}? {person} is in the",
        answer=f" {place}",
    )


STORIES: dict[str, Callable[[Draws, int, int, Sequence[str]], Story]] = {
    "passkey": passkey,
    "multi_key": multi_key,
    "multi_value": multi_value,
    "associative_recall": associative_recall,
    "babi": babi,
}
