"""Which rows a step trains on, and in how many segments."""

import itertools

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from hici.train.order import TrainingOrder, describe_rows, draw_segments, rows_of_step

ROWS = 7


class NumberedRows:
    """Row i holds the number i."""

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        return {"input_ids": torch.tensor([index]), "labels": torch.tensor([index])}

    def sources(self, index):
        return f"book{index}.txt"


def order(total=4 * ROWS, seed=0):
    return TrainingOrder(NumberedRows(), total, seed)


def read(dataset):
    return [int(dataset[position]["input_ids"]) for position in range(len(dataset))]


def test_every_row_once_a_pass_and_each_pass_in_another_order():
    found = read(order(total=4 * ROWS + 3))
    passes = [found[begin : begin + ROWS] for begin in range(0, 4 * ROWS, ROWS)]
    for one in passes:
        assert sorted(one) == list(range(ROWS))
    assert len({tuple(one) for one in passes}) == 4
    assert list(range(ROWS)) not in passes
    assert len(set(found[4 * ROWS :])) == 3


def test_the_order_is_the_seeds():
    assert read(order(seed=3)) == read(order(seed=3))
    assert len({tuple(read(order(seed=seed))) for seed in range(5)}) == 5
    # a longer run begins as a shorter one
    assert read(order(total=40, seed=3))[: 4 * ROWS] == read(order(seed=3))


def test_random_access_gives_what_reading_in_a_row_gives():
    """A resumed run begins in the middle; an error looks back."""
    dataset = order()
    expected = read(dataset)
    positions = [20, 3, 27, 0, 13, 14, 6, 7]
    assert [int(dataset[p]["input_ids"]) for p in positions] == [expected[p] for p in positions]
    assert [dataset.row(p) for p in positions] == [expected[p] for p in positions]
    assert int(order()[20]["input_ids"]) == expected[20]


DEALS = [(p, b, a) for p, b, a in itertools.product((1, 2, 3, 6), repeat=3) if p * b * a == 6]


@pytest.mark.parametrize("processes, batch, accumulation", DEALS)
def test_a_step_gets_the_same_rows_however_they_are_dealt_out(processes, batch, accumulation):
    """Through accelerate's sharding of batches, as the Trainer reads it."""
    steps = 9  # 54 rows: nearly eight passes
    dataset = order(total=6 * steps, seed=1)
    expected = [read(dataset)[6 * step : 6 * (step + 1)] for step in range(steps)]
    found = [[] for _ in range(steps)]
    for process in range(processes):
        shard = BatchSamplerShard(
            BatchSampler(SequentialSampler(dataset), batch, drop_last=False), processes, process, split_batches=False
        )
        batches = [b["input_ids"].flatten().tolist() for b in DataLoader(dataset, batch_sampler=shard)]
        assert len(batches) == steps * accumulation
        for number, rows in enumerate(batches):
            found[number // accumulation] += rows
    assert [sorted(rows) for rows in found] == [sorted(rows) for rows in expected]
    assert [rows_of_step(dataset, step, 6) for step in range(steps)] == expected


def test_rows_are_described_by_their_documents():
    rows = rows_of_step(order(), 2, 6)
    text = describe_rows(order(), 2, 6)
    assert text == "; ".join(f"row {row} (book{row}.txt)" for row in rows[:4]) + " and 2 more"
    assert describe_rows(order(), 0, 1) == f"row {order().row(0)} (book{order().row(0)}.txt)"


def test_segments_are_drawn_from_the_list_by_seed_and_step():
    counts = [2, 4, 8]
    drawn = [draw_segments(counts, 0, step) for step in range(300)]
    assert set(drawn) == set(counts)
    assert all(70 < drawn.count(count) < 130 for count in counts)  # evenly: 100 each, sd 8
    assert drawn == [draw_segments(counts, 0, step) for step in range(300)]
    assert drawn != [draw_segments(counts, 1, step) for step in range(300)]
    assert all(type(count) is int for count in drawn)
    assert [draw_segments([5], 0, step) for step in range(5)] == [5] * 5


def test_neither_draws_from_the_generator_of_dropout():
    before = torch.get_rng_state()
    draw_segments([2, 4], 0, 0)
    order().row(0)
    assert torch.equal(torch.get_rng_state(), before)
