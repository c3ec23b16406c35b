"""The summary's first table: which of two runs is better, and whether that can be told."""

import result_factory as factory
from hici.report.gather import gather
from hici.report.sections import headline
from hici.report.verdicts import verdict_table


def verdicts(root, **records):
    """{(row, column): cell} of the table, and its columns."""
    places = [
        factory.write(root / name / f"{i}.json", record).parent
        for name, own in records.items()
        for i, record in enumerate(own)
    ]
    table = verdict_table(gather(list(dict.fromkeys(places))))
    return {(row[0], column): cell for row in table.rows for column, cell in zip(table.columns, row, strict=True)}


CAUSAL = (factory.FULL, factory.PAST)


def test_two_runs(tmp_path):
    b_about = factory.model("runs/b")
    found = verdicts(
        tmp_path,
        a=[factory.perplexity(attentions=CAUSAL), factory.retrieval(tasks=("passkey",)), factory.longbench()],
        b=[factory.perplexity(attentions=CAUSAL, shift=-0.1, about=b_about),
           factory.retrieval(tasks=("passkey",), skill=0.2, about=b_about),
           factory.longbench(shift=2.0, about=b_about)],
    )  # fmt: skip
    full, past = "b: full against a: full", "b: hici, past against a: hici, past"
    assert {row for row, _ in found} == {"perplexity, published", "passkey", "LongBench"}
    assert found["perplexity, published", full] == "better: -0.1000 (-0.1000 to -0.1000), at 8K"
    assert found["perplexity, published", past] == "better: -0.1000 (-0.1000 to -0.1000), at 8K"
    assert found["passkey", full].startswith("worse: -")
    assert found["LongBench", full] == "+2.00 over 6 data sets, no interval"


def test_what_cannot_be_told_is_said(tmp_path):
    a = factory.perplexity(attentions=CAUSAL)
    found = verdicts(tmp_path / "same", a=[a], b=[a])
    cells = {cell for (_, column), cell in found.items() if column == "perplexity, published"}
    assert cells == {"not distinguishable: +0.0000 (+0.0000 to +0.0000), at 8K"}
    b = factory.perplexity((2048, 4096), attentions=(factory.FULL,))
    b["data"]["sha256"] = "ff" * 32
    found = verdicts(tmp_path / "data", a=[a], b=[b])
    assert found["b: full against a: full", "perplexity, published"] == "not comparable: data differ, at 4K"


def test_what_is_not_causal_is_not_better(tmp_path):
    found = verdicts(tmp_path, a=[factory.perplexity()])
    assert found["a: hici, past against a: full", "perplexity, published"].startswith("worse: +0.0")
    assert found["a: hici, all (not causal) against a: full", "perplexity, published"].startswith("lower: -0.0")


def test_without_a_common_attention_the_first_one_is_compared_with(tmp_path):
    found = verdicts(
        tmp_path,
        base=[factory.perplexity(attentions=(factory.FULL,))],
        tuned=[factory.perplexity(attentions=(factory.PAST,), about=factory.model("t"))],
    )
    assert {row for row, _ in found} == {"tuned: hici, past against base: full"}
    places = [factory.write(tmp_path / "three" / name / "r.json", factory.perplexity(attentions=attentions)).parent
              for name, attentions in (("base", (factory.FULL,)), ("b", CAUSAL), ("c", (factory.PAST,)))]  # fmt: skip
    assert [row[0] for row in verdict_table(gather(places)).rows] == [
        "b: full against base: full",
        "c: hici, past against b: hici, past",
    ]


def test_retrieval_counts_lengths_that_both_have(tmp_path):
    short = factory.retrieval((1024,), tasks=("passkey",), attentions=(factory.FULL,))
    longer = factory.retrieval((1024, 8192), tasks=("passkey",), attentions=(factory.FULL,))
    found = verdicts(tmp_path, a=[short], b=[longer])
    right = [
        sum(c["accuracy"] * c["samples"] for c in r["conditions"] if c["context"] == 1024) for r in (short, longer)
    ]
    assert f" {right[1] - right[0]:+.1f} (" in found["b: full against a: full", "passkey"]


def test_tasks_whose_numbers_should_be_low(tmp_path):
    a, b = factory.lm(), factory.lm()
    for record, value in ((a, 20.0), (b, 10.0)):
        record["conditions"] = record["conditions"][:1]
        record["conditions"][0] |= {"metric": "word_perplexity,none", "value": value, "higher_is_better": False}
    found = verdicts(tmp_path, a=[a], b=[b])
    assert found["b: full against a: full", "arc_easy"].startswith("better: -10.0000 (")


def test_runs_of_the_same_weights_are_told(tmp_path):
    places = [factory.write(tmp_path / name / "r.json", factory.perplexity(about=about)).parent
              for name, about in (("a", None), ("b", None), ("c", factory.model(adapter=False)))]  # fmt: skip
    notes = [block.text for block in headline.SECTION.draw(gather(places)) if block.block == "text"]
    assert "a and b measured the same weights." in notes
