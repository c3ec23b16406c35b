"""Documents, packing and the held-out split."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from hici.data.documents import Document, load_documents
from hici.data.packing import load_stream, pack, split_documents, token_stream


class Letters:
    """A tokenizer of lower-case letters: a = 1, b = 2, ...; EOS 0."""

    eos_token_id = 0

    def __call__(self, text, add_special_tokens, verbose):
        assert add_special_tokens is False
        return {"input_ids": [ord(c) - 96 for c in text if c.isalpha()]}


def tokens(documents):
    return [d.tokens.tolist() for d in documents]


def test_files_globs_folders_and_jsonl(tmp_path):
    (tmp_path / "b.txt").write_text("bb")
    (tmp_path / "a.txt").write_text("aa")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.md").write_text("c")
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": "d"}) + "\n\n" + json.dumps({"text": "ee"}) + "\n")
    load = lambda *sources: tokens(load_documents(list(sources), Letters()))  # noqa: E731
    assert load(tmp_path / "*.txt") == [[1, 1], [2, 2]]
    assert load(tmp_path) == [[1, 1], [2, 2], [4], [5, 5], [3]]
    assert load(tmp_path / "b.txt", tmp_path / "*.txt") == [[2, 2], [1, 1]]  # each file once
    assert load(tmp_path / "b.txt", tmp_path / "deep" / ".." / "b.txt") == [[2, 2]]  # under two names too
    assert load(tmp_path / "d.jsonl") == [[4], [5, 5]]
    (tmp_path / "other.jsonl").write_text(json.dumps({"body": "f"}))
    assert tokens(load_documents(tmp_path / "other.jsonl", Letters(), text_key="body")) == [[6]]


@pytest.mark.parametrize("vocab_size, dtype", [(100, "<u2"), (65_535, "<u2"), (65_536, "<u4")])
def test_token_files(tmp_path, vocab_size, dtype):
    np.array([5, 6, 0, 7, 0, 0, 8], dtype=dtype).tofile(tmp_path / "x.bin")
    assert tokens(load_documents(tmp_path / "x.bin", Letters(), vocab_size=vocab_size)) == [[5, 6], [7], [8]]
    no_eos = SimpleNamespace(eos_token_id=None)
    assert tokens(load_documents(tmp_path / "x.bin", no_eos, vocab_size=vocab_size)) == [[5, 6, 0, 7, 0, 0, 8]]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b"  \n", "is empty"),
        ("a.txt", b"ab\0cd", "NUL bytes, so it is binary"),
        ("a.txt", b"ab\xff", "not UTF-8 .byte 2: 0xff.*iconv"),
        ("a.txt", b"123", "gives no token"),
        ("a.txt", b"z", "token 26, but the model's vocabulary has 20"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}', r"a\.jsonl:2 has no text under 'text' .it has: txt"),
        ("a.jsonl", b"{", r"a\.jsonl:1 is not JSON"),
        ("a.jsonl", b'{"text": " "}', "is empty"),
        ("a.bin", b"", "has 0 bytes"),
        ("a.bin", b"abc", "3 bytes, but token files of a vocabulary of 20 hold 2 bytes"),
        ("a.bin", b"\x30\x00", "token 48, but the model's vocabulary has 20"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_documents(tmp_path / name, Letters(), vocab_size=20)
    assert name in str(error.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="does not exist, and as a glob it matches no file"):
        load_documents(tmp_path / "*.txt", Letters())
    with pytest.raises(ValueError, match="is a folder without"):
        load_documents(tmp_path, Letters())
    with pytest.raises(ValueError, match="names no file"):
        load_documents([], Letters())
    (tmp_path / "a.bin").write_bytes(b"ab")
    with pytest.raises(ValueError, match="give vocab_size"):
        load_documents(tmp_path / "a.bin", Letters())


def documents(count, size=10):
    return [Document(str(i), np.full(size, i + 1)) for i in range(count)]


def test_packing_loses_only_the_tail_and_ends_documents():
    docs = documents(7, 5)
    packed = pack(docs, 8, 0, seed=3)
    assert packed.shape == (7 * 6 // 8, 8)
    flat = packed.flatten()
    order = [int(x) for x in dict.fromkeys(flat[flat > 0])]
    assert (flat == token_stream([docs[i - 1] for i in order], 0)[: flat.size]).all()
    assert (pack(docs, 8, 0, seed=3) == packed).all()
    assert any((pack(docs, 8, 0, seed=s) != packed).any() for s in range(4, 8))
    assert 0 not in pack(docs, 8, None, seed=3)
    with pytest.raises(ValueError, match="42 tokens, fewer than one sequence of 43"):
        pack(docs, 43, 0, seed=0)


def test_split_is_by_document_stable_and_without_overlap():
    docs = documents(40)
    train, heldout = split_documents(docs, 0.25)
    assert len(heldout) == 10
    assert {d.source for d in train} | {d.source for d in heldout} == {d.source for d in docs}
    assert not {d.source for d in train} & {d.source for d in heldout}
    again = split_documents(docs[::-1], 0.25)
    assert [{d.source for d in side} for side in again] == [{d.source for d in side} for side in (train, heldout)]


@pytest.mark.parametrize("large", range(5))
def test_one_large_document_is_not_held_out(large, caplog):
    docs = [Document(str(i), np.arange(i, i + (5000 if i == large else 40))) for i in range(5)]
    heldout = split_documents(docs, 0.02)[1]
    assert [d.source for d in heldout] != [str(large)]
    assert sum(len(d.tokens) for d in heldout) <= 2 * 0.02 * 5160
    assert not caplog.text


def test_a_share_that_is_far_off_is_said(caplog):
    train, heldout = split_documents([Document(str(i), np.arange(i, i + 50)) for i in range(4)], 0.02)
    assert (len(train), len(heldout)) == (3, 1)
    assert "25.0 % of the tokens are held out instead of 2.0 %" in caplog.text


def test_equal_texts_stay_on_one_side():
    docs = [Document(f"{i}.{copy}", np.full(4, i)) for i in range(10) for copy in range(3)]
    train, heldout = split_documents(docs, 0.3)
    assert heldout
    assert not {int(d.tokens[0]) for d in train} & {int(d.tokens[0]) for d in heldout}


def test_split_refusals():
    assert split_documents(documents(1), 0.0)[1] == []
    with pytest.raises(ValueError, match="needs two different documents, but the data has 1"):
        split_documents(documents(1), 0.1)
    with pytest.raises(ValueError, match=r"not in \[0, 1\)"):
        split_documents(documents(3), 1.0)
    train, heldout = split_documents(documents(2), 0.9)
    assert len(train) == len(heldout) == 1


def test_json_lines_may_hold_other_line_ends_and_a_byte_order_mark(tmp_path):
    (tmp_path / "a.jsonl").write_text('\ufeff{"text": "a\u2028b\u0085c"}\r\n{"text": "d"}\n', encoding="utf-8")
    assert tokens(load_documents(tmp_path / "a.jsonl", Letters())) == [[1, 2, 3], [4]]


def test_a_stream_keeps_token_files_as_they_are(tmp_path):
    np.array([0, 5, 6, 0, 0, 7], dtype="<u2").tofile(tmp_path / "x.bin")
    (tmp_path / "y.txt").write_text("ab")
    stream, count = load_stream([tmp_path / "x.bin", tmp_path / "y.txt"], Letters(), vocab_size=50)
    assert (stream.tolist(), count) == ([0, 5, 6, 0, 0, 7, 1, 2, 0], 2)
    with pytest.raises(ValueError, match="token 7, but the model's vocabulary has 7"):
        load_stream(tmp_path / "x.bin", Letters(), vocab_size=7)
