"""Whether an answer is right. Decoded text is scored, never tokens, so BOS and the tokenizer's habits cannot matter."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NUMBER = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?")


def numbers(text: str) -> list[str]:
    """All numbers of a text, as they stand but for commas between thousands: "12,345 or 7." -> ["12345", "7"]."""
    return [found.replace(",", "") for found in _NUMBER.findall(text)]


def first_number(answer: str, expected: Sequence[str]) -> float:
    """1 when the answer's first number is the expected one, exactly: 123456 is not 12345."""
    (number,) = expected
    return float(numbers(answer)[:1] == [number])


def number_recall(answer: str, expected: Sequence[str]) -> float:
    """Share of the expected numbers that are among the answer's."""
    found = set(numbers(answer))
    return sum(number in found for number in expected) / len(expected)


def word_recall(answer: str, expected: Sequence[str]) -> float:
    """Share of the expected words that stand in the answer as whole words, in the same case."""
    found = set(re.findall(r"[^\W_]+", answer))
    return sum(word in found for word in expected) / len(expected)


def whole_text(answer: str, expected: Sequence[str]) -> float:
    """1 when the expected text stands in the answer, upper and lower case alike, with no letter or digit beside it."""
    (text,) = expected
    return float(re.search(rf"(?<!\w){re.escape(text.lower())}(?!\w)", answer.lower()) is not None)


def label_within(answer: str, expected: Sequence[str]) -> float:
    """1 when the label occurs in the answer, both lower-cased: the rule of the published LongEval topic accuracies."""
    (label,) = expected
    return float(label.lower() in answer.lower())
