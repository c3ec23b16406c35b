"""Prompts of an exact number of tokens, in any tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hici.eval.retrieval.base import Draft, Filler, Options, RetrievalTask
from hici.eval.retrieval.draws import Draws, seed_of

SLACK = 8  # tokens of an answer beside its lead-in: a line break, a mark, an end token
_FIRST_GUESS = 8

Encode = Callable[[str], list[int]]  # a whole prompt, with all that the tokenizer (or its chat template) adds


@dataclass(frozen=True)
class Case:
    """One generated prompt and its place in the grid: `depth` is None for tasks without."""

    task: RetrievalTask
    options: Options
    length: int
    depth: float | None
    sample: int
    seed: int

    @property
    def own_seed(self) -> int:
        """Of this prompt alone: other tasks, lengths, depths or samples in the same run do not change it."""
        depth = None if self.depth is None else float(self.depth)  # 0 and 0.0 are the same depth
        return seed_of(self.seed, self.task.name, self.length, depth, self.sample)

    def draft(self, filler: Filler) -> Draft:
        """The prompt before it is filled."""
        return self.task.draft(Draws(self.own_seed), self.depth, self.options, filler)


@dataclass(frozen=True)
class Prompt:
    """A prompt that is ready to be answered.

    Attributes:
        text, ids: the prompt, and its tokens with the special ones.
        expected: the answer, or all of them.
        answer_text: all of them as they would follow the prompt.
        max_new_tokens: room for them behind a lead-in.
        units: of filler in it.
    """

    text: str
    ids: list[int]
    expected: tuple[str, ...]
    answer_text: str
    max_new_tokens: int
    units: int

    @property
    def sha256(self) -> str:
        """Of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def answer_room(tokenizer: Any, lead_in: str, answer: str) -> int:
    """Tokens that the longest usual way to give this answer takes in this tokenizer, with some slack."""
    said = tokenizer(f" {lead_in} {answer}.", add_special_tokens=False, verbose=False)["input_ids"]
    return len(said) + SLACK


def shortest(case: Case, filler: Filler, tokenizer: Any, encode: Encode) -> int:
    """Tokens of a case without filler, its answer's room among them: the least length that it can have."""
    draft = case.draft(filler)
    return len(encode(draft.text(0))) + answer_room(tokenizer, draft.lead_in, ", ".join(draft.expected))


def make_prompt(case: Case, filler: Filler, tokenizer: Any, encode: Encode) -> Prompt:
    """The prompt of a case, with as much filler as its length has room for: with one unit more it would be too long.

    Prompt and answer together have at most `case.length` tokens.

    Raises:
        ValueError: the length is below `shortest`; the filler ends before the length is reached.
    """
    draft = case.draft(filler)
    answer = ", ".join(draft.expected)
    room = answer_room(tokenizer, draft.lead_in, answer)
    least = len(encode(draft.text(0))) + room
    if least > case.length:
        raise ValueError(too_short(case, least, least))
    units, ids = _most_units(draft, case.length - room, encode)
    if units == draft.capacity:
        raise ValueError(
            f"length {case.length} for task {case.task.name}: all there is ({units} units of filler) makes only "
            f"{len(ids)} tokens; give a shorter length, or (needle, variables) more text with --haystack"
        )
    return Prompt(draft.text(units), ids, draft.expected, draft.separator + answer, room, units)


def too_short(case: Case, least: int, fitting: int) -> str:
    """The text of an error: `least` tokens are needed; `fitting` is a length that works."""
    return (
        f"length {case.length} is too short for task {case.task.name}: without any filler its prompt and the room for "
        f"its answer take {least} tokens in this tokenizer; give at least {fitting}"
    )


def _most_units(draft: Draft, most: int, encode: Encode) -> tuple[int, list[int]]:
    """(units, tokens) of the longest prompt of at most `most` tokens; or all units there are.

    By interpolation, since tokens grow almost evenly with units; by halves where that closes in from one side only.
    """
    low, low_ids = 0, encode(draft.text(0))
    high, high_tokens = 0, 0  # 0: not known yet
    base, guess, rounds = len(low_ids), _FIRST_GUESS, 0
    while high == 0 or high - low > 1:
        if draft.capacity is not None:
            guess = min(guess, draft.capacity)
        ids = encode(draft.text(guess))
        rounds += 1
        if len(ids) > most:
            high, high_tokens = guess, len(ids)
        else:
            low, low_ids = guess, ids
            if low == draft.capacity:
                break
        if high == 0:
            rate = max((len(low_ids) - base) / low, 0.1)
            guess = low + max(1, int((most - len(low_ids)) / rate))
        elif rounds % 4:
            share = (most - len(low_ids)) / (high_tokens - len(low_ids))
            guess = min(max(low + int(share * (high - low)), low + 1), high - 1)
        else:
            guess = (low + high) // 2
    return low, low_ids
