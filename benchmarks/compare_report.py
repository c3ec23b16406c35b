"""The tables, the verdicts and the picture of `compare.py`, from the results of its runs alone.

Shapes: R runs (seeds), W windows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from compare_setup import METHODS
from hici.eval.bootstrap import paired_difference
from hici.files import write_json, write_text
from hici.report.figures import new_figure, save_figure

UNTOUCHED, EXTENDED = "base, untouched", "base, rope extended"
WARM_UP_STEPS = 3  # of a run that are not timed, where it has twice as many
NOT_DISTINGUISHABLE = "not distinguishable"
# Okabe and Ito's colours, which are told apart without red and green, each with a marker and a dash of its own
LOOKS = (
    ("#000000", "o", "-"), ("#E69F00", "s", "-"), ("#0072B2", "^", "-"), ("#009E73", "D", "-"), ("#CC79A7", "v", "-"),
    ("#56B4E9", "P", "--"), ("#D55E00", "X", ":"), ("#999999", "*", ":"),
)  # fmt: skip


class Series(NamedTuple):
    """One line of the table: a way to train and an attention to measure in.

    `losses`: by length, by seed (None: a base, which has none), the mean loss of every window in nats.
    """

    name: str
    method: str | None
    attention: str
    losses: dict[int, dict[int | None, list[float]]]

    def perplexities(self, length: int) -> list[float]:
        """Of every seed: exp of its mean loss over the windows, which are of equal length."""
        return [math.exp(sum(losses) / len(losses)) for losses in self.losses[length].values()]


# ---- from runs to series


def make_series(runs: Sequence[dict[str, Any]], baselines: dict[str, list[dict[str, Any]]]) -> list[Series]:
    """Baselines first, then methods in full attention, then those in their own.

    A window of one segment in a method's own attention is left out: it has nothing to see but itself, so this is full
    attention by construction, and no result.

    Args:
        runs: `method`, `seed` and `evaluations` (`Perplexity.to_dict`) of each.
        baselines: evaluations by name.

    Raises:
        ValueError: evaluations over other windows or other text.
    """
    parts = [(name, None, None, each) for name, evaluations in baselines.items() for each in evaluations]
    parts += [(run["method"], run["method"], run["seed"], each) for run in runs for each in run["evaluations"]]
    series: dict[str, Series] = {}
    seen: dict[int, tuple[str, Any]] = {}
    for name, method, seed, each in parts:
        length, attention = each["windows"]["context"], each["attention"]
        scored = (each["stream_sha256"], each["windows"]["starts"], each["counts"])
        first_name, first = seen.setdefault(length, (name, scored))
        if scored != first:
            raise ValueError(
                f"{name} was measured on other windows of {length} tokens than {first_name}, and a paired comparison "
                "needs the same: evaluate both again (delete their evaluated.json in the scratch folder)"
            )
        full_name = name if attention == "full" else f"{name}, in {attention} attention"
        if attention != "full" and each["segments"] == 1:
            continue
        place = series.setdefault(full_name, Series(full_name, method, attention, {}))
        place.losses.setdefault(length, {})[seed] = each["losses"]
    order = (None, *METHODS)
    return sorted(series.values(), key=lambda one: (one.attention != "full", order.index(one.method)))


def check_same_data(runs: Sequence[dict[str, Any]]) -> list[str]:
    """What is wrong with the claim that all methods of a seed saw the same tokens in each step; empty: nothing.

    A run with fewer steps (full attention in equal time) must have seen the beginning of what the others saw.
    """
    problems: list[str] = []
    longest: dict[int, dict[str, Any]] = {}
    for run in runs:
        first = longest.get(run["seed"])
        if first is None or len(run["trained"]["seen"]) > len(first["trained"]["seen"]):
            longest[run["seed"]] = run
    for run in runs:
        first = longest[run["seed"]]
        pairs = enumerate(zip(run["trained"]["seen"], first["trained"]["seen"], strict=False), start=1)
        step = next((step for step, (own, other) in pairs if own != other), None)
        if step is not None:
            problems.append(
                f"{run['method']} seed {run['seed']} saw other tokens than {first['method']} from step {step} on"
            )
    return problems


# ---- differences


def compare(a: Series, b: Series, length: int) -> dict[str, Any] | None:
    """`a` minus `b` over the seeds that both have; None without a common one."""
    left, right = a.losses[length], b.losses[length]
    seeds = [seed for seed in left if seed in right or None in right]
    if not seeds:
        return None
    losses_a_RW = np.array([left[seed] for seed in seeds])
    losses_b_RW = np.array([right[None if None in right else seed] for seed in seeds])
    found = paired_difference(losses_a_RW, losses_b_RW)
    verdict = NOT_DISTINGUISHABLE
    if found.distinguishable:
        verdict = f"{a.name} lower" if found.mean < 0 else f"{b.name} lower"
    return {
        "a": a.name, "minus": b.name, "length": length, "seeds": seeds, "verdict": verdict,
        "loss_difference": found.mean, "by_seed": found.by_run, "interval_windows": found.interval,
        "interval_windows_and_seeds": found.interval_with_runs, "confidence": found.confidence,
        "windows": found.windows, "resamples": found.resamples,
    }  # fmt: skip


def comparisons(series: Sequence[Series]) -> list[dict[str, Any]]:
    """Methods with each other (later minus earlier) and with the bases in full attention; a method's own two modes."""
    full = [one for one in series if one.method is not None and one.attention == "full"]
    pairs = [(later, earlier) for earlier, later in itertools.combinations(full, 2)]
    pairs += [(one, base) for one in full for base in series if base.method is None]
    own = {one.method: one for one in full}
    pairs += [(one, own[one.method]) for one in series if one.attention != "full" and one.method in own]
    found = (compare(a, b, length) for a, b in pairs for length in a.losses if length in b.losses)
    return [each for each in found if each is not None]


# ---- tables


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Markdown; the first `left` columns left-aligned."""
    lines = [f"| {' | '.join(line)} |" for line in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * left + "---:|" * (len(head) - left), *lines[1:]])


def timed(step_seconds: Sequence[float], warm_up: int = WARM_UP_STEPS) -> list[float]:
    """The steps that count: without a warm-up, where at least as many are left."""
    return list(step_seconds[warm_up:] if len(step_seconds) >= 2 * warm_up else step_seconds[-1:])


def costs(runs: Sequence[dict[str, Any]], profile: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By method: steps, tokens, seconds a step, their sum, peak bytes.

    With a profile, seconds are of its solo runs alone (None where one failed); without, of the trainings.
    """
    result = {}
    for method in dict.fromkeys(run["method"] for run in runs):
        trained = [run["trained"] for run in runs if run["method"] == method]
        if profile:
            solo = profile.get(method, {"step_seconds": [], "warm_up": 0})
            seconds = timed(solo["step_seconds"], solo["warm_up"])
        else:
            seconds = [each for one in trained for each in timed(one["step_seconds"])]
        typical = median(seconds) if seconds else None
        result[method] = {
            "runs": len(trained),
            "steps": sorted({one["steps"] for one in trained}),
            "tokens": sorted({one["tokens"] for one in trained}),
            "seconds_per_step": typical,
            "steps_timed": len(seconds),
            "timed": "solo" if profile else "in the runs",
            "step_minutes": None if typical is None else typical * max(one["steps"] for one in trained) / 60,
            "peak_memory_bytes": max(one["peak_memory_bytes"] for one in trained),
        }
    return result


def perplexity_table(series: Sequence[Series], cost: dict[str, dict[str, Any]]) -> str:
    """A row a series: what its training took, and its perplexity at each length, with that of each seed."""
    lengths = sorted({length for one in series for length in one.losses})
    rows = []
    for one in series:
        cells = ["-"] * 5
        if one.method is not None:
            spent = cost[one.method]
            cells = [" / ".join(f"{n:,}" for n in spent["steps"]), " / ".join(f"{n:,}" for n in spent["tokens"]),
                     *("-" if spent[key] is None else f"{spent[key]:{digits}}"
                       for key, digits in (("seconds_per_step", ".3g"), ("step_minutes", ".1f"))),
                     f"{spent['peak_memory_bytes'] / 2**30:.2f}"]  # fmt: skip
        rows.append([one.name, *cells, *(_perplexity_cell(one, length) for length in lengths)])
    head = ["trained in", "steps", "tokens", "s a step", "minutes", "peak GiB"]
    return table([*head, *(f"ppl at {length:,}" for length in lengths)], rows)


def _perplexity_cell(one: Series, length: int) -> str:
    """The geometric mean over seeds (the mean of their losses), and in brackets each seed's."""
    if length not in one.losses:
        return "-"
    each = one.perplexities(length)
    mean = math.exp(sum(math.log(ppl) for ppl in each) / len(each))
    return f"{mean:.3f}" + (f" ({', '.join(f'{ppl:.3f}' for ppl in each)})" if len(each) > 1 else "")


def difference_table(found: Sequence[dict[str, Any]]) -> str:
    """A row a pair, a column a length: the difference in loss, its intervals, the verdict."""
    lengths = sorted({each["length"] for each in found})
    pairs = dict.fromkeys((each["a"], each["minus"]) for each in found)
    at = {(each["a"], each["minus"], each["length"]): each for each in found}
    rows = []
    for pair in pairs:
        cells = [at.get((*pair, length)) for length in lengths]
        rows.append([f"{pair[0]} - {pair[1]}", *("-" if cell is None else _difference_cell(cell) for cell in cells)])
    return table(["difference in loss", *(f"{length:,} tokens" for length in lengths)], rows)


def _difference_cell(found: dict[str, Any]) -> str:
    windows, both = found["interval_windows"], found["interval_windows_and_seeds"]
    if windows is None:
        return f"{found['loss_difference']:+.4f} (one window: no interval, {NOT_DISTINGUISHABLE})"
    verdict = {f"{found['a']} lower": "lower", f"{found['minus']} lower": "higher"}.get(found["verdict"])
    seeds = " (one seed)" if both is None else f", with seeds {_span(both)}"
    return f"{found['loss_difference']:+.4f} {_span(windows)}{seeds}: {verdict or found['verdict']}"


def _span(interval: Sequence[float]) -> str:
    return f"[{interval[0]:+.4f}, {interval[1]:+.4f}]"


def heading(result: dict[str, Any]) -> str:
    """What the tables of a result (as in its JSON file) are of, and how they are read."""
    settings, facts, made_with = result["settings"], result["data"], result["made_with"]
    machine, packages = made_with["machine"], made_with["packages"]
    lone = len(settings["seeds"]) == 1
    return (
        f"# Comparison of training methods, {settings['model']}, {settings['base_context']:,} to "
        f"{settings['context']:,} tokens, {made_with['time_utc'][:10]}\n\n"
        f"{machine['device']}, {machine['cpu_threads']} threads, torch {packages['torch']}, transformers "
        f"{packages['transformers']}. Trained on {len(facts['training_books'])} books "
        f"({facts['training_tokens']:,} tokens), tested on {facts['test_book']} ({facts['test_tokens']:,}); seeds "
        f"{', '.join(map(str, settings['seeds']))}"
        f"{' (one seed alone: what another would change is not in the intervals)' if lone else ''}; the same tokens in "
        "every step of all methods of a seed.\n"
        "Perplexity: in full attention unless the row says otherwise (HiCI attention from two segments on: in one it "
        "is full attention), non-overlapping windows, at most "
        f"{settings['eval_windows']} a length; the mean of the seeds' losses, each seed in brackets. Seconds a step: "
        f"median, {'in short runs, one at a time' if result['profile'] else 'in the trainings'}. GiB: the largest peak "
        "of a training's process (on a GPU: of its allocator).\n"
        f"{_how_to_read(lone)} `{UNTOUCHED}` has its own rope: cutting the context by config takes nothing from what "
        "it learned at more positions.\n"
        f"Made by `python benchmarks/compare.py {result['command']}` at revision {made_with['git_revision']}."
        + (f"\nThese tables were made anew from the stored losses at revision {again['git_revision']}, "
           f"{again['time_utc'][:10]}." if (again := result.get("report_made_with")) else "")
        + "\n\n"
    )  # fmt: skip


def _how_to_read(lone: bool) -> str:
    """The differences; `lone`: one seed."""
    text = (
        "Differences: nats a token, first minus second (lower: the first is better), same windows and seeds. In square "
        "brackets a 95 % interval over windows, of a paired bootstrap, for these very trainings"
    )
    if lone:
        return f"{text}: a verdict is about them, not about the methods. One that holds zero: {NOT_DISTINGUISHABLE}."
    return (
        f"{text}; then, `with seeds`, one over windows and seeds: what other windows and other seeds would give "
        "(Student's t over the seeds' means and over the windows' means, half-lengths added in squares). "
        f"Where either holds zero: {NOT_DISTINGUISHABLE}. Each by itself: of twenty pairs without a difference, about "
        "one at most is called different by chance."
    )


# ---- files


def tables(result: dict[str, Any]) -> str:
    """What goes on the screen: perplexities and costs, differences, failures."""
    series = make_series(result["runs"], result["baselines"])
    text = f"{perplexity_table(series, result['costs'])}\n\n{difference_table(result['comparisons'])}\n"
    if result["failures"]:
        text += "\nFailed, and not in the tables:\n\n" + "".join(f"* {line}\n" for line in result["failures"])
    return text


def write_report(result: dict[str, Any], target: Path) -> None:
    """`target`.json, .md and .png; what is there is replaced."""
    write_json(target.with_suffix(".json"), result)
    write_text(target.with_suffix(".md"), heading(result) + tables(result))
    plot(make_series(result["runs"], result["baselines"]), result["comparisons"], target.with_suffix(".png"))


# ---- the picture


def plot(series: Sequence[Series], found: Sequence[dict[str, Any]], target: Path) -> Path:
    """Left: perplexity by length, the mean of the seeds, and each seed as a small point. Right: what lies between the
    methods, which the left can hardly show: loss minus that of the first method, with its intervals.
    """
    figure, (left, right) = new_figure(columns=2, width=6.5, height=5.2)
    looks = {one.name: LOOKS[i % len(LOOKS)] for i, one in enumerate(series)}
    lengths = sorted({length for one in series for length in one.losses})
    _plot_perplexity(left, series, looks)
    reference = next((one.name for one in series if one.method is not None), None)
    _plot_differences(right, [each for each in found if each["minus"] == reference], looks, reference)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.xaxis.minorticks_off()
        axes.set_xlabel("length, tokens")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return save_figure(figure, target)


def _plot_perplexity(axes: Any, series: Sequence[Series], looks: dict[str, tuple[str, str, str]]) -> None:
    shown = []
    for one in series:
        color, marker, dash = looks[one.name]
        lengths = sorted(one.losses)
        seeds = [one.perplexities(length) for length in lengths]
        means = [math.exp(sum(map(math.log, each)) / len(each)) for each in seeds]
        shown += means
        axes.plot(lengths, means, color=color, marker=marker, linestyle=dash, label=one.name, markersize=7)
        for length, each in zip(lengths, seeds, strict=True):
            axes.plot([length] * len(each), each, color=color, marker=marker, linestyle="", markersize=3, alpha=0.6)
    if max(shown) > 3 * min(shown):  # a base beyond its positions would press all else into one line
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "235" else "")
    axes.set_ylabel("held-out perplexity (small points: seeds)")


def _plot_differences(
    axes: Any, found: Sequence[dict[str, Any]], looks: dict[str, tuple[str, str, str]], reference: str | None
) -> None:
    names = list(dict.fromkeys(each["a"] for each in found))
    axes.axhline(0, color="#444444", linewidth=1)
    for i, name in enumerate(names):
        color, marker, _ = looks[name]
        aside = 2 ** (0.08 * (i - (len(names) - 1) / 2))  # or the bars of one length hide each other
        own = [each for each in found if each["a"] == name]
        at = [each["length"] * aside for each in own]
        axes.plot(at, [each["loss_difference"] for each in own], color=color, marker=marker, markersize=4, linestyle="")
        for x, each in zip(at, own, strict=True):
            seeds = each["by_seed"]
            axes.plot([x * 1.02] * len(seeds), seeds, color=color, marker=marker, linestyle="", markersize=2.5)
        # what is wider lies behind, thin and with caps
        for key, style in (
            ("interval_windows_and_seeds", {"capsize": 3, "elinewidth": 1}),
            ("interval_windows", {"elinewidth": 5, "alpha": 0.5}),
        ):
            known = [(x, each) for x, each in zip(at, own, strict=True) if each[key] is not None]
            middles = [each["loss_difference"] for _, each in known]
            ends = [[sign * (each[key][side] - each["loss_difference"]) for _, each in known]
                    for side, sign in ((0, -1), (1, 1))]  # fmt: skip
            axes.errorbar([x for x, _ in known], middles, yerr=ends, color=color, linestyle="", **style)
    axes.set_ylabel(
        f"loss - loss of {reference}, nats; small points: seeds\n"
        "95 % intervals: windows (thick), windows and seeds (thin)"
    )
