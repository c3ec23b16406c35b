"""LongEval's topics and lines: the published accuracies, the rules, and bad files."""

from __future__ import annotations

import pytest

from hici.eval.measure import measure
from hici.eval.responses import Response, find_responses, is_correct, read_responses, responses_plan

PUBLISHED = {
    "LongLoRA-13B-16K": {"5": 100.0, "10": 96.0, "15": 100.0, "20": 98.0, "25": 84.0},
    "longchat-7b-16k": {"5": 100.0, "10": 98.0, "15": 94.0, "20": 84.0, "25": 60.0},
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_accuracies(shared, model):
    """All ten."""
    result = measure(responses_plan(shared / "published" / "topic_predictions" / model, "topics"))
    assert result["accuracy"] == PUBLISHED[model]
    assert result["samples"] == dict.fromkeys(PUBLISHED[model], 50)
    assert (result["task"], result["protocol"]["name"], result["conditions"]) == ("score", "topics", [])


def test_rules():
    assert is_correct("topics", Response("The Art of War", "['It was the art OF war.']", 5))
    assert not is_correct("topics", Response("The Art of War", "['the art of peace']", 5))
    assert is_correct("lines", Response("42", "['line 7: <42>'], Parsed: 7", 5))
    assert not is_correct("lines", Response("42", "['<42> of 7'], Parsed: 42", 5))
    assert not is_correct("lines", Response("42", "['none'], Parsed: -1", 5))


def test_lines_and_files_in_order_of_numbers(tmp_path, caplog):
    caplog.set_level("INFO", logger="hici")
    for number in ("200", "30"):
        (tmp_path / f"{number}_response.txt").write_text(
            "Label: 42, Predict: ['<42>'], Parsed: 42, prompt length: 10\n"
            "Label: 43, Predict: ['<42>, Predict: x'], Parsed: 42, prompt length: 12\n"
        )
    (tmp_path / "notes.txt").write_text("x")
    assert list(find_responses(tmp_path)) == ["30", "200"]
    assert "left out: notes.txt" in caplog.text
    result = measure(responses_plan(tmp_path, "lines"))
    assert result["accuracy"] == {"30": 50.0, "200": 50.0}
    assert result["prompt_tokens"] == {"30": [10, 12], "200": [10, 12]}


@pytest.mark.parametrize(
    "bad", ["", "Label: x, Predict: y", "Predict: y, prompt length: 5", "Label: , Predict: y, prompt length: 5"]
)
def test_corrupt_lines(tmp_path, bad):
    path = tmp_path / "5_response.txt"
    good = "Label: x, Predict: ['x'], prompt length: 5"
    path.write_text(f"{good}\n{bad}\n{good}\n")
    with pytest.raises(ValueError, match=r"5_response.txt has 1 corrupt of 3 lines \(line 2\)"):
        responses_plan(tmp_path, "topics")
    path.write_text(f"{good}\n")
    assert read_responses(path, "topics") == [Response("x", "['x']", 5)]
    with pytest.raises(ValueError, match=r"1 corrupt of 1 lines \(line 1\), not UTF-8 of the form 'Label: a number"):
        responses_plan(tmp_path, "lines")


def test_all_corrupt_lines_of_all_files_are_counted_and_named(tmp_path):
    good = "Label: x, Predict: ['x'], prompt length: 5\n"
    (tmp_path / "5_response.txt").write_bytes(b"Label: \xff\n" + good.encode() + b"bad\n" * 7)
    (tmp_path / "10_response.txt").write_text(good)
    (tmp_path / "15_response.txt").write_text("bad\n" + good + f"Label: x, Predict: , prompt length: {'1' * 5000}\n")
    with pytest.raises(ValueError, match=r"5_response.txt has 8 corrupt of 9 lines \(lines 1, 3-9\); .*"
                       r"15_response.txt has 2 corrupt of 3 lines \(lines 1, 3\), not"):  # fmt: skip
        responses_plan(tmp_path, "topics")


def test_numbers_of_any_length():
    """Python's int() refuses more than 4,300 digits, which a model that repeats itself may write."""
    assert not is_correct("lines", Response("42", f"['{'1' * 5000}']", 5))
    assert is_correct("lines", Response("042", "['<0042>']", 5))
    assert not is_correct("lines", Response("42", "['<420>']", 5))


def test_bad_places(tmp_path):
    with pytest.raises(ValueError, match="nothing is no directory"):
        find_responses(tmp_path / "nothing")
    with pytest.raises(ValueError, match="holds no N_response.txt"):
        find_responses(tmp_path)
    (tmp_path / "5_response.txt").write_bytes(b"")
    with pytest.raises(ValueError, match="is empty"):
        read_responses(tmp_path / "5_response.txt", "topics")
