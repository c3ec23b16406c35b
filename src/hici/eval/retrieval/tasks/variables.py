"""Variable tracking (in the manner of RULER): chains of assignments in filler; which variables hold a value?"""

from __future__ import annotations

from hici.eval.retrieval.base import Draft, Filler, Option, Options, RetrievalTask, different, hide
from hici.eval.retrieval.draws import Draws
from hici.eval.retrieval.scoring import word_recall

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _draft(draws: Draws, depth: float | None, options: Options, filler: Filler) -> Draft:
    names: set[str] = set()
    values: set[int] = set()
    hidden: list[tuple[float, str]] = []
    chains: list[tuple[int, tuple[str, ...]]] = []
    for _ in range(options["chains"]):
        value = different(lambda: draws.between(10_000, 99_999), values)
        chain = tuple(
            different(lambda: "".join(draws.choose(_LETTERS) for _ in range(5)), names)
            for _ in range(options["hops"] + 1)
        )
        sources = (str(value), *(f"VAR {name}" for name in chain))
        depths = sorted(draws.fraction() for _ in chain)
        hidden += [(d, f"VAR {name} = {source}.") for d, name, source in zip(depths, chain, sources, strict=False)]
        chains.append((value, chain))
    value, expected = chains[0]
    task = "Variables are assigned in the text below, some from others. Keep track of their values."
    question = (
        f"Which variables hold the value {value} in the text above, directly or through others? Name all "
        f"{len(expected)}, separated by commas. The variables are"
    )

    listed = "The variables are:" + f" 1. VAR = {value}" * len(expected)  # models like lists, with the values

    def text(count: int) -> str:
        return f"{task}\n{hide(filler.first(count, draws), hidden)}\n{question}"

    return Draft(text, expected, lead_in=listed, capacity=filler.capacity)


TASK = RetrievalTask(
    name="variables",
    about="chains of assignments; all variables of a value are asked (recall)",
    draft=_draft,
    score=word_recall,
    options={
        "chains": Option(2, 1, 64, "chains of assignments in a prompt"),
        "hops": Option(3, 0, 64, "assignments from variable to variable in a chain"),
    },
    uses_filler=True,
)
