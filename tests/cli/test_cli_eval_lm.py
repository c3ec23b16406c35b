"""`hici eval lm` on local tasks without a network: from YAML files to JSON and table, a kill, and its refusals."""

import copy
import json
import logging
import math
import sys

import pytest

pytest.importorskip("lm_eval")

import datasets
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from hici.eval import lm as lm_module
from hici.eval.harness import HiCIModel
from hici.eval.harness import tasks as tasks_module

QUESTIONS = [
    {"question": "the old house", "choices": ["sings", "runs over the river", "dog"], "answer": 1},
    {"question": "a blue tree", "choices": ["cat", "sees under the house", "slowly"], "answer": 0},
    {"question": "the dog runs " * 9, "choices": ["quickly", "mountain", "and then a cat"], "answer": 2},
    {"question": "the river", "choices": ["a", "the", "old"], "answer": 2},
]
TEXTS = [{"text": "the cat sees the dog and then runs over the mountain. " * 25}, {"text": "a blue tree sings"}]
HEAD = "dataset_path: json\ndataset_kwargs:\n  data_files: {data}\ntest_split: train\nmetadata:\n  version: 2.0\n"
CHOICE = (
    HEAD
    + """\
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
)
ANSWER = (
    HEAD
    + """\
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 6}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
)
TEXT = (
    HEAD
    + """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}
  - {{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
"""
)


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def task_files(tmp_path_factory):
    """Three tasks, one of every kind, two of which form a group with a number of its own."""
    directory = tmp_path_factory.mktemp("tasks")
    questions = lines(directory / "questions.jsonl", QUESTIONS)
    texts = lines(directory / "texts.jsonl", TEXTS)
    for name, text, data in (
        ("my_choice", CHOICE, questions), ("my_answer", ANSWER, questions), ("my_text", TEXT, texts),
        ("my_other_choice", CHOICE, lines(directory / "other.jsonl", QUESTIONS[:2])),
    ):  # fmt: skip
        (directory / f"{name}.yaml").write_text(f"task: {name}\n" + text.format(data=data))
    (directory / "group.yaml").write_text(
        "group: my_group\ntask: [my_choice, my_other_choice]\naggregate_metric_list:\n"
        "  - {metric: acc, aggregation: mean, weight_by_size: true}\nmetadata:\n  version: 3.0\n"
    )
    (directory / "lost.yaml").write_text("task: my_lost\n" + TEXT.format(data=directory / "absent.jsonl"))
    return directory


@pytest.fixture
def eval_lm(hici_command, task_files, tmp_path, monkeypatch):
    """Run `hici eval lm MODEL --include-path ...`, without lm-eval's own 14,000 tasks."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(
        tasks_module,
        "TaskManager",
        lambda include_path=None, include_defaults=False: TaskManager(
            include_path=include_path, include_defaults=False
        ),
    )
    return lambda model, *flags: hici_command("eval", "lm", model, "--include-path", task_files, *flags)


def entries(record, **wanted):
    return [c for c in record["conditions"] if all(c[key] == value for key, value in wanted.items())]


def test_three_kinds_of_tasks_in_two_attentions(eval_lm, adapter_directory, tmp_path):
    done = eval_lm(adapter_directory, "--tasks", "my_choice,my_answer", "my_text", "--attention", "full", "hici",
                   "--batch-size", 2, "--out", tmp_path)  # fmt: skip
    assert done.status == 0, done.err
    assert done.out.startswith("Tasks of lm-evaluation-harness 0.4")  # nothing of lm-eval's on stdout
    assert done.out.rstrip().endswith(f"wrote {tmp_path / 'lm.json'}")
    record = json.loads((tmp_path / "lm.json").read_text())
    assert [(c["attention"], c["task_name"], c["metric"]) for c in record["conditions"]] == [
        (attention, task, metric)
        for attention in ("full", "hici")
        for task, metric in (("my_choice", "acc,none"), ("my_answer", "exact_match,none"),
                             ("my_text", "word_perplexity,none"), ("my_text", "bits_per_byte,none"))
    ]  # fmt: skip
    for entry in record["conditions"]:
        assert f"{entry['value']:.4f}" in done.out
        assert (entry["causal"], entry["version"], entry["num_fewshot"]) == (True, 2.0, 0)
        assert entry["samples"] == entry["documents"] == (2 if entry["task_name"] == "my_text" else 4)
        assert entry["higher_is_better"] == (entry["task_name"] != "my_text")
        assert entry["truncated_requests"] == 0
    for entry in entries(record, task_name="my_choice"):
        share = entry["value"]
        assert entry["standard_error"] == pytest.approx(math.sqrt(share * (1 - share) / 3))
    assert all(entry["standard_error"] is None for entry in entries(record, task_name="my_text"))
    assert [(c["segment_size"], c["visibility"]) for c in entries(record, task_name="my_choice")] == [
        (None, None), (16, "past"),
    ]  # fmt: skip
    full, other = (entries(record, metric="bits_per_byte,none", attention=a)[0]["value"] for a in ("full", "hici"))
    assert abs(full - other) > 1e-3


def test_full_attention_equals_lm_evals_own_model(eval_lm, base_directory, task_files, tmp_path):
    """A plain model: the same numbers as from `lm_eval --model hf`."""
    import lm_eval

    tasks = ["my_choice", "my_answer", "my_text"]
    done = eval_lm(base_directory, "--tasks", *tasks, "--num-fewshot", 1, "--out", tmp_path)
    assert done.status == 0, done.err
    record = json.loads((tmp_path / "lm.json").read_text())
    expected = lm_eval.simple_evaluate(
        HFLM(pretrained=str(base_directory), device="cpu"),
        tasks=tasks,
        num_fewshot=1,
        task_manager=TaskManager(include_path=task_files, include_defaults=False),
    )
    for entry in record["conditions"]:
        assert entry["value"] == pytest.approx(expected["results"][entry["task_name"]][entry["metric"]], rel=1e-5)
        assert entry["num_fewshot"] == 1


def test_json_says_how_the_numbers_were_made(eval_lm, adapter_directory, tokenizer, tmp_path):
    done = eval_lm(adapter_directory, "--tasks", "my_choice", "--limit", 2, "--max-length", 24, "--seed", 7,
                   "--out", tmp_path / "a.json")  # fmt: skip
    assert done.status == 0, done.err
    record = json.loads((tmp_path / "a.json").read_text())
    assert (record["task"], record["seed"]) == ("lm", 7)
    protocol = record["protocol"]
    assert (protocol["name"], protocol["version"][:3]) == ("lm-evaluation-harness", "0.4")
    assert (protocol["asked"], protocol["limit"], protocol["max_length"]) == (["my_choice"], 2, 24)
    assert protocol["prefix_token"] == {"id": tokenizer.eos_token_id, "text": "<eos>"}
    assert protocol["seeds"] == {"python": 7, "numpy": 7, "torch": 7, "few_shot": 7}
    task = protocol["tasks"]["my_choice"]
    assert (task["version"], task["output_type"], len(task["config_sha256"])) == (2.0, "multiple_choice", 64)
    assert task["config"]["doc_to_text"] == "{{question}}"
    assert record["data"]["tasks"]["my_choice"]["documents"] == 4
    assert record["model"]["adapter_sha256"]
    assert "Only the first 2 documents of each task" in done.out
    assert record["conditions"][0]["samples"] == 2
    assert record["conditions"][0]["truncated_requests"] == 0
    more = eval_lm(adapter_directory, "--tasks", "my_choice", "--limit", 2, "--max-length", 24, "--seed", 7,
                   "--attention", "full", "hici", "--out", tmp_path / "a.json")  # fmt: skip
    assert (more.status, 'its protocol.attentions is ["full"], now' in more.err) == (2, True)
    done = eval_lm(adapter_directory, "--tasks", "my_choice", "--max-length", 24)
    assert "my_choice, full: 3 requests were longer than 24 tokens and lost their beginning." in done.out


def test_a_group_is_taken_apart_and_gets_its_number(eval_lm, base_directory, tmp_path):
    done = eval_lm(base_directory, "--tasks", "my_group", "--out", tmp_path)
    assert done.status == 0, done.err
    record = json.loads((tmp_path / "lm.json").read_text())
    one, other, group = record["conditions"]
    assert [c["task_name"] for c in record["conditions"]] == ["my_choice", "my_other_choice", "my_group"]
    assert group["value"] == pytest.approx((4 * one["value"] + 2 * other["value"]) / 6)
    assert (group["samples"], group["version"], group["higher_is_better"]) == (6, "3.0", True)


def test_a_group_of_which_one_number_is_none(eval_lm, base_directory, monkeypatch):
    evaluate = lm_module._evaluate

    def one_is_nan(lm, name, *rest, **options):
        value = evaluate(lm, name, *rest, **options)
        return value | {"results": value["results"] | ({"acc,none": "nan"} if name == "my_choice" else {})}

    monkeypatch.setattr(lm_module, "_evaluate", one_is_nan)
    done = eval_lm(base_directory, "--tasks", "my_group")
    assert done.status == 0, done.err
    assert done.out.count(" nan │") == 2  # the task's and the group's


def test_other_examples_are_another_measurement(eval_lm, base_directory, tmp_path):
    lines(tmp_path / "shots.jsonl", QUESTIONS)
    files = f"{{test: {lines(tmp_path / 'asked.jsonl', QUESTIONS)}, train: {tmp_path / 'shots.jsonl'}}}"
    text = CHOICE.format(data=files).replace("test_split: train", "test_split: test\nfewshot_split: train")
    (tmp_path / "shots.yaml").write_text("task: my_shots\n" + text)
    flags = ("--include-path", tmp_path, "--tasks", "my_shots", "--num-fewshot", 2, "--out", tmp_path / "out")
    assert eval_lm(base_directory, *flags).status == 0
    lines(tmp_path / "shots.jsonl", QUESTIONS[:3])
    done = eval_lm(base_directory, *flags)
    assert (done.status, "its data.tasks.my_shots.example_documents is 4, now 3" in done.err) == (2, True)


def test_what_cannot_generate_is_told_before_anything_is_measured(eval_lm, adapter_directory, tmp_path):
    done = eval_lm(adapter_directory, "--tasks", "my_choice", "my_answer", "--attention", "full", "hici",
                   "--num-segments", 2, "--out", tmp_path / "out")  # fmt: skip
    assert (done.status, "num_segments=2 with a HiCICache" in done.err) == (2, True)
    assert not (tmp_path / "out").exists()


def test_goes_on_after_a_kill(eval_lm, adapter_directory, tmp_path, monkeypatch):
    flags = ("--tasks", "my_choice", "my_text", "--attention", "full", "hici", "--out")
    assert eval_lm(adapter_directory, *flags, tmp_path / "whole").status == 0
    whole = json.loads((tmp_path / "whole" / "lm.json").read_text())
    measured, evaluate = [], lm_module._evaluate

    def killed_at_the_third(lm, name, *rest, **options):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(name)
        return evaluate(lm, name, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(lm_module, "_evaluate", killed_at_the_third)
        assert eval_lm(adapter_directory, *flags, tmp_path / "killed").status == 130
    assert not (tmp_path / "killed" / "lm.json").exists()
    monkeypatch.setattr(
        lm_module, "_evaluate",
        lambda lm, name, *rest, **options: measured.append(name) or evaluate(lm, name, *rest, **options),
    )  # fmt: skip
    done = eval_lm(adapter_directory, *flags, tmp_path / "killed")
    assert done.status == 0, done.err
    assert measured == ["my_choice", "my_text", "my_choice", "my_text"]  # each once
    found = json.loads((tmp_path / "killed" / "lm.json").read_text())
    for record in (whole, found):
        for entry in record["conditions"]:
            entry.pop("seconds")
        record.pop("provenance")
    assert found == whole
    again = eval_lm(adapter_directory, *flags, tmp_path / "killed")
    assert (again.status, len(measured)) == (0, 4)
    assert again.out == done.out


def test_not_causal_is_marked(eval_lm, adapter_directory, tmp_path):
    done = eval_lm(adapter_directory, "--tasks", "my_choice", "--attention", "hici", "--visibility", "all",
                   "--out", tmp_path)  # fmt: skip
    assert done.status == 0, done.err
    assert "hici, all (not causal)" in done.out
    assert "(not causal): a token sees a summary of its own future" in done.out
    assert "no log-likelihood is one of a language model" in done.err
    assert json.loads((tmp_path / "lm.json").read_text())["conditions"][0]["causal"] is False


def test_a_chat_template_changes_the_prompt(eval_lm, base_directory, tokenizer, tmp_path, monkeypatch):
    prompts, loglikelihood = [], HiCIModel.loglikelihood
    monkeypatch.setattr(
        HiCIModel, "loglikelihood",
        lambda self, requests, **rest: prompts.append(requests[0].args[0]) or loglikelihood(self, requests, **rest),
    )  # fmt: skip
    for flags in ([], ["--apply-chat-template"]):
        done = eval_lm(base_directory, "--tasks", "my_choice", *flags, "--out", tmp_path / f"{len(flags)}.json")
        assert done.status == 0, done.err
        record = json.loads((tmp_path / f"{len(flags)}.json").read_text())
        assert record["protocol"]["apply_chat_template"] == bool(flags)
    assert prompts == ["the old house", "[user] the old house[assistant]"]
    without = copy.deepcopy(tokenizer)
    without.chat_template = None
    with pytest.raises(ValueError, match="the tokenizer has no chat template; drop it"):
        lm_module.lm_plan(None, without, None, apply_chat_template=True)


@pytest.mark.parametrize("flags, message", [
    (["--tasks", "my_choise"], "unknown task 'my_choise', which is none of 6 known ones. Did you mean 'my_choice'"),
    (["--tasks", "my_choice", "my_choice"], "--tasks my_choice my_choice names one twice"),
    (["--tasks", "my_group", "my_choice"], "task 'my_choice' is asked for twice, once by 'my_choice'"),
    (["--tasks", "my_lost"], "task 'my_lost' could not be loaded with its data"),
    (["--tasks", ","], "--tasks names no task"),
    (["--tasks", "my_text", "--rope", "auto"], "--rope auto extends to --max-length, which is not given"),
    (["--tasks", "my_text", "--max-length", "200"], "200 tokens are more than the 128 positions"),
    (["--tasks", "my_text", "--num-fewshot", "-1"], "'-1' is not an integer >= 0"),
    (["--tasks", "my_text", "--attention", "hici", "--num-segments", "2", "--batch-size", "2"],
     "batch_size=2 with num_segments=2"),
    (["--tasks", "my_choice", "--num-fewshot", "8"], "task 'my_choice' with 8 examples (--num-fewshot), but it has 4"),
    (["--tasks", "my_text", "--include-path", "nowhere"], "include_path=nowhere (--include-path) is no directory"),
])  # fmt: skip
def test_refusals(eval_lm, adapter_directory, flags, message):
    done = eval_lm(adapter_directory, *flags)
    assert done.status == 2
    assert message in done.err
    assert done.out == ""


def test_an_unknown_task_among_thousands():
    known = [f"mmlu_{i}" for i in range(14_000)] + ["hellaswag", "hellaswag_de"]
    text = tasks_module.unknown_task("hellaswg", known)
    assert "unknown task 'hellaswg', which is none of 14,002 known ones. Did you mean 'hellaswag'" in text
    assert len(text) < 300
    assert "'hellaswag_de'" in tasks_module.unknown_task("swag", known)
    assert "Did you mean" not in tasks_module.unknown_task("zzzz", known)


def test_a_task_that_runs_code_needs_leave(eval_lm, base_directory, task_files):
    path = task_files / "code.yaml"
    path.write_text((task_files / "my_choice.yaml").read_text().replace("my_choice", "my_code") + "unsafe_code: true\n")
    try:
        done = eval_lm(base_directory, "--tasks", "my_code")
        assert (done.status, "task 'my_code' runs code that the model has written" in done.err) == (2, True)
        assert eval_lm(base_directory, "--tasks", "my_code", "--run-unsafe-code").status == 0
    finally:
        path.unlink()


def test_lists_tasks(hici_command, task_files, eval_lm):
    done = hici_command("eval", "lm", "--include-path", task_files, "--list-tasks", "my_*o*")
    assert (done.status, done.out.split("\n")[:-1]) == (
        0, ["my_choice", "my_group  (group)", "my_lost", "my_other_choice"],
    )  # fmt: skip
    done = hici_command("eval", "lm", "--include-path", task_files, "--list-tasks", "yours*")
    assert (done.status, "no task matches 'yours*'" in done.err) == (2, True)


def test_lm_eval_is_not_installed(hici_command, base_directory, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    done = hici_command("eval", "lm", base_directory, "--tasks", "my_text")
    assert (done.status, "pip install 'hici[lm-eval]'" in done.err) == (2, True)


def test_values_that_are_no_numbers():
    value = {
        "condition": {"attention": "full"}, "results": {"alias": "x", "sample_len": 3, "f1,none": "nan",
                                                        "f1_stderr,none": "N/A"},
        "higher_is_better": {"f1": True}, "documents": 3, "version": 1, "num_fewshot": 0, "truncated_requests": 0,
        "seconds": 1.0,
    }  # fmt: skip
    (entry,) = lm_module._conditions("a_task", value)
    assert (entry["value"], entry["text"], entry["standard_error"]) == (None, "nan", None)
    assert lm_module._json_number(float("nan")) == "nan"
    assert lm_module._json_number(2) == 2


def test_warnings_of_lm_eval_are_counted(eval_lm, base_directory, task_files):
    path = task_files / "terse.yaml"
    path.write_text(
        (task_files / "my_choice.yaml").read_text().replace("my_choice", "my_terse").split("metric_list")[0]
        + "metric_list: [{metric: acc}]\n"
    )
    try:
        done = eval_lm(base_directory, "--tasks", "my_terse")
    finally:
        path.unlink()
    assert (done.status, "hici: WARNING: lm-eval logged 2 warnings; --verbose shows them" in done.err) == (0, True)
    assert logging.getLogger("lm_eval").propagate


@pytest.mark.slow
def test_own_task_beside_lm_evals(hici_command, base_directory, task_files, tmp_path, monkeypatch):
    """lm-eval's whole index: a group of one's own in it, an unknown name, and one whose data are not there."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    flags = ("eval", "lm", base_directory, "--include-path", task_files, "--tasks")
    assert hici_command(*flags, "my_group").status == 0
    done = hici_command(*flags, "hellaswg")
    assert (done.status, "Did you mean 'hellaswag'" in done.err, len(done.err) < 600) == (2, True, True)
    done = hici_command(*flags, "arc_easy")
    assert (done.status, "without a network its data must lie in the cache" in done.err) == (2, True)


def test_library_alone(task_files, base_directory, tokenizer, tmp_path, monkeypatch):
    """Without the command: a plan, measured without a file."""
    from transformers import AutoModelForCausalLM

    from hici.eval.measure import measure

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    model = AutoModelForCausalLM.from_pretrained(base_directory)
    tasks = tasks_module.load_tasks([str(task_files / "my_text.yaml")])  # by its file
    plan = lm_module.lm_plan(model, tokenizer, tasks)
    assert (plan.parts, plan.model["dtype"]) == (["full/my_text"], "float32")
    perplexity, bits = measure(plan)["conditions"]
    nats = -sum(
        HiCIModel(model, tokenizer=tokenizer).loglikelihood_rolling(
            [Instance("loglikelihood_rolling", {}, (row["text"],), i) for i, row in enumerate(TEXTS)]
        )
    )
    assert bits["value"] == pytest.approx(nats / sum(len(row["text"]) for row in TEXTS) / math.log(2))
    assert perplexity["value"] == pytest.approx(math.exp(nats / sum(len(row["text"].split(" ")) for row in TEXTS)))
