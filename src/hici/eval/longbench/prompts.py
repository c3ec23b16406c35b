"""LongBench's prompts as tokens: filled in, cut in the middle, tokenised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hici.eval.longbench.datasets import Dataset
from hici.eval.longbench.samples import Sample
from hici.models.generate import encode_prompt


@dataclass(frozen=True)
class Prompt:
    """A prompt, ready to be read.

    Attributes:
        ids: its tokens.
        whole_tokens: of the prompt before it was cut, without chat template.
        kept_tokens: how many of these the cut has kept at most; None: nothing was cut.
    """

    ids: list[int]
    whole_tokens: int
    kept_tokens: int | None


def fill_in(dataset: Dataset, sample: Sample) -> str:
    """The prompt's text."""
    return dataset.prompt.format(context=sample["context"], input=sample["input"])


def cut_middle(tokenizer: Any, text: str, max_length: int) -> str:
    """`text`, or where it has more tokens its first and its last max_length // 2, decoded one by one and joined.

    As LongBench prescribes: the tokenizer's special tokens count, and are left out of the text.
    """
    ids = tokenizer(text, verbose=False)["input_ids"]
    if len(ids) <= max_length:
        return text
    half = max_length // 2
    first, last = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:half], ids[-half:]))
    return str(first + last)


def make_prompt(
    tokenizer: Any, dataset: Dataset, sample: Sample, max_length: int, *, room: int | None = None, chat: bool = False
) -> Prompt:
    """The prompt of a sample, cut to `max_length` tokens.

    Text that is cut may have a few more tokens when it is tokenised again, and a chat template adds some. LongBench
    lets them be; where they are more than `room` (the model's positions without those of the answer), as many more are
    cut as are too many.

    Raises:
        ValueError: max_length below 2; no room for the prompt at all; `chat` without a chat template.
    """
    if max_length < 2:
        raise ValueError(f"max_length={max_length} is below 2, so that no two halves of a prompt are left; give more")
    text = fill_in(dataset, sample)
    whole = len(tokenizer(text, verbose=False)["input_ids"])
    keep = max_length
    while True:
        ids = encode_prompt(tokenizer, cut_middle(tokenizer, text, keep), chat=chat and dataset.chat)
        excess = 0 if room is None else len(ids) - room
        if excess <= 0:
            return Prompt(ids, whole, keep if whole > keep else None)
        keep = min(keep, whole) - excess
        if keep < 2:
            raise ValueError(
                f"the model's positions leave room for {room} tokens of prompt, fewer than the chat template and the "
                f"cut prompt of {dataset.name} need; extend the rope (--rope auto with --max-length), or drop --chat"
            )
