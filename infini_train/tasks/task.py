"""A task under one tokenizer: samples of an exact number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from infini_train.config import TaskConfig
from infini_train.runtime.errors import UserError
from infini_train.tasks.draws import Draws, Purpose, sample_seed
from infini_train.tasks.filler import TextFiller
from infini_train.tasks.placement import Placement, Room
from infini_train.tasks.sample import Fixed, Part, Sample
from infini_train.tasks.stories import STORIES, Story
from infini_train.tasks.words import OBJECTS
from infini_train.tokenizers.tokenizer import Tokenizer


class EncodedStory(NamedTuple):
    """The tokens of a story; `Story` says what each is."""

    introduction: list[int]
    needle: list[int]
    question: list[int]
    answer: list[int]
    """With further questions and their answers."""
    scored: list[bool]
    before: list[list[int]]
    anywhere: list[list[int]]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, [self.introduction, self.needle, self.question, self.answer, *self.before, *self.anywhere]))


class Task:
    """Makes samples.

    Args:
        config: kind, number of keys and of digits.
        tokenizer: must encode a number alike wherever it stands.
        filler: the text around the needles.

    Raises:
        UserError: if the tokenizer joins numbers with what is beside them.
    """

    def __init__(self, config: TaskConfig, tokenizer: Tokenizer, filler: TextFiller) -> None:
        self.config = config
        self.kind = config.kind or "passkey"
        self.tokenizer = tokenizer
        self.filler = filler
        check_numbers(tokenizer, config.digits)

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
        """The sample that (seed, purpose, index) names.

        Args:
            length: tokens from the begin token to the answer's last.
            placement: where the asked needle goes.
            questions: facts that are asked, if there are so many. The further questions follow the first answer, and with
                theirs they are part of the sample's answer, in which they are not scored.
            keys: numbers of facts, of which the first takes effect with which the text fits; else the configured number.

        Raises:
            UserError: if the text without any filler is longer.
        """
        for count in keys or (self.config.keys,):
            draws = Draws(sample_seed(seed, purpose, *index))
            story = tell(replace(self.config, keys=count), draws)
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
        room = Room(
            head=len(head),
            filler=filler,
            needle=len(needle),
            question=len(question),
            before=sum(map(len, before)),
            others=tuple((offset, len(tokens)) for offset, tokens in zip(free, anywhere, strict=True)),
        )
        asked = placement(room, draws)
        earlier = sorted(draws.between(0, asked) for _ in before)
        # With equal offsets the asked needle comes last, as `Room.start` has it.
        placed = sorted(
            [
                *((offset, 0, tokens) for offset, tokens in zip(earlier + free, before + anywhere, strict=True)),
                (asked, 1, needle),
            ],
            key=lambda entry: entry[:2],
        )
        parts, done = [Part(Fixed(head), 0, len(head))], 0
        positions, place = [], len(head)
        for offset, _, tokens in placed:
            parts.append(Part(self.filler, first + done, offset - done))
            parts.append(Part(Fixed(tokens), 0, len(tokens)))
            positions.append(place + offset - done)
            place += offset - done + len(tokens)
            done = offset
        parts.append(Part(self.filler, first + done, filler - done))
        parts.append(Part(Fixed(question + answer), 0, len(question) + len(answer)))
        return Sample(
            parts=tuple(parts),
            answer_start=length - len(answer),
            answer=np.array(answer, dtype=np.int64),
            scored=np.array(scored),
            facts={
                "task": self.kind,
                "needle": story.needle.strip(),
                "needle_start": room.start(asked),
                "needle_tokens": len(needle),
                "needle_starts": positions,
                "question": story.question.strip(),
                "answer": story.answer.strip(),
            },
        )

    def _answers(self, story: Story, questions: int) -> tuple[list[int], list[bool]]:
        """The tokens after the first question, and which of them are scored: those of answers, without what separates parts."""
        encode = self.tokenizer.encode
        separators = {token for character in story.unscored for token in encode(character)}
        answer = encode(story.answer)
        scored = [token not in separators for token in answer]
        for its_question, its_answer in story.further[: questions - 1]:
            for text, counts in ((its_question, False), (its_answer, True)):
                tokens = encode(text)
                answer, scored = answer + tokens, scored + [counts] * len(tokens)
        return answer, scored


def tell(config: TaskConfig, draws: Draws) -> Story:
    """A story of the configured task."""
    return STORIES[config.kind or "passkey"](draws, config.keys, config.digits, OBJECTS[: config.words])


def check_numbers(tokenizer: Tokenizer, digits: int) -> None:
    """Refuse a tokenizer under which a number of so many digits has other tokens in a text than as an answer.

    Raises:
        UserError: naming the tokenizer.
    """
    endless = "8105726439" * (digits // 10 + 2)
    numbers = [endless[start : start + digits] for start in range(10)]
    parts = ["is", *(part for number in numbers for part in (" ", number)), "."]
    if tokenizer.encode("".join(parts)) != [token for part in parts for token in tokenizer.encode(part)]:
        raise UserError(
            f"{tokenizer.path} joins a number with what stands before or behind it, so that an answer cannot be scored; use a "
            "tokenizer trained with split_digits, as `infini-train prepare` trains it"
        )
