"""Texts and samples into tokens, and the fingerprint of everything that decides which tokens they become."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from hici.data.prompts import TEMPLATES, Encoded, check_prompt, encode_sample
from hici.data.samples import INSTRUCTION, Sample, letters, sample_of, text_of
from hici.data.sources import Record
from hici.data.stretches import is_long, long_text_ids

TEXT = "text"
FORMATS = (TEXT, INSTRUCTION)
_VERSION = 2  # of the tokens that this package makes of the same input; counts in every fingerprint


class Encoder:
    """A tokenizer with the format of the data.

    Args:
        tokenizer: of transformers; instruction data needs a fast one (places of tokens in the text).
        data_format: "text" or "instruction".
        text_key: the text's column ("text").
        prompt: how a sample becomes text ("instruction"); see `hici.data.prompts`.

    Raises:
        ValueError: an unknown prompt; one that this tokenizer cannot give; a slow tokenizer for instruction data.
    """

    def __init__(
        self, tokenizer: Any, data_format: str = TEXT, *, text_key: str = "text", prompt: str = "auto"
    ) -> None:
        if data_format == INSTRUCTION:
            check_prompt(prompt, tokenizer)
            if not getattr(tokenizer, "is_fast", False):
                raise ValueError(
                    f"instruction data needs a fast tokenizer, and {type(tokenizer).__name__} is a slow one; give one "
                    "with a tokenizer.json"
                )
        self.tokenizer = tokenizer
        self.data_format = data_format
        self.text_key = text_key
        self.prompt = prompt

    def check(self, record: Record) -> Sample | None:
        """The record's text or sample; None where there is nothing to learn (white space, no answer).

        Raises:
            ValueError: wrong columns; see `hici.data.samples`.
        """
        if self.data_format == INSTRUCTION:
            return sample_of(record)
        return text_of(record, self.text_key) or None

    def encode(
        self, samples: list[tuple[str, Sample]], advance: Callable[[int], None] = lambda letters: None
    ) -> list[list[Encoded]]:
        """Tokens of (place, checked sample) pairs: one document of each, or some, see `hici.data.prompts`.

        A text has no special tokens, whatever is written in it, and no kinds (an empty array). `advance` is told of
        the letters done.
        """
        if self.data_format == INSTRUCTION:
            found = [encode_sample(dict(sample), self.tokenizer, self.prompt, place) for place, sample in samples]  # type: ignore[arg-type]
            advance(sum(letters(sample) for _, sample in samples))
            return found
        ids = self._text_ids([str(text) for _, text in samples], advance)
        return [[Encoded(row, np.zeros(0, dtype=np.uint8))] for row in ids]

    def _text_ids(self, texts: list[str], advance: Callable[[int], None]) -> list[np.ndarray]:
        """Tokens of texts, long ones a stretch at a time: int64 [t] each."""
        fast = getattr(self.tokenizer, "is_fast", False)  # only these say where their tokens stand
        long = [fast and is_long(text) for text in texts]
        short = [text for text, is_one in zip(texts, long, strict=True) if not is_one]
        rows = iter(self._whole_ids(short) if short else [])
        advance(sum(map(len, short)))
        return [
            long_text_ids(text, self.tokenizer, advance) if is_one else np.asarray(next(rows), dtype=np.int64)
            for text, is_one in zip(texts, long, strict=True)
        ]

    def _whole_ids(self, texts: list[str]) -> list[list[int]]:
        # split: what looks like a special token in a text is letters
        # verbose=False: a document may be longer than the tokenizer's idea of the model's context; it is packed later
        encoded = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)
        return list(encoded["input_ids"])

    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer, the format and the prompt: equal where the same input gives the same tokens."""
        facts: dict[str, Any] = {
            "version": _VERSION,
            "format": self.data_format,
            "tokenizer": _tokenizer_facts(self.tokenizer),
        }
        if self.data_format == INSTRUCTION:
            facts |= {
                "prompt": self.prompt,
                "templates": TEMPLATES,
                "chat_template": getattr(self.tokenizer, "chat_template", None),
            }
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of the tokenizer and its chat template: equal where a text or conversation gives the same tokens."""
    facts = {**_tokenizer_facts(tokenizer), "chat_template": getattr(tokenizer, "chat_template", None)}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _tokenizer_facts(tokenizer: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "special": sorted(tokenizer.all_special_tokens),
    }
    if getattr(tokenizer, "is_fast", False):
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        # how the last call padded or cut is left in the backend, and is no part of the tokenizer
        return facts | {"backend": {k: v for k, v in backend.items() if k not in ("padding", "truncation")}}
    return facts | {"class": type(tokenizer).__name__, "vocabulary": sorted(tokenizer.get_vocab().items()),
                    "settings": sorted(map(str, tokenizer.init_kwargs.items()))}  # fmt: skip
