"""Tasks of lm-evaluation-harness as a measurement: one part a task and attention."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hici.eval.conditions import describe_condition, describe_model
from hici.eval.measure import Plan
from hici.models.modes import set_attention
from hici.models.session import Session

if TYPE_CHECKING:
    from hici.eval.harness.tasks import Tasks

NAME = "lm-evaluation-harness"
_NO_METRIC = ("name", "alias", "sample_len", "sample_count")


def check_installed() -> None:
    """Raise ValueError unless lm-eval is installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("lm-evaluation-harness is not installed; run pip install 'hici[lm-eval]'")


def lm_plan(
    model: Any,
    tokenizer: Any,
    tasks: Tasks,
    attentions: Sequence[str] = ("full",),
    *,
    about: dict[str, Any] | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    max_length: int | None = None,
    allow_beyond_rope: bool = False,
    apply_chat_template: bool = False,
) -> Plan:
    """A measurement of `tasks` under every one of `attentions`. A group that has a number of its own gets one.

    Measuring seeds the generators of Python, NumPy and torch, and leaves the model in the last attention.

    Args:
        model, tokenizer: a causal LM in any form; prepared for `attentions`.
        tasks: see `hici.eval.harness.tasks.load_tasks`.
        about: what a result says of the model.
        limit: documents of each task at most, the first ones.
        batch_size: texts read together.
        max_length, allow_beyond_rope: see `hici.eval.harness.HiCIModel`.
        apply_chat_template: prompts as a conversation, examples as its turns.

    Raises:
        ValueError: several texts at once where segments depend on the batch; a max_length beyond the rope settings; no
            chat template; an attention that cannot generate, for a task that needs it.
    """
    from hici.eval.harness.model import HiCIModel
    from hici.eval.harness.tasks import describe_documents, plant_seeds

    if apply_chat_template and not tokenizer.chat_template:
        raise ValueError("apply_chat_template (--apply-chat-template), but the tokenizer has no chat template; drop it")
    models = {
        attention: HiCIModel(model, attention, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length,
                             allow_beyond_rope=allow_beyond_rope, progress=False)
        for attention in attentions
    }  # fmt: skip
    if any(task.OUTPUT_TYPE == "generate_until" for task in tasks.tasks.values()):
        for attention in attentions:  # told now, and not behind the tasks before
            set_attention(model, attention)
            Session(model, allow_beyond_rope=allow_beyond_rope)
    parts = {f"{attention}/{name}": (attention, name) for attention in attentions for name in tasks.tasks}

    def measure_part(part: str) -> dict[str, Any]:
        attention, name = parts[part]
        set_attention(model, attention)
        task = tasks.tasks[name]
        plant_seeds(tasks.seeds, task)  # what a task draws must not depend on what was measured before
        value = _evaluate(
            models[attention], name, task, limit=limit, apply_chat_template=apply_chat_template, unsafe=tasks.unsafe
        )
        return {"condition": describe_condition(model, None), **value}

    def summarise(values: dict[str, Any]) -> dict[str, Any]:
        conditions = []
        for attention in attentions:
            mine = {name: value for part, value in values.items() for of, name in [parts[part]] if of == attention}
            for name, value in (mine | _groups(tasks.groups, mine)).items():
                conditions += _conditions(name, value)
        return {"conditions": conditions}

    return Plan(
        task="lm",
        protocol=_protocol(tasks, models, limit, apply_chat_template),
        model=describe_model(model, attentions, about, tokenizer),
        data={"tasks": {name: describe_documents(task) for name, task in tasks.tasks.items()}},
        seed=tasks.seeds.few_shot,
        parts=list(parts),
        measure_part=measure_part,
        summarise=summarise,
    )


def _protocol(tasks: Tasks, models: dict[str, Any], limit: int | None, apply_chat_template: bool) -> dict[str, Any]:
    from hici.eval.harness.tasks import describe_task

    lm = next(iter(models.values()))  # in these settings all are alike
    return {
        "name": NAME,
        "version": importlib.metadata.version("lm_eval"),
        "asked": tasks.asked,
        "attentions": list(models),
        "tasks": {name: describe_task(task) for name, task in tasks.tasks.items()},
        "limit": limit,
        "batch_size": lm.batch_size,
        "max_length": lm.max_length,
        "apply_chat_template": apply_chat_template,
        "prefix_token": {"id": lm.prefix_token_id, "text": lm.tok_decode(lm.prefix_token_id, False)},
        "seeds": tasks.seeds._asdict(),
    }


def _evaluate(
    lm: Any, name: str, task: Any, *, limit: int | None, apply_chat_template: bool, unsafe: bool
) -> dict[str, Any]:
    """One task's results, as lm-eval computes them. JSON values."""
    from lm_eval.evaluator import evaluate

    truncated, begin = lm.truncated, time.perf_counter()
    found = evaluate(
        lm,
        {"tasks": {name: task}, "groups": {}},
        limit=limit,
        log_samples=False,
        apply_chat_template=apply_chat_template,
        fewshot_as_multiturn=apply_chat_template,
        confirm_run_unsafe_code=unsafe,
    )
    assert found is not None, "lm-eval sees one process"
    return {
        "results": {key: _json_number(value) for key, value in found["results"][name].items()},
        "higher_is_better": found["higher_is_better"][name],
        "version": found["versions"][name],
        "num_fewshot": found["n-shot"][name],
        "documents": found["n-samples"][name]["original"],
        "truncated_requests": lm.truncated - truncated,
        "seconds": time.perf_counter() - begin,
    }


def _groups(groups: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The same for groups with a number of their own, from their tasks' results."""
    results = {name: {key: _number(x) for key, x in value["results"].items()} for name, value in values.items()}
    found = {}
    for name, group in groups.items():
        members = [values[task.task_name] for task in group.get_all_tasks()]
        aggregated = group.aggregate(results) if group.has_aggregation else {}
        if not _metrics(aggregated):
            continue
        found[name] = {
            "condition": members[0]["condition"],
            "results": {key: _json_number(value) for key, value in aggregated.items()},
            "higher_is_better": {k: v for member in members for k, v in member["higher_is_better"].items()},
            "version": group.version,
            "num_fewshot": members[0]["num_fewshot"] if len({m["num_fewshot"] for m in members}) == 1 else None,
            "documents": sum(member["documents"] for member in members),
            "truncated_requests": sum(member["truncated_requests"] for member in members),
            "seconds": sum(member["seconds"] for member in members),
        }
    return found


def _conditions(name: str, value: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry for every metric (with its filter, "acc,none") of a task or group."""
    results = value["results"]
    entries = []
    for key in _metrics(results):
        metric, _, filtered = key.partition(",")
        number, error = results[key], results.get(f"{metric}_stderr,{filtered}")
        finite = isinstance(number, (int, float))
        entries.append({
            **value["condition"],
            "task_name": name,
            "metric": key,
            "value": number if finite else None,
            **({} if finite else {"text": number}),  # "nan", or what else lm-eval has in a number's place
            "standard_error": error if isinstance(error, (int, float)) else None,
            "samples": results["sample_len"],
            **{k: value[k] for k in ("documents", "version", "num_fewshot", "truncated_requests", "seconds")},
            "higher_is_better": value["higher_is_better"].get(metric),
        })  # fmt: skip
    return entries


def _metrics(results: dict[str, Any]) -> list[str]:
    return [key for key in results if key not in _NO_METRIC and "_stderr," not in key]


def _json_number(value: Any) -> Any:
    """A number as Python has it; what is not finite, and what is none, as text."""
    if isinstance(value, dict) or value is None:
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    if not math.isfinite(number):
        return str(number)
    return int(value) if isinstance(value, int) else number


def _number(value: Any) -> Any:
    """What `_json_number` made a text of, as the number that it was."""
    return float(value) if value in ("nan", "inf", "-inf") else value
