"""`hici eval retrieval` from flags to JSON, table and picture, and its refusals."""

import json

import pytest
from matplotlib import image

from hici.cli.eval_retrieval import parse_depths
from hici.report import retrieval as report

BEYOND = ("--allow-beyond-rope",)  # the tests' models have 128 positions


def test_table_json_and_picture_of_two_attentions(adapter_directory, tmp_path, hici_command):
    arguments = ["eval", "retrieval", adapter_directory, "--tasks", "passkey", "variables", "--lengths", 500, 600,
                 "--depths", 2, "--samples", 1, "--attention", "full", "hici", "--hops", 1, *BEYOND,
                 "--out", tmp_path]  # fmt: skip
    done = hici_command(*arguments)
    assert done.status == 0, done.err
    record = json.loads((tmp_path / "retrieval.json").read_text())
    assert [(c["attention"], c["task"], c["context"], c["depth"]) for c in record["conditions"]] == [
        (attention, task, length, depth)
        for attention in ("full", "hici")
        for task, depths in (("passkey", (0.0, 1.0)), ("variables", (None,)))
        for length in (500, 600)
        for depth in depths
    ]
    assert record["task"] == "retrieval"
    assert record["protocol"]["options"]["variables"] == {"chains": 2, "hops": 1}
    assert record["model"]["rope"]["allow_beyond_rope"]
    for c in record["conditions"]:
        assert c["prompt_tokens"][1] + c["answers"][0]["max_new_tokens"] <= c["context"]
        assert c["prompt_tokens"][0] + c["answers"][0]["max_new_tokens"] > c["context"] - 40
    assert "passkey of" in done.out
    assert "variables of" in done.out
    assert done.out.count("hici, past") == 4
    assert "not causal" not in done.out
    assert image.imread(tmp_path / "retrieval.png").shape[0] > 300
    again = hici_command(*arguments)
    assert again.status == 0, again.err
    assert "holds this very measurement already" in again.err
    assert again.out == done.out


def test_numbers_of_a_model_that_sees_the_future_are_marked(adapter_directory, tmp_path, hici_command):
    done = hici_command("eval", "retrieval", adapter_directory, "--lengths", 500, "--depths", 0.5, "--samples", 1,
                        "--attention", "full", "hici", "--visibility", "all", *BEYOND, "--out", tmp_path)  # fmt: skip
    assert done.status == 0, done.err
    row = next(line for line in done.out.splitlines() if "hici, all" in line)
    assert "hici, all (not causal)" in row
    assert "(not causal): tokens of the prompt see summaries of their own future." in done.out
    full, hici = json.loads((tmp_path / "retrieval.json").read_text())["conditions"]
    assert (full["causal"], hici["causal"], hici["decode"]) == (True, False, "raw keys")


def test_rope_is_extended_to_the_longest(base_directory, tmp_path, hici_command):
    arguments = ["eval", "retrieval", base_directory, "--lengths", 480, 500, "--samples", 1, "--depths", 1]
    refused = hici_command(*arguments)
    assert refused.status == 2
    assert "500 tokens are more than the 128 positions" in refused.err
    done = hici_command(*arguments, "--rope", "auto", "--out", tmp_path / "a.json")
    assert done.status == 0, done.err
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["model"]["rope"]["positions"] == 500
    assert [c["depth"] for c in record["conditions"]] == [0.5, 0.5]


def test_cases_of_a_file_and_those_left_out(base_directory, tmp_path, hici_command):
    cases = tmp_path / "cases.jsonl"
    texts = ["the river <12>. Which number?", "the river " + "runs " * 300 + "<34>. Which number?"]
    cases.write_text("".join(json.dumps({"prompt": text, "expected_number": 12}) + "\n" for text in texts))
    refused = hici_command("eval", "retrieval", base_directory, "--cases", cases)
    assert refused.status == 2
    assert f"the longest, {cases}:2, takes" in refused.err
    for flags in (["--rope", "auto"], ["--allow-beyond-rope"]):
        refused = hici_command("eval", "retrieval", base_directory, "--cases", cases, *flags)
        assert (refused.status, refused.out) == (2, "")
        assert f"{flags[0]} changes nothing while cases are limited to the model's positions" in refused.err
    done = hici_command("eval", "retrieval", base_directory, "--cases", cases, "--skip-too-long", "--out", tmp_path)
    assert done.status == 0, done.err
    assert f"1 cases of {cases} are too long and left out." in done.out
    (c,) = json.loads((tmp_path / "retrieval.json").read_text())["conditions"]
    assert (c["task"], c["samples"], c["skipped_too_long"]) == ("lines", 1, 1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tasks", "needles"], "unknown retrieval task 'needles'"),
        (["--tasks", "passkey", "passkey"], "task passkey is given twice"),
        (["--lengths", 100], "length 100 is too short for task passkey: without any filler"),
        (["--depths", "0"], "a whole number is how many depths, at least 1; give 0.0 for the beginning"),
        (["--depths", "20000"], "20000 depths are not in 1..1000"),
        (["--depths", "0.5", "2"], "depth 2 is not in 0..1"),
        (["--depths", "half"], "could not convert string to float: 'half'; give how many (10), or fractions"),
        (["--samples", 0], "samples=0 is below 1"),
        (["--keys", 2], "keys=2 is for task needle"),
        (["--chat", "--tasks", "topics", "--depths", 3], "depths change nothing for topics"),
        (["--haystack", "/no/such/file"], "a haystack changes nothing for passkey"),
        (["--tasks", "needle", "--haystack", "/no/such/file"], "/no/such/file does not exist"),
        (["--cases", "/no/such.jsonl"], "--cases /no/such.jsonl does not exist"),
        (["--skip-too-long"], "skip_too_long is for case files"),
        (["--attention", "full", "full"], "--attention full full names one twice"),
        (["--attention", "hici"], "fresh random ones"),
        (["--overwrite"], "--overwrite is for --out only"),
    ],
    ids=str,
)
def test_refusals(arguments, message, base_directory, tmp_path, hici_command):
    rest = [] if "--lengths" in arguments else ["--lengths", 600]
    out = [] if "--overwrite" in arguments else ["--out", tmp_path / "out"]
    done = hici_command("eval", "retrieval", base_directory, *rest, *arguments, *BEYOND, *out)
    assert (done.status, done.out) == (2, "")
    assert message in done.err
    assert not (tmp_path / "out").exists()


def test_lengths_are_needed_for_generated_prompts(base_directory, hici_command):
    done = hici_command("eval", "retrieval", base_directory)
    assert done.status == 2
    assert "task passkey needs lengths; give some, for example 1024 2048 4096" in done.err


def test_depths_from_words():
    assert parse_depths(["3"]) == (0, 0.5, 1)
    assert parse_depths(["1"]) == (0.5,)
    assert parse_depths(["0.0"]) == (0,)
    assert parse_depths(["1.0", "0.25"]) == (1, 0.25)
    assert parse_depths(["0", "1"]) == (0, 1)


def _condition(depth, context, accuracy, samples=4, **changes):
    return {
        "attention": "full", "visibility": None, "causal": True, "task": "passkey", "depth": depth, "context": context,
        "accuracy": accuracy, "samples": samples, "answer_loss": 0.5, "prompt_tokens": [90 + context, 95 + context],
        "seconds": 1.25, **changes,
    }  # fmt: skip


def test_few_depths_are_columns_and_of_many_the_lowest_is_shown():
    grid = [_condition(depth, 1024, accuracy) for depth, accuracy in ((0.0, 1.0), (1.0, 0.25))]
    columns, rows = report.table(grid)
    assert columns[5:7] == ["at 0.00", "at 1.00"]
    assert rows == [["full", "1,024", "8", "0.625", "[0.31, 0.86]", "1.00", "0.25", "0.500", "1,114-1,119", "2.5"]]
    many = [_condition(i / 9, 1024, 0.0 if i == 4 else 1.0) for i in range(10)]
    columns, rows = report.table(many)
    assert columns[5] == "lowest"
    assert (rows[0][3], rows[0][5]) == ("0.900", "0.00 at 0.44")
    columns, rows = report.table([_condition(None, 512, 0.5, answer_loss=None)])
    assert "lowest" not in columns
    assert rows[0][:6] == ["full", "512", "4", "0.500", "[0.15, 0.85]", "-"]


def test_every_cell_of_the_heat_map_has_its_number_in_a_colour_to_be_read():
    from hici.report.figures import new_figure

    cells = [_condition(depth, context, depth) for depth in (0.0, 0.5, 1.0) for context in (512, 1024)]
    _, axes = new_figure()
    report.heat_map(axes, cells[:-1], "passkey, full", 1)
    assert axes.images[0].get_array().shape == (3, 2)
    assert axes.images[0].get_array().mask.sum() == 1  # what was not measured is told from a zero
    assert [(text.get_text(), text.get_color()) for text in axes.texts] == [
        ("0", "white"), ("0", "white"), ("50", "black"), ("50", "black"), ("100", "black"), ("–", "black"),  # noqa: RUF001
    ]  # fmt: skip
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0 %", "50 %", "100 %"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["512", "1,024"]
