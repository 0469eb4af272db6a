"""A task with a tokenizer: generates samples of an exact number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from infini_train.config import TaskConfig
from infini_train.runtime.errors import UserError
from infini_train.tasks.draws import Draws, Purpose, sample_seed
from infini_train.tasks.filler import TextFiller
from infini_train.tasks.placement import Haystack, Placement
from infini_train.tasks.sample import FixedTokens, Sample, Span
from infini_train.tasks.stories import STORIES, Story
from infini_train.tasks.words import OBJECTS
from infini_train.tokenizers.tokenizer import Tokenizer


class EncodedStory(NamedTuple):
    """The tokens of a `Story`; see its fields."""

    introduction: list[int]
    needle: list[int]
    question: list[int]
    answer: list[int]
    """The answer, followed by further questions and their answers."""
    scored: list[bool]
    before: list[list[int]]
    anywhere: list[list[int]]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, [self.introduction, self.needle, self.question, self.answer, *self.before, *self.anywhere]))


class Task:
    """Generator of samples.

    Args:
        config: kind of the task, number of keys and of digits.
        tokenizer: tokenizer that gives a number the same tokens in every context.
        filler: the text around the needles.

    Raises:
        UserError: if the tokenizer joins a number with the characters around it.
    """

    def __init__(self, config: TaskConfig, tokenizer: Tokenizer, filler: TextFiller) -> None:
        self.config = config
        self.kind = config.kind or "passkey"
        self.tokenizer = tokenizer
        self.filler = filler
        check_number_tokens(tokenizer, config.digits)

    def sample(
        self,
        seed: int,
        purpose: Purpose,
        index: tuple[int, ...],
        length: int,
        placement: Placement,
        questions: int = 1,
        keys: Sequence[int] = (),
    ) -> Sample:
        """Return the sample that (seed, purpose, index) identifies.

        Args:
            length: tokens from the begin token to the last token of the answer.
            placement: chooses the position of the queried needle.
            questions: maximum number of questions. Further questions and their answers follow the first answer and belong to
                the sample's answer; the tokens of these questions are not scored.
            keys: numbers of facts to try in order; the first one that fits into `length` is used. If empty, the configured
                number is used.

        Raises:
            UserError: if the text is longer than `length` even without filler.
        """
        for count in keys or (self.config.keys,):
            draws = Draws(sample_seed(seed, purpose, *index))
            story = draw_story(replace(self.config, keys=count), draws)
            encoded = self._encode(story, questions)
            if encoded.num_tokens <= length:
                return self._assemble(story, encoded, draws, length, placement)
        longer = "task.lengths" if purpose is Purpose.EVALUATION else "task.min_tokens"
        fewer = (
            ""
            if self.config.keys == 1
            else ", or a smaller " + ("task.min_keys" if keys and self.config.min_keys else "task.keys")
        )
        raise UserError(
            f"a text of {length} tokens is too short for the task {self.kind}: without any filler it takes "
            f"{encoded.num_tokens}; use longer texts ({longer}){fewer}"
        )

    def _encode(self, story: Story, questions: int) -> EncodedStory:
        encode = self.tokenizer.encode
        answer, scored = self._answers(story, questions)
        return EncodedStory(
            [self.tokenizer.bos_id, *encode(story.introduction)],
            encode(story.needle),
            encode(story.question),
            answer,
            scored,
            [encode(text) for text in story.before],
            [encode(text) for text in story.anywhere],
        )

    def _assemble(self, story: Story, encoded: EncodedStory, draws: Draws, length: int, placement: Placement) -> Sample:
        head, needle, question, answer, scored, before, anywhere = encoded
        filler = length - encoded.num_tokens
        first = draws.between(0, self.filler.period - 1) if self.filler.starts_anywhere else 0
        free = sorted(draws.between(0, filler) for _ in anywhere)
        haystack = Haystack(
            head=len(head),
            filler=filler,
            needle=len(needle),
            question=len(question),
            before=sum(map(len, before)),
            others=tuple((offset, len(tokens)) for offset, tokens in zip(free, anywhere, strict=True)),
        )
        asked = placement(haystack, draws)
        earlier = sorted(draws.between(0, asked) for _ in before)
        # At equal offsets the queried needle is last, as in `Haystack.start`.
        placed = sorted(
            [
                *((offset, 0, tokens) for offset, tokens in zip(earlier + free, before + anywhere, strict=True)),
                (asked, 1, needle),
            ],
            key=lambda entry: entry[:2],
        )
        spans, done = [Span(FixedTokens(head), 0, len(head))], 0
        positions, place = [], len(head)
        for offset, _, tokens in placed:
            spans.append(Span(self.filler, first + done, offset - done))
            spans.append(Span(FixedTokens(tokens), 0, len(tokens)))
            positions.append(place + offset - done)
            place += offset - done + len(tokens)
            done = offset
        spans.append(Span(self.filler, first + done, filler - done))
        spans.append(Span(FixedTokens(question + answer), 0, len(question) + len(answer)))
        return Sample(
            spans=tuple(spans),
            answer_start=length - len(answer),
            answer=np.array(answer, dtype=np.int64),
            scored=np.array(scored),
            facts={
                "task": self.kind,
                "needle": story.needle.strip(),
                "needle_start": haystack.start(asked),
                "needle_tokens": len(needle),
                "needle_starts": positions,
                "question": story.question.strip(),
                "answer": story.answer.strip(),
            },
        )

    def _answers(self, story: Story, questions: int) -> tuple[list[int], list[bool]]:
        """Return the tokens after the first question, and whether each is scored.

        Tokens of answers are scored, except separators inside an answer. Tokens of further questions are not scored.
        """
        encode = self.tokenizer.encode
        separators = {token for character in story.unscored for token in encode(character)}
        answer = encode(story.answer)
        scored = [token not in separators for token in answer]
        for its_question, its_answer in story.further[: questions - 1]:
            for text, is_scored in ((its_question, False), (its_answer, True)):
                tokens = encode(text)
                answer, scored = answer + tokens, scored + [is_scored] * len(tokens)
        return answer, scored


def draw_story(config: TaskConfig, draws: Draws) -> Story:
    """Draw a random story of the configured task."""
    return STORIES[config.kind or "passkey"](draws, config.keys, config.digits, OBJECTS[: config.words])


def check_number_tokens(tokenizer: Tokenizer, digits: int) -> None:
    """Check that a number of `digits` digits has the same tokens inside a text and alone, so that answers can be scored.

    Raises:
        UserError: if the tokens differ; names the tokenizer.
    """
    digit_cycle = "8105726439" * (digits // 10 + 2)
    numbers = [digit_cycle[start : start + digits] for start in range(10)]
    words = ["is", *(word for number in numbers for word in (" ", number)), "."]
    if tokenizer.encode("".join(words)) != [token for word in words for token in tokenizer.encode(word)]:
        raise UserError(
            f"{tokenizer.path} joins a number with the characters before or after it, so that an answer cannot be scored; use "
            "a tokenizer trained with split_digits, as `infini-train prepare` trains it"
        )
