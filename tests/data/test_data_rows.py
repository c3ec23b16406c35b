"""Documents into rows: nothing lost but the counted rest, nothing on both sides, batches padded."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hici.data.packing import DocumentRows, PackedRows, collate
from hici.data.split import split_documents

EOS = 9
TOKENS = st.lists(st.lists(st.integers(10, 99), min_size=1, max_size=30), min_size=1, max_size=8)


def ids(rows):
    return [row["input_ids"].tolist() for row in rows]


@given(TOKENS, st.integers(2, 20), st.integers(0, 3), st.sampled_from([EOS, None]))
def test_packing_loses_nothing_but_the_counted_rest(documents, texts, length, seed, eos):
    table = documents(*texts)
    rows = PackedRows(table, length, seed, eos)
    end = [] if eos is None else [eos]
    stream = [token for i in rows.order for token in texts[i] + end]
    assert sorted(rows.order) == list(range(len(texts)))
    got = ids(rows)
    assert all(len(row) == length for row in got)
    assert list(itertools.chain(*got)) == stream[: len(stream) - rows.left_out]
    assert rows.left_out < length
    for i, row in enumerate(rows):
        assert row["labels"].tolist() == [-100, *got[i][1:]]
        assert row["input_ids"].dtype == row["labels"].dtype == torch.int64
        # the documents that a row names are those that its tokens are from
        begin, parts = i * length, set()
        place = 0
        for document in rows.order:
            size = len(texts[document]) + len(end)
            if place < begin + length and place + size > begin:
                parts.add(document)
            place += size
        assert set(rows.parts(i)) == parts


@given(TOKENS, st.integers(2, 20), st.sampled_from([EOS, None]))
def test_one_document_a_row_loses_nothing_but_single_tokens(documents, texts, length, eos):
    table = documents(*texts)
    rows = DocumentRows(table, length, 0, eos)
    want = []
    for document in rows.order:
        whole = texts[document] + ([] if eos is None else [eos])
        want += [(document, whole[i : i + length]) for i in range(0, len(whole), length)]
    kept = [(document, piece) for document, piece in want if len(piece) > 1]
    assert ids(rows) == [piece for _, piece in kept]
    assert [rows.parts(i) for i in range(len(rows))] == [[document] for document, _ in kept]
    assert rows.left_out == len(want) - len(kept)
    assert all((row["labels"] == -100).tolist() == [True] + [False] * (len(row["labels"]) - 1) for row in rows)


def test_the_order_is_the_seeds_and_a_limit_takes_the_first(documents):
    table = documents(*([i] * 5 for i in range(10, 30)))
    rows = [ids(PackedRows(table, 8, seed, EOS)) for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]
    assert rows[0] != ids(PackedRows(table, 8, 0, None))
    limited = PackedRows(table, 8, 0, EOS, limit=3)
    assert (ids(limited), limited.available) == (rows[0][:3], 15)
    with pytest.raises(IndexError):
        limited[3]
    with pytest.raises(IndexError):
        limited[-1]


def test_a_batch_is_padded_on_the_right_and_masked_only_then():
    rows = [{"input_ids": torch.tensor(x), "labels": torch.tensor([-100, *x[1:]])} for x in ([5, 6, 7], [8, 9], [4])]
    batch = collate(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0], [4, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100], [-100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0]]
    assert set(collate([rows[0], rows[0]])) == {"input_ids", "labels"}


def test_rows_are_read_from_disk_in_a_worker_too(documents):
    rows = PackedRows(documents(range(10, 40), range(50, 90)), 6, 0, EOS)
    first = ids(rows)  # maps the file, which no process inherits
    loader = torch.utils.data.DataLoader(rows, batch_size=2, collate_fn=collate, num_workers=1)
    assert [row for batch in loader for row in batch["input_ids"].tolist()] == first


def test_documents_that_are_shorter_than_the_context(prepared, write, caplog):
    path = write("a.jsonl", [{"text": "abc"}, {"text": "defgh"}])
    assert [len(x) for x in ids(prepared(path, length=5).train)] == [5, 5]  # 3 + 1 + 5 + 1 tokens in a row
    assert not caplog.text
    data = prepared(path, length=20, packing="document")
    assert sorted(len(x) for x in ids(data.train)) == [4, 6]
    assert "every document is shorter than the context of 20 tokens (the longest has 5)" in caplog.text
    with pytest.raises(ValueError, match="the data has 10 tokens, fewer than one sequence of 20; give more text or"):
        prepared(path, length=20)


def test_what_is_cut_is_told(prepared, write, caplog):
    caplog.set_level("INFO")
    path = write("a.jsonl", [{"text": "abcdefgh"}, {"text": "ij"}])
    data = prepared(path, length=4, packing="document")
    assert "1 of 2 documents are longer than 4 tokens: each is cut" in caplog.text
    assert "shorter than the context" not in caplog.text
    assert data.summary["sequences"] == 3
    assert data.summary["tokens_outside_of_whole_sequences"] == 1  # the EOS alone behind two whole rows
    one = write("one.txt", "a")
    with pytest.raises(ValueError, match="the held-out part .* has 0 documents and no row"):
        prepared(path, packing="document", heldout_windows=1, heldout_fraction=0.0)
    assert prepared(one, packing="document").summary["sequences"] == 1


def sources(table):
    return {table.source(i).split("#")[1] for i in range(len(table))}


def test_split_is_by_document_stable_and_without_overlap(documents):
    texts = [[i] * 10 for i in range(10, 50)]
    train, heldout = split_documents(documents(*texts), 0.25)
    assert len(heldout) == 10
    assert sources(train) | sources(heldout) == {str(i) for i in range(40)}
    assert not sources(train) & sources(heldout)
    contents = lambda table: {int(table.tokens(i)[0]) for i in range(len(table))}  # noqa: E731
    assert contents(split_documents(documents(*texts[::-1]), 0.25)[1]) == contents(heldout)


@pytest.mark.parametrize("large", range(5))
def test_one_large_document_is_not_held_out(large, documents, caplog):
    table = documents(*(range(i + 1, i + 1 + (5000 if i == large else 40)) for i in range(5)))
    heldout = split_documents(table, 0.02)[1]
    assert sources(heldout) != {str(large)}
    assert heldout.size.sum() <= 2 * 0.02 * 5160
    assert not caplog.text


def test_a_share_that_is_far_off_is_said(documents, caplog):
    train, heldout = split_documents(documents(*(range(i, i + 50) for i in range(1, 5))), 0.02)
    assert (len(train), len(heldout)) == (3, 1)
    assert "25.0 % of the tokens are held out instead of 2.0 %" in caplog.text


def test_equal_texts_stay_on_one_side(documents):
    sides = split_documents(documents(*([i] * 4 for i in range(10, 20) for _ in range(3))), 0.3)
    train, heldout = ({int(side.tokens(i)[0]) for i in range(len(side))} for side in sides)
    assert heldout
    assert not train & heldout


def test_split_refusals(documents):
    two = documents([1, 2], [3, 4])
    assert len(split_documents(two, 0.0)[1]) == 0
    with pytest.raises(ValueError, match="needs two different documents, but the data has 1.*or heldout_windows: 0"):
        split_documents(documents([1, 2], [1, 2]), 0.1)
    with pytest.raises(ValueError, match=r"not in \[0, 1\)"):
        split_documents(two, 1.0)
    train, heldout = split_documents(two, 0.9)
    assert len(train) == len(heldout) == 1


def test_heldout_data_of_its_own_and_what_is_in_both(prepared, write):
    a = write("a.jsonl", [{"text": "first text"}, {"text": "second one"}])
    b = write("b.jsonl", [{"text": "third text"}, {"text": "second one"}])
    data = prepared(a, heldout_sources=[str(write("c.txt", "something else"))], heldout_windows=1)
    assert data.heldout.sources(0).endswith("c.txt")
    assert (data.summary["documents"], data.summary["heldout_windows"]) == (2, 1)
    with pytest.raises(ValueError, match=r"1 held-out documents .*a\.jsonl:2 and .*b\.jsonl:2; take them out"):
        prepared(a, heldout_sources=[str(b)], heldout_windows=1)


def test_the_summary_counts_tokens(prepared, write):
    path = write("a.jsonl", [{"text": "a" * n} for n in (10, 20, 30)])
    summary = prepared(path, length=8).summary
    assert {k: summary[k] for k in ("documents", "tokens", "sequences", "tokens_outside_of_whole_sequences")} == {
        "documents": 3, "tokens": 60, "sequences": 7, "tokens_outside_of_whole_sequences": 7,
    }  # fmt: skip
    assert np.isin(["heldout_documents", "heldout_windows", "heldout_sources", "fingerprint"], list(summary)).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"packing": "pakced"}, "unknown packing 'pakced'.*mean 'packed'"),
        ({"data_format": "chat"}, "unknown data_format 'chat'; known: instruction, text"),
        ({"overlong": "cut"}, "unknown overlong 'cut'; known: error, shorten, skip"),
        ({"length": 1}, "length=1 is below 2"),
        ({"workers": 0}, "workers=0 is below 1"),
        ({"max_documents": 0}, "max_documents=0 is below 1"),
    ],
)
def test_options_that_are_none(prepared, options, message):
    with pytest.raises(ValueError, match=message):
        prepared("x.txt", **options)


@pytest.mark.parametrize("packing", ["packed", "document"])
def test_held_out_rows_are_the_same_for_every_seed_and_order_of_the_data(packing, prepared, write):
    records = [{"text": f"text {i} {'x' * i}"} for i in range(30)]
    options = {"packing": packing, "heldout_windows": 4, "heldout_fraction": 0.4}
    a, b = (prepared(write("a.jsonl", records), seed=seed, **options) for seed in (0, 1))
    other = prepared(write("b.jsonl", records[::-1]), seed=0, **options)
    assert ids(a.heldout) == ids(b.heldout) == ids(other.heldout)
    assert len(a.heldout.documents) > 6
    assert ids(a.train) != ids(b.train)
    assert a.fingerprint != b.fingerprint


@pytest.mark.parametrize("change", [lambda t: t.replace("\n", "\r\n"), lambda t: t + "\n", lambda t: "  " + t])
def test_a_held_out_text_with_other_white_space_is_found(change, prepared, write):
    text = "some text\nin lines\n\nof words"
    a = write("a.jsonl", [{"text": "other text"}, {"text": text}])
    b = write("b.jsonl", [{"text": "third text"}, {"text": change(text)}])
    with pytest.raises(ValueError, match=r"1 held-out documents .*a\.jsonl:2 and .*b\.jsonl:2; take them out"):
        prepared(a, heldout_sources=[str(b)], heldout_windows=1)
    c = write("c.jsonl", [{"text": "third text"}, {"text": change(text) + "."}])
    assert len(prepared(a, heldout_sources=[str(c)], heldout_windows=1).heldout) == 1


def test_what_belongs_together_stays_on_one_side(prepared, write, make_tokenizer):
    """Texts with other white space; the samples of one conversation, and of others that begin as it does."""
    twins = [{"text": f"{i} of{space}ten"} for space in (" ", "\n", "\t") for i in range(10)]
    data = prepared(write("a.jsonl", twins), heldout_fraction=0.3, heldout_windows=1, length=2)
    sides = [{side.documents.source(i) for i in range(len(side.documents))} for side in (data.train, data.heldout)]
    numbers = [{int(source.rpartition(":")[2]) % 10 for source in side} for side in sides]
    assert [len(side) for side in sides] == [3 * len(side) for side in numbers] == [21, 9]
    rewriting = make_tokenizer(
        "{% if messages | length > 2 %}again {% endif %}{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    )
    turn = lambda i: [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]  # noqa: E731
    talks = [[*turn(first), *turn(second)] for first in range(8) for second in (10 * first, 10 * first + 1)]
    path = write("b.jsonl", [{"messages": messages} for messages in talks])
    data = prepared(path, tokenizer=rewriting, data_format="instruction", heldout_fraction=0.3, heldout_windows=1)
    sides = [{int(side.documents.source(i).rpartition(":")[2]) for i in range(len(side.documents))}
             for side in (data.train, data.heldout)]  # fmt: skip
    assert not {(n - 1) // 2 for n in sides[0]} & {(n - 1) // 2 for n in sides[1]}
    assert sorted([*sides[0], *sides[1]]) == list(range(1, 17))


def test_copies_in_training_are_counted_and_stay(prepared, write, caplog):
    path = write("a.jsonl", [{"text": text} for text in ("one text", "a copy", "a copy", "a copy", "one text")])
    assert prepared(path).summary["documents"] == 5
    assert "3 of 5 documents to train on are copies of others" in caplog.text
    caplog.clear()
    prepared(write("b.jsonl", [{"text": "one"}, {"text": "other text"}]))
    assert not caplog.text
