"""Predictions of a model for LongBench, with their scores: a measurement, one part for every sample and attention."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hici.eval.conditions import attention_label, describe_condition, describe_model
from hici.eval.longbench.datasets import Dataset, get_dataset
from hici.eval.longbench.predictions import prediction_record
from hici.eval.longbench.prompts import make_prompt
from hici.eval.longbench.samples import Sample, evenly_spaced, read_samples
from hici.eval.longbench.scorer import LEVENSHTEIN, Scorer
from hici.eval.longbench.scoring import by_length, percent
from hici.eval.measure import Plan
from hici.files import file_sha256, write_text
from hici.models.generate import encode_prompt, generate
from hici.models.lookup import get_causal_lm
from hici.models.modes import set_attention
from hici.models.session import Session
from hici.rope import check_context

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chosen:
    """What is asked of one dataset: its file, all its samples, the indices of those that are used."""

    dataset: Dataset
    path: Path
    samples: list[Sample]
    indices: list[int]


def choose_samples(files: dict[str, Path], max_samples: int | None = None) -> dict[str, Chosen]:
    """Read LongBench's files; `max_samples`: that many of each, evenly spaced.

    Raises:
        ValueError: see `read_samples`; max_samples below 1.
    """
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples={max_samples} is below 1; give at least 1, or nothing for all samples")
    chosen = {}
    for name, path in files.items():
        samples = read_samples(path, name)
        chosen[name] = Chosen(get_dataset(name), path, samples, evenly_spaced(len(samples), max_samples))
    return chosen


def longest_sequence(chosen: dict[str, Chosen], max_length: int) -> int:
    """Tokens of the longest prompt and its answer."""
    return max_length + max(each.dataset.max_new_tokens for each in chosen.values())


def prediction_plan(
    model: Any,
    tokenizer: Any,
    about: dict[str, Any],
    chosen: dict[str, Chosen],
    *,
    attentions: Sequence[str] = ("full",),
    max_length: int | None = None,
    max_samples: int | None = None,
    chat: bool = False,
    edit_similarity: str = LEVENSHTEIN,
    allow_beyond_rope: bool = False,
) -> Plan:
    """Predict and score, greedily, in every attention. A condition of the result is one attention and dataset.

    Args:
        about: what the result says of the model.
        max_length: tokens of a prompt, see `make_prompt`; None: the model's positions less the generation length.
        max_samples: what `chosen` was made with.
        chat: in the chat template, where LongBench has it so.

    Raises:
        ValueError: attention "hici_s2"; prompts and answers beyond the model's rope; `chat` without a chat template;
            a package that is missing for the scores; what generating in an attention refuses.
    """
    scorer = Scorer(edit_similarity)
    for each in chosen.values():
        scorer.check(each.dataset)
    run = _Run(model, tokenizer, chosen, scorer, max_length, chat, allow_beyond_rope)
    conditions = {attention: run.enter(attention) for attention in attentions}

    def summarise(parts: dict[str, Any]) -> dict[str, Any]:
        return {
            "conditions": [
                {**condition, **run.summary(attention, name, parts)}
                for attention, condition in conditions.items()
                for name in chosen
            ]
        }

    return Plan(
        task="longbench",
        protocol={
            "name": "longbench",
            "datasets": {name: run.protocol(name) for name in chosen},
            "attentions": list(attentions),
            "max_samples": max_samples,
            "chat": chat,
            "truncation": "first and last half of max_length tokens, decoded, joined, tokenised again",
            "generation": "greedy; samsum ends at a newline, and not before one token",
            "edit_similarity": edit_similarity,
            "packages": scorer.versions([each.dataset for each in chosen.values()]),
        },
        model=describe_model(model, attentions, about, tokenizer),
        data=_describe_data(chosen),
        seed=None,
        parts=[f"{a}/{name}/{i}" for a in attentions for name, each in chosen.items() for i in each.indices],
        measure_part=run.measure_part,
        summarise=summarise,
    )


def write_predictions(
    record: dict[str, Any], chosen: dict[str, Chosen], directory: str | Path, *, overwrite: bool = False
) -> list[Path]:
    """Write a result's predictions as LongBench does: DIRECTORY/ATTENTION/DATASET.jsonl. Returns the folders.

    Other predictions that lie in these folders, of an earlier result, stay and are named in a warning.

    Raises:
        ValueError: a file is there with other content.
    """
    folders: dict[Path, list[Path]] = {}
    for condition in record["conditions"]:
        samples = chosen[condition["dataset"]].samples
        lines = (prediction_record(each["pred"], samples[each["index"]]) for each in condition["predictions"])
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        folder = Path(directory) / folder_name(condition)
        path = folder / f"{condition['dataset']}.jsonl"
        if path.exists() and not overwrite and path.read_bytes() != text.encode():
            raise ValueError(f"{path} exists with other content, and nothing is overwritten silently; give another "
                             "--out or --overwrite")  # fmt: skip
        write_text(path, text)
        folders.setdefault(folder, []).append(path)
    for folder, written in folders.items():
        others = sorted(path.name for path in folder.glob("*.jsonl") if path not in written)
        if others:
            logger.warning("%s also holds %s, which are of another result; delete them before the folder is scored",
                           folder, ", ".join(others))  # fmt: skip
    return list(folders)


def folder_name(condition: dict[str, Any]) -> str:
    """The attention's label as a folder: "full", "hici-past", "hici-all-not-causal"."""
    return re.sub(r"[^a-z0-9]+", "-", attention_label(condition)).strip("-")


def _describe_data(chosen: dict[str, Chosen]) -> dict[str, Any]:
    return {
        "files": {name: str(each.path) for name, each in chosen.items()},
        "sha256": {name: file_sha256(each.path) for name, each in chosen.items()},
        "samples": {name: len(each.samples) for name, each in chosen.items()},
    }


class _Run:
    """What all parts share."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        chosen: dict[str, Chosen],
        scorer: Scorer,
        max_length: int | None,
        chat: bool,
        allow_beyond_rope: bool,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.chosen = chosen
        self.scorer = scorer
        self.max_length = max_length
        self.chat = chat
        self.allow_beyond_rope = allow_beyond_rope
        self.config = get_causal_lm(model).config
        if max_length is not None and not allow_beyond_rope:
            check_context(self.config, longest_sequence(chosen, max_length))
        if chat:
            encode_prompt(tokenizer, "probe", chat=True)

    def enter(self, attention: str) -> dict[str, Any]:
        """Switch to an attention, make sure that it can generate, and describe it."""
        if attention == "hici_s2":
            raise ValueError("attention hici_s2 is for training and perplexity, and writes no text; give full or hici")
        set_attention(self.model, attention)
        self._session()
        return describe_condition(self.model, None)

    def longest_prompt(self, dataset: Dataset) -> int:
        """max_length, given or by default."""
        if self.max_length is not None:
            return self.max_length
        return int(self.config.max_position_embeddings) - dataset.max_new_tokens

    def protocol(self, name: str) -> dict[str, Any]:
        """Settings of one dataset."""
        dataset = self.chosen[name].dataset
        return {
            "max_length": self.longest_prompt(dataset),
            "max_new_tokens": dataset.max_new_tokens,
            "samples": len(self.chosen[name].indices),
            "available": len(self.chosen[name].samples),
            "chat": self.chat and dataset.chat,
        }

    def measure_part(self, part: str) -> dict[str, Any]:
        """Predict and score one sample."""
        attention, name, index = part.split("/")
        dataset, sample = self.chosen[name].dataset, self.chosen[name].samples[int(index)]
        set_attention(self.model, attention)
        room = None if self.allow_beyond_rope else self.config.max_position_embeddings - dataset.max_new_tokens
        prompt = make_prompt(self.tokenizer, dataset, sample, self.longest_prompt(dataset), room=room, chat=self.chat)
        begin = time.perf_counter()
        # a session of its own: its cache goes with the sample
        done = generate(
            self._session(),
            self.tokenizer,
            prompt.ids,
            max_new_tokens=dataset.max_new_tokens,
            stop_tokens=self._newline() if dataset.stop_at_newline else [],
            min_new_tokens=1 if dataset.stop_at_newline else 0,
        )
        scored = self.scorer.score(dataset, done.text, sample["answers"], sample["all_classes"])
        return {
            "pred": done.text,
            "score": scored.score,
            "problem": scored.problem,
            "prompt_tokens": len(prompt.ids),
            "whole_tokens": prompt.whole_tokens,
            "kept_tokens": prompt.kept_tokens,
            "new_tokens": len(done.tokens),
            "seconds": time.perf_counter() - begin,
        }

    def summary(self, attention: str, name: str, parts: dict[str, Any]) -> dict[str, Any]:
        """Score and predictions of one dataset in one attention."""
        each = self.chosen[name]
        max_length = self.longest_prompt(each.dataset)
        values = [parts[f"{attention}/{name}/{index}"] for index in each.indices]
        scores = [value["score"] for value in values]
        kept = [value["kept_tokens"] for value in values]
        tokens = [value["prompt_tokens"] for value in values]
        return {
            "dataset": name,
            "score": percent(scores),
            "samples": len(values),
            "metric": each.dataset.metric,
            "by_length": by_length(scores, [each.samples[index]["length"] for index in each.indices]),
            "max_length": max_length,
            "cut": sum(count is not None for count in kept),
            "cut_below_max_length": sum(count is not None and count < max_length for count in kept),
            "prompt_tokens": [min(tokens), max(tokens)],
            "seconds": sum(value["seconds"] for value in values),
            "predictions": [
                {"index": index, "_id": each.samples[index].get("_id"), **value}
                for index, value in zip(each.indices, values, strict=True)
            ],
        }

    def _session(self) -> Session:
        return Session(self.model, allow_beyond_rope=self.allow_beyond_rope)

    def _newline(self) -> list[int]:
        """As LongBench takes it, the last token of a newline; none where the tokenizer leaves newlines out."""
        return [int(token) for token in self.tokenizer.encode("\n", add_special_tokens=False)[-1:]]
