"""Which answers count, what may be asked, and what files hold."""

import json

import pytest

from hici.eval.retrieval.files import read_cases, read_haystack, split_sentences
from hici.eval.retrieval.scoring import first_number, label_within, number_recall, numbers, whole_text, word_recall
from hici.eval.retrieval.settings import Settings, evenly_spaced
from hici.eval.statistics import wilson_interval

UUID = "1bb1fbec-26c5-44d0-8619-6506c5c37841"


@pytest.mark.parametrize(
    "answer, right",
    [
        ("12345", 1), (" 12345.\nThe grass", 1), ("is 12345, or 99", 1), ("<12345>", 1), ("12,345", 1),
        ("\n\n12345", 1), ("No.12345", 1), ("123456", 0), ("012345", 0), ("1 12345", 0), ("99, then 12345", 0),
        ("12345.5", 0), ("", 0), ("the key", 0), ("12 345", 0), ("١٢٣٤٥", 0),
    ],
)  # fmt: skip
def test_the_first_number_counts_and_only_exactly(answer, right):
    assert first_number(answer, ("12345",)) == right


def test_numbers_of_a_list():
    assert numbers("1,234,567 and 12,34 or 123456,789012; 0.5") == ["1234567", "12", "34", "123456", "789012", "0.5"]


@pytest.mark.parametrize(
    "answer, share",
    [("481723, 907001 and 555555", 1), ("481723", 1 / 3), ("4817230, 907001", 1 / 3), ("", 0),
     ("907001 907001 907001", 1 / 3), ("1. 555555\n2. 907001", 2 / 3)],
)  # fmt: skip
def test_recall_of_numbers(answer, share):
    assert number_recall(answer, ("481723", "907001", "555555")) == pytest.approx(share)


@pytest.mark.parametrize(
    "answer, share",
    [("ABCDE, FGHIJ", 1), ("1. VAR ABCDE = 4\n2. FGHIJ.", 1), ("ABCDEF FGHIJ", 0.5), ("abcde fghij", 0),
     ("VAR_ABCDE", 0.5), ("", 0)],
)  # fmt: skip
def test_recall_of_words(answer, share):
    assert word_recall(answer, ("ABCDE", "FGHIJ")) == share


@pytest.mark.parametrize(
    "answer, right",
    [(UUID, 1), (f' "{UUID.upper()}"', 1), (f"it is {UUID}.", 1), (UUID[:-1], 0), (f"{UUID}0", 0), (f"a{UUID}", 0)],
)
def test_a_whole_text(answer, right):
    assert whole_text(answer, (UUID,)) == right


@pytest.mark.parametrize(
    "answer, right",
    [("the psychology of creativity.", 1), ("The Psychology of Creativity", 1), ("psychology", 0), ("", 0)],
)
def test_a_label_within_the_answer(answer, right):
    assert label_within(answer, ("The psychology of creativity",)) == right


def test_the_rule_for_labels_gives_the_published_accuracies(shared):
    for model, published in (
        ("LongLoRA-13B-16K", {5: 100, 10: 96, 15: 100, 20: 98, 25: 84}),
        ("longchat-7b-16k", {5: 100, 10: 98, 15: 94, 20: 84, 25: 60}),
    ):
        for topics, accuracy in published.items():
            path = shared / "published" / "topic_predictions" / model / f"{topics}_response.txt"
            lines = [line for line in path.read_text().splitlines() if line]
            cut = [line.removeprefix("Label: ").rpartition(", prompt length:")[0] for line in lines]
            pairs = [line.partition(", Predict: ")[::2] for line in cut]
            assert len(pairs) == 50
            assert 2 * sum(label_within(predicted, (label,)) for label, predicted in pairs) == accuracy


def test_wilson_interval():
    assert wilson_interval(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)  # Wilson 1927's formula by hand
    assert wilson_interval(0, 3) == pytest.approx((0, 0.561497), abs=1e-6)
    assert wilson_interval(3, 3) == pytest.approx((0.438503, 1), abs=1e-6)
    low, high = wilson_interval(1.5, 3)
    assert low + high == pytest.approx(1)
    wide, narrow = wilson_interval(1.5, 3), wilson_interval(150, 300)
    assert narrow[1] - narrow[0] < 0.2 * (wide[1] - wide[0])
    for successes, trials in ((4, 3), (-1, 3), (0, 0)):
        with pytest.raises(ValueError, match="give at least one trial, no more successes than trials"):
            wilson_interval(successes, trials)


def test_depths_are_evenly_spaced():
    assert evenly_spaced(1) == (0.5,)
    assert evenly_spaced(5) == (0, 0.25, 0.5, 0.75, 1)
    assert evenly_spaced(4) == (0, 0.3333, 0.6667, 1)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tasks": ("passky",)}, "unknown retrieval task 'passky'; known: keyvalue, .* Did you mean 'passkey'"),
        ({"tasks": ()}, "no task is given; give some of"),
        ({"tasks": ("lines", "lines")}, "task lines is given twice"),
        ({"lengths": ()}, "task passkey needs lengths; give some"),
        ({"lengths": (512, 512)}, "length 512 is given twice"),
        ({"lengths": (512, 0)}, "length 0 is below 1"),
        ({"depths": (0.5, 1.5)}, r"depth 1.5 is not in 0..1"),
        ({"depths": (-0.1,)}, r"depth -0.1 is not in 0..1"),
        ({"depths": (float("nan"),)}, "depth nan is not in 0..1"),
        ({"depths": (0.5, 0.5)}, "depth 0.5 is given twice"),
        ({"depths": ()}, "no depth is given"),
        ({"depths": (0.5,), "tasks": ("topics",)}, "depths change nothing for topics"),
        ({"depths": (0.5,), "tasks": ("needle",), "options": {"values": 2}}, "depths change nothing for needle"),
        ({"samples": 0}, "samples=0 is below 1"),
        ({"seed": -1}, "seed=-1 is below 0"),
        ({"options": {"keys": 2}}, "keys=2 is for task needle, and none of its prompts is generated here; add needle"),
        ({"options": {"kees": 2}}, "unknown option of a retrieval task 'kees'; .* Did you mean 'keys'"),
        ({"tasks": ("needle",), "options": {"keys": 0}}, r"keys=0 is not in 1..48 \(names in a prompt\)"),
        ({"tasks": ("topics",), "options": {"topics": 31}}, "topics=31 is not in 2..30"),
        ({"haystack": ("a.txt",)}, "a haystack changes nothing for passkey; add one of needle, variables"),
        ({"skip_too_long": True}, "skip_too_long is for case files"),
        ({"cases": ("a.jsonl",), "case_tasks": ("lines",)}, "a.jsonl holds cases of lines, which is not among"),
        ({"tasks": ("lines",), "cases": ("a.jsonl",), "case_tasks": ("lines",), "lengths": (1, 2)},
         "lengths 1 2 with prompts from files only"),
        ({"cases": ("a.jsonl",)}, "1 case files with 0 case_tasks"),
        ({"cases": ("a", "a"), "case_tasks": ("lines", "lines")}, "case file a is given twice"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_what_cannot_be_asked(changes, message):
    with pytest.raises(ValueError, match=message):
        Settings(**{"tasks": ("passkey",), "lengths": (512,), **changes})


def test_settings_fill_in_what_is_not_given():
    settings = Settings(tasks=("needle", "topics"), lengths=(512,), options={"keys": 2})
    needle, topics = settings.generated
    assert settings.options_of(needle) == {"keys": 2, "values": 1}
    assert settings.options_of(topics) == {"topics": 5}
    assert settings.depths_of(needle) == evenly_spaced(10)
    assert settings.depths_of(topics) == [None]
    from_file = Settings(tasks=("topics",), cases=("5.jsonl",), case_tasks=("topics",))
    assert from_file.generated == []


def test_sentences_of_a_text():
    text = 'One day, it "rained." Did it?\n\nYes! And 3.5 mm fell.  ' + "so on " * 100 + "until the end"
    sentences = split_sentences(text)
    assert sentences[:4] == ['One day, it "rained."', "Did it?", "Yes!", "And 3.5 mm fell."]
    assert " ".join(sentences) == " ".join(text.split())
    assert max(map(len, sentences)) <= 300
    assert min(map(len, sentences[4:-1])) > 290


def test_a_haystack_is_all_files_in_order(tmp_path):
    for name, text in (("a.txt", "First. Second."), ("b.txt", "Third.")):
        (tmp_path / name).write_text(text)
    filler, about = read_haystack([str(tmp_path / "*.txt")])
    assert filler.sentences == ("First.", "Second.", "Third.")
    assert filler.capacity == 3
    assert about["sentences"] == 3
    assert [len(file["sha256"]) for file in about["files"]] == [64, 64]
    (tmp_path / "c.jsonl").write_text('{"text": "No."}\n')
    with pytest.raises(ValueError, match="c.jsonl holds records, but sentences are taken from plain text"):
        read_haystack([str(tmp_path / "c.jsonl")])
    with pytest.raises(ValueError, match="does not exist, and as a glob it matches no file"):
        read_haystack([str(tmp_path / "d.txt")])


LINE = {"prompt": "line a-b: ...", "expected_number": 2416}
TOPIC = {"prompt": "USER: ...", "topics": ["The sea", "The sky"]}


@pytest.mark.parametrize(
    "lines, message",
    [
        ([LINE, TOPIC], "a.jsonl:2 is a case of topics, and those before it are of lines; give a file each"),
        ([LINE, {"prompt": "x"}], "a.jsonl:2 has neither a whole 'expected_number'"),
        ([{**LINE, "expected_number": 1.5}], "a.jsonl:1 has neither"),
        ([{**LINE, "expected_number": True}], "a.jsonl:1 has neither"),
        ([{**TOPIC, "topics": []}], "a.jsonl:1 has neither"),
        ([{**TOPIC, "topics": [3]}], "a.jsonl:1 has neither"),
        ([{**LINE, "prompt": " "}], "a.jsonl:1 has no text in 'prompt'"),
        ([3], "a.jsonl:1 is int, and every|a.jsonl:1 is int, but every"),
        ([], "a.jsonl is empty"),
    ],
    ids=str,
)
def test_broken_case_files_are_named_by_line(lines, message, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=message):
        read_cases(str(path))


def test_case_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match=r"--cases .*a.jsonl does not exist; give a file with one test case a line"):
        read_cases(str(tmp_path / "a.jsonl"))
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ValueError, match=r"--cases .*a.json is no .jsonl file"):
        read_cases(str(tmp_path / "a.json"))
    (tmp_path / "torn.jsonl").write_text(json.dumps(LINE) + '\n{"prompt": "li')
    with pytest.raises(ValueError, match="torn.jsonl:2 is not JSON"):
        read_cases(str(tmp_path / "torn.jsonl"))


def test_published_cases_are_read(shared):
    folder = shared / "published" / "longeval_testcases"
    lines, topics = read_cases(str(folder / "200_lines.jsonl")), read_cases(str(folder / "5_topics.jsonl"))
    assert (lines.task, len(lines.cases), lines.cases[0].expected) == ("lines", 50, "2416")
    assert (topics.task, len(topics.cases), topics.cases[0].expected) == ("topics", 50, "The psychology of creativity")
    for case in lines.cases:
        assert f"REGISTER_CONTENT is <{case.expected}>" in case.prompt
