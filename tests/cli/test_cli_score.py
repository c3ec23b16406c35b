"""`hici score longbench|topics|lines`: from a folder of predictions to a table and a file."""

from __future__ import annotations

import json
import sys

import pytest


def test_score_verb(hici_command, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    lines = [{"pred": "cat", "answers": ["cat"]}, {"pred": "dog", "answers": ["cat"]}, {"answers": ["cat"]}]
    (folder / "qasper.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "result.json").write_text('{"qasper": 30.0, "lcc": 5}')
    command = ("score", "longbench", folder, "--output", tmp_path / "scores.json")
    done = hici_command(*command)
    assert done.status == 2
    assert "qasper.jsonl has 1 corrupt of 3 lines (line 3: lacks pred)" in done.err
    done = hici_command(*command, "--allow-corrupt", "--compare", folder / "result.json", "--verbose")
    assert done.status == 0, done.err
    for text in ("33.33", "+3.33", "Corrupt lines, scored 0: 1 (qasper.jsonl line 3: lacks pred)", "qasper (3 of 200)",
                 "only in", "lcc"):  # fmt: skip
        assert text in done.out
    assert "left out: result.json" in done.err
    result = json.loads((tmp_path / "scores.json").read_text())
    assert result["scores"] == {"qasper": 33.33}
    assert result["corrupt_lines"] == [{"file": "qasper.jsonl", "line": 3, "problem": "lacks pred"}]
    done = hici_command(*command, "--allow-corrupt", "--compare", tmp_path / "scores.json")
    assert done.status == 0, done.err
    assert "+0.00" in done.out
    (folder / "bad.json").write_text('{"qasper": "high"}')
    done = hici_command("score", "longbench", folder, "--compare", folder / "bad.json")
    assert (done.status, "holds no {name: score}" in done.err) == (2, True)
    done = hici_command("score", "longbench", folder, "--overwrite")
    assert (done.status, "--overwrite is for --output only" in done.err) == (2, True)


@pytest.mark.parametrize("kind", ["topics", "lines"])
def test_score_responses_verb(hici_command, tmp_path, kind):
    (tmp_path / "5_response.txt").write_text(
        "Label: 42, Predict: ['it is <42>'], prompt length: 1000\nLabel: 7, Predict: ['none'], prompt length: 900\n"
    )
    done = hici_command("score", kind, tmp_path, "--output", tmp_path / "out.json")
    assert done.status == 0, done.err
    for text in (f"LongEval {kind}", "900 to 1,000", "50.00"):
        assert text in done.out
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["accuracy"] == {"5": 50.0}
    assert (result["task"], result["protocol"]["name"]) == ("score", kind)


def test_paths_as_people_write_them(hici_command, tmp_path, monkeypatch):
    """Relative, with a slash at the end, into folders that are not there yet, and onto a name that mktemp has made."""
    folder = tmp_path / "predictions" / "model"
    folder.mkdir(parents=True)
    (folder / "qasper.jsonl").write_text('{"pred": "cat", "answers": ["cat"]}\n')
    (folder / "result.json").write_text('{"qasper": 30.0}')
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.json").touch()
    for output in ("new/folder/scores.json", "empty.json", "empty.json"):  # the last one is shown again
        done = hici_command("score", "longbench", "predictions/model/", "--output", output)
        assert done.status == 0, done.err
        assert json.loads((tmp_path / output).read_text())["scores"] == {"qasper": 100.0}
    done = hici_command("score", "longbench", "predictions/model", "--output", "predictions/model/result.json")
    assert (done.status, "result.json exists and is no result" in done.err) == (2, True)
    assert (folder / "result.json").read_text() == '{"qasper": 30.0}'


def test_a_missing_package_is_told_before_a_model_is_loaded(hici_command, tmp_path, monkeypatch):
    sample = {"input": "", "context": "x = 1", "answers": ["y = 2"], "all_classes": None, "length": 2}
    (tmp_path / "lcc.jsonl").write_text(json.dumps(sample | {"pred": "y = 2"}))
    monkeypatch.setitem(sys.modules, "rapidfuzz", None)
    for verb in (("score", "longbench", tmp_path), ("eval", "longbench", tmp_path / "no-model", "--data", tmp_path)):
        done = hici_command(*verb)
        assert (done.status, "the package 'rapidfuzz' is not installed" in done.err) == (2, True), done.err
