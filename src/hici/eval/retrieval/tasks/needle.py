"""Needles (in the manner of RULER): numbers that belong to names, hidden in text; all numbers of one name are asked."""

from __future__ import annotations

from collections.abc import Sequence

from hici.eval.retrieval.base import Draft, Filler, Option, Options, RetrievalTask, different, hide
from hici.eval.retrieval.draws import Draws
from hici.eval.retrieval.scoring import first_number, number_recall
from hici.eval.retrieval.words import NAMES


def _draft(draws: Draws, depth: float | None, options: Options, filler: Filler) -> Draft:
    keys, values = options["keys"], options["values"]
    names = draws.sample(NAMES, keys)
    taken: set[int] = set()
    numbers = {
        name: [str(different(lambda: draws.between(100_000, 999_999), taken)) for _ in range(values)] for name in names
    }
    asked, expected = names[0], tuple(numbers[names[0]])
    hidden = [
        (depth if name == asked and depth is not None else draws.fraction(), f"A secret number of {name} is {number}.")
        for name in names
        for number in numbers[name]
    ]
    task = "Secret numbers are hidden in the text below. Remember each of them and whom it belongs to."
    if values == 1:
        question = f"What is the secret number of {asked} in the text above? The secret number of {asked} is"
    else:
        question = (
            f"What are all {values} secret numbers of {asked} in the text above? The {values} secret numbers of "
            f"{asked} are"
        )

    def text(count: int) -> str:
        return f"{task}\n{hide(filler.first(count, draws), hidden)}\n{question}"

    return Draft(text, expected, lead_in=f"The secret numbers of {asked} are", capacity=filler.capacity)


def _score(answer: str, expected: Sequence[str]) -> float:
    return first_number(answer, expected) if len(expected) == 1 else number_recall(answer, expected)


TASK = RetrievalTask(
    name="needle",
    about="numbers of several names; one name is asked",
    draft=_draft,
    score=_score,
    options={
        "keys": Option(4, 1, len(NAMES), "names in a prompt"),
        "values": Option(1, 1, 32, "numbers of each name; more than 1: all are asked, and recall is measured"),
    },
    has_depth=lambda options: options["values"] == 1,
    uses_filler=True,
)
