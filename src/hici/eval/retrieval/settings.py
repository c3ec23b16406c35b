"""What one retrieval run asks: everything that its prompts depend on, checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hici.eval.retrieval.base import RetrievalTask
from hici.eval.retrieval.tasks import get_task, retrieval_tasks
from hici.registry import suggest

DEPTHS = 10
SAMPLES = 3
MOST_DEPTHS = 1000  # spaced evenly: they are rounded to four places
CASE_TASKS = ("topics", "lines")


@dataclass(frozen=True)
class Settings:
    """What is asked. Checked when it is made.

    Attributes:
        tasks: names, each once.
        lengths: tokens of prompt and answer together. With case files only: none, or one that limits them.
        depths: fractions 0 (in front) to 1 (behind everything); None: ten, spaced evenly.
        samples: prompts of every task, length and depth, and cases of every file; None: 3, and all of them.
        seed: of the generated prompts.
        options: of the tasks, by name; others keep their defaults.
        haystack: text files for tasks with filler; none: the usual repeated sentences.
        cases: .jsonl of LongEval; "topics" or "lines" is then taken from there, and not generated.
        case_tasks: task of each of `cases`, as `read_cases` tells.
        skip_too_long: leave out cases that are longer than the limit, and count them; False: an error.
        chat: prompts are a user's message in the tokenizer's chat template.

    Raises:
        ValueError: what cannot be, with the rule and what to give.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...] = ()
    depths: tuple[float, ...] | None = None
    samples: int | None = None
    seed: int = 0
    options: Mapping[str, int] = field(default_factory=dict)
    haystack: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()
    case_tasks: tuple[str, ...] = ()
    skip_too_long: bool = False
    chat: bool = False

    def __post_init__(self) -> None:
        for what, values in (
            ("task", self.tasks),
            ("length", self.lengths),
            ("depth", self.depths or ()),
            ("case file", self.cases),
        ):
            twice = [value for value in values if list(values).count(value) > 1]
            if twice:
                raise ValueError(f"{what} {twice[0]} is given twice; give each once")
        if not self.tasks:
            raise ValueError(f"no task is given; give some of {', '.join(retrieval_tasks())}")
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"samples={self.samples} is below 1; give at least one prompt for every length and depth")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} is below 0; give 0 or more")
        self._check_lengths()
        self._check_options()
        self._check_depths()
        self._check_files()

    @property
    def generated(self) -> list[RetrievalTask]:
        """Tasks whose prompts are generated."""
        return [get_task(name) for name in self.tasks if name not in self.case_tasks]

    def options_of(self, task: RetrievalTask) -> dict[str, int]:
        """All options of a task, with its defaults."""
        return {name: self.options.get(name, option.default) for name, option in task.options.items()}

    def depths_of(self, task: RetrievalTask) -> Sequence[float | None]:
        """The depths at which a task is measured; [None] for one without."""
        if not task.has_depth(self.options_of(task)):
            return [None]
        return evenly_spaced(DEPTHS) if self.depths is None else self.depths

    def _check_lengths(self) -> None:
        if self.generated and not self.lengths:
            raise ValueError(f"task {self.generated[0].name} needs lengths; give some, for example 1024 2048 4096")
        if not self.generated and len(self.lengths) > 1:
            raise ValueError(f"lengths {' '.join(map(str, self.lengths))} with prompts from files only, which have "
                             "lengths of their own; give one (the longest that is permitted), or none")  # fmt: skip
        if any(length < 1 for length in self.lengths):
            raise ValueError(f"length {min(self.lengths)} is below 1; give numbers of tokens")

    def _check_options(self) -> None:
        owners = {name: task for task in retrieval_tasks().values() for name in task.options}
        for name, value in self.options.items():
            if name not in owners:
                raise ValueError(suggest(name, owners, "option of a retrieval task"))
            task, option = owners[name], owners[name].options[name]
            if task not in self.generated:
                raise ValueError(f"{name}={value} is for task {task.name}, and none of its prompts is generated here; "
                                 f"add {task.name}, or drop it")  # fmt: skip
            if not option.minimum <= value <= option.maximum:
                raise ValueError(f"{name}={value} is not in {option.minimum}..{option.maximum} ({option.help}); give "
                                 "such a number")  # fmt: skip

    def _check_depths(self) -> None:
        if self.depths is None:
            return
        if not self.depths:
            raise ValueError("no depth is given; give fractions from 0 to 1, or none at all for ten")
        for depth in self.depths:
            if not 0 <= depth <= 1:
                raise ValueError(f"depth {depth:g} is not in 0..1 (0 in front of everything, 1 behind it); give such a "
                                 "fraction")  # fmt: skip
        if not any(task.has_depth(self.options_of(task)) for task in self.generated):
            raise ValueError(f"depths change nothing for {', '.join(self.tasks)}, where nothing lies at one depth; "
                             "drop them")  # fmt: skip

    def _check_files(self) -> None:
        if len(self.case_tasks) != len(self.cases):
            raise ValueError(f"{len(self.cases)} case files with {len(self.case_tasks)} case_tasks; give one for each")
        if self.haystack and not any(task.uses_filler for task in self.generated):
            users = ", ".join(task.name for task in retrieval_tasks().values() if task.uses_filler)
            raise ValueError(f"a haystack changes nothing for {', '.join(self.tasks)}; add one of {users}, or drop it")
        for name, task in zip(self.cases, self.case_tasks, strict=True):
            if task not in self.tasks:
                raise ValueError(f"{name} holds cases of {task}, which is not among the tasks; add {task}")
        if self.skip_too_long and not self.cases:
            raise ValueError("skip_too_long is for case files, and generated prompts always fit; drop it")


def evenly_spaced(count: int) -> tuple[float, ...]:
    """That many depths from 0 to 1, both among them; one: 0.5."""
    if not 1 <= count <= MOST_DEPTHS:
        raise ValueError(f"{count} depths are not in 1..{MOST_DEPTHS}; give such a number, or the fractions themselves")
    return (0.5,) if count == 1 else tuple(round(i / (count - 1), 4) for i in range(count))
