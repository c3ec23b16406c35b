"""LongBench's metrics without their libraries: one prediction against one true answer, 0 to 1."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

# LongBench's own list (see NOTICE)
_CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃"  # noqa: RUF001
    "》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."  # noqa: RUF001
)
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NO_CHINESE_PUNCTUATION = str.maketrans("", "", string.punctuation + _CHINESE_PUNCTUATION)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"\d+")
_COMMENT_MARKS = ("`", "#", "//")


def english_words(text: str) -> list[str]:
    """Lower-cased words without punctuation and articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def chinese_words(cut: Sequence[str]) -> list[str]:
    """Cut words, lower-cased, without punctuation and white space; empty ones are left out."""
    words = ("".join(word.lower().translate(_NO_CHINESE_PUNCTUATION).split()) for word in cut)
    return [word for word in words if word]


def f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    """F1 of the words in common, each as often as both have it."""
    common = (Counter(prediction) & Counter(answer)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(prediction), common / len(answer)
    return 2 * precision * recall / (precision + recall)


def share_of_number(prediction: str, number: str) -> float:
    """Share of `number` among all numbers in the prediction; 0 where there is none."""
    numbers = _NUMBER.findall(prediction)
    return numbers.count(number) / len(numbers) if numbers else 0.0


def classification(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """1 over the number of classes that the prediction names, if the true one is among them; else 0.

    A class whose name is a part of the true one's is no other class: it is taken off the list. As in LongBench, the
    name right behind one that was taken off is not looked at; its published scores depend on that.
    """
    named = [name for name in classes if name in prediction]
    position = 0
    while position < len(named):
        name = named[position]
        if name in answer and name != answer:
            named.remove(name)
        position += 1
    return 1 / len(named) if answer in named else 0.0


def code_line(prediction: str) -> str:
    """The first line that is no comment and no Markdown fence; "" where there is none. Empty lines in front are cut."""
    lines = prediction.lstrip("\n").split("\n")
    return next((line for line in lines if not any(mark in line for mark in _COMMENT_MARKS)), "")


def first_line(prediction: str) -> str:
    """Up to the first newline; newlines in front are cut."""
    return prediction.lstrip("\n").split("\n")[0]
