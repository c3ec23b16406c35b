"""Texts and samples into tokens, and the fingerprint of everything that decides which tokens they become."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

from hici.data.prompts import TEMPLATES, Encoded, check_prompt, encode_sample
from hici.data.samples import INSTRUCTION, Sample, sample_of, text_of
from hici.data.sources import Record

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

    def encode(self, samples: list[tuple[str, Sample]]) -> list[list[Encoded]]:
        """Tokens of (place, checked sample) pairs: one document of each, or some, see `hici.data.prompts`.

        A text has no special tokens and no kinds (an empty array).
        """
        if self.data_format == INSTRUCTION:
            return [encode_sample(dict(sample), self.tokenizer, self.prompt, place) for place, sample in samples]  # type: ignore[arg-type]
        # verbose=False: a document may be longer than the tokenizer's idea of the model's context; it is packed later
        ids = self.tokenizer([text for _, text in samples], add_special_tokens=False, verbose=False)["input_ids"]
        return [[Encoded(np.asarray(row, dtype=np.int64), np.zeros(0, dtype=np.uint8))] for row in ids]

    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer, the format and the prompt: equal where the same input gives the same tokens."""
        facts: dict[str, Any] = {"version": _VERSION, "format": self.data_format, "tokenizer": self._tokenizer_facts()}
        if self.data_format == INSTRUCTION:
            facts |= {
                "prompt": self.prompt,
                "templates": TEMPLATES,
                "chat_template": getattr(self.tokenizer, "chat_template", None),
            }
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()

    def _tokenizer_facts(self) -> dict[str, Any]:
        tokenizer = self.tokenizer
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
