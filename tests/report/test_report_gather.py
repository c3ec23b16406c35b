"""What `hici report` finds at its arguments, how it names it, and what it refuses."""

import json
import logging

import pytest

import result_factory as factory
from hici.eval.results import SCHEMA_VERSION
from hici.report.gather import gather


def labels(gathered):
    return [(result.label, result.path.name) for result in gathered.results]


def test_results_of_a_directory_are_one_run_named_after_it(tmp_path):
    factory.write(tmp_path / "base" / "ppl.json", factory.perplexity(attentions=(factory.FULL,)))
    factory.write(tmp_path / "base" / "strict.json", factory.perplexity(protocol="strict"))
    factory.write(tmp_path / "base" / "hici.json", factory.perplexity(attentions=(factory.PAST,)))
    factory.write(tmp_path / "base" / "passkey.json", factory.retrieval(tasks=("passkey",)))
    factory.write(tmp_path / "base" / "needle.json", factory.retrieval(tasks=("needle",)))
    found = gather([tmp_path / "base"])
    assert labels(found) == [("base", name) for name in
                             ("hici.json", "needle.json", "passkey.json", "ppl.json", "strict.json")]  # fmt: skip
    assert found.protocols("perplexity") == ["published", "strict"]
    assert len(found.of("perplexity")) == 3
    assert [result.path.name for result in found.of("perplexity", "strict")] == ["strict.json"]


def test_results_that_measure_the_same_or_are_of_other_models_are_named_after_their_files(tmp_path):
    factory.write(tmp_path / "same" / "a.json", factory.perplexity())
    factory.write(tmp_path / "same" / "b.json", factory.perplexity(contexts=(8192, 16384)))
    assert labels(gather([tmp_path / "same"])) == [("a", "a.json"), ("b", "b.json")]
    factory.write(tmp_path / "other" / "base.json", factory.perplexity(about=factory.model("base", adapter=False)))
    factory.write(tmp_path / "other" / "ours.json", factory.perplexity(protocol="strict"))
    assert labels(gather([tmp_path / "other"])) == [("base", "base.json"), ("ours", "ours.json")]
    both = gather([tmp_path / "same", tmp_path / "other"])
    assert [label for label, _ in labels(both)] == ["same/a", "same/b", "other/base", "other/ours"]


def test_a_plain_model_with_and_without_segments_is_one_run(tmp_path):
    """Its fingerprint is another with (unused) HiCI modules in it; its base's is not."""
    plain, cut = factory.model("base", adapter=False), factory.model("base", adapter=False)
    cut["fingerprint"] = "sha256:" + "77" * 32
    factory.write(tmp_path / "base" / "a.json", factory.perplexity(attentions=(factory.FULL,), about=plain))
    factory.write(tmp_path / "base" / "b.json", factory.retrieval(about=cut))
    assert [label for label, _ in labels(gather([tmp_path / "base"]))] == ["base", "base"]
    cut["base_fingerprint"] = "sha256:" + "77" * 32
    factory.write(tmp_path / "base" / "b.json", factory.retrieval(about=cut))
    assert [label for label, _ in labels(gather([tmp_path / "base"]))] == ["a", "b"]


def test_directories_of_one_name_are_told_apart_and_the_order_is_that_of_the_arguments(tmp_path):
    for place in ("x/eval", "a/eval"):
        factory.write(tmp_path / place / "ppl.json", factory.perplexity())
    found = gather([tmp_path / "x" / "eval" / "ppl.json", tmp_path / "a" / "eval"])
    assert labels(found) == [("x/eval", "ppl.json"), ("a/eval", "ppl.json")]


def test_one_level_below_is_searched_and_no_further(tmp_path):
    factory.write(tmp_path / "all" / "base" / "ppl.json", factory.perplexity())
    factory.write(tmp_path / "all" / "base" / "deep" / "ppl.json", factory.perplexity())
    factory.write(tmp_path / "all" / "ours" / "ppl.json", factory.perplexity())
    factory.training_run(tmp_path / "all" / "trained")
    found = gather([tmp_path / "all"])
    assert labels(found) == [("base", "ppl.json"), ("ours", "ppl.json")]
    assert [run.label for run in found.runs] == ["trained"]


def test_results_below_a_training_run_are_named_after_it(tmp_path):
    run = factory.training_run(tmp_path / "run")
    factory.write(run / "train.json", {"steps": [{"step": 1, "loss": 1.0}]})
    factory.write(run / "eval" / "ppl.json", factory.perplexity())
    factory.write(run / "adapter" / "adapter_config.json", {})
    found = gather([run])
    assert labels(found) == [("run", "ppl.json")]
    assert [each.label for each in found.runs] == ["run"]
    assert found.labels == ["run"]


def test_other_json_files_are_left_out_and_named(tmp_path, caplog):
    factory.write(tmp_path / "here" / "ppl.json", factory.perplexity())
    factory.write(tmp_path / "here" / "notes.json", {"a": 1})
    (tmp_path / "here" / "retrieval.partial-0.jsonl").write_text("{}\n")
    factory.write(tmp_path / "here" / "sub" / "settings.json", {"a": 1})
    factory.write(tmp_path / "here" / "old" / ".hici-report.json", {"files": []})
    factory.write(tmp_path / "here" / "old" / "ppl.json", factory.perplexity())
    with caplog.at_level(logging.WARNING, "hici"):
        assert labels(gather([tmp_path / "here"])) == [("here", "ppl.json")]
    text = caplog.text
    assert "no results, and left out: notes.json" in text
    assert "have not ended are left out (the same command ends them): retrieval.partial-0.jsonl" in text
    assert "settings.json" not in text  # a folder without any result is none of ours


def test_a_comparison_is_told_by_its_fields(tmp_path):
    factory.write(tmp_path / "here" / "compare.json", factory.training_comparison())
    found = gather([tmp_path / "here"])
    assert [each.label for each in found.comparisons] == ["compare"]
    assert [each.label for each in gather([tmp_path / "here" / "compare.json"]).comparisons] == ["compare"]
    assert found.results == []


def damaged(task, change):
    record = {"perplexity": factory.perplexity, "retrieval": factory.retrieval, "inspect": factory.inspect,
              "position": lambda: factory.perplexity((64,), protocol="position"),
              "score": factory.scored_topics}[task]()  # fmt: skip
    change(record)
    return record


@pytest.mark.parametrize(
    "record, message",
    [
        ({"a": 1}, "ppl.json is no result"),
        (damaged("perplexity", lambda r: r["schema"].update(version=SCHEMA_VERSION + 1)),
         f"is a result of schema version {SCHEMA_VERSION + 1}"),
        (damaged("perplexity", lambda r: r.pop("seed")), "ppl.json lacks seed"),
        (damaged("perplexity", lambda r: r["conditions"][1].pop("ppl")), "`ppl` of its condition 2 is missing"),
        (damaged("perplexity", lambda r: r["conditions"][0].update(context="long")),
         "`context` of its condition 1 is 'long'"),
        (damaged("perplexity", lambda r: r["conditions"][0].update(causal=1)), "`causal` of its condition 1 is 1"),
        (damaged("perplexity", lambda r: r["conditions"].append(3)), "its condition 10 is no object"),
        (damaged("perplexity", lambda r: r.update(protocol="published")), "its protocol is no object"),
        (damaged("perplexity", lambda r: r.update(model="m")), "its model is neither an object nor null"),
        (damaged("retrieval", lambda r: r["conditions"][0].update(accuracy=True)), "`accuracy` of its condition 1"),
        (damaged("position", lambda r: r["conditions"][0]["bins"][0].pop("last")), "`bins` of its condition 1"),
        (damaged("inspect", lambda r: r["conditions"][0]["shares"].pop("local")), "no rows of layers for 'local'"),
        (damaged("score", lambda r: r.update(accuracy={"5": "all"})), "`accuracy` is no object of numbers"),
    ],
    ids=["foreign", "version", "field", "number", "type", "bool", "object", "protocol", "model", "retrieval", "bins",
         "shares", "scores"],
)  # fmt: skip
def test_damaged_results_are_named(tmp_path, record, message):
    path = factory.write(tmp_path / "ppl.json", record)
    with pytest.raises(ValueError) as error:
        gather([path])
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_damaged_files_of_a_directory_are_named(tmp_path):
    factory.write(tmp_path / "here" / "ppl.json", factory.perplexity())
    (tmp_path / "here" / "torn.json").write_text('{"schema": {')
    with pytest.raises(ValueError, match="torn.json is not valid JSON"):
        gather([tmp_path / "here"])
    (tmp_path / "here" / "torn.json").write_text(json.dumps({"schema": {"name": "hici-result", "version": 99}}))
    with pytest.raises(ValueError, match="torn.json is a result of schema version 99"):
        gather([tmp_path / "here"])
    factory.write(tmp_path / "above" / "below" / "ppl.json", factory.perplexity())
    (tmp_path / "above" / "below" / "torn.json").write_text("[")
    with pytest.raises(ValueError, match="below/torn.json is not valid JSON"):
        gather([tmp_path / "above"])


def test_nothing_there_and_twice(tmp_path):
    with pytest.raises(ValueError, match="gone does not exist; give a result's JSON"):
        gather([tmp_path / "gone"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no result, no training comparison, and neither metrics.jsonl"):
        gather([tmp_path / "empty"])
    path = factory.write(tmp_path / "here" / "ppl.json", factory.perplexity())
    with pytest.raises(ValueError, match="ppl.json is given twice; give each result and each run once"):
        gather([tmp_path / "here", path])
    run = factory.training_run(tmp_path / "run")
    with pytest.raises(ValueError, match="run is given twice"):
        gather([run, tmp_path / "here" / ".." / "run"])


def test_every_run_and_attention_has_a_look_of_its_own(tmp_path):
    for name in ("a", "b", "c"):
        factory.write(tmp_path / name / "ppl.json", factory.perplexity())
    looks = gather([tmp_path / name for name in ("a", "b", "c")]).looks
    assert len(looks) == 9
    assert len({(look.colour, look.dash, look.marker) for look in looks.values()}) == 9
    hollow = {key for key, look in looks.items() if look.hollow}
    assert hollow == {(name, "hici, all (not causal)") for name in ("a", "b", "c")}
    assert looks["a", "hici, all (not causal)"].face == "white"
