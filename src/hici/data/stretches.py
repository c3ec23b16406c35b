"""Long texts into tokens, a stretch at a time: a fast tokenizer holds some 160 bytes a letter while it works on a text.

Stretches overlap, and the seam lies where both give the same tokens at the same letters, well inside of the overlap. So
the tokens are those of the whole text for every tokenizer whose tokens depend on letters nearby only, as all do that
split a text into words. Where there is no such place, the stretch grows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

_STRETCH = 2**19  # letters; shorter texts are tokenised whole
_OVERLAP = 2**12  # letters
_EQUAL = 16  # tokens on each side of a seam


def long_text_ids(text: str, tokenizer: Any, advance: Callable[[int], None]) -> np.ndarray:
    """Tokens of a text of any length, without special tokens: int64 [t]. `advance` is told of letters done."""
    parts: list[np.ndarray] = []
    start, first = 0, 0  # of the stretch in the text; first of its tokens that is not in `parts`
    size = _STRETCH
    tokens = _tokens(text, start, start + size, tokenizer)
    while start + size < len(text):
        following = start + size - _OVERLAP
        more = _tokens(text, following, following + _STRETCH, tokenizer)
        seam = _seam(tokens, more, following + _OVERLAP // 2)
        if seam is None:
            size += _STRETCH
            tokens = _tokens(text, start, start + size, tokenizer)
            continue
        parts.append(tokens[first : seam[0], 0].copy())
        advance(following - start)
        start, first, size, tokens = following, seam[1], _STRETCH, more
    parts.append(tokens[first:, 0])
    advance(len(text) - start)
    return np.concatenate(parts)


def is_long(text: str) -> bool:
    """Whether a text is more than one stretch."""
    return len(text) > _STRETCH


def _tokens(text: str, start: int, stop: int, tokenizer: Any) -> np.ndarray:
    """(id, first letter, letter behind the last), in letters of the whole text, of each token: int64 [t, 3]."""
    encoded = tokenizer(
        text[start:stop],
        add_special_tokens=False,
        split_special_tokens=True,
        return_offsets_mapping=True,
        verbose=False,
    )
    ids = np.asarray(encoded["input_ids"], dtype=np.int64)
    spans = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    return np.column_stack([ids, spans + start])


def _seam(left: np.ndarray, right: np.ndarray, middle: int) -> tuple[int, int] | None:
    """Where the tokens of two stretches can be joined: (end of left, beginning of right); None: nowhere."""
    i, j = (int(np.searchsorted(tokens[:, 1], middle)) for tokens in (left, right))
    if min(i, j, len(left) - i, len(right) - j) < _EQUAL:
        return None
    equal = np.array_equal(left[i - _EQUAL : i + _EQUAL], right[j - _EQUAL : j + _EQUAL])
    return (i, j) if equal else None
