"""Instruction samples into tokens: how a sample becomes text, and which tokens are answers.

A sample is rendered once and cut where its answers begin and end; every piece is tokenised by itself, so that an
answer begins with the token that a model generates behind the prompt. Kinds of tokens: `CONTEXT` is read, `ANSWER` is
learned, `USER` is read too and is the longest message of the user, which may be shortened.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import jinja2
import numpy as np

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


class Rendered(NamedTuple):
    """A sample's text, the characters of its answers, and those of the user's longest message ((0, 0): not found)."""

    text: str
    answers: list[tuple[int, int]]
    user: tuple[int, int]
    close: bool  # the last answer still needs an EOS token behind it


class Encoded(NamedTuple):
    """Token ids of a sample, int64 [t], and their kinds, uint8 [t]."""

    ids: np.ndarray
    kinds: np.ndarray


def check_prompt(prompt: str, tokenizer: Any) -> None:
    """Raise ValueError for an unknown prompt, or for "chat" with a tokenizer that has no chat template."""
    if prompt not in PROMPTS:
        raise ValueError(suggest(prompt, PROMPTS, "prompt"))
    if prompt == "chat" and not _has_template(tokenizer):
        raise ValueError(
            "prompt 'chat' (for messages 'auto' too) needs a chat template, and the tokenizer has none; use prompt: "
            "alpaca or llama2, or the tokenizer of the instruction-tuned model"
        )


def encode_sample(sample: dict[str, Any], tokenizer: Any, prompt: str, place: str) -> Encoded:
    """Tokens of a checked sample (`hici.data.samples.sample_of`) under a prompt.

    Raises:
        ValueError: messages under a prompt that is for instructions; a chat template that refuses the sample or in
            which the answers cannot be found.
    """
    kind = MESSAGES if MESSAGES in sample else INSTRUCTION
    if prompt == "auto":
        prompt = "chat" if kind == MESSAGES or _has_template(tokenizer) else "alpaca"
    if prompt == "chat":
        check_prompt(prompt, tokenizer)
        rendered, begin = render_chat(_as_messages(sample), tokenizer, place), []
    elif kind == MESSAGES:
        raise ValueError(
            f"{place} has messages, but prompt {prompt!r} is for instruction and output; use prompt: chat or auto"
        )
    else:
        rendered, begin = _render_template(sample, TEMPLATES[prompt]), beginning(tokenizer)
    return _tokenise(rendered, tokenizer, begin)


def beginning(tokenizer: Any) -> list[int]:
    """[BOS] where the tokenizer puts one in front of a text by itself, else []."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def _has_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


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


def render_chat(messages: list[dict[str, str]], tokenizer: Any, place: str) -> Rendered:
    """A conversation in the tokenizer's chat template; every assistant turn is an answer, with its end-of-turn token.

    An answer begins where the template would let a model begin it, and ends behind the turn's last special token (white
    space behind that is the template's).

    Raises:
        ValueError: the template refuses the messages, or does not render the beginning of a conversation as the
            beginning of the whole.
    """
    text = _apply(tokenizer, messages, False, place)
    answers, close = [], False
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _apply(tokenizer, messages[:number], True, place)
        through = _apply(tokenizer, messages[: number + 1], False, place)
        if not (through.startswith(before) and text.startswith(through)):
            raise ValueError(
                f"{place}: the tokenizer's chat template does not render the first {number + 1} messages as the "
                "beginning of the whole conversation, so the answers cannot be found; make a sample of each answer, "
                "or use a tokenizer with another template"
            )
        end, close = _answer_end(through, len(before), tokenizer)
        if message["content"].strip():
            answers.append((len(before), end))
    close = close and answers[-1][1] == len(text)
    return Rendered(text, answers, _longest_of_user(messages, text, tokenizer, place), close)


def _longest_of_user(messages: list[dict[str, str]], text: str, tokenizer: Any, place: str) -> tuple[int, int]:
    """Where the user's longest message stands in the rendered conversation; (0, 0): changed by the template."""
    asked = [number for number, message in enumerate(messages) if message["role"] == "user"]
    longest = max(asked, key=lambda number: len(messages[number]["content"]))
    content = messages[longest]["content"].strip()
    # the last place in the conversation up to it: the same words may stand in a message before
    start = _apply(tokenizer, messages[: longest + 1], False, place).rfind(content)
    end = start + len(content)
    return (start, end) if start >= 0 and text[start:end] == content else (0, 0)


def _answer_end(through: str, start: int, tokenizer: Any) -> tuple[int, bool]:
    """(end of the answer, whether no special token closes it)."""
    stripped = through.rstrip()
    if len(stripped) > start and stripped.endswith(tuple(_special_tokens(tokenizer))):
        return len(stripped), False
    return len(through), True


def _special_tokens(tokenizer: Any) -> list[str]:
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*added, *tokenizer.all_special_tokens})


def _apply(tokenizer: Any, messages: list[dict[str, str]], ask: bool, place: str) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask))
    except jinja2.TemplateError as error:
        raise ValueError(
            f"{place}: the tokenizer's chat template refuses the messages ({error}); change the sample, or use a "
            "tokenizer with another template"
        ) from error


def _tokenise(rendered: Rendered, tokenizer: Any, begin: list[int]) -> Encoded:
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
