"""Key-value lookup in a JSON object of UUIDs, in the published form (Liu et al. 2023, Lost in the Middle)."""

from __future__ import annotations

from hici.eval.retrieval.base import Draft, Drawn, Filler, Options, RetrievalTask, place
from hici.eval.retrieval.draws import Draws
from hici.eval.retrieval.scoring import whole_text


def _draft(draws: Draws, depth: float | None, options: Options, filler: Filler) -> Draft:
    assert depth is not None
    key, value = draws.uuid(), draws.uuid()
    others_stream = draws.stream("others")
    others = Drawn(lambda: f'"{others_stream.uuid()}": "{others_stream.uuid()}"')

    def text(count: int) -> str:
        records = others.first(count)
        records.insert(place(depth, count), f'"{key}": "{value}"')
        data = ",\n ".join(records)
        return (
            "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
            f'{{{data}}}\n\nKey: "{key}"\nCorresponding value:'
        )

    return Draft(text, (value,), lead_in='The corresponding value is "')


TASK = RetrievalTask(
    name="keyvalue",
    about="one value of a JSON object of UUIDs; depth is the key's place",
    draft=_draft,
    score=whole_text,
    has_depth=lambda options: True,
)
