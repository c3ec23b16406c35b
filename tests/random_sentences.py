"""Texts of a few simple words. Nothing here is a test."""

from __future__ import annotations

import random

TEXT = "the a cat dog river mountain runs sees under over quickly slowly and then while blue old house tree sings"
WORDS = TEXT.split()


def sentences(count, seed=0):
    generator = random.Random(seed)
    return "\n".join(" ".join(generator.choices(WORDS, k=9)) + "." for _ in range(count)) + "\n"
