"""A recipe's data as rows to train on and rows held out."""

from __future__ import annotations

import hashlib
import logging
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hici.data.documents import Document, load_documents
from hici.data.packing import content_hash, pack, split_documents
from hici.models.loss import IGNORE
from hici.train.recipe import Recipe

logger = logging.getLogger(__name__)


class TrainingData(NamedTuple):
    """Rows to train on and held out, where they came from, and what tells them from others."""

    train: Sequences
    heldout: Sequences
    summary: dict[str, Any]
    fingerprint: str


class Sequences(Dataset[dict[str, Tensor]]):
    """Packed sequences [n, T] as a data set. The first token of a row is never a target."""

    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.from_numpy(self.tokens[index])
        labels = ids.clone()
        labels[0] = IGNORE
        return {"input_ids": ids, "labels": labels}

    def __iter__(self) -> Any:
        return (self[i] for i in range(len(self)))

    def sources(self, index: int) -> str:
        return "packed"


def prepare_data(recipe: Recipe, tokenizer: Any, vocab_size: int) -> TrainingData:
    """Documents, the held-out split by document, and packed sequences."""
    documents = load_documents(recipe.data, tokenizer, vocab_size=vocab_size, text_key=recipe.text_key)
    if recipe.heldout_data is not None:
        training = documents
        heldout = load_documents(recipe.heldout_data, tokenizer, vocab_size=vocab_size, text_key=recipe.text_key)
        _refuse_overlap(training, heldout)
    else:
        training, heldout = split_documents(documents, recipe.heldout_fraction if recipe.heldout_windows else 0.0)
    length, eos = recipe.context_length, tokenizer.eos_token_id
    packed = pack(training, length, eos, seed=recipe.seed)
    windows = np.zeros((0, length), dtype=np.int64)
    if recipe.heldout_windows:
        what = f"the held-out part (heldout_fraction {recipe.heldout_fraction}, heldout_data or heldout_windows 0 help)"
        windows = pack(heldout, length, eos, seed=recipe.seed, what=what)[: recipe.heldout_windows]
    summary = {
        "documents": len(training),
        "heldout_documents": len(heldout),
        "sequences": len(packed),
        "tokens": sum(len(d.tokens) for d in training),
        "tokens_outside_of_whole_sequences": sum(len(d.tokens) + (eos is not None) for d in training) - packed.size,
        "heldout_windows": len(windows),
        "heldout_sources": [d.source for d in heldout],
    }
    fingerprint = hashlib.sha256(packed.tobytes()).hexdigest()
    return TrainingData(Sequences(packed), Sequences(windows), summary, fingerprint)


def _refuse_overlap(training: list[Document], heldout: list[Document]) -> None:
    """The same text on both sides would make the held-out loss one of training."""
    trained = {content_hash(document): document.source for document in training}
    both = [(trained[content_hash(d)], d.source) for d in heldout if content_hash(d) in trained]
    if both:
        raise ValueError(
            f"{len(both)} held-out documents are in the training data too, the first one as {both[0][0]} and "
            f"{both[0][1]}; take them out of data or of heldout_data"
        )
