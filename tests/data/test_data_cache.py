"""The token cache: made once, the same whoever makes it, and made again where it is broken."""

import os
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hici.data import tokenising
from hici.data.cache import TokenCache, default_cache
from hici.data.encoder import Encoder
from hici.data.reading import Reader
from hici.data.sources import Record, resolve
from hici.data.tokenising import Pieces


@pytest.fixture
def text(write, monkeypatch):
    """Six files of the cache: pieces are small here."""
    monkeypatch.setattr(tokenising, "PIECE_LETTERS", 100)
    write("d/a.jsonl", [{"text": f"line {i} of the first file"} for i in range(12)])
    write("d/b.jsonl", [{"text": f"line {i} of the second file"} for i in range(8)])
    return write("d/c.txt", "some text " * 40).parent


@pytest.fixture
def encoded(monkeypatch):
    """Counts what is tokenised."""
    texts = []
    plain = Encoder.encode

    def counting(self, samples, *rest):
        texts.extend(text for _, text in samples)
        return plain(self, samples, *rest)

    monkeypatch.setattr(Encoder, "encode", counting)
    return texts


def rows(data):
    return [row["input_ids"].tolist() for row in data.train]


def files(tmp_path):
    return sorted((tmp_path / "cache").rglob("*.safetensors"))


def test_documents_are_tokenised_once(text, prepared, encoded, tmp_path, write):
    first = prepared(text)
    assert len(encoded) == 21
    assert len(files(tmp_path)) == 6
    again = prepared(text)
    assert len(encoded) == 21
    assert rows(again) == rows(first)
    assert again.fingerprint == first.fingerprint
    # under another name nothing is new; of changed data only the piece that changed
    (text / "a.jsonl").rename(text / "other.jsonl")
    assert rows(prepared(text / "other.jsonl", text / "b.jsonl", text / "c.txt")) == rows(first)
    assert len(encoded) == 21
    write("d/b.jsonl", (text / "b.jsonl").read_text().replace("line 7", "line X"))
    changed = prepared(text / "other.jsonl", text / "b.jsonl", text / "c.txt")
    assert 21 < len(encoded) < 26
    assert changed.fingerprint != first.fingerprint


def test_the_cache_is_read_from_disk(text, prepared, tmp_path):
    data = prepared(text).train.documents
    assert isinstance(data.store.arrays(0)["tokens"], np.memmap)
    assert data.store.arrays(0)["tokens"].dtype == np.uint16
    assert data.tokens(0).dtype == np.int64


def test_a_large_vocabulary_has_four_bytes(prepared, make_tokenizer, write, tmp_path):
    large = make_tokenizer()
    large.add_tokens([f"word{i}" for i in range(66_000)])
    path = write("a.txt", "ab word65999")
    data = prepared(path, tokenizer=large, length=2).train.documents
    assert data.store.arrays(0)["tokens"].dtype == np.uint32
    assert data.tokens(0)[-1] == len(large) - 1 > 2**16


DAMAGE = {
    "deleted": lambda raw: None,
    "cut": lambda raw: raw[:-7],
    "empty": lambda raw: b"",
    "few bytes": lambda raw: raw[:5],
    "one bit": lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]),
    "header": lambda raw: raw[:8] + b"#" + raw[9:],
    "header of another kind": lambda raw: struct.pack("<Q", 3) + b'"a"' + raw[8:],
    "header without arrays": lambda raw: raw.replace(b'"data_offsets":[0,', b'"data_offsets":[],"x":[0,', 1),
    "header of numbers": lambda raw: struct.pack("<Q", 20) + b'{"__metadata__": 1}  ' + raw[8:],
    "length": lambda raw: b"\xff" * 8 + raw[8:],
    "longer": lambda raw: raw + b"\0",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_is_gone_or_broken_is_made_again(damage, text, prepared, encoded, tmp_path, caplog):
    first = prepared(text)
    whole = {path: path.read_bytes() for path in files(tmp_path)}
    for path in files(tmp_path)[1:3]:
        changed = DAMAGE[damage](path.read_bytes())
        path.unlink()
        if changed is not None:
            path.write_bytes(changed)
    encoded.clear()
    again = prepared(text)
    assert rows(again) == rows(first)
    assert again.fingerprint == first.fingerprint
    assert 0 < len(encoded) < 21
    assert {path: path.read_bytes() for path in files(tmp_path)} == whole
    broken = [record for record in caplog.records if "is broken" in record.message]
    assert len(broken) == (0 if damage == "deleted" else 2)


def test_a_killed_run_goes_on_behind_what_is_finished(text, prepared, encoded, tmp_path, monkeypatch, caplog):
    whole = prepared(text, token_cache=str(tmp_path / "other"))
    encoded.clear()
    counting = Encoder.encode

    def killed(self, samples, *rest):
        if len(encoded) >= 8:
            raise KeyboardInterrupt
        return counting(self, samples, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "encode", killed)
        with pytest.raises(KeyboardInterrupt):
            prepared(text)
    before = len(encoded)
    assert 8 <= before < 21
    assert rows(prepared(text)) == rows(whole)
    assert len(encoded) == 21  # none twice


def test_processes_make_the_same_files(text, prepared, tmp_path):
    one = prepared(text)
    two = prepared(text, workers=2, token_cache=str(tmp_path / "two"))
    assert rows(two) == rows(one)
    assert two.fingerprint == one.fingerprint
    names = {place.relative_to(tmp_path / "two"): place.read_bytes() for place in (tmp_path / "two").rglob("*.safe*")}
    assert names == {path.relative_to(tmp_path / "cache"): path.read_bytes() for path in files(tmp_path)}
    assert not [p for p in (tmp_path / "two").rglob(".*") if p.is_file()]  # no half of a file
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "good"}\n{"txt": "bad"}\n')
    with pytest.raises(ValueError, match="bad.jsonl:2 has no text under 'text'"):
        prepared(bad, workers=2)


def test_an_error_of_a_process_is_the_error(prepared, make_tokenizer, write):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    refusing = make_tokenizer("{{ raise_exception('never') }}")
    path = write("m.jsonl", [{"messages": messages}])
    with pytest.raises(ValueError, match=r"m\.jsonl:1: .*refuses the messages .never.; change the sample"):
        prepared(path, tokenizer=refusing, data_format="instruction", workers=2)


def test_two_at_the_same_time(text, prepared, tmp_path):
    """Threads stand for processes: both tokenise everything and put it in the same places."""
    found, barrier = [], threading.Barrier(2)

    def run():
        barrier.wait()
        found.append(rows(prepared(text)))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert found[0] == found[1] == rows(prepared(text))
    assert len(files(tmp_path)) == 6


def test_a_place_that_cannot_be_written(text, prepared, tmp_path, write):
    write("file", "")
    with pytest.raises(ValueError, match="no token cache: nothing can be written in .*file is a file.*token_cache"):
        prepared(text, token_cache=str(tmp_path / "file"))
    cache = tmp_path / "cache"
    prepared(text)
    for folder in list(cache.iterdir()):  # a file in the place of each folder: only seen when it is written
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
        folder.write_text("")
    with pytest.raises(
        ValueError, match="the token cache .*cache cannot be written .*make room, or give another place"
    ):
        prepared(text)


def test_a_full_disk_leaves_no_part_of_a_file(text, prepared, tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(arrays, path, metadata):
        Path(path).write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("hici.data.cache.save_file", full)
    with pytest.raises(ValueError, match="cannot be written .*No space left on device.*make room"):
        prepared(text)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_the_users_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "hici" / "tokens"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache() == tmp_path / "home" / ".cache" / "hici" / "tokens"
    assert TokenCache("~/x", "").directory == tmp_path / "home" / "x"


def test_the_fingerprint_changes_with_the_rows_and_only_then(prepared, write, make_tokenizer, tmp_path):
    records = [{"text": f"text {i}", "body": f"text {i}"} for i in range(9)]
    a = write("a.jsonl", records)
    plain = prepared(a, length=8, heldout_windows=1, heldout_fraction=0.3)
    same = [
        {"workers": 2}, {"token_cache": str(tmp_path / "elsewhere")}, {"max_documents": 9}, {"text_key": "body"},
        {"overlong": "error"}, {"prompt": "alpaca"}, {"tokenizer": make_tokenizer("a chat template of its own")},
    ]  # fmt: skip
    other = [
        {"length": 9}, {"seed": 1}, {"packing": "document"}, {"max_documents": 8}, {"heldout_windows": 2},
        {"heldout_fraction": 0.6}, {"heldout_sources": [str(write("b.txt", "other text"))]},
    ]  # fmt: skip
    base = {"length": 8, "heldout_windows": 1, "heldout_fraction": 0.3}
    for change in same:
        assert prepared(a, **{**base, **change}).fingerprint == plain.fingerprint, change
    found = [prepared(a, **{**base, **change}).fingerprint for change in other]
    assert len({plain.fingerprint, *found}) == 1 + len(other)
    for changed in (records[::-1], [*records[:-1], {"text": "text 9"}]):
        found.append(prepared(write("c.jsonl", changed), **base).fingerprint)
    assert len({plain.fingerprint, *found}) == 3 + len(other)
    assert prepared(write("c.jsonl", records[:-1]), **base).fingerprint == found[3]  # as with max_documents=8
    assert prepared(write("d/of_another_name.jsonl", records), **base).fingerprint == plain.fingerprint


def test_the_fingerprint_of_instruction_data(prepared, write, chat, make_tokenizer):
    path = write("a.jsonl", [{"instruction": f"question {i}", "output": "answer"} for i in range(4)])
    base = {"data_format": "instruction", "length": 200}
    make = lambda tokenizer, **change: prepared(path, tokenizer=tokenizer, **{**base, **change}).fingerprint  # noqa: E731
    plain = make(chat)
    assert make(chat, packing="document") == make(chat, overlong="shorten") == plain  # nothing is over-long
    others = [
        make(chat, prompt="alpaca"),
        make(chat, prompt="llama2"),
        make(make_tokenizer("Hi. " + chat.chat_template)),
    ]
    assert len({plain, *others}) == 4


def test_the_fingerprint_knows_what_is_learned(prepared, write):
    """The same tokens, and an answer that begins elsewhere."""
    samples = [
        {"instruction": "q", "output": "a\n\n### Response:b"},
        {"instruction": "q\n\n### Response:a", "output": "b"},
    ]
    one, other = (
        prepared(write(f"{i}.jsonl", [sample]), data_format="instruction", length=300, prompt="alpaca")
        for i, sample in enumerate(samples)
    )
    assert rows(one) == rows(other)
    assert one.fingerprint != other.fingerprint


def test_padding_of_another_call_is_no_part_of_the_tokenizer(make_tokenizer):
    tokenizer = make_tokenizer()
    before = Encoder(tokenizer).fingerprint()
    tokenizer.pad_token = "</s>"
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)
    assert Encoder(tokenizer).fingerprint() == before
    assert Encoder(make_tokenizer(bos=True)).fingerprint() != before
    tokenizer.add_tokens(["more"])
    assert Encoder(tokenizer).fingerprint() != before


@given(st.lists(st.text(max_size=300), max_size=30), st.one_of(st.none(), st.integers(1, 10)))
def test_pieces_hold_every_record_once_and_in_order(tokenizer, texts, limit):
    records = [Record("x.jsonl", number, {"text": text}) for number, text in enumerate(texts, start=1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenising, "PIECE_LETTERS", 250)
        pieces = Pieces(records, Encoder(tokenizer), limit)
        found = list(pieces)
    kept = [(number, text) for number, text in enumerate(texts, start=1) if text.strip()][:limit]
    assert [pair for piece in found for pair in zip(piece.numbers, piece.samples, strict=True)] == kept
    assert all(piece.samples for piece in found)
    assert all(sum(map(len, piece.samples[:-1])) < 250 for piece in found)
    assert pieces.kept.total() == len(kept)


def test_a_process_that_is_ended_from_outside_is_told(text, prepared, monkeypatch):
    monkeypatch.setattr(tokenising, "_work", _exit)
    with pytest.raises(RuntimeError, match="tokenised .*a.jsonl was ended from outside.*fewer data_workers"):
        prepared(text, workers=2)


def _exit(*arguments):
    os._exit(1)


class Deaf(Encoder):
    """Makes nothing of the letter z, as tokenizers do of some characters."""

    def encode(self, samples, *rest):
        z = self.tokenizer("z")["input_ids"][0]
        return [[encoded._replace(ids=encoded.ids[encoded.ids != z])] for (encoded,) in super().encode(samples, *rest)]


@pytest.mark.parametrize("letters", [1, 1000])  # in a piece of its own, and with others
def test_documents_without_tokens_are_left_out_and_counted(letters, tokenizer, tmp_path, write, caplog, monkeypatch):
    monkeypatch.setattr(tokenising, "PIECE_LETTERS", letters)
    reader = Reader(Deaf(tokenizer), TokenCache(tmp_path / "cache", "deaf"), 300)
    path = write("a.jsonl", [{"text": text} for text in ("ab", "zz", "", "cd")])
    for _ in range(2):  # made, and read
        (table,) = reader.read([resolve(path)])
        assert [table.source(i) for i in range(len(table))] == [f"{path}:1", f"{path}:4"]
        assert tokenizer.decode(table.tokens(1)) == "cd"
        assert f"{path}: 2 empty records are left out" in caplog.text
        caplog.clear()
    with pytest.raises(ValueError, match="b.jsonl gives no token: there is no text or answer in it .1 empty records"):
        reader.read([resolve(write("b.jsonl", [{"text": "zzz"}]))])


MANY_FILES = """
import json, pathlib, resource, sys
from transformers import AutoTokenizer
from hici.data import tokenising
from hici.data.prepare import DataOptions, prepare

folder = pathlib.Path(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
tokenising.PIECE_LETTERS = 1
options = DataOptions([str(folder / "a.jsonl")], length=8, heldout_windows=0, token_cache=str(folder / "cache"))
prepare(options, tokenizer, vocab_size=300, progress=False)
resource.setrlimit(resource.RLIMIT_NOFILE, (110, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
rows = prepare(options, tokenizer, vocab_size=300, progress=False).train
print(len({path for path, _, _ in rows.documents.store.places}), sorted(row["input_ids"][0].item() for row in rows))
"""


def test_few_files_are_open_at_a_time(write, tokenizer, tmp_path):
    texts = [f"{i:07}" for i in range(150)]
    write("a.jsonl", [{"text": text} for text in texts])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    done = subprocess.run([sys.executable, "-c", MANY_FILES, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"150 {sorted(tokenizer(text)['input_ids'][0] for text in texts)}"


@pytest.mark.parametrize("damage", ["deleted", "header"])
def test_a_cache_that_is_gone_while_it_is_read(damage, text, prepared, tmp_path):
    data = prepared(text)
    for path in files(tmp_path):
        raw = path.read_bytes()
        path.unlink()
        if damage != "deleted":
            path.write_bytes(DAMAGE[damage](raw))
    with pytest.raises(ValueError, match=r"\.safetensors of the token cache cannot be read any more .*start again"):
        data.train[0]


def test_what_killed_writers_left_is_removed_after_a_day(text, prepared, tmp_path):
    prepared(text)
    folder = files(tmp_path)[0].parent
    old, new = (folder / f".{files(tmp_path)[0].name}.{end}" for end in ("old1", "new2"))
    for path, age in ((old, 25 * 3600), (new, 3600)):
        path.write_bytes(b"half")
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - age))
    whole = files(tmp_path)
    prepared(text)
    assert (old.exists(), new.exists(), files(tmp_path)) == (False, True, whole)


def test_small_files_share_a_file_of_the_cache(prepared, write, tokenizer, tmp_path, encoded):
    texts = [f"text {i} of many" for i in range(600)]
    for i, text in enumerate(texts):
        write(f"d/{i:03}.txt", text)
    write("d/300.jsonl", [{"text": "of a list"}, {"text": " "}, {"text": "of a list too"}])
    np.array([5, 6, 7], dtype="<u2").tofile(tmp_path / "d/450.bin")
    folder = tmp_path / "d"
    data = prepared(folder).train.documents
    found = [(data.source(i), tokenizer.decode(data.tokens(i))) for i in range(len(data))]
    wanted = [(f"{folder}/{i:03}.txt", text) for i, text in enumerate(texts)]
    wanted.insert(300, (f"{folder}/300.jsonl:1", "of a list"))
    wanted.insert(301, (f"{folder}/300.jsonl:3", "of a list too"))
    wanted.insert(452, (f"{folder}/450.bin#0", tokenizer.decode([5, 6, 7])))
    assert found == wanted
    pieces = len(files(tmp_path))
    assert 3 < pieces < 40
    # the same under other names; of a changed folder only what is near the change
    encoded.clear()
    moved = folder.rename(tmp_path / "e")
    assert len(prepared(moved).train.documents) == 603
    assert not encoded
    write("e/005.txt", "another text")
    (moved / "007.txt").unlink()
    assert len(prepared(moved).train.documents) == 602
    assert 0 < len(encoded) < 300
    assert "another text" in encoded


def test_the_number_of_documents_reads_no_more_files(prepared, write):
    write("d/a.txt", "first")
    write("d/b.jsonl", [{"text": "second"}, {"text": "third"}, {"text": 3}])
    write("d/c.txt", b"\xff")
    assert prepared(write("d/a.txt", "first").parent, max_documents=3).summary["documents"] == 3
