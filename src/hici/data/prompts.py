"""Instruction samples into tokens: how a sample becomes text, and which tokens are answers.

A conversation is tokenised whole, as it is when a model is asked, and a token is learned when all of it is an answer's.
The fixed prompts are cut where the answer begins; both parts are tokenised by themselves, so that the answer begins
with the token that a model generates behind the prompt. Kinds of tokens: `CONTEXT` is read, `ANSWER` is learned,
`USER` is read too and is the longest message of the user, which may be shortened.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np

from hici.data.chat import Rendered, has_template, render_chat
from hici.data.samples import INSTRUCTION, MESSAGES
from hici.registry import suggest

CONTEXT, ANSWER, USER = 0, 1, 2
PROMPTS = ("auto", "alpaca", "llama2", "chat")

# the two texts of Alpaca's format
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
# one turn between Llama 2's brackets
_LLAMA2 = "[INST] {instruction} [/INST]"
_LLAMA2_INPUT = "[INST] {instruction}\n{input} [/INST]"
TEMPLATES = {"alpaca": (_ALPACA, _ALPACA_INPUT), "llama2": (_LLAMA2, _LLAMA2_INPUT)}


class Encoded(NamedTuple):
    """Token ids of a sample, int64 [t], and their kinds, uint8 [t]."""

    ids: np.ndarray
    kinds: np.ndarray


def check_prompt(prompt: str, tokenizer: Any) -> None:
    """Raise ValueError for an unknown prompt, or for "chat" with a tokenizer that has no chat template."""
    if prompt not in PROMPTS:
        raise ValueError(suggest(prompt, PROMPTS, "prompt"))
    if prompt == "chat" and not has_template(tokenizer):
        raise ValueError(
            "prompt 'chat' (for messages 'auto' too) needs a chat template, and the tokenizer has none; use prompt: "
            "alpaca or llama2, or the tokenizer of the instruction-tuned model"
        )


def encode_sample(sample: dict[str, Any], tokenizer: Any, prompt: str, place: str) -> list[Encoded]:
    """Tokens of a checked sample (`hici.data.samples.sample_of`) under a prompt.

    One, or one for each answer where the chat template rewrites earlier turns.

    Raises:
        ValueError: messages under a prompt that is for instructions; a chat template that refuses the sample or in
            which the answers cannot be found; a tokenizer that does not say where its tokens stand in the text.
    """
    kind = MESSAGES if MESSAGES in sample else INSTRUCTION
    if prompt == "auto":
        prompt = "chat" if kind == MESSAGES or has_template(tokenizer) else "alpaca"
    if prompt == "chat":
        check_prompt(prompt, tokenizer)
        return [
            _tokenise_whole(rendered, tokenizer) for rendered in render_chat(_as_messages(sample), tokenizer, place)
        ]
    if kind == MESSAGES:
        raise ValueError(
            f"{place} has messages, but prompt {prompt!r} is for instruction and output; use prompt: chat or auto"
        )
    return [_tokenise_parts(_render_template(sample, TEMPLATES[prompt]), tokenizer, beginning(tokenizer))]


def beginning(tokenizer: Any) -> list[int]:
    """[BOS] where the tokenizer puts one in front of a text by itself, else []."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def _as_messages(sample: dict[str, Any]) -> list[dict[str, str]]:
    if MESSAGES in sample:
        return list(sample[MESSAGES])
    question = f"{sample['instruction']}\n\n{sample['input']}" if sample["input"].strip() else sample["instruction"]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": sample["output"]}]


def _render_template(sample: dict[str, Any], templates: tuple[str, str]) -> Rendered:
    with_input = bool(sample["input"].strip())
    template = templates[with_input]
    longest = "input" if with_input and len(sample["input"]) > len(sample["instruction"]) else "instruction"
    before, _, behind = template.partition("{" + longest + "}")
    head, tail = _fill(before, sample), _fill(behind, sample)
    text = head + sample[longest] + tail
    return Rendered(
        text + sample["output"],
        [(len(text), len(text) + len(sample["output"]))],
        (len(head), len(head) + len(sample[longest])),
        close=True,
    )


def _fill(template: str, sample: dict[str, Any]) -> str:
    """`template` with the one name that it may hold; braces in the user's words stay as they are."""
    for name in ("instruction", "input"):
        before, found, behind = template.partition("{" + name + "}")
        if found:
            return before + sample[name] + behind
    return template


def _tokenise_whole(rendered: Rendered, tokenizer: Any) -> Encoded:
    """Tokens of the whole text; one that lies across the border of an answer is no part of it."""
    encoded = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    kinds = np.full(len(spans), CONTEXT, dtype=np.uint8)
    for (start, end), kind in [(rendered.user, USER), *((answer, ANSWER) for answer in rendered.answers)]:
        kinds[(start <= spans[:, 0]) & (spans[:, 0] < end) & (spans[:, 1] <= end)] = kind
    ids = np.asarray(encoded["input_ids"], dtype=np.int64)
    if rendered.close and tokenizer.eos_token_id is not None:
        ids, kinds = np.append(ids, tokenizer.eos_token_id), np.append(kinds, np.uint8(ANSWER))
    return Encoded(ids, kinds)


def _tokenise_parts(rendered: Rendered, tokenizer: Any, begin: list[int]) -> Encoded:
    ids, kinds = list(begin), [CONTEXT] * len(begin)
    cuts = [0, *(cut for answer in rendered.answers for cut in answer), len(rendered.text)]
    for number, (start, end) in enumerate(itertools.pairwise(cuts)):
        if start == end:
            continue
        answer = number % 2 == 1
        encoded = tokenizer(
            rendered.text[start:end], add_special_tokens=False, return_offsets_mapping=not answer, verbose=False
        )
        ids += encoded["input_ids"]
        if answer:
            kinds += [ANSWER] * len(encoded["input_ids"])
        else:
            kinds += [
                USER if rendered.user[0] <= start + a < start + b <= rendered.user[1] else CONTEXT
                for a, b in encoded["offset_mapping"]
            ]
    if rendered.close and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
        kinds.append(ANSWER)
    return Encoded(np.asarray(ids, dtype=np.int64), np.asarray(kinds, dtype=np.uint8))
