"""Differences between runs: their arithmetic, and what cannot be compared."""

import copy

import pytest

import result_factory as factory
from hici.eval.statistics import weighted_estimate, wilson_interval
from hici.report.differences import (
    Difference,
    Measured,
    Pooled,
    accuracy_difference,
    differing_protocol,
    loss_difference,
    pooled,
    value_difference,
)
from hici.report.gather import gather
from hici.report.sections import differences, settings


def measured(record, index=0):
    return Measured("x", record["conditions"][index], record)


def test_loss_difference_is_paired_over_windows():
    a, b = factory.perplexity(shift=-0.1), factory.perplexity()
    found = loss_difference(measured(a, 1), measured(b, 0))
    left, right = a["conditions"][1], b["conditions"][0]
    gaps = [x - y for x, y in zip(left["losses"], right["losses"], strict=True)]
    expected = weighted_estimate(gaps, left["counts"], neighbours_depend=True)  # published windows overlap
    assert [found.value, *found.interval] == pytest.approx([expected.mean, *expected.interval])
    assert found.interval[1] - found.interval[0] < 0.03  # the noise of the text, ten times as large, is in both
    same = loss_difference(measured(a), measured(b))
    assert same.value == pytest.approx(-0.1)
    assert same.verdict == "lower"
    assert loss_difference(measured(b), measured(a)).verdict == "higher"
    assert loss_difference(measured(a), measured(a)).verdict == "not distinguishable"


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda r: r["data"].update(sha256="ff" * 32), "data differ"),
        (lambda r: r["conditions"][0]["windows"]["starts"].reverse(), "windows differ"),
        (lambda r: r["conditions"][0]["counts"].__setitem__(0, 5), "scored tokens differ"),
        (lambda r: r["protocol"].update(name="strict"), "protocols (name) differ"),
        (lambda r: r["protocol"].update(stride=512), "protocols (stride) differ"),
        (lambda r: r["conditions"][0].pop("losses"), "no losses of the windows"),
    ],
    ids=["data", "windows", "tokens", "protocol", "stride", "losses"],
)
def test_what_differs_is_said_instead_of_a_number(change, reason):
    a, b = factory.perplexity(), factory.perplexity()
    change(b)
    assert loss_difference(measured(a), measured(b)) == f"not comparable: {reason}"


def test_files_elsewhere_and_other_lengths_beside_are_the_same_protocol_and_data():
    a, b = factory.perplexity(), factory.perplexity()
    b["data"]["files"], b["protocol"]["contexts"] = ["elsewhere.txt"], [2048]
    assert differing_protocol(a, b) is None
    assert isinstance(loss_difference(measured(a), measured(b)), Difference)


def test_one_window_has_no_interval():
    a, b = factory.perplexity(windows=1, shift=-1.0), factory.perplexity(windows=1)
    found = loss_difference(measured(a), measured(b))
    assert found.interval is None
    assert found.verdict == "no interval"


def test_windows_of_a_group_count_as_one():
    a, b = (factory.perplexity((64,), (factory.FULL,), protocol="strict", windows=4, shift=s) for s in (0.0, 1.0))
    for record, losses in ((a, [1.0, 3.0, 5.0, 5.0]), (b, [0.0, 0.0, 0.0, 0.0])):
        record["conditions"][0] |= {"losses": losses, "counts": [1, 3, 2, 2]}
        record["conditions"][0]["windows"] |= {"unit": "document", "groups": [0, 0, 1, 1]}
    found = loss_difference(measured(a), measured(b))
    expected = weighted_estimate([2.5, 5.0], [4, 4])
    assert [found.value, *found.interval] == pytest.approx([3.75, *expected.interval])


def test_settings_of_other_tasks_do_not_matter():
    a, b = factory.retrieval(tasks=("passkey", "needle")), factory.retrieval(tasks=("passkey", "needle"))
    b["protocol"]["options"]["needle"] = {"words": 99}
    assert differing_protocol(a, b, "passkey") is None
    assert differing_protocol(a, b, "needle") == "protocols (options)"
    b["protocol"]["chat"] = True
    assert differing_protocol(a, b, "passkey") == "protocols (chat)"


def test_accuracies():
    """Newcombe's own example: 56 of 70 against 48 of 80, 0.2 with 0.0524 to 0.3339."""
    found = accuracy_difference(Pooled(56, 70), Pooled(48, 80))
    assert found.value == pytest.approx(0.2)
    assert found.interval == pytest.approx((0.0524, 0.3339), abs=1e-4)
    assert wilson_interval(10, 20) == pytest.approx(factory.wilson(10, 20))
    assert wilson_interval(0, 20)[0] == 0.0
    cells = [{"accuracy": 0.9, "samples": 10}, {"accuracy": 0.1, "samples": 30}]
    assert pooled(cells) == Pooled(12, 40)


def test_values_with_standard_errors():
    found = value_difference({"value": 0.5, "standard_error": 0.03}, {"value": 0.4, "standard_error": 0.04})
    assert found.value == pytest.approx(0.1)
    assert found.interval == pytest.approx((0.1 - 1.959964 * 0.05, 0.1 + 1.959964 * 0.05), abs=1e-6)
    assert value_difference({"value": 1.0}, {"value": 0.5, "standard_error": 0.1}) == Difference(0.5, None)
    assert value_difference({"value": None}, {"value": 0.5}) is None


def tables(tmp_path, *records):
    places = [factory.write(tmp_path / name / "r.json", record).parent for name, record in records]
    gathered = gather(places)
    return {table.columns[0]: table for table in differences.SECTION.draw(gathered)}, gathered


def test_table_of_two_runs(tmp_path):
    full = {"attentions": (factory.FULL,), "contexts": (2048, 4096)}
    a, b = factory.perplexity(**full), factory.perplexity(shift=-0.25, **full)
    found, _ = tables(tmp_path, ("a", a), ("b", b))
    table = found["pair"]
    assert list(table.columns) == ["pair", "2,048 tokens", "4,096 tokens"]
    assert table.rows == [["b: full minus a: full", *["-0.2500 (-0.2500 to -0.2500), lower"] * 2]]
    b["data"]["sha256"] = "ff" * 32
    found, _ = tables(tmp_path / "other", ("a", a), ("b", b))
    assert found["pair"].rows[0][1:] == ["not comparable: data differ"] * 2


def test_of_many_series_each_is_compared_with_the_first(tmp_path):
    records = [(name, factory.perplexity((2048,), shift=i)) for i, name in enumerate("ab")]
    found, _ = tables(tmp_path, *records)
    pairs = [row[0] for row in found["pair"].rows]
    assert len(pairs) == 5
    assert all(pair.endswith(" minus a: full") for pair in pairs)
    assert "b: hici, all (not causal) minus a: full" in pairs


def test_retrieval_over_all_depths(tmp_path):
    options = {"tasks": ("passkey",), "attentions": (factory.FULL,), "contexts": (1024,)}
    a, b = factory.retrieval(**options), factory.retrieval(**options, skill=0.1)
    found, _ = tables(tmp_path, ("a", a), ("b", b))
    right = [round(sum(c["accuracy"] * c["samples"] for c in record["conditions"])) for record in (a, b)]
    (row,) = found["task and pair"].rows
    assert row[0] == "passkey, b: full minus a: full"
    assert row[1].startswith(f"-{right[0] - right[1]:.1f} (")
    assert row[1].endswith(f", lower; {right[1]} of 100 against {right[0]} of 100")
    del b["conditions"][0]
    found, _ = tables(tmp_path / "depths", ("a", a), ("b", b))
    assert found["task and pair"].rows[0][1] == "not comparable: depths differ"


def test_parts_of_answers_are_no_whole_numbers(tmp_path):
    options = {"tasks": ("needle",), "attentions": (factory.FULL,), "contexts": (1024,), "samples": 10}
    a, b = factory.retrieval(**options), factory.retrieval(**options)
    a["conditions"][0]["accuracy"], b["conditions"][0]["accuracy"] = 0.45, 0.9
    found, _ = tables(tmp_path, ("a", a), ("b", b))
    assert found["task and pair"].rows[0][1].startswith("+45.0 (")
    assert found["task and pair"].rows[0][1].endswith("; 9 of 10 against 4.5 of 10")


def test_longbench_is_compared_over_the_sets_that_both_have(tmp_path):
    a, b = factory.longbench((factory.FULL,)), factory.longbench((factory.FULL,), shift=2.0)
    b["conditions"][0]["score"] += 3.0
    del b["conditions"][-1]
    found, _ = tables(tmp_path, ("a", a), ("b", b))
    assert found["pair"].rows == [
        ["b: full minus a: full", "+2.60 over 5 data sets", "+2.00 (qasper)", "+5.00 (narrativeqa)"]
    ]
    b["protocol"]["edit_similarity"] = "difflib"
    found, _ = tables(tmp_path / "other", ("a", a), ("b", b))
    assert found["pair"].rows[0][1] == "not comparable: protocols (edit_similarity) differ"


def test_settings_that_differ_and_only_those(tmp_path):
    a, b = factory.perplexity(about=factory.model("m", adapter=False)), factory.perplexity()
    b["protocol"]["stride"], b["provenance"]["git_revision"] = 512, "fe" * 20
    b["provenance"]["time_utc"] = "2027-01-01T00:00:00+00:00"
    _, gathered = tables(tmp_path, ("a", a), ("b", b))
    (table,) = settings.SECTION.draw(gathered)
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["perplexity, published: protocol.stride"] == ["256", "512"]
    assert rows["model.path"] == ["m", "runs/adapter"]
    assert rows["model.rope.positions"] == ["8192", "16384"]
    assert [cell.full for cell in rows["provenance.git_revision"]] == [a["provenance"]["git_revision"], "fe" * 20]
    assert rows["provenance.git_revision"][1].text == "fe" * 6
    assert not [name for name in rows if "time" in name or "seed" in name or "data" in name or "dtype" in name]
    same = copy.deepcopy(a)
    _, gathered = tables(tmp_path / "same", ("a", a), ("b", same))
    assert "agree in every setting" in settings.SECTION.draw(gathered)[0].text


def test_files_of_the_data_are_one_setting(tmp_path):
    a, b = factory.scored_topics(), factory.scored_topics()
    b["data"] = b["data"] | {"sha256": {"trec.jsonl": "cd" * 32, "lcc.jsonl": "ef" * 32}}
    _, gathered = tables(tmp_path, ("a", a), ("b", b))
    (table,) = settings.SECTION.draw(gathered)
    ((name, *cells),) = table.rows
    assert name == "score, topics: data.sha256"
    assert [cell.full for cell in cells] == [
        f'{{"trec.jsonl": "{"ab" * 32}"}}', f'{{"trec.jsonl": "{"cd" * 32}", "lcc.jsonl": "{"ef" * 32}"}}'
    ]  # fmt: skip
