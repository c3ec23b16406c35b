"""What is read, in which order, and what is said about data that cannot be."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from hici.data.sources import HubOptions, file_records, resolve
from hici.data.stream import load_stream


def texts(prepared, tokenizer, *sources, **options):
    """(source, text) of every document, in the order of the data."""
    data = prepared(*sources, **options).train.documents
    return [(data.source(i), tokenizer.decode(data.tokens(i))) for i in range(len(data))]


def test_files_globs_folders_and_records_in_a_stable_order(prepared, tokenizer, write, tmp_path):
    write("d/b.txt", "bbbb")
    write("d/a.txt", "aaaa")
    write("d/deep/c.md", "cccc")
    write("d/e.jsonl", [{"text": "dddd"}, {"text": "eeee"}])
    write("d/f.parquet", [{"text": "ffff", "other": 1}, {"text": "gggg", "other": 2}])
    write("d/config.json", [{"text": "no data: a .json is read when it is named"}])
    read = lambda *sources: [text for _, text in texts(prepared, tokenizer, *sources)]  # noqa: E731
    d = tmp_path / "d"
    assert read(d / "*.txt") == ["aaaa", "bbbb"]
    assert read(d) == ["aaaa", "bbbb", "cccc", "dddd", "eeee", "ffff", "gggg"]
    assert read(d / "b.txt", d / "*.txt") == ["bbbb", "aaaa"]  # each file once
    assert read(d / "b.txt", d / "deep" / ".." / "b.txt", d / "e.jsonl") == ["bbbb", "dddd", "eeee"]
    assert read(d / "*.json") == ["no data: a .json is read when it is named"]
    assert texts(prepared, tokenizer, d / "e.jsonl", d / "f.parquet", d / "b.txt") == [
        (f"{d}/e.jsonl:1", "dddd"), (f"{d}/e.jsonl:2", "eeee"), (f"{d}/f.parquet#0", "ffff"),
        (f"{d}/f.parquet#1", "gggg"), (f"{d}/b.txt", "bbbb"),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.parquet"])
def test_columns_empty_records_and_the_number_of_documents(name, prepared, tokenizer, write, caplog):
    path = write(name, [{"body": "one.", "n": 0}, {"body": " \n"}, {"body": None}, {"body": "two."}, {"body": "three"}])
    got = texts(prepared, tokenizer, path, text_key="body")
    assert [text for _, text in got] == ["one.", "two.", "three"]
    assert got[1][0] == f"{path}{':4' if name == 'x.jsonl' else '#3'}"  # the number in the file, empty ones counted
    assert f"{path}: 2 empty records are left out" in caplog.text
    got = texts(prepared, tokenizer, path, text_key="body", max_documents=2)
    assert [text for _, text in got] == ["one.", "two."]  # those kept are counted


def test_endings_in_any_case(prepared, tokenizer, write, tmp_path):
    write("d/a.JSONL", '{"text": "aaaa"}')
    write("d/b.ndjson", '{"text": "bbbb"}\n{"text": "cccc"}')
    write("d/c.JSON", '[{"text": "dddd"}]')
    write("d/d.TXT", "eeee")
    np.array([5, 6, 7, 8], dtype="<u2").tofile(tmp_path / "d/e.BIN")
    d = tmp_path / "d"
    got = texts(prepared, tokenizer, d, d / "c.JSON")
    assert got[:4] == [(f"{d}/a.JSONL:1", "aaaa"), (f"{d}/b.ndjson:1", "bbbb"), (f"{d}/b.ndjson:2", "cccc"),
                       (f"{d}/d.TXT", "eeee")]  # fmt: skip
    assert got[4:] == [(f"{d}/e.BIN#0", tokenizer.decode([5, 6, 7, 8])), (f"{d}/c.JSON#0", "dddd")]


def test_max_documents_is_of_each_entry_over_its_files(prepared, tokenizer, write, tmp_path):
    for name in "abc":
        write(f"d/{name}.txt", 4 * name)
    np.array([5, 257, 6, 257, 7], dtype="<u2").tofile(tmp_path / "t.bin")  # 257 is </s>
    got = texts(prepared, tokenizer, tmp_path / "d", tmp_path / "t.bin", max_documents=2)
    assert [source.rsplit("/")[-1] for source, _ in got] == ["a.txt", "b.txt", "t.bin#0", "t.bin#1"]


def test_a_hub_data_set(prepared, tokenizer, write, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    write("set/data.jsonl", [{"text": f"text {i}"} for i in range(5)])
    name = f"hub:{tmp_path / 'set'}"
    whole = texts(prepared, tokenizer, name)
    assert whole == [(f"{name}#{i}", f"text {i}") for i in range(5)]
    assert texts(prepared, tokenizer, name, streaming=True, max_documents=3) == whole[:3]
    assert load_stream(name, tokenizer, vocab_size=300)[1] == 5
    with pytest.raises(ValueError, match="set could not be read .*hub_split .test."):
        prepared(name, hub_split="test")
    with pytest.raises(ValueError, match="nobody/nothing could not be read .*check hub:org/name.*or download it"):
        prepared("hub:nobody/nothing")
    write("script/script.py", "import datasets")
    with pytest.raises(ValueError, match="script could not be read .*or download it and give its files"):
        prepared(f"hub:{tmp_path / 'script'}")
    with pytest.raises(ValueError, match="streaming without max_documents would read without end"):
        prepared(name, streaming=True)


@pytest.mark.parametrize("name, module", [("a.parquet", "pyarrow"), ("hub:a/b", "datasets")])
def test_a_package_that_is_not_there(name, module, prepared, write, monkeypatch):
    import sys

    for loaded in [m for m in sys.modules if m.split(".")[0] == module] + [module, f"{module}.parquet"]:
        monkeypatch.setitem(sys.modules, loaded, None)
    source = name if name.startswith("hub:") else write(name, b"PAR1")
    with pytest.raises(ValueError, match=rf"needs {module}, which is not installed; pip install 'hici\[data\]'"):
        prepared(source)


@pytest.mark.parametrize("vocab_size, dtype", [(300, "<u2"), (65_535, "<u2"), (65_536, "<u4")])
def test_token_files(prepared, tokenizer, tmp_path, vocab_size, dtype):
    eos = tokenizer.eos_token_id
    np.array([eos, 5, 6, eos, 7, eos, eos, 8], dtype=dtype).tofile(tmp_path / "x.bin")
    data = prepared(tmp_path / "x.bin", length=2, vocab_size=vocab_size).train.documents
    assert [data.tokens(i).tolist() for i in range(len(data))] == [[5, 6], [7], [8]]
    from hici.data.documents import table, token_file

    whole = table([token_file(tmp_path / "x.bin", vocab_size, None)])
    assert whole.tokens(0).tolist() == [eos, 5, 6, eos, 7, eos, eos, 8]


def test_token_files_of_the_other_width(prepared, tmp_path):
    path = tmp_path / "x.bin"
    ids = [5, 6, 7, 300, 4000]
    for whole in (ids, [0, *ids, 0]):
        np.array(whole, dtype="<u4").tofile(path)
        with pytest.raises(ValueError, match=r"x\.bin is read as uint16, 2 bytes .*uint32, 4 bytes .*as uint16"):
            prepared(path, vocab_size=49_152)
        assert prepared(path, length=2, vocab_size=70_000).train.documents.tokens(0).tolist() == whole
    np.array([5, 0, 6, 0, 7, 1], dtype="<u2").tofile(path)  # some text has zeros
    assert prepared(path, length=2, vocab_size=49_152).train.documents.size.sum() == 6
    np.array([*ids, 8], dtype="<u2").tofile(path)
    with pytest.raises(ValueError, match=r"x\.bin#0 holds token .*, or as uint16, 2 bytes .* read as uint32, 4 bytes"):
        prepared(path, vocab_size=70_000)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b"  \n", "is empty"),
        ("a.txt", b"ab\0cd", "NUL bytes, so it is binary"),
        ("a.txt", b"ab\xff", "not UTF-8 .byte 2: 0xff.*iconv"),
        ("a.txt", "é".encode(), "token 127, but the model's vocabulary has 120"),
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}', r"a\.jsonl:2 has no text under 'text'.*known: txt.*mean 'txt'"),
        ("a.jsonl", b'{"text": 3}', r"a\.jsonl:1 holds int under 'text', but a document is text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b\\ud83d"}', r"a\.jsonl:2 holds '.ud83d', half of a surrogate pair"),
        ("a.jsonl", b"{", r"a\.jsonl:1 is not JSON"),
        ("a.jsonl", b'["a"]', r"a\.jsonl:1 is list, but every record is an object"),
        ("a.jsonl", b'{"text": " "}\n{"text": null}', "gives no token.*2 empty records"),
        ("a.json", b"[{]", r"a\.json is not JSON"),
        ("a.json", b'{"text": "a"}', r"a\.json holds dict, but a \.json of data is a list of objects"),
        ("a.json", b"[]", "an empty list"),
        ("a.json", b'[{"text": "a"}, 3]', r"a\.json#1 is int, but every record is an object"),
        ("a.csv", b"text\nabc", r"a\.csv is a table.*write its rows as \.jsonl"),
        ("a.TSV", b"text\nabc", r"a\.TSV is a table.*write its rows as \.jsonl"),
        ("a.NDJSON", b'{"text": 3}', r"a\.NDJSON:1 holds int under 'text'"),
        ("a.parquet", b"PAR1 and then nothing", "is no whole Parquet file"),
        ("a.bin", b"", "has 0 bytes"),
        ("a.bin", b"abc", "3 bytes, but token files of a vocabulary of 120 hold 2 bytes"),
        ("a.bin", b"\x30\x01", "token 304, but the model's vocabulary has 120"),
        ("a.bin", b"\x01\x01\x01\x01", "nothing but the EOS token 257"),
    ],
)
def test_bad_files_are_named(prepared, write, name, content, message):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    path = write(name, content)
    with pytest.raises(ValueError, match=message) as error:
        prepared(path, vocab_size=120)
    assert name in str(error.value)


def test_a_cut_parquet_file(prepared, write):
    path = write("a.parquet", [{"text": "some text " * 50}] * 50)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"a\.parquet is no whole Parquet file .*download or write it again"):
        prepared(path)


def test_an_empty_parquet_file(prepared, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet is empty"):
        prepared(tmp_path / "a.parquet")


def test_missing_files_are_named(prepared, tmp_path):
    with pytest.raises(ValueError, match="does not exist, and as a glob it matches no file"):
        prepared(tmp_path / "*.txt")
    with pytest.raises(ValueError, match="is a folder without"):
        prepared(tmp_path)
    with pytest.raises(ValueError, match="names no file"):
        prepared()


def test_json_lines_may_hold_other_line_ends_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"text": "a\u2028b\u0085c"}\r\n\n{"text": "d"}\n', encoding="utf-8")
    records = list(file_records(path))
    assert [(r.number, r.value["text"]) for r in records] == [(1, "a\u2028b\u0085c"), (3, "d")]


def test_a_stream_keeps_order_and_token_files_as_they_are(tmp_path, tokenizer, write):
    eos = tokenizer.eos_token_id
    write("y.txt", "ab")
    np.array([eos, 5, 6, eos, eos, 7], dtype="<u2").tofile(tmp_path / "x.bin")
    write("z.jsonl", [{"text": "c"}, {"text": ""}, {"text": "d"}])
    a, b, c, d = tokenizer("abcd")["input_ids"]
    sources = [tmp_path / "y.txt", tmp_path / "x.bin", tmp_path / "z.jsonl"]
    stream, count = load_stream(sources, tokenizer, vocab_size=300)
    assert stream.dtype == np.int64
    assert (stream.tolist(), count) == ([a, b, eos, eos, 5, 6, eos, eos, 7, c, eos, d, eos], 4)
    no_eos = SimpleNamespace(eos_token_id=None, __call__=None)
    assert load_stream(tmp_path / "x.bin", no_eos, vocab_size=300)[0].tolist() == [eos, 5, 6, eos, eos, 7]
    with pytest.raises(ValueError, match="x.bin holds token 257, but the model's vocabulary has 257"):
        load_stream(tmp_path / "x.bin", tokenizer, vocab_size=257)
    write("none.jsonl", json.dumps({"text": " "}))
    with pytest.raises(ValueError, match="none.jsonl gives no token"):
        load_stream(tmp_path / "none.jsonl", tokenizer, vocab_size=300)


def test_sources_that_are_no_files_stay_themselves():
    assert resolve(["hub:org/name"])[0].hub == "org/name"
    assert HubOptions() == ("train", None, False)
