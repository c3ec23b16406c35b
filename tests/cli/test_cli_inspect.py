"""`hici inspect` from files to JSON, table and picture, and its refusals."""

import json
import struct

import numpy as np
import pytest

import hici
from hici.data.stream import load_stream
from hici.eval.inspection import inspection_plan
from hici.eval.measure import measure
from hici.models.modes import set_attention
from hici.report.inspection import draw_inspection


@pytest.fixture(scope="module")
def result(adapter_directory, text_file, tokenizer):
    """The conditions' only entry, measured through the library: two windows of 72 tokens, segments of 16."""
    model = hici.from_pretrained(adapter_directory)
    set_attention(model, "hici")
    stream = load_stream(text_file, tokenizer, vocab_size=len(tokenizer))[0]
    return measure(inspection_plan(model, stream, 72, windows=2))["conditions"][0]


def test_from_files_to_json_table_and_picture(adapter_directory, text_file, tmp_path, hici_command, result):
    done = hici_command("inspect", adapter_directory, "--data", text_file, "--context", 72, "--windows", 2,
                        "--out", tmp_path)  # fmt: skip
    assert done.status == 0, done.err
    record = json.loads((tmp_path / "inspect.json").read_text())
    assert record["conditions"] == [result]
    assert (record["task"], record["model"]["path"]) == ("inspect", str(adapter_directory))
    assert record["data"]["files"] == [str(text_file)]
    assert record["model"]["rope"]["extended"] is False
    shares = {kind: np.array(result["shares"][kind]) for kind in ("global", "local", "tokens")}
    assert np.abs(sum(shares.values()) - 1).max() < 1e-6
    assert min(shares["global"].mean(), shares["local"].mean()) > 0.01
    available = record["data"]["tokens"] // 72
    assert done.out.startswith(
        f"Attention of {adapter_directory}, hici, past: 72 tokens in 5 segments of 16, mean of 2 of {available} windows"
    )
    for layer in (0, 1):
        heads = shares["local"][layer]
        cell = f"{100 * heads.mean():.1f} % ({100 * heads.min():.1f} to {100 * heads.max():.1f})"
        row = next(line for line in done.out.splitlines() if line.startswith(f"│ {layer} "))
        assert cell in row
    means, first = (done.out.index(note) for note in ("Mean over the query tokens of segments 2 to 5", "Segment 1 has"))
    assert means < first
    everywhere = np.mean(result["shares_all_tokens"]["tokens"])
    assert f"tokens {100 * everywhere:.1f} %" in done.out
    low, high = sorted(sum(np.array(result["by_window"][kind]) for kind in ("global", "local")))
    assert f"{100 * low:.1f}" != f"{100 * high:.1f}"
    assert f"Slots together, window by window: {100 * low:.1f} % to {100 * high:.1f} %." in done.out
    across = np.array(result["slot_similarity"]["local"])[:, ~np.eye(4, dtype=bool)].mean()
    assert f"Cosine of local slots: of two segments {across:.3f}" in done.out
    assert picture_size(tmp_path / "inspect.png") == (2400, 1440)
    again = hici_command("inspect", adapter_directory, "--data", text_file, "--context", 72, "--windows", 2,
                         "--out", tmp_path)  # fmt: skip
    assert again.status == 0
    assert again.out == done.out  # from the record that stands
    assert "holds this very measurement already" in again.err


def picture_size(path):
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    return struct.unpack(">II", header[16:24])


@pytest.mark.parametrize("visibility", ["all", "current"])
def test_a_leak_stands_beside_the_shares(adapter_directory, text_file, visibility, tmp_path, hici_command):
    done = hici_command("inspect", adapter_directory, "--data", text_file, "--context", 64, "--visibility", visibility,
                        "--segment-size", 32, "--layers", 1, "--out", tmp_path / "r.json")  # fmt: skip
    assert done.status == 0, done.err
    assert f", hici, {visibility} (not causal): 64 tokens in 2 segments of 32, 1 of " in done.out
    assert "Mean over the query tokens of all segments" in done.out
    assert "Segment 1 has no slots" not in done.out
    condition = json.loads((tmp_path / "r.json").read_text())["conditions"][0]
    assert (condition["causal"], condition["layer_numbers"]) == (False, [1])
    assert condition["shares"] == condition["shares_all_tokens"]
    assert (tmp_path / "r.png").is_file()


def test_records_and_contexts_beyond_the_rope(adapter_directory, text_file, tmp_path, hici_command):
    source = tmp_path / "book.jsonl"
    source.write_text(json.dumps({"text": "a", "body": text_file.read_text()}))
    done = hici_command("inspect", adapter_directory, "--data", source, "--text-key", "body", "--context", 136,
                        "--allow-beyond-rope", "--out", tmp_path / "r.json")  # fmt: skip
    assert done.status == 0, done.err
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["conditions"][0]["segments"] == 9
    assert record["model"]["rope"]["allow_beyond_rope"] is True
    assert record["data"]["tokens"] > 500


def test_without_out_nothing_is_written(adapter_directory, text_file, tmp_path, hici_command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = hici_command("inspect", adapter_directory, "--data", text_file, "--context", 32)
    assert done.status == 0, done.err
    assert ", hici, past: 32 tokens in 2 segments of 16" in done.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--no-slots"], "--no-slots leaves tokens alone"),
        (["--layers", 1, 1], "--layers 1 1 names one twice"),
        (["--layers", 2], "layer 2 is not in 0..1"),
        (["--context", 16], "context 16 is one segment of 16 tokens"),
        (["--context", 129], "129 tokens are more than the 128 positions"),
        (["--context", 100000, "--allow-beyond-rope"], "fewer than one window of 100000"),
        (["--overwrite"], "--overwrite is for --out only"),
        (["--out", "result.txt", "--data", "nowhere.txt"], "nowhere.txt"),
    ],
    ids=str,
)
def test_refusals(flags, message, adapter_directory, text_file, tmp_path, hici_command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = hici_command("inspect", adapter_directory, "--data", text_file, "--context", 64, *flags)
    assert (done.status, done.out) == (2, "")
    assert message in done.err
    assert done.err.strip().splitlines()[-1].startswith("hici: error: ")


def test_a_plain_model_is_refused(base_directory, text_file, hici_command):
    done = hici_command("inspect", base_directory, "--data", text_file, "--context", 64)
    assert done.status == 2
    assert "is a plain model without HiCI modules, so it has no slots to look at" in done.err


def drawn(condition, tmp_path, monkeypatch):
    """The axes' titles, texts and legends of the picture of a condition."""
    figures = []
    monkeypatch.setattr("hici.report.inspection.save_figure", lambda figure, target: figures.append(figure))
    windows = {"starts": [0], "available": 1}
    record = {"protocol": {"windows": windows}, "model": {"path": "m" * 200}, "conditions": [condition]}
    draw_inspection(tmp_path / "x.png", record)
    return figures[0]


def test_what_the_picture_shows(result, tmp_path, monkeypatch):
    figure = drawn(result, tmp_path, monkeypatch)
    by_title = {axis.get_title(): axis for axis in figure.axes if axis.get_title()}
    assert len(by_title) == 6
    heat = by_title["attention to slots, global and local together"].images[0]
    slots = np.array(result["shares"]["global"]) + np.array(result["shares"]["local"])
    np.testing.assert_allclose(heat.get_array(), 100 * slots)
    assert heat.cmap.name == "cividis"
    bars = by_title["by layer, mean over heads"].containers
    assert [bar[0].get_hatch() for bar in bars] == ["//", "..", "xx", ""]
    heights = np.array([[patch.get_height() for patch in bar] for bar in bars])
    np.testing.assert_allclose(heights[:2].sum(0), 100 * slots.mean(1))
    np.testing.assert_allclose(heights[2], 100 * np.mean(result["first_token"], axis=1))
    np.testing.assert_allclose(heights.sum(0), 100)
    segments = by_title["by segment, mean over layers and heads"].containers
    assert [patch.get_height() == 0 for patch in segments[0]] == [True, False, False, False, False]
    similarity = by_title["local slots of two segments: cosine, mean over layers"]
    np.testing.assert_allclose(similarity.images[0].get_array(), np.mean(result["slot_similarity"]["local"], axis=0))
    assert len(similarity.texts) == 16
    lines = by_title["how alike slots are, by layer"].lines
    assert len({(line.get_marker(), line.get_linestyle()) for line in lines}) == 4
    assert "m, hici, past: 72 tokens in 5 segments of 16, 1 of 1 window" in figure.get_suptitle().replace("\n", " ")


@pytest.mark.parametrize("kind", ["global", "local"])
def test_a_picture_without_slots_to_compare(kind, result, tmp_path, monkeypatch):
    """One kind is not in use, the other is of one segment only: nothing is drawn for them, and nothing fails."""
    other = {"global": "local", "local": "global"}[kind]
    condition = {**result, "slot_similarity": {kind: [[], []], other: [[[1.0]], [[1.0]]]},
                 "slot_likeness": {kind: [None, None], other: [0.5, 0.25]}}  # fmt: skip
    figure = drawn(condition, tmp_path, monkeypatch)
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert len(titles) == 4
    (line,) = next(axis for axis in figure.axes if axis.get_title() == "how alike slots are, by layer").lines
    assert (line.get_label(), list(line.get_ydata())) == (f"{other}, two slots of a segment", [0.5, 0.25])
