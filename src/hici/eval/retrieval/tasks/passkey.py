"""Passkey (Mohtashami and Jaggi 2023): a number in repeated filler. The prompt's form is the published one."""

from __future__ import annotations

from hici.eval.retrieval.base import REPEATED, Draft, Filler, Options, RetrievalTask, place
from hici.eval.retrieval.draws import Draws
from hici.eval.retrieval.scoring import first_number

_TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
    "about the important information there."
)
_QUESTION = "What is the pass key? The pass key is"


def _draft(draws: Draws, depth: float | None, options: Options, filler: Filler) -> Draft:
    assert depth is not None
    number = str(draws.between(1, 49_999))  # numpy's randint(1, 50000), as published
    information = f"The pass key is {number}. Remember it. {number} is the pass key."

    def text(count: int) -> str:
        before = place(depth, count)
        parts = [" ".join(REPEATED.first(n, draws)) for n in (before, count - before)]
        return "\n".join(part for part in (_TASK, parts[0], information, parts[1], _QUESTION) if part)

    return Draft(text, (number,), lead_in="The pass key is")


TASK = RetrievalTask(
    name="passkey",
    about="a number in repeated filler",
    draft=_draft,
    score=first_number,
    has_depth=lambda options: True,
)
