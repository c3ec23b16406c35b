"""Retrieval as a measurement: one part for every attention, task, length, depth and sample."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from hici.eval.conditions import describe_condition, describe_model
from hici.eval.measure import Plan
from hici.eval.retrieval.answering import answer_prompt
from hici.eval.retrieval.base import REPEATED, Filler, RetrievalTask
from hici.eval.retrieval.files import CaseFile, FileCase, read_cases, read_haystack
from hici.eval.retrieval.fit import Case, Prompt, answer_room, make_prompt, shortest, too_short
from hici.eval.retrieval.settings import SAMPLES, Settings
from hici.eval.retrieval.tasks import get_task
from hici.eval.statistics import wilson_interval
from hici.models.generate import encode_prompt
from hici.models.lookup import FULL, attention_mode, get_causal_lm
from hici.models.modes import set_attention
from hici.models.session import Session
from hici.rope import check_context

logger = logging.getLogger(__name__)

PROMPTS = 1  # version of the generated prompts: raised when one seed gives another prompt than before


@dataclass(frozen=True)
class Cell:
    """One entry of the result for each attention: prompts that are counted together.

    Attributes:
        context: tokens of prompt and answer; of prompts from a file those of the longest.
        prompts: each makes its prompt; `about` says beside each answer which it was.
        facts: what the result's entry says besides.
    """

    task: RetrievalTask
    context: int
    depth: float | None
    prompts: Sequence[Callable[[], Prompt]]
    about: Sequence[dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)

    def part(self, attention: str, sample: int) -> str:
        """The name of one part."""
        of = self.facts.get("cases", self.context)
        depth = "" if self.depth is None else f" depth {float(self.depth)}"  # all places: no two parts of one name
        return f"{attention} {self.task.name} {of}{depth} sample {sample}"


def plan_retrieval(
    model: Any,
    tokenizer: Any,
    about: dict[str, Any],
    settings: Settings,
    attentions: Sequence[str],
    *,
    allow_beyond_rope: bool = False,
) -> Plan:
    """The measurement. The model is left in the attention of the part that was measured last.

    Args:
        model, tokenizer: the model, ready for every one of `attentions`; `about` is what a result says of it.
        settings: what is asked.
        allow_beyond_rope: permit more tokens than the model's rope represents.

    Raises:
        ValueError: a length too short for its task; more tokens than the rope represents; an attention in which the
            model cannot generate; no chat template; a case that is too long.
    """
    lm = get_causal_lm(model)
    if settings.lengths and not allow_beyond_rope:
        check_context(lm.config, max(settings.lengths))
    filler, haystack = read_haystack(settings.haystack) if settings.haystack else (REPEATED, None)
    files = [read_cases(name) for name in settings.cases]
    encode = partial(encode_prompt, tokenizer, chat=settings.chat)
    cells = [cell for task in settings.generated for cell in _generated(task, settings, filler, tokenizer, encode)]
    limit = max(settings.lengths) if settings.lengths else lm.config.max_position_embeddings
    cells += [_from_file(file, settings, limit, tokenizer, encode) for file in files]
    conditions = _conditions(model, attentions, {cell.context for cell in cells}, allow_beyond_rope)
    parts = {
        cell.part(attention, i): (attention, cell, i)
        for attention in attentions
        for cell in cells
        for i in range(len(cell.prompts))
    }

    def measure_part(name: str) -> dict[str, Any]:
        attention, cell, i = parts[name]
        if attention_mode(model) != attention:
            set_attention(model, attention)
        model.eval()
        prompt = cell.prompts[i]()
        with_answer = _with_answer(tokenizer, prompt, chat=settings.chat)
        made = answer_prompt(
            lm, tokenizer, prompt, with_answer, cell.task.score, allow_beyond_rope=allow_beyond_rope
        )  # fmt: skip
        return made | cell.about[i]

    def summarise(values: dict[str, Any]) -> dict[str, Any]:
        return {
            "conditions": [
                conditions[attention, cell.context]
                | _numbers(cell, [values[cell.part(attention, i)] for i in range(len(cell.prompts))])
                for attention in attentions
                for cell in cells
            ]
        }

    return Plan(
        task="retrieval",
        protocol=_protocol(settings, attentions, limit),
        model=describe_model(model, attentions, about, tokenizer),
        data=_data(haystack, files),
        seed=settings.seed if settings.generated else None,
        parts=list(parts),
        measure_part=measure_part,
        summarise=summarise,
    )


def _generated(
    task: RetrievalTask, settings: Settings, filler: Filler, tokenizer: Any, encode: Callable[[str], list[int]]
) -> list[Cell]:
    """Cells of one task, after a look at every prompt's least length."""
    options, samples = settings.options_of(task), settings.samples or SAMPLES
    own_filler = filler if task.uses_filler else REPEATED
    cells = []
    for length in settings.lengths:
        grid = {
            depth: [Case(task, options, length, depth, i, settings.seed) for i in range(samples)]
            for depth in settings.depths_of(task)
        }
        _check_length([case for cases in grid.values() for case in cases], own_filler, tokenizer, encode)
        for depth, cases in grid.items():
            make = [partial(make_prompt, c, own_filler, tokenizer, encode) for c in cases]
            cells.append(Cell(task, length, depth, make, [{"seed": c.own_seed} for c in cases], {"options": options}))
    if cells:
        max(cells, key=lambda cell: cell.context).prompts[0]()  # whether there is filler enough
    return cells


def _check_length(cases: list[Case], filler: Filler, tokenizer: Any, encode: Callable[[str], list[int]]) -> None:
    """Raise ValueError, with a length that works, where one of these prompts is too long without any filler."""

    def least(case: Case) -> int:
        return shortest(case, filler, tokenizer, encode)

    longest = max(cases, key=least)
    if least(longest) > longest.length:
        fitting = next(  # other lengths have other numbers in them, so this one must be looked for
            n for n in itertools.count(least(longest)) if all(least(replace(case, length=n)) <= n for case in cases)
        )
        raise ValueError(too_short(longest, least(longest), fitting))


def _from_file(
    file: CaseFile, settings: Settings, limit: int, tokenizer: Any, encode: Callable[[str], list[int]]
) -> Cell:
    """The one cell of a file's cases: those that fit, which must be all unless `skip_too_long`."""
    asked = file.cases[: settings.samples]
    fitting: list[tuple[FileCase, Prompt]] = []
    lengths: dict[str, int] = {}  # by place, of those that do not fit
    for case in asked:
        room = answer_room(tokenizer, case.lead_in, case.expected)
        prompt = Prompt(case.prompt, encode(case.prompt), (case.expected,), f" {case.expected}", room, 0)
        if len(prompt.ids) + room > limit:
            lengths[case.place] = len(prompt.ids) + room
        else:
            fitting.append((case, prompt))
    if lengths and (not settings.skip_too_long or not fitting):
        place = max(lengths, key=lambda each: lengths[each])
        remedy = "" if settings.skip_too_long else ", or --skip-too-long to leave them out"
        raise ValueError(
            f"{len(lengths)} of {len(asked)} cases of {file.path} are too long; the longest, {place}, takes "
            f"{lengths[place]} tokens with its answer, and the limit is {limit} (the longest of --lengths, else the "
            f"model's positions); give --lengths {lengths[place]} (with --rope auto beyond the model's positions)"
            f"{remedy}"
        )
    if lengths:
        logger.warning("%d of %d cases of %s are too long and left out", len(lengths), len(asked), file.path)
    facts = {"cases": file.path, "cases_in_file": len(file.cases), "skipped_too_long": len(lengths)}
    context = max(len(prompt.ids) + prompt.max_new_tokens for _, prompt in fitting)
    make = [partial(_same, prompt) for _, prompt in fitting]
    return Cell(get_task(file.task), context, None, make, [{"case": case.place} for case, _ in fitting], facts)


def _same(prompt: Prompt) -> Prompt:
    return prompt


def _with_answer(tokenizer: Any, prompt: Prompt, *, chat: bool) -> list[int]:
    """Tokens of the prompt and its right answer, as one text; in a chat the answer begins the assistant's message."""
    if chat:
        return prompt.ids + list(tokenizer(prompt.answer_text.strip(), add_special_tokens=False)["input_ids"])
    return encode_prompt(tokenizer, prompt.text + prompt.answer_text)


def _conditions(
    model: Any, attentions: Sequence[str], contexts: set[int], allow_beyond_rope: bool
) -> dict[tuple[str, int], dict[str, Any]]:
    """What each attention is, at each context; raises what a session in it would raise."""
    before, found = attention_mode(model), {}
    try:
        for attention in attentions:
            set_attention(model, attention)
            cache = Session(model, allow_beyond_rope=allow_beyond_rope).cache
            decode = "all keys" if attention == FULL else "raw keys" if cache is None else "slots and segment"
            for context in contexts:
                found[attention, context] = describe_condition(model, context) | {"decode": decode}
    finally:
        set_attention(model, before)
    return found


def _numbers(cell: Cell, answers: list[dict[str, Any]]) -> dict[str, Any]:
    """What one entry of the result says of its answers."""
    scores = [answer["score"] for answer in answers]
    losses = [answer["answer_loss"] for answer in answers if answer["answer_loss"] is not None]
    tokens = [answer["prompt_tokens"] for answer in answers]
    apart = ("seconds", "peak_memory_bytes")
    return {
        "task": cell.task.name,
        "depth": cell.depth,
        **cell.facts,
        "samples": len(answers),
        "accuracy": sum(scores) / len(scores),
        "accuracy_interval": wilson_interval(sum(scores), len(scores)),
        "answer_loss": sum(losses) / len(losses) if losses else None,
        "prompt_tokens": [min(tokens), max(tokens)],
        "seconds": sum(answer["seconds"] for answer in answers),
        "peak_memory_bytes": max(answer["peak_memory_bytes"] for answer in answers),
        "answers": [{key: value for key, value in answer.items() if key not in apart} for answer in answers],
    }


def _protocol(settings: Settings, attentions: Sequence[str], limit: int) -> dict[str, Any]:
    return {
        "name": "retrieval",
        "tasks": list(settings.tasks),
        "attentions": list(attentions),
        "lengths": list(settings.lengths),
        "depths": {task.name: list(settings.depths_of(task)) for task in settings.generated},
        "options": {task.name: settings.options_of(task) for task in settings.generated},
        "samples": (settings.samples or SAMPLES) if settings.generated else settings.samples,
        "case_limit": limit if settings.cases else None,
        "skip_too_long": settings.skip_too_long,
        "chat": settings.chat,
        "prompts": PROMPTS,
        "seconds": "reading the prompt, the answer loss and answering",
        "generation": "greedy, to the end of text or max_new_tokens, which with the prompt is no more than the length",
        "accuracy": "mean score of the answers' text: 1 or 0, or the share of the expected that is there (recall)",
        "answer_loss": "mean nats a token of the expected answer behind the prompt; null with several "
        "answers, and where prompts are read in one prefill with decode over raw keys",
    }


def _data(haystack: dict[str, Any] | None, files: Sequence[CaseFile]) -> dict[str, Any] | None:
    if haystack is None and not files:
        return None
    return {
        "haystack": haystack,
        "cases": [{"path": file.path, "sha256": file.sha256, "task": file.task} for file in files],
    }
