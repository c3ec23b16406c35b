"""Scores of predictions, with the libraries that give LongBench's published numbers: rouge, jieba, rapidfuzz."""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import logging
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from hici.eval.longbench import metrics
from hici.eval.longbench.datasets import Dataset
from hici.registry import suggest

LEVENSHTEIN = "levenshtein"
DIFFLIB = "difflib"
EDIT_SIMILARITIES = (LEVENSHTEIN, DIFFLIB)
METRICS = ("qa_f1", "qa_f1_zh", "rouge_l", "rouge_l_zh", "classification", "retrieval", "retrieval_zh", "count",
           "code_similarity")  # fmt: skip
_PARAGRAPH = {"retrieval": re.compile(r"Paragraph (\d+)"), "retrieval_zh": re.compile(r"段落(\d+)")}


@dataclass(frozen=True)
class Scored:
    """The score of one prediction, 0 to 1, and why some answer could not be compared with it (it counts as 0 there)."""

    score: float
    problem: str | None = None


class Scorer:
    """Scores predictions as LongBench does.

    Args:
        edit_similarity: of code: "levenshtein" (2 M / T with the longest common subsequence M) or "difflib"
            (Python's matcher). LongBench takes what its string matcher has installed, so published scores of code
            are of either kind.

    Raises:
        ValueError: another edit_similarity.
    """

    def __init__(self, edit_similarity: str = LEVENSHTEIN) -> None:
        if edit_similarity not in EDIT_SIMILARITIES:
            raise ValueError(suggest(edit_similarity, EDIT_SIMILARITIES, "edit_similarity"))
        self.edit_similarity = edit_similarity

    def check(self, dataset: Dataset) -> None:
        """Raise ValueError when a package that the dataset's metric needs is missing."""
        for package in self._packages(dataset):
            _package(package)

    def versions(self, datasets: Sequence[Dataset]) -> dict[str, str]:
        """Versions of the packages that the datasets' scores come from."""
        names = sorted({name for dataset in datasets for name in self._packages(dataset)})
        return {name: importlib.metadata.version(name) for name in names}

    def score(self, dataset: Dataset, prediction: str, answers: Sequence[str], classes: Sequence[str] | None) -> Scored:
        """The best score over the true answers."""
        if dataset.first_line:
            prediction = metrics.first_line(prediction)
        best, problem = 0.0, None
        for answer in answers:
            try:
                best = max(best, self._compare(dataset.metric, prediction, answer, classes or ()))
            except _NotComparableError as error:
                problem = str(error)
        return Scored(best, problem)

    def _compare(self, metric: str, prediction: str, answer: str, classes: Sequence[str]) -> float:
        match metric:
            case "qa_f1":
                return metrics.f1(metrics.english_words(prediction), metrics.english_words(answer))
            case "qa_f1_zh":
                return metrics.f1(*(metrics.chinese_words(self._cut(text)) for text in (prediction, answer)))
            case "rouge_l":
                return self._rouge_l(prediction, answer)
            case "rouge_l_zh":
                return self._rouge_l(*(" ".join(self._cut(text)) for text in (prediction, answer)))
            case "classification":
                return metrics.classification(prediction, answer, classes)
            case "retrieval" | "retrieval_zh":
                return metrics.share_of_number(prediction, _PARAGRAPH[metric].findall(answer)[0])
            case "count":
                return metrics.share_of_number(prediction, answer)
            case "code_similarity":
                return self._edit_similarity(metrics.code_line(prediction), answer)
        raise AssertionError(f"no metric {metric}")

    def _edit_similarity(self, prediction: str, answer: str) -> float:
        """In whole percents, as fuzzywuzzy gives it."""
        if prediction == answer:
            return 1.0
        if not prediction or not answer:
            return 0.0
        if self.edit_similarity == DIFFLIB:
            percent = 100 * difflib.SequenceMatcher(None, prediction, answer).ratio()
        else:
            percent = _package("rapidfuzz").fuzz.ratio(prediction, answer)
        return round(percent) / 100

    def _rouge_l(self, prediction: str, answer: str) -> float:
        # rouge recurses as deep as its sentences are long: in a thread of its own Python's limit is met at the same
        # length wherever this is called from
        with ThreadPoolExecutor(max_workers=1) as fresh:
            work = fresh.submit(self._rouge.get_scores, [prediction], [answer], avg=True)
            try:
                return float(work.result()["rouge-l"]["f"])
            except (ValueError, RecursionError) as error:
                reason = "sentences too long for its recursion" if isinstance(error, RecursionError) else str(error)
                raise _NotComparableError(f"rouge: {reason.rstrip('.')}") from error

    def _cut(self, text: str) -> list[str]:
        return list(self._jieba.cut(text, cut_all=False))

    @functools.cached_property
    def _rouge(self) -> Any:
        return _package("rouge").Rouge(metrics=["rouge-l"])

    @functools.cached_property
    def _jieba(self) -> Any:
        cutter = _package("jieba").Tokenizer()
        logger = logging.getLogger("jieba")  # tells on stderr that it reads its dictionary
        level = logger.level
        logger.setLevel(logging.WARNING)
        try:
            cutter.initialize()
        finally:
            logger.setLevel(level)
        return cutter

    def _packages(self, dataset: Dataset) -> list[str]:
        needed = {
            "qa_f1_zh": ["jieba"],
            "rouge_l": ["rouge"],
            "rouge_l_zh": ["jieba", "rouge"],
            "code_similarity": ["rapidfuzz"] if self.edit_similarity == LEVENSHTEIN else [],
        }
        return needed.get(dataset.metric, [])


class _NotComparableError(Exception):
    """A prediction and an answer that a metric's library refuses. LongBench lets them count as 0."""


def answer_problem(dataset: Dataset, answers: Any, classes: Any) -> str | None:
    """What is wrong with a sample's true answers or its list of classes; None: nothing."""
    if not _texts(answers) or not answers:
        return "answers is no list of texts with at least one in it"
    if classes is not None and not _texts(classes):
        return "all_classes is neither null nor a list of texts"
    if dataset.metric == "classification" and not classes:
        return "all_classes is empty, but a classification needs the classes"
    pattern = _PARAGRAPH.get(dataset.metric)
    wrong = next((answer for answer in answers if pattern and not pattern.search(answer)), None)
    return (
        None
        if wrong is None
        else f"the answer {wrong[:40]!r} names no paragraph ({pattern.pattern if pattern else ''})"
    )


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _package(name: str) -> Any:
    try:
        module = importlib.import_module(name)
        if name == "rapidfuzz":
            importlib.import_module("rapidfuzz.fuzz")
    except ImportError as error:
        raise ValueError(
            f"the package {name!r} is not installed, and LongBench's scores need it; pip install 'hici[scores]'"
        ) from error
    return module
