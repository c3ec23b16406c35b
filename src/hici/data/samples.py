"""Records checked: the text of a document, or the messages or instruction of a sample."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from hici.data.sources import Record
from hici.registry import suggest

INSTRUCTION = "instruction"
MESSAGES = "messages"
ROLES = ("system", "user", "assistant")

_BLOCK = 2**20  # letters of a text looked at a time: words of a long one need much memory

Sample = str | dict[str, Any]  # a document's text, or the checked columns of an instruction sample


def letters(sample: Any) -> int:
    """Letters of everything in a sample or in a list of samples."""
    if isinstance(sample, str):
        return len(sample)
    return sum(letters(value) for value in (sample.values() if isinstance(sample, dict) else sample))


def plain_digest(sample: Any) -> bytes:
    """SHA-256 of everything in a sample without its white space."""
    digest = hashlib.sha256()
    for text in _texts(sample):
        for begin in range(0, len(text), _BLOCK):
            digest.update("".join(text[begin : begin + _BLOCK].split()).encode())
        digest.update(b"\n")
    return digest.digest()


def _texts(sample: Any) -> Iterator[str]:
    if isinstance(sample, str):
        yield sample
        return
    for value in [sample[key] for key in sorted(sample)] if isinstance(sample, dict) else sample:
        yield from _texts(value)


def text_of(record: Record, key: str) -> str:
    """The record's text; "" where its column is null or white space.

    Raises:
        ValueError: no such column, or one that holds something else than text.
    """
    if isinstance(record.value, str):
        return record.value
    if key not in record.value:
        raise ValueError(
            f"{record.place} has no text under {key!r}: "
            + suggest(key, map(str, record.value), "column", "Name the text's column with text_key.")
        )
    value = record.value[key]
    if value is not None and not isinstance(value, str):
        raise ValueError(
            f"{record.place} holds {type(value).__name__} under {key!r}, but a document is text; name the text's "
            "column with text_key, or use data_format: instruction"
        )
    return _sound(value, record.place) if value is not None and value.strip() else ""


def sample_of(record: Record) -> dict[str, Any] | None:
    """The columns of an instruction sample: `messages`, or `instruction`, `input` and `output`; None: no answer.

    Raises:
        ValueError: a plain text; neither kind of columns; messages without a user or in another form.
    """
    value = record.value
    if isinstance(value, str):
        raise ValueError(
            f"{record.place} is plain text, but data_format is instruction, whose samples are records with "
            "instruction and output, or messages; take it out of the data or use data_format: text"
        )
    if value.get(MESSAGES) is not None:
        messages = [_message(message, record.place) for message in _list(value[MESSAGES], record.place)]
        _check_turns(messages, record.place)
        return (
            {MESSAGES: messages} if any(m["role"] == "assistant" and m["content"].strip() for m in messages) else None
        )
    columns = {key: _column(value, key, record.place) for key in ("instruction", "output")}
    if not columns["output"].strip():
        return None
    return {**columns, "input": _column({"input": "", **value}, "input", record.place)}


def _column(value: dict[str, Any], key: str, place: str) -> str:
    if key not in value:
        raise ValueError(
            f"{place} is no instruction sample, which has instruction, output and perhaps input, or messages: "
            + suggest(key, map(str, value), "column", "Rename it, or use data_format: text.")
        )
    if value[key] is not None and not isinstance(value[key], str):
        raise ValueError(
            f"{place} holds {type(value[key]).__name__} under {key!r}, but text is needed; write it as text"
        )
    return _sound(value[key] or "", place)


def _sound(text: str, place: str) -> str:
    """The text, unless it holds half a letter: JSON can, no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place} holds {text[error.start]!r}, half of a surrogate pair and no letter; write the text anew"
        ) from error
    return text


def _list(value: Any, place: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(
            f"{place}: messages is {type(value).__name__}, but it is a list of role and content; correct it"
        )
    return value


def _message(message: Any, place: str) -> dict[str, str]:
    if not isinstance(message, dict) or not {"role", "content"} <= set(message):
        raise ValueError(f"{place}: a message is {message!r:.80}, but it has a role and a content; correct it")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise ValueError(f"{place}: " + suggest(str(role), ROLES, "role of a message", "Rename or remove it."))
    if not isinstance(content, str):
        raise ValueError(f"{place}: the content of a message is {type(content).__name__}, but it is text; correct it")
    return {"role": role, "content": _sound(content, place)}


def _check_turns(messages: list[dict[str, str]], place: str) -> None:
    answered = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if answered and not any(message["role"] == "user" for message in messages[: answered[0]]):
        raise ValueError(f"{place}: the assistant answers before the user asks; put the user's message first")
