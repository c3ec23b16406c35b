"""Conversations in a tokenizer's chat template, and where their answers stand in the text."""

from __future__ import annotations

import datetime
from typing import Any, NamedTuple

import jinja2

_TODAY = datetime.datetime(2024, 7, 26)  # for templates that write the date: tokens must not depend on the day
_CODES = [f"%{flag}{letter}" for letter in "aAbBcdDfFHIjmMpSTuwxXyY" for flag in ("", "-")]
# transformers passes plain data only to a template, so the clock is replaced by a macro (its newline is not rendered)
_CLOCK = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f".replace('{code}', '{_TODAY.strftime(code)}')" for code in _CODES)
    + " }}{% endmacro %}\n"
)


class Rendered(NamedTuple):
    """A sample's text, the characters of its answers, and those of the user's longest message ((0, 0): not found)."""

    text: str
    answers: list[tuple[int, int]]
    user: tuple[int, int]
    close: bool  # the last answer still needs an EOS token behind it


class _Turn(NamedTuple):
    """A conversation that ends in an answer: its text, the answer's characters, and whether nothing closes it."""

    text: str
    start: int
    end: int
    open: bool


def has_template(tokenizer: Any) -> bool:
    """Whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def render_chat(messages: list[dict[str, str]], tokenizer: Any, place: str) -> list[Rendered]:
    """A conversation in the tokenizer's chat template; every assistant turn is an answer, with its end-of-turn token.

    An answer begins where the template would let a model begin it, and ends behind the turn's last special token (white
    space behind that is the template's). One text holds all answers where the template renders the beginning of a
    conversation as the beginning of the whole; where it rewrites earlier turns, each answer has a text of its own, the
    conversation up to it.

    Raises:
        ValueError: the template refuses the messages, or does not show where an answer begins.
    """
    answered = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    text = _apply(tokenizer, messages, False, place)
    turns = [_turn(messages[: number + 1], tokenizer, place) for number in answered]
    learned = [
        (number, turn) for number, turn in zip(answered, turns, strict=True) if messages[number]["content"].strip()
    ]
    if all(text.startswith(turn.text) for turn in turns):
        spans = [(turn.start, turn.end) for _, turn in learned]
        close = learned[-1][1].open and spans[-1][1] == len(text)
        return [Rendered(text, spans, _longest_of_user(messages, text, tokenizer, place), close)]
    return [
        Rendered(
            turn.text,
            [(turn.start, turn.end)],
            _longest_of_user(messages[: number + 1], turn.text, tokenizer, place),
            turn.open,
        )
        for number, turn in learned
    ]


def _turn(messages: list[dict[str, str]], tokenizer: Any, place: str) -> _Turn:
    """Where the answer that is the last message stands."""
    before = _apply(tokenizer, messages[:-1], True, place)
    text = _apply(tokenizer, messages, False, place)
    if not text.startswith(before):
        raise ValueError(
            f"{place}: the tokenizer's chat template renders the {len(messages) - 1} messages before an answer not as "
            "the beginning of the conversation with it, so the answer cannot be found; use prompt: alpaca or llama2, "
            "or a tokenizer with another template"
        )
    start = len(before)
    if before == _apply(tokenizer, messages[:-1], False, place):
        start += len(_header(messages, before, text, tokenizer, place))
    stripped = text.rstrip()
    closed = len(stripped) > start and stripped.endswith(tuple(_special_tokens(tokenizer)))
    return _Turn(text, start, len(stripped) if closed else len(text), not closed)


def _header(messages: list[dict[str, str]], before: str, text: str, tokenizer: Any, place: str) -> str:
    """What a template that ignores add_generation_prompt writes in front of an answer's content; "": white space.

    It is what two other answers have in common.
    """
    others = [
        _apply(tokenizer, [*messages[:-1], {**messages[-1], "content": content}], False, place)
        for content in ("a", "b")
    ]
    differ = next((i for i, (a, b) in enumerate(zip(*others, strict=False)) if a != b), 0)
    common = others[0][:differ]
    if not (differ and common.startswith(before) and text.startswith(common)):
        raise ValueError(
            f"{place}: the tokenizer's chat template ignores add_generation_prompt and does not show where an answer "
            "begins; use prompt: alpaca or llama2, or a tokenizer with another template"
        )
    header = common[len(before) :]
    # a space in front of a word is the word's, as in most tokenizers
    return header.rstrip(" ") if header.strip() else ""


def _longest_of_user(messages: list[dict[str, str]], text: str, tokenizer: Any, place: str) -> tuple[int, int]:
    """Where the user's longest message stands in the rendered conversation; (0, 0): changed by the template."""
    asked = [number for number, message in enumerate(messages) if message["role"] == "user"]
    longest = max(asked, key=lambda number: len(messages[number]["content"]))
    content = messages[longest]["content"].strip()
    # the last place in the conversation up to it: the same words may stand in a message before
    start = _apply(tokenizer, messages[: longest + 1], False, place).rfind(content)
    end = start + len(content)
    return (start, end) if start >= 0 and text[start:end] == content else (0, 0)


def _special_tokens(tokenizer: Any) -> list[str]:
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*added, *tokenizer.all_special_tokens})


def _apply(tokenizer: Any, messages: list[dict[str, str]], ask: bool, place: str) -> str:
    try:
        template = tokenizer.get_chat_template()
        template = _CLOCK + template if "strftime_now" in template else None
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask, chat_template=template)
        )
    except jinja2.TemplateError as error:
        raise ValueError(
            f"{place}: the tokenizer's chat template refuses the messages ({error}); change the sample, or use a "
            "tokenizer with another template"
        ) from error
