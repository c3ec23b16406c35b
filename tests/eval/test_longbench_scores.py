"""LongBench's scores: the published ones from the published predictions, lm-eval's metrics, and bad files."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
import types
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hici.eval.longbench import metrics
from hici.eval.longbench.datasets import DATA_FILE, get_dataset, in_order, load_datasets
from hici.eval.longbench.predictions import find_predictions, read_predictions
from hici.eval.longbench.scorer import METRICS, Scorer
from hici.eval.longbench.scoring import by_length, percent, score_file, score_plan
from hici.eval.measure import measure

for package in ("rouge", "jieba", "rapidfuzz"):
    pytest.importorskip(package, reason="LongBench's scores need it: pip install 'hici[scores]'")

MODELS = ("longalpaca-7b-16k", "my-sft-16k")
DATASETS = [name for name in load_datasets() if not name.endswith("_e")]
SLOW = ("gov_report", "multi_news")  # long summaries: rouge takes 5 to 10 s for each model


@pytest.fixture(scope="module")
def scorer():
    """Jieba reads its dictionary once."""
    return Scorer()


def published(shared, model):
    folder = shared / "published" / "longbench_predictions" / model
    return folder, json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in DATASETS]
)
def test_published_scores(shared, scorer, model, name):
    """All 42 to two decimals. Code was scored with difflib."""
    folder, scores = published(shared, model)
    code = name in ("lcc", "repobench-p")
    done = score_file(folder / f"{name}.jsonl", name, Scorer("difflib") if code else scorer)
    assert done["score"] == scores[name]
    assert done["samples"] == get_dataset(name).samples
    assert done["corrupt_lines"] == []
    assert done["unscored"] == []


@pytest.mark.parametrize(
    "model, name, score",
    [
        ("longalpaca-7b-16k", "lcc", 59.45),
        ("longalpaca-7b-16k", "repobench-p", 56.52),
        ("my-sft-16k", "lcc", 64.42),
        ("my-sft-16k", "repobench-p", 61.38),
    ],
)
def test_levenshtein_is_the_default_for_code(shared, scorer, model, name, score):
    folder, _ = published(shared, model)
    assert score_file(folder / f"{name}.jsonl", name, scorer)["score"] == score


def test_the_21_datasets():
    assert len(DATASETS) == 21
    assert [name for name in load_datasets() if name.endswith("_e")] == [
        "qasper_e", "multifieldqa_en_e", "hotpotqa_e", "2wikimqa_e", "gov_report_e", "multi_news_e", "trec_e",
        "triviaqa_e", "samsum_e", "passage_count_e", "passage_retrieval_en_e", "lcc_e", "repobench-p_e",
    ]  # fmt: skip
    for dataset in load_datasets().values():
        assert dataset.metric in METRICS
        assert "{context}" in dataset.prompt
    assert get_dataset("qasper_e").prompt == get_dataset("qasper").prompt
    assert get_dataset("qasper_e").samples is None
    assert in_order(["lcc", "qasper_e", "qasper"]) == ["qasper", "lcc", "qasper_e"]
    with pytest.raises(ValueError, match="unknown LongBench dataset 'hotpotq'; known: .* Did you mean 'hotpotqa'?"):
        get_dataset("hotpotq")


def test_quoted_data_states_its_source_and_licence():
    quoted = json.loads(DATA_FILE.read_text(encoding="utf-8"))
    assert "https://github.com/THUDM/LongBench" in quoted["source"]
    assert "MIT" in quoted["licence"]
    notice = DATA_FILE.with_name("NOTICE").read_text()
    assert "Copyright (c) 2023 THU-KEG & Zhipu AI" in notice
    assert "THE SOFTWARE IS PROVIDED" in notice


# ---- lm-eval's task files, which quote LongBench too


@pytest.fixture(scope="module")
def harness():
    """Where lm-eval keeps its LongBench tasks."""
    found = importlib.util.find_spec("lm_eval")
    if found is None:
        pytest.skip("lm-eval is not installed")
    return Path(found.submodule_search_locations[0]) / "tasks" / "longbench"


# what lm-eval leaves out of LongBench's prompts: (its end, LongBench's)
DEVIATIONS = {
    "triviaqa": ("{context}\n{input}", "{context}\n\n{input}"),
    "samsum": ("{context}\n{input}", "{context}\n\n{input}"),
    "passage_count": ("is:", "is: "),
    "passage_retrieval_en": ("The answer is:", "The answer is: "),
    "lcc": ("code:", "code:\n"),
    "repobench-p": ("code:", "code:\n"),
}


@pytest.mark.parametrize("name", DATASETS)
def test_prompts_and_lengths_are_those_of_the_harness(harness, name):
    """But for six ends of prompts, where LongBench's own file decides."""
    import yaml

    text = (harness / f"{name}.yaml").read_text(encoding="utf-8").replace("!function", "")
    task = yaml.safe_load(text)
    dataset = get_dataset(name)
    prompt = task["doc_to_text"].replace("{{context}}", "{context}").replace("{{question}}", "{input}")
    theirs, ours = DEVIATIONS.get(name, ("", ""))
    assert dataset.prompt.endswith(ours)
    assert dataset.prompt == prompt.removesuffix(theirs) + ours
    assert dataset.max_new_tokens == task["generation_kwargs"]["max_gen_toks"]
    assert dataset.first_line == (task["generation_kwargs"]["until"] == ["\n"])


@pytest.fixture(scope="module")
def oracle(harness):
    """lm-eval's metrics. It imports fuzzywuzzy for code alone, which is compared with nothing here."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("fuzzywuzzy") is None:
            patch.setitem(sys.modules, "fuzzywuzzy", types.SimpleNamespace(fuzz=None))
        spec = importlib.util.spec_from_file_location("longbench_oracle", harness / "metrics.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


PIECES = [
    *("a", "The", "an", "cat", "Cat", "dog's", "7", "07", "7.", "Paragraph 7", "Paragraph 12 and 7", "I", "don't"),
    *("段落7", "段落 7", "小猫", "。", "、猫", "人物", "人", "...", ".", "\n", "\n\n", " ", "", "`", "#", "//x", "\t"),
    *("\u2028", "\u00a0", "\uff0c", "x" * 40),
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)


@given(prediction=TEXTS, answer=TEXTS)
def test_metrics_are_those_of_the_harness(oracle, scorer, prediction, answer):
    assert scorer._compare("qa_f1", prediction, answer, ()) == oracle.qa_f1_score(prediction, answer)
    assert scorer._compare("qa_f1_zh", prediction, answer, ()) == oracle.qa_f1_zh_score(prediction, answer)
    assert scorer._compare("count", prediction, answer, ()) == oracle.count_score(prediction, answer)
    for name, theirs in (("dureader", oracle.rouge_zh_score), ("gov_report", oracle.rouge_score)):
        assert scorer.score(get_dataset(name), prediction, [answer], None).score == theirs(prediction, answer)
    for metric, head in (("retrieval", "Paragraph 7"), ("retrieval_zh", "段落7")):
        theirs = getattr(oracle, f"{metric}_score")
        assert scorer._compare(metric, prediction, head + answer, ()) == theirs(prediction, head + answer)


CLASSES = ["a", "ab", "abc", "abcd", "b", "bc", "bcd", "c", "cd", "d"]


@given(
    classes=st.lists(st.sampled_from(CLASSES), min_size=1, max_size=8),
    prediction=st.text("abcd ", max_size=8),
    data=st.data(),
)
def test_classification_is_that_of_the_harness(oracle, classes, prediction, data):
    """Names that are parts of others, in any order, also twice."""
    answer = data.draw(st.sampled_from(classes))
    ours = metrics.classification(prediction, answer, classes)
    assert ours == oracle.classification_score(prediction, answer, all_classes=classes)


def test_classification_skips_behind_a_name_that_was_taken_off():
    # "a" is a part of "abc" and goes; "b", right behind it, is not looked at and stays
    assert metrics.classification("abc", "abc", ["a", "b", "abc"]) == 1 / 2
    assert metrics.classification("abc", "abc", ["abc", "b"]) == 1
    assert metrics.classification("x", "abc", ["abc", "b"]) == 0


# ---- single rules


def test_the_first_line_rule(scorer):
    trec = get_dataset("trec")
    assert scorer.score(trec, "\n\nNumber\nQuestion: Who", ["Number"], ["Number", "Who"]).score == 1
    assert scorer.score(trec, "Who\nNumber", ["Number"], ["Number", "Who"]).score == 0
    assert scorer.score(get_dataset("triviaqa"), "Paris\nLondon Rome", ["paris."], None).score == 1
    assert scorer.score(get_dataset("hotpotqa"), "Paris\nLondon", ["Paris"], None).score == pytest.approx(2 / 3)


def test_the_best_answer_counts(scorer):
    dataset = get_dataset("hotpotqa")
    assert scorer.score(dataset, "the big cat", ["dog", "big cat", "cat"], None).score == 1


@pytest.mark.parametrize("kind", ["levenshtein", "difflib"])
def test_edit_similarity_of_code(kind):
    dataset = get_dataset("lcc")

    def score(prediction, answer):
        return Scorer(kind).score(dataset, prediction, [answer], None).score

    assert score("\n\n# a comment\n```\n// another\nreturn x\nreturn y", "return x") == 1
    assert score("# only this", "return x") == 0
    assert score("# only this", "") == 1  # both have no line: equal
    assert score("abcd", "bcda") == 0.75  # 2 M / T: "bcd" in common, 6 / 8
    assert score("ab", "a") == 0.67  # in whole percents
    # "abcd" is the longest common subsequence; difflib takes the longest common piece, "efg", and nothing is beside it
    assert score("axbxcxd--efg", "efgabcd") == {"levenshtein": 0.42, "difflib": 0.32}[kind]  # 8 / 19, 6 / 19


def test_a_text_that_rouge_refuses_scores_0_and_is_named(scorer, tmp_path):
    path = tmp_path / "gov_report.jsonl"
    write(path, {"pred": "...", "answers": ["a report"], "all_classes": None, "length": 10},
                {"pred": "a report", "answers": ["a report"], "all_classes": None, "length": 4000})  # fmt: skip
    done = score_file(path, "gov_report", scorer)
    assert done["score"] == 50.0
    assert done["by_length"] == {"0-4k": 0.0, "4-8k": 100.0, "8k+": None}
    assert done["unscored"] == [{"file": "gov_report.jsonl", "line": 1,
                                 "problem": "rouge: Collections must contain at least 1 sentence"}]  # fmt: skip


def test_sentences_too_long_for_rouge_score_0_at_any_depth_of_the_caller(scorer):
    """It recurses word by word, and begins anew in its own thread."""
    gov_report = get_dataset("gov_report")

    def deep(levels, words):
        return deep(levels - 1, words) if levels else scorer.score(gov_report, "x " * words, ["x " * words], None)

    fits, too_long = deep(500, 800), deep(0, 1100)
    assert (fits.score, fits.problem) == (pytest.approx(1), None)
    assert (too_long.score, too_long.problem) == (0, "rouge: sentences too long for its recursion")


def test_percent_and_buckets():
    assert percent([1, 0, 0.5]) == 50.0
    assert percent([1, 1, 0]) == 66.67
    lengths = [0, 3999, 4000, 7999, 8000, 50000]
    assert by_length([1, 0, 1, 1, 0, 0.5], lengths) == {"0-4k": 50.0, "4-8k": 100.0, "8k+": 25.0}
    assert by_length([1, 0], [5, None]) is None


def test_unknown_edit_similarity():
    with pytest.raises(ValueError, match="unknown edit_similarity 'levenstein'.*Did you mean 'levenshtein'"):
        Scorer("levenstein")


@pytest.mark.parametrize(
    "package, dataset", [("rouge", "samsum"), ("jieba", "multifieldqa_zh"), ("jieba", "vcsum"), ("rapidfuzz", "lcc")]
)
def test_a_missing_package_is_told_of(monkeypatch, package, dataset):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"'{package}' is not installed.*pip install 'hici\[scores\]'"):
        Scorer().check(get_dataset(dataset))
    Scorer("difflib").check(get_dataset("lcc"))
    Scorer().check(get_dataset("hotpotqa"))


# ---- files


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


GOOD = {"pred": "A cat", "answers": ["cat"], "all_classes": None, "length": 5}
BAD = [
    ("{", "no JSON"),
    ("", "empty"),
    ("[1]", "no JSON object"),
    ('{"answers": ["x"]}', "lacks pred"),
    ("{}", "lacks pred and answers"),
    ('{"pred": 5, "answers": ["x"]}', "pred is 5, no text"),
    ('{"pred": "x", "answers": "x"}', "answers is no list of texts"),
    ('{"pred": "x", "answers": []}', "answers is no list of texts with at least one in it"),
    ('{"pred": "x", "answers": [1]}', "answers is no list of texts"),
    ('{"pred": "x", "answers": ["x"], "length": "5"}', "length is '5'"),
    ('{"pred": "x", "answers": ["x"], "length": true}', "length is True"),
    ('{"pred": "x", "answers": ["x"], "all_classes": [1]}', "all_classes is neither null nor a list"),
    (b'{"pred": "\xff", "answers": ["x"]}', "no JSON"),
]


@pytest.mark.parametrize("line, problem", BAD, ids=[problem for _, problem in BAD])
def test_a_corrupt_line_is_named(tmp_path, scorer, line, problem):
    path = tmp_path / "hotpotqa.jsonl"
    raw = line if isinstance(line, bytes) else line.encode()
    good = json.dumps(GOOD).encode()
    path.write_bytes(good + b"\n" + raw + b"\n" + good + b"\n")
    with pytest.raises(
        ValueError, match=r"hotpotqa.jsonl has 1 corrupt of 3 lines \(line 2: .*--allow-corrupt"
    ) as caught:
        score_file(path, "hotpotqa", scorer)
    assert problem in str(caught.value)
    done = score_file(path, "hotpotqa", scorer, allow_corrupt=True)
    assert (done["score"], done["samples"]) == (66.67, 3)  # "a" is no word
    assert [(x["file"], x["line"]) for x in done["corrupt_lines"]] == [("hotpotqa.jsonl", 2)]
    assert problem in done["corrupt_lines"][0]["problem"]


@pytest.mark.parametrize(
    "name, changes, problem",
    [
        ("trec", {"all_classes": None}, "a classification needs the classes"),
        ("passage_retrieval_en", {"answers": ["7"]}, "the answer '7' names no paragraph"),
        ("passage_retrieval_zh", {"answers": ["Paragraph 7"]}, "the answer 'Paragraph 7' names no paragraph"),
    ],
)
def test_what_a_metric_needs(tmp_path, name, changes, problem):
    write(tmp_path / "file.jsonl", GOOD | changes)
    read, corrupt = read_predictions(tmp_path / "file.jsonl", get_dataset(name))
    assert read == []
    assert corrupt[0].line == 1
    assert problem in corrupt[0].problem


def test_line_ends_inside_of_texts_end_no_line(tmp_path):
    record = GOOD | {"pred": "a\u2028b\x85c\rd"}
    (tmp_path / "x.jsonl").write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8", newline="")
    read, corrupt = read_predictions(tmp_path / "x.jsonl", get_dataset("qasper"))
    assert [each.pred for each in read] == ["a\u2028b\x85c\rd"]
    assert corrupt == []


def test_all_corrupt_lines_of_all_files_are_counted_and_named(tmp_path):
    write(tmp_path / "qasper.jsonl", *[GOOD | {"pred": n} for n in range(2)], GOOD, *[{}] * 7, GOOD | {"pred": 0})
    write(tmp_path / "musique.jsonl", GOOD)
    (tmp_path / "lcc.jsonl").write_text("{\n" * 8 + "[" * 100_000)
    with pytest.raises(ValueError) as caught:
        score_plan(tmp_path)
    text = str(caught.value)
    assert "qasper.jsonl has 10 corrupt of 11 lines (lines 1, 11: pred is 0, no text; line 2: pred is 1, no " in text
    assert "; lines 4-10: lacks pred and answers)" in text
    assert "lcc.jsonl has 9 corrupt of 9 lines (lines 1-8: no JSON (" in text
    assert "; line 9: no JSON (nested too deeply))" in text
    assert "musique" not in text
    result = measure(score_plan(tmp_path, allow_corrupt=True))
    assert result["scores"] == {"qasper": 9.09, "musique": 100.0, "lcc": 0.0}
    assert [(x["file"], x["line"]) for x in result["corrupt_lines"]] == [
        *(("qasper.jsonl", n) for n in (1, 2, *range(4, 12))), *(("lcc.jsonl", n) for n in range(1, 10)),
    ]  # fmt: skip
    (tmp_path / "qasper.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"qasper.jsonl is empty"):
        score_plan(tmp_path)


def test_directory_of_predictions(tmp_path, caplog):
    caplog.set_level("INFO", logger="hici")
    with pytest.raises(ValueError, match="nothing is no directory"):
        find_predictions(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"holds no \.jsonl file"):
        find_predictions(tmp_path)
    for name in ("lcc.jsonl", "trec.jsonl", "qasper_e.jsonl", "scores.partial-0.jsonl", "result.json"):
        (tmp_path / name).write_text("{}")
    assert list(find_predictions(tmp_path)) == ["trec", "lcc", "qasper_e"]
    assert "left out: result.json, scores.partial-0.jsonl" in caplog.text
    (tmp_path / "hotpot_qa.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="unknown LongBench dataset .*'hotpot_qa'; .*Did you mean 'hotpotqa'.*Rename"):
        find_predictions(tmp_path)


def test_plan_of_scores(tmp_path):
    """A result with everything in it; other predictions under the same name are another measurement."""
    folder, target = tmp_path / "model", tmp_path / "out.json"
    folder.mkdir()
    rng = random.Random(0)
    write(folder / "lcc.jsonl", *(GOOD | {"pred": rng.choice(["cat", "car"])} for _ in range(9)))
    write(folder / "hotpotqa.jsonl", GOOD)
    result = measure(score_plan(folder, edit_similarity="difflib"), target)
    assert result["schema"] == {"name": "hici-result", "version": 1}
    assert result["task"] == "score"
    assert result["protocol"] == {"name": "longbench", "edit_similarity": "difflib", "allow_corrupt": False,
                                  "packages": {}}  # fmt: skip
    assert list(result["scores"]) == ["hotpotqa", "lcc"]
    assert result["scores"]["hotpotqa"] == 100.0
    assert result["samples"] == {"hotpotqa": 1, "lcc": 9}
    assert (result["model"], result["seed"], result["conditions"]) == (None, None, [])
    assert set(result["data"]["sha256"]) == {"hotpotqa.jsonl", "lcc.jsonl"}
    assert measure(score_plan(folder, edit_similarity="difflib"), target) == result
    assert "rapidfuzz" in score_plan(folder).protocol["packages"]
    with pytest.raises(ValueError, match='edit_similarity is "difflib", now "levenshtein"'):
        measure(score_plan(folder), target)
