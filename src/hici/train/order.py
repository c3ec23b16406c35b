"""Which rows a step trains on, and in how many segments: functions of the seed and the step alone.

So a resumed run, another number of processes and the recomputation of gradient checkpointing see the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from hici.data.packing import Rows

_SEGMENTS = 1  # streams of randomness beside one another under one seed
_ROWS = 2


class TrainingOrder(Dataset[dict[str, Tensor]]):
    """`total` rows: all of `rows` in an order drawn by the seed, then all of them in another one, and so on.

    Reading it from front to back deals out the same rows to a step whatever the number of processes, as long as the
    step's number of rows is the same.
    """

    def __init__(self, rows: Rows, total: int, seed: int) -> None:
        self.rows = rows
        self.total = total
        self.seed = seed
        self._order: tuple[int, np.ndarray] | None = None  # of the present pass

    def __len__(self) -> int:
        return self.total

    def row(self, position: int) -> int:
        """The row that stands at a position."""
        turn, place = divmod(position, len(self.rows))
        if self._order is None or self._order[0] != turn:
            generator = np.random.default_rng([self.seed, _ROWS, turn])
            self._order = (turn, generator.permutation(len(self.rows)))
        return int(self._order[1][place])

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        return self.rows[self.row(position)]


def draw_segments(counts: list[int], seed: int, step: int) -> int:
    """The number of segments of an optimizer step (from 0), drawn evenly from `counts`."""
    return int(np.random.default_rng([seed, _SEGMENTS, step]).choice(counts))


def rows_of_step(order: TrainingOrder, step: int, rows_a_step: int) -> list[int]:
    """The rows of an optimizer step (from 0), over all processes and accumulated batches."""
    return [order.row(position) for position in range(step * rows_a_step, (step + 1) * rows_a_step)]


def describe_rows(order: TrainingOrder, step: int, rows_a_step: int) -> str:
    """The rows of a step and their documents, for an error."""
    rows: list[Any] = rows_of_step(order, step, rows_a_step)
    shown = "; ".join(f"row {row} ({order.rows.sources(row)})" for row in rows[:4])
    return shown + (f" and {len(rows) - 4} more" if len(rows) > 4 else "")
