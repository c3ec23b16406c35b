"""Lines, in the manner of LongEval (Li et al. 2023): many lines of a name and a number; the number of one is asked."""

from __future__ import annotations

from hici.eval.retrieval.base import Draft, Drawn, Filler, Options, RetrievalTask, different, place
from hici.eval.retrieval.draws import Draws
from hici.eval.retrieval.scoring import first_number
from hici.eval.retrieval.words import ADJECTIVES, NOUNS

LINES = len(ADJECTIVES) * len(NOUNS) * 9 // 10  # of all names; beyond, drawing another one takes long


def _draft(draws: Draws, depth: float | None, options: Options, filler: Filler) -> Draft:
    assert depth is not None
    taken: set[str] = set()

    def draw(source: Draws) -> tuple[str, str]:
        name = different(lambda: f"{source.choose(ADJECTIVES)}-{source.choose(NOUNS)}", taken)
        number = str(source.between(1, 49_999))
        return name, number

    asked, number = draw(draws)
    source = draws.stream("others")
    others = Drawn(lambda: "line {}: REGISTER_CONTENT is <{}>".format(*draw(source)))

    def text(count: int) -> str:
        lines = others.first(count)
        lines.insert(place(depth, count), f"line {asked}: REGISTER_CONTENT is <{number}>")
        return "\n".join((
            "Here is a list of lines. Each has a name and, in angle brackets, a number, its REGISTER_CONTENT. Remember "
            "which number belongs to which line.",
            "",
            *lines,
            "",
            f"The list is complete. What is the REGISTER_CONTENT of line {asked}?",
            f"line {asked}: REGISTER_CONTENT is",
        ))  # fmt: skip

    return Draft(text, (number,), lead_in=f"The REGISTER_CONTENT of line {asked} is <", capacity=LINES, separator=" <")


TASK = RetrievalTask(
    name="lines",
    about="the number of one line among many; depth is its place",
    draft=_draft,
    score=first_number,
    has_depth=lambda options: True,
)
