"""What a retrieval task is: a way to draw a prompt that can be filled to any length, and a rule for answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from hici.eval.retrieval.draws import Draws

T = TypeVar("T")
Options = Mapping[str, int]
Score = Callable[[str, Sequence[str]], float]  # (answer, what is expected) -> 0..1


@dataclass(frozen=True)
class Filler:
    """Sentences among which things are hidden.

    Attributes:
        sentences: in order.
        repeats: they begin anew at their end. False: each stands in a prompt once at most.
    """

    sentences: tuple[str, ...]
    repeats: bool

    @property
    def capacity(self) -> int | None:
        """Most sentences of one prompt; None: any number."""
        return None if self.repeats else len(self.sentences)

    def first(self, count: int, draws: Draws) -> list[str]:
        """The first `count` sentences of a prompt. Text that does not repeat begins at a drawn sentence, in a ring."""
        begin = 0 if self.repeats else draws.stream("filler").below(len(self.sentences))
        return [self.sentences[(begin + i) % len(self.sentences)] for i in range(count)]


# the filler of the passkey prompt of Mohtashami and Jaggi (2023), which all passkey evaluations use
REPEATED = Filler(
    ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again."),
    repeats=True,
)


@dataclass(frozen=True)
class Draft:
    """A prompt with any amount of filler.

    Attributes:
        text: number of units of filler -> prompt. More units only add text; all else stays.
        expected: the answer, or all of them.
        lead_in: what a model may say in front of the answer; there is room for it.
        capacity: most units there are; None: any number.
        separator: what stands between the prompt and its answer.
    """

    text: Callable[[int], str]
    expected: tuple[str, ...]
    lead_in: str
    capacity: int | None = None
    separator: str = " "


@dataclass(frozen=True)
class Option:
    """A whole number that a task can be varied by; `hici eval retrieval` has a flag of its name."""

    default: int
    minimum: int
    maximum: int
    help: str


@dataclass(frozen=True)
class RetrievalTask:
    """An entry of the registry.

    Attributes:
        name, about: for messages and help.
        draft: (draws, depth, options, filler) -> Draft. Depth is None unless `has_depth`.
        score: how an answer is scored.
        options: by name; no two tasks have one of the same name.
        has_depth: options -> whether one thing is hidden, at a depth: 0 in front of all filler, 1 behind it.
        uses_filler: whether sentences of a haystack can stand in for the usual filler.
    """

    name: str
    about: str
    draft: Callable[[Draws, float | None, Options, Filler], Draft]
    score: Score
    options: Mapping[str, Option] = field(default_factory=dict)
    has_depth: Callable[[Options], bool] = lambda options: False
    uses_filler: bool = False


def place(depth: float, count: int) -> int:
    """How many of `count` units stand in front of depth `depth`: the nearest whole number."""
    return int(depth * count + 0.5)


def hide(sentences: Sequence[str], hidden: Sequence[tuple[float, str]]) -> str:
    """Sentences with others among them, each (depth, sentence) behind that share of the text's letters.

    It stands at the border of sentences that is nearest. Of those at one border, the order stays.
    """
    total = sum(map(len, sentences))
    places: dict[int, list[str]] = {}
    border, letters = 0, 0
    for depth, sentence in sorted(hidden, key=lambda each: each[0]):
        wanted = depth * total
        while border < len(sentences) and letters + len(sentences[border]) / 2 <= wanted:
            letters += len(sentences[border])
            border += 1
        places.setdefault(border, []).append(sentence)
    text: list[str] = []
    for i in range(len(sentences) + 1):
        text += places.get(i, [])
        text += sentences[i : i + 1]
    return " ".join(text)


class Drawn:
    """Units that are drawn one after another when they are needed, so that the first n are always the same."""

    def __init__(self, draw: Callable[[], str]) -> None:
        self._draw = draw
        self._units: list[str] = []

    def first(self, count: int) -> list[str]:
        """The first `count` of them."""
        while len(self._units) < count:
            self._units.append(self._draw())
        return self._units[:count]


def different(draw: Callable[[], T], taken: set[T]) -> T:
    """A drawn value that is not in `taken`, and is from now on."""
    value = draw()
    while value in taken:
        value = draw()
    taken.add(value)
    return value
