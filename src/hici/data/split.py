"""The held-out split by document, and the refusal of the same document on both sides."""

from __future__ import annotations

import logging

import numpy as np

from hici.data.documents import Documents

logger = logging.getLogger(__name__)


def split_documents(documents: Documents, fraction: float) -> tuple[Documents, Documents]:
    """(training, held out): whole documents, chosen by a hash of their tokens.

    The same documents give the same split in any order, and the same text is never on both sides, nor one with other
    white space, nor another sample of the same conversation. (Other documents
    can give another split: hold out files of their own to compare runs on different data.) `fraction` is of tokens
    and approximate: documents are taken in the order of their hash, without those that would overshoot twice; a share
    that is far from it is logged.

    Raises:
        ValueError: a fraction outside of [0, 1); fewer than two documents with a fraction above 0.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"held-out fraction {fraction} is not in [0, 1); give for example 0.05")
    if fraction == 0:
        return documents, documents.select(np.zeros(0, dtype=np.int64))
    by_content = _by_content(documents)
    if len(by_content) < 2:
        raise ValueError(
            f"a held-out split by document needs two different documents, but the data has {len(by_content)}; give "
            "more files, heldout_data of its own, or heldout_windows: 0"
        )
    wanted = fraction * int(documents.size.sum())
    sizes = {key: sum(int(documents.size[i]) for i in by_content[key]) for key in sorted(by_content)}
    chosen: set[bytes] = set()
    tokens = 0
    for key, size in list(sizes.items())[:-1]:  # at least one stays for training
        if tokens < wanted and tokens + size <= 2 * wanted:
            chosen.add(key)
            tokens += size
    if not chosen:
        smallest = min(sizes, key=lambda key: sizes[key])
        chosen, tokens = {smallest}, sizes[smallest]
    if not 0.5 * wanted <= tokens <= 2 * wanted:
        logger.warning(
            "%.1f %% of the tokens are held out instead of %.1f %%, since documents are held out whole; split long "
            "documents, or give held-out data of its own", 100 * fraction * tokens / wanted, 100 * fraction,
        )  # fmt: skip
    train = [i for key, group in by_content.items() if key not in chosen for i in group]
    heldout = [i for key, group in by_content.items() if key in chosen for i in group]
    return documents.select(np.array(train)), documents.select(np.array(heldout))


def _by_content(documents: Documents) -> dict[bytes, list[int]]:
    """Documents that stay together, under the lowest hash of their tokens: those of equal tokens or `plain`."""
    leader: dict[bytes, bytes] = {}  # of each key: another one of its group, or itself

    def lead(key: bytes) -> bytes:
        while leader.setdefault(key, key) != key:
            leader[key] = leader[leader[key]]  # half the way for the next time
            key = leader[key]
        return key

    hashes, plain = _rows(documents.hashes), _rows(documents.plain)
    for own, other in zip(hashes, plain, strict=True):
        leader[lead(own)] = lead(other)
    groups: dict[bytes, list[int]] = {}
    for i, key in enumerate(hashes):
        groups.setdefault(lead(key), []).append(i)
    return {min(hashes[i] for i in group): group for group in groups.values()}


def _rows(hashes: np.ndarray) -> list[bytes]:
    return [row.tobytes() for row in hashes]


def refuse_overlap(training: Documents, heldout: Documents) -> None:
    """Raise ValueError for a document on both sides: its held-out loss would be one of training."""
    trained = {key: i for hashes in (training.hashes, training.plain) for i, key in enumerate(_rows(hashes))}
    pairs = zip(_rows(heldout.hashes), _rows(heldout.plain), strict=True)
    both = [(i, keys[0] if keys[0] in trained else keys[1]) for i, keys in enumerate(pairs) if trained.keys() & keys]
    if both:
        first, key = both[0]
        raise ValueError(
            f"{len(both)} held-out documents are in the training data too (but for white space), the "
            f"first one as {training.source(trained[key])} and {heldout.source(first)}; take them out of data or "
            "of heldout_data"
        )
