"""benchmarks/compare.py: its arithmetic, verdicts, tables and picture, from results alone."""

import json
import math

import numpy as np
import pytest

import compare
import compare_report
from hici.eval.bootstrap import paired_difference
from hici.files import read_json, write_json
from hici.provenance import provenance


def evaluation(losses, length=64, attention="full", **changes):
    """What `Perplexity.to_dict` gives of it that matters here."""
    return {"attention": attention, "stream_sha256": "of the book", "counts": [length - 1] * len(losses),
            "windows": {"context": length, "starts": [length * i for i in range(len(losses))]},
            "segments": None if attention == "full" else 4, "losses": list(losses), **changes}  # fmt: skip


def trained(seen=("a", "b"), **changes):
    return {"steps": len(seen), "tokens": 128 * len(seen), "step_seconds": [9.0, 1.0, 1.0, 2.0, 2.0, 3.0],
            "peak_memory_bytes": 2**30, "seen": list(seen), **changes}  # fmt: skip


def run(method, seed, losses, **changes):
    return {"method": method, "seed": seed, "trained": trained(), "evaluations": [evaluation(losses)], **changes}


@pytest.fixture
def noise():
    return np.random.default_rng(0).normal(0, 0.01, (4, 12))


@pytest.fixture
def runs(noise):
    """Two seeds each: hici-all equals full up to noise, hici-past is lower by 0.1."""
    base = np.linspace(2, 4, 12)
    means = {"full": 0.0, "hici-all": 0.0, "hici-past": -0.1}
    return [
        run(method, seed, base + shift + noise[(i + 2 * seed) % 4])
        for seed in (0, 1)
        for i, (method, shift) in enumerate(means.items())
    ]


def test_differences_inside_the_interval_are_not_distinguishable_and_others_name_the_lower(runs):
    series = compare_report.make_series(runs, {})
    found = {(each["a"], each["minus"]): each for each in compare_report.comparisons(series)}
    assert set(found) == {("hici-all", "full"), ("hici-past", "full"), ("hici-past", "hici-all")}
    same, lower = found["hici-all", "full"], found["hici-past", "full"]
    assert same["verdict"] == "not distinguishable"
    assert same["interval_windows_and_seeds"][0] < 0 < same["interval_windows_and_seeds"][1]
    assert lower["verdict"] == "hici-past lower"
    assert lower["loss_difference"] == pytest.approx(-0.1)  # the noise of one seed is the other's, negative
    assert lower["seeds"] == [0, 1]
    assert lower["windows"] == 12
    assert len(lower["by_seed"]) == 2
    a = np.array([runs[2]["evaluations"][0]["losses"], runs[5]["evaluations"][0]["losses"]])
    b = np.array([runs[0]["evaluations"][0]["losses"], runs[3]["evaluations"][0]["losses"]])
    expected = paired_difference(a, b)
    assert lower["interval_windows"] == expected.interval
    assert lower["interval_windows_and_seeds"] == expected.interval_with_runs
    text = compare_report.difference_table(list(found.values()))
    row = next(line for line in text.splitlines() if line.startswith("| hici-past - full |"))
    windows, both = (f"[{low:+.4f}, {high:+.4f}]" for low, high in (expected.interval, expected.interval_with_runs))
    assert row == f"| hici-past - full | {expected.mean:+.4f} {windows}, with seeds {both}: lower |"
    assert "not distinguishable |" in next(x for x in text.splitlines() if x.startswith("| hici-all - full |"))


def test_the_higher_method_is_never_called_lower(runs):
    swapped = [{**each, "method": {"full": "hici-past", "hici-past": "full"}.get(each["method"], each["method"])}
               for each in runs]  # fmt: skip
    found = compare_report.comparisons(compare_report.make_series(swapped, {}))
    verdicts = {(each["a"], each["minus"]): each["verdict"] for each in found}
    assert verdicts["hici-past", "full"] == "full lower"
    text = compare_report.difference_table(found)
    assert next(x for x in text.splitlines() if x.startswith("| hici-past - full |")).endswith("]: higher |")


def test_seeds_that_disagree_are_not_distinguishable_however_sure_the_windows_are(runs):
    """Two seeds, one behind by 0.02 and one by 0.004: surely so on these windows, but a third might be ahead."""
    changes = {("hici-all", 0): 0.02, ("hici-all", 1): 0.004, ("full", 0): 0.0, ("full", 1): 0.0}
    base = np.linspace(2, 4, 12)
    wave = 0.001 * np.array([1.0, -1.0] * 6)
    runs = [run(method, seed, base + shift + (wave if seed else 0)) for (method, seed), shift in changes.items()]
    (found,) = compare_report.comparisons(compare_report.make_series(runs, {}))
    assert found["by_seed"] == pytest.approx([0.02, 0.004])
    assert 0.011 < found["interval_windows"][0] < found["interval_windows"][1] < 0.013
    assert found["interval_windows_and_seeds"][0] < -0.08  # t with one degree of freedom: 12.7 times 0.008
    assert found["verdict"] == "not distinguishable"


def test_baselines_pair_with_each_seed_and_own_attention_with_full(runs):
    for each in runs:
        if each["method"] == "hici-past":
            losses = np.array(each["evaluations"][0]["losses"]) + 0.5
            each["evaluations"].append(evaluation(losses, attention="hici"))
    base = [evaluation(np.linspace(2, 4, 12) + 1)]
    series = compare_report.make_series(runs, {compare_report.UNTOUCHED: base})
    assert [one.name for one in series] == [
        "base, untouched", "full", "hici-all", "hici-past", "hici-past, in hici attention",
    ]  # fmt: skip
    found = {(each["a"], each["minus"]): each for each in compare_report.comparisons(series)}
    assert found["full", "base, untouched"]["seeds"] == [0, 1]
    assert found["full", "base, untouched"]["verdict"] == "full lower"
    own = found["hici-past, in hici attention", "hici-past"]
    assert own["loss_difference"] == pytest.approx(0.5)
    assert own["verdict"] == "hici-past lower"
    assert ("hici-past, in hici attention", "base, untouched") not in found  # another attention and other training


def test_own_attention_in_a_window_of_one_segment_is_no_result(runs):
    for each in runs:
        if each["method"] == "hici-past":
            losses = each["evaluations"][0]["losses"]
            each["evaluations"] += [evaluation(losses, attention="hici", segments=1),
                                    evaluation(losses, 128), evaluation(losses, 128, "hici")]  # fmt: skip
    series = compare_report.make_series(runs, {})
    assert list(series[-1].losses) == [128]
    text = compare_report.perplexity_table(series, compare_report.costs(runs, {}))
    cells = [cell.strip() for cell in text.splitlines()[-1].strip("|").split("|")]
    assert cells[0] == "hici-past, in hici attention"
    assert cells[-2] == "-"
    assert cells[-1] != "-"
    own = [each for each in compare_report.comparisons(series) if "in hici" in each["a"]]
    assert [each["length"] for each in own] == [128]


def test_only_seeds_that_both_have_are_paired(runs):
    runs = [each for each in runs if (each["method"], each["seed"]) != ("hici-past", 0)]
    series = compare_report.make_series(runs, {})
    found = {(each["a"], each["minus"]): each for each in compare_report.comparisons(series)}
    assert found["hici-past", "full"]["seeds"] == [1]
    assert found["hici-past", "full"]["interval_windows_and_seeds"] is None
    cell = compare_report.difference_table([found["hici-past", "full"]]).splitlines()[2]
    assert cell.endswith("] (one seed): lower |")
    assert found["hici-all", "full"]["seeds"] == [0, 1]
    runs = [each for each in runs if (each["method"], each["seed"]) != ("full", 1)]
    pairs = {(each["a"], each["minus"]) for each in compare_report.comparisons(compare_report.make_series(runs, {}))}
    assert ("hici-past", "full") not in pairs


@pytest.mark.parametrize(
    "changes",
    [{"stream_sha256": "of another"}, {"windows": {"context": 64, "starts": [1, 2]}}, {"counts": [62, 63]}],
    ids=["text", "windows", "counts"],
)
def test_other_windows_are_refused(changes):
    runs = [run("full", 0, [1.0, 2.0]), run("hici-past", 0, [1.0, 2.0], evaluations=[evaluation([1, 2], **changes)])]
    with pytest.raises(ValueError, match="hici-past was measured on other windows of 64 tokens than full"):
        compare_report.make_series(runs, {})


def test_perplexity_table_takes_means_of_losses_and_shows_every_seed(runs):
    for i, each in enumerate(runs):
        each["evaluations"] = [evaluation([2.0 + 0.1 * (i // 3), 4.0 + 0.1 * (i // 3)])]
    series = compare_report.make_series(runs, {compare_report.EXTENDED: [evaluation([3.0, 3.0])]})
    text = compare_report.perplexity_table(series, compare_report.costs(runs, {}))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert rows[0] == ["trained in", "steps", "tokens", "s a step", "minutes", "peak GiB", "ppl at 64"]
    assert rows[2] == ["base, rope extended", "-", "-", "-", "-", "-", f"{math.exp(3):.3f}"]
    assert rows[3][:1] == ["full"]
    assert rows[3][-1] == f"{math.exp(3.05):.3f} ({math.exp(3.0):.3f}, {math.exp(3.1):.3f})"


def test_costs_leave_the_warm_up_out_and_take_a_solo_profile_where_there_is_one():
    runs = [run("full", 0, [1.0]), run("hici-past", 0, [1.0]), run("hici-past", 1, [1.0])]
    runs[2]["trained"] = trained(peak_memory_bytes=3 * 2**30, step_seconds=[9.0, 9.0, 9.0, 4.0, 4.0, 4.0])
    profile = {"full": {"step_seconds": [9.0, 0.5, 0.7], "warm_up": 1}}
    cost = compare_report.costs(runs, profile)
    assert cost["full"]["seconds_per_step"] == pytest.approx(0.6)
    assert cost["full"]["timed"] == "solo"
    assert cost["hici-past"]["seconds_per_step"] is None  # its profile failed; a shared device's time is no answer
    text = compare_report.perplexity_table(compare_report.make_series(runs, {}), cost)
    assert "| 2 | 256 | - | - | 3.00 |" in text
    assert "| 2 | 256 | 0.6 | 0.0 | 1.00 |" in text
    cost = compare_report.costs(runs, {})
    assert cost["hici-past"]["seconds_per_step"] == pytest.approx(3.5)  # of 2, 2, 3, 4, 4, 4
    assert cost["hici-past"]["steps_timed"] == 6
    assert cost["hici-past"]["timed"] == "in the runs"
    assert cost["hici-past"]["step_minutes"] == pytest.approx(3.5 * 2 / 60)
    assert cost["hici-past"]["peak_memory_bytes"] == 3 * 2**30
    assert compare_report.timed([5.0, 4.0]) == [4.0]


def test_one_window_is_told_and_distinguishes_nothing():
    runs = [run("full", 0, [1.0]), run("hici-past", 0, [5.0])]
    found = compare_report.comparisons(compare_report.make_series(runs, {}))
    assert found[0]["verdict"] == "not distinguishable"
    assert "+4.0000 (one window: no interval, not distinguishable)" in compare_report.difference_table(found)


def test_same_data_is_checked_by_seed_and_step_and_fewer_steps_are_a_beginning():
    def seen(method, seed, *tokens):
        return {"method": method, "seed": seed, "trained": trained(tokens)}

    good = [seen("full", 0, "a", "b"), seen("hici_s2", 0, "a", "b", "c"), seen("hici-all", 1, "x", "b", "c")]
    assert compare_report.check_same_data(good) == []
    bad = compare_report.check_same_data([*good, seen("hici-past", 0, "a", "x", "c")])
    assert bad == ["hici-past seed 0 saw other tokens than hici_s2 from step 2 on"]


def test_the_picture_is_written(runs, tmp_path):
    base = {compare_report.UNTOUCHED: [evaluation([9.0, 9.0]), evaluation([10.0], 128)]}
    for each in runs:
        each["evaluations"] = [evaluation([3.0, 3.1]), evaluation([3.2], 128)]
    series = compare_report.make_series(runs, base)
    target = compare_report.plot(series, compare_report.comparisons(series), tmp_path / "x.png")
    assert target.read_bytes().startswith(b"\x89PNG")
    colors = [look[0] for look in compare_report.LOOKS]
    markers = [look[1] for look in compare_report.LOOKS]
    assert len(set(colors)) == len(set(markers)) == len(colors) >= 8  # two bases, five methods, one in two attentions


def test_a_report_is_made_anew_from_the_stored_losses(runs, tmp_path, capsys):
    for each in runs:
        each["trained"]["losses"] = [1.0]
    file = tmp_path / "compare-x.json"
    settings = {"model": "tiny", "base_context": 16, "context": 64, "seeds": [0, 1], "eval_windows": 12}
    facts = {"training_books": {"a.txt": 9}, "training_tokens": 9, "test_book": "b.txt", "test_tokens": 7}
    stored = {"command": "--steps 2", "settings": settings, "recipe": {}, "data": facts, "profile": {}, "failures": [],
              "costs": compare_report.costs(runs, {}), "baselines": {}, "comparisons": [{"stale": True}],
              "runs": json.loads(json.dumps(runs)),
              "made_with": {**provenance(), "git_revision": "of the run"}}  # fmt: skip
    write_json(file, stored)
    assert compare.main(["--report", str(file)]) == 0
    result, text = read_json(file), file.with_suffix(".md").read_text()
    assert {each["verdict"] for each in result["comparisons"]} == {"hici-past lower", "not distinguishable"}
    assert result.pop("report_made_with")["git_revision"] == provenance()["git_revision"]
    assert {**result, "comparisons": stored["comparisons"]} == stored
    assert (
        "Made by `python benchmarks/compare.py --steps 2` at revision of the run.\nThese tables were made anew" in text
    )
    assert compare_report.difference_table(result["comparisons"]) in text
    assert compare_report.difference_table(result["comparisons"]) in capsys.readouterr().out
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    before = file.read_bytes()
    for arguments, message in (
        (["--report", str(file), "--seeds", "0"], "takes all from that file; give it alone"),
        (["--report", str(file.with_suffix(".md"))], "is no JSON file; give one that --out has made"),
        (["--steps", "2"], "--model, --books, --test-book missing"),
    ):
        with pytest.raises(SystemExit):
            compare.main(arguments)
        assert message in capsys.readouterr().err
    assert file.read_bytes() == before
    write_json(file, {key: value for key, value in stored.items() if key != "command"})
    with pytest.raises(SystemExit):
        compare.main(["--report", str(file)])
    assert "lacks command; give one" in capsys.readouterr().err
