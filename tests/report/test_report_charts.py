"""Charts: what is drawn are the numbers given, told apart by more than colour, in both widths."""

import math
from itertools import pairwise

import numpy as np
import pytest

import result_factory as factory
from hici.report.charts.attention import heads_figure, segments_figure, shares_figure, similarity_figure
from hici.report.charts.comparison import comparison_figure
from hici.report.charts.costs import cost_figure
from hici.report.charts.heat import annotated_heat_map
from hici.report.charts.perplexity import perplexity_figure, position_figure
from hici.report.charts.retrieval import accuracy_figure, retrieval_heatmap
from hici.report.charts.scores import score_figure
from hici.report.figures import NARROW_INCHES, WIDE_INCHES, new_panels, png_bytes, tokens
from hici.report.sections.comparison import trained_of
from hici.report.series import series_of

NAMES = ["a: full", "a: hici, past", "a: hici, all (not causal)"]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def lines(axis):
    """{label: line} of what has a name; error bars hold theirs in a container."""
    named = {each.get_label(): each[0] for each in axis.containers if hasattr(each, "has_yerr")}
    return named or {line.get_label(): line for line in axis.lines if not line.get_label().startswith("_")}


def test_perplexity():
    record = factory.perplexity((2048, 8192, 4096))
    figure = perplexity_figure(series_of([("a", record)]), title="protocol x")
    (axis,) = figure.axes
    assert legend(figure) == NAMES
    assert axis.get_title(loc="left") == "protocol x"
    for name, line in lines(axis).items():
        own = [c for c in record["conditions"] if name.endswith("full") == (c["attention"] == "full")]
        own = sorted((c for c in own if name.endswith("(not causal)") != c["causal"]), key=lambda c: c["context"])
        assert list(line.get_ydata()) == [c["ppl"] for c in own]
        assert line.get_xdata() == pytest.approx([c["context"] for c in own], rel=0.06)
        assert (line.get_markerfacecolor() == "white") == ("(not causal)" in name)
    drawn = list(lines(axis).values())
    assert len({line.get_marker() for line in drawn}) == len({line.get_linestyle() for line in drawn}) == 3
    # the bars of the first series, from low to high
    bars = axis.containers[0][2][0].get_segments()
    first = sorted((c for c in record["conditions"] if c["attention"] == "full"), key=lambda c: c["context"])
    assert [[y for _, y in bar] for bar in bars] == [pytest.approx(c["ppl_interval"]) for c in first]
    assert [text.get_text() for text in axis.get_xticklabels()] == ["2K", "4K", "8K"]


def test_one_window_has_no_bar_and_a_base_beyond_its_positions_makes_the_axis_logarithmic():
    one = factory.perplexity((2048,), (factory.FULL,), windows=1)
    assert one["conditions"][0]["ppl_interval"] is None
    axis = perplexity_figure(series_of([("", one)])).axes[0]
    assert list(lines(axis)) == ["full"]
    assert axis.get_yscale() == "linear"
    far = factory.perplexity((2048,), (factory.FULL,), shift=3.0)
    assert perplexity_figure(series_of([("a", one), ("b", far)])).axes[0].get_yscale() == "log"


def test_loss_by_position():
    record = factory.perplexity((64, 128), (factory.FULL, factory.ALL), protocol="position")
    figure = position_figure(series_of([("a", record)]))
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["windows of 64 tokens", "windows of 128 tokens"]
    entry = record["conditions"][2]
    assert entry["context"] == 128
    line = lines(figure.axes[1])["a: full"]
    assert list(line.get_ydata()) == [b["mean_loss"] for b in entry["bins"]]
    assert all(b["first"] <= x <= b["last"] + 1 for x, b in zip(line.get_xdata(), entry["bins"], strict=True))
    band = figure.axes[1].collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == pytest.approx(min(b["interval"][0] for b in entry["bins"]))
    assert band.max() == pytest.approx(max(b["interval"][1] for b in entry["bins"]))


def test_late_positions_are_drawn_by_themselves_too():
    record = factory.perplexity((1024,), (factory.FULL,), protocol="position")
    figure = position_figure(series_of([("a", record)]))
    titles = ["windows of 1,024 tokens", "windows of 1,024 tokens, behind 64 tokens"]
    assert [axis.get_title(loc="left") for axis in figure.axes] == titles
    bins = record["conditions"][0]["bins"]
    late = [b["mean_loss"] for b in bins if b["first"] >= 64]
    assert 0 < len(late) < len(bins)
    assert list(lines(figure.axes[1])["a: full"].get_ydata()) == late
    assert figure.axes[1].get_ylim()[1] < max(b["mean_loss"] for b in bins)


def test_heat_map_says_every_number():
    record = factory.retrieval((1024, 2048), (0.0, 0.5), tasks=("passkey",))
    missing = record["conditions"].pop()
    assert (missing["context"], missing["depth"], missing["visibility"]) == (2048, 0.5, "past")
    figure = retrieval_heatmap(series_of([("a", record)]))
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["a: full", "a: hici, past"]
    axis = figure.axes[1]
    found = {(c["context"], c["depth"]): c["accuracy"] for c in record["conditions"] if c["attention"] == "hici"}
    values = np.array([[100 * found[1024, 0.0], 100 * found[2048, 0.0]], [100 * found[1024, 0.5], math.nan]])
    np.testing.assert_array_equal(axis.images[0].get_array().filled(math.nan), values)
    texts = {text.get_position(): text.get_text() for text in axis.texts}
    assert texts == {(0, 0): f"{values[0, 0]:.0f}", (1, 0): f"{values[0, 1]:.0f}", (0, 1): f"{values[1, 0]:.0f}",
                     (1, 1): "–"}  # fmt: skip  # noqa: RUF001
    assert axis.images[0].get_clim() == (0, 100)  # alike in all panels
    assert [text.get_text() for text in axis.get_yticklabels()] == ["0 %", "50 %"]


def test_text_in_cells_stands_out():
    """WCAG's 4.5:1 of black or white on every colour of the map."""
    _, (axis,) = new_panels(1, narrow=False, height=4)
    values = np.linspace(0, 100, 121).reshape(11, 11)
    image = annotated_heat_map(axis, values.tolist(), low=0, high=100, narrow=False, panels=1)
    assert len(axis.texts) == 121
    for value, text in zip(values.flat, axis.texts, strict=True):
        assert text.get_text() == f"{value:.0f}"
        back, ink = luminance(image.to_rgba(value)[:3]), luminance(text.get_color())
        assert (max(back, ink) + 0.05) / (min(back, ink) + 0.05) >= 4.5, value


def luminance(colour):
    from matplotlib.colors import to_rgb

    parts = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in to_rgb(colour)]
    return sum(v * weight for v, weight in zip(parts, (0.2126, 0.7152, 0.0722), strict=True))


def test_accuracy_by_length():
    record = factory.retrieval(tasks=("needle", "variables"))
    tasks = [(task, series_of([("a", record)], keep=lambda c, task=task: c["task"] == task))
             for task in ("needle", "variables")]  # fmt: skip
    figure = accuracy_figure(tasks)
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["needle", "variables"]
    own = [c for c in record["conditions"] if (c["task"], c["attention"]) == ("variables", "full")]
    assert list(lines(figure.axes[1])["a: full"].get_ydata()) == [100 * c["accuracy"] for c in own]
    bars = figure.axes[1].containers[0][2][0].get_segments()
    assert [bar[0][1] for bar in bars] == pytest.approx([100 * c["accuracy_interval"][0] for c in own])


def test_attention_shares_are_stacked_to_the_whole():
    record = factory.inspect(layers=5)
    series = series_of([("", record)])
    axis = shares_figure(series).axes[0]
    to_global, to_local, to_tokens = axis.containers
    means = {part: np.mean(values, axis=1) for part, values in record["conditions"][0]["shares"].items()}
    assert [bar.get_height() for bar in to_global] == pytest.approx(100 * means["global"])
    assert [bar.get_height() for bar in to_local] == pytest.approx(100 * means["local"])
    assert [bar.get_y() + bar.get_height() for bar in to_tokens] == pytest.approx([100] * 5)
    hatches = {bars[0].get_hatch() for bars in axis.containers}
    assert len(hatches) == 2  # local slots by their hatch, the others dark and light
    heads = heads_figure(series).axes[0].images[0].get_array()
    shares = record["conditions"][0]["shares"]
    np.testing.assert_allclose(heads, 100 * (np.array(shares["global"]) + np.array(shares["local"])))


def test_similarity_is_of_different_segments():
    record = factory.inspect(layers=3, segments=3)
    entry = record["conditions"][0]
    axis = similarity_figure(series_of([("", record)])).axes[0]
    local = np.array(entry["slot_similarity"]["local"])
    off = ~np.eye(3, dtype=bool)
    assert list(lines(axis)["local slots"].get_ydata()) == pytest.approx([matrix[off].mean() for matrix in local])
    panels = segments_figure("x", entry).axes
    assert [axis.get_title(loc="left") for axis in panels] == ["layer 0", "layer 1", "layer 2"]
    np.testing.assert_allclose(panels[2].images[0].get_array(), local[2])


def test_scores():
    record = factory.longbench()
    series = series_of([("a", record)])
    figure = score_figure(series, name="dataset", value="score", label="score")
    rows = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert rows == [entry["dataset"] for entry in series[0].entries]
    for one, line in zip(series, (each[0] for each in figure.axes[0].containers), strict=True):
        assert list(line.get_xdata()) == [entry["score"] for entry in one.entries]
        assert [round(y) for y in line.get_ydata()] == list(range(len(rows)))


def test_costs():
    record = factory.perplexity((2048, 4096), (factory.FULL,))
    del record["conditions"][0]["peak_memory_bytes"]
    speed, memory = cost_figure(series_of([("", record)])).axes
    assert list(speed.lines[0].get_ydata()) == [c["tokens_per_second"] for c in record["conditions"]]
    assert list(memory.lines[0].get_ydata()) == [record["conditions"][1]["peak_memory_bytes"] / 2**30]


def test_training_comparison():
    record = factory.training_comparison()
    own = record["runs"][2]["evaluations"][0] | {"attention": "hici", "visibility": "all", "leaks_future": True}
    record["runs"][2]["evaluations"] += [own | {"segments": 4}, own | {"segments": 1, "windows": {"context": 99}}]
    trained = trained_of(record)
    assert [one.name for one in trained] == ["base, untouched", "full", "hici-past",
                                             "hici-past, in hici, all (not causal) attention"]  # fmt: skip
    assert [one.look.hollow for one in trained] == [False, False, False, True]
    assert list(trained[3].losses) == [2048]
    assert [len(one.curves) for one in trained] == [0, 2, 2, 0]
    left, right = comparison_figure(trained).axes
    assert list(lines(left)["full"].get_ydata()) == pytest.approx([math.exp(3.01), math.exp(2.91)])
    seeds = [list(line.get_ydata()) for line in left.lines if line.get_markersize() == 3]
    assert pytest.approx([math.exp(3.0), math.exp(3.02)]) in seeds
    assert len(right.lines) == 2


@pytest.mark.parametrize("kind", ["perplexity", "heat", "shares"])
def test_both_widths_are_readable(kind):
    record = {"perplexity": factory.perplexity(), "heat": factory.retrieval(tasks=("passkey",)),
              "shares": factory.inspect(30)}[kind]  # fmt: skip
    draw = {"perplexity": perplexity_figure, "heat": retrieval_heatmap, "shares": shares_figure}[kind]
    series = series_of([("a label that is rather long", record)])
    for narrow, inches in ((False, WIDE_INCHES), (True, NARROW_INCHES)):
        figure = draw(series, narrow=narrow)
        png = png_bytes(figure, narrow=narrow)
        assert png == png_bytes(draw(series, narrow=narrow), narrow=narrow)
        assert figure.get_figwidth() == inches
        figure.draw_without_rendering()  # extents at the figure's own resolution again
        columns = {axis.get_subplotspec().colspan.start for axis in figure.axes}
        assert not narrow or columns == {0}
        for axis in figure.axes:
            texts = (*axis.get_xticklabels(), *axis.get_yticklabels(), *axis.texts)
            assert min(text.get_fontsize() for text in texts) >= 9
            assert axis.get_tightbbox().x1 <= figure.bbox.x1 + 1  # its title, too
        for each in figure.legends:
            box = each.get_window_extent()
            assert box.x0 >= 0
            assert box.x1 <= figure.bbox.x1
            assert box.y1 <= min(axis.get_tightbbox().y0 for axis in figure.axes) + 1


def test_grey_alone_tells_lines_apart():
    """Without any colour: no two of the first series have the same dash and marker."""
    records = [(name, factory.perplexity((2048, 4096))) for name in "abcde"]
    looks = [(one.look.dash, one.look.marker) for one in series_of(records)]
    assert len(looks) == 15
    assert len(set(map(str, looks))) == 15
    assert all(a != b for a, b in pairwise(looks))


def test_lengths():
    assert [tokens(n) for n in (512, 1024, 3500, 8192, 102400)] == ["512", "1K", "3,500", "8K", "100K"]


def apart(figure, labels):
    """Whether texts that are seen lie beside each other, and none over another."""
    boxes = sorted((each.get_window_extent() for each in labels if each.get_text()), key=lambda box: (box.x0, box.y0))
    return all(a.x1 <= b.x0 or a.y1 <= b.y0 or b.y1 <= a.y0 for a, b in pairwise(boxes))


@pytest.mark.parametrize("narrow", [False, True])
def test_names_of_many_lengths_and_segments_lie_apart(narrow):
    contexts = tuple(range(1024, 31 * 1024, 1024))
    figure = perplexity_figure(series_of([("a", factory.perplexity(contexts, (factory.FULL,)))]), narrow=narrow)
    figure.draw_without_rendering()
    (axis,) = figure.axes
    names = [text.get_text() for text in axis.get_xticklabels()]
    assert len(names) == len(axis.get_xticks()) == 30
    assert {"1K", "4K", "8K", "30K"} <= set(names)
    assert apart(figure, axis.get_xticklabels())
    entry = factory.inspect(3, 4, segments=64)["conditions"][0]
    figure = segments_figure("a", entry, narrow=narrow)
    figure.draw_without_rendering()
    for axis in figure.axes[:3]:
        rows = sorted((each.get_window_extent() for each in axis.get_yticklabels()), key=lambda box: box.y0)
        assert len(rows) >= 5
        assert all(a.y1 <= b.y0 for a, b in pairwise(rows))


@pytest.mark.parametrize("narrow", [False, True])
def test_long_names_are_folded_and_not_cut(narrow):
    name = "a-model-of-135-million-parameters-trained-for-long-contexts-at-a-learning-rate-of-2e-5-with-seed-1"
    series = series_of([(name, factory.perplexity()), (f"{name}1", factory.perplexity())])
    passkey = factory.retrieval(tasks=("passkey",))
    tasks = series_of([(name, passkey), (f"{name}1", passkey)])
    for figure in (perplexity_figure(series, narrow=narrow), retrieval_heatmap(tasks, narrow=narrow)):
        figure.draw_without_rendering()
        boxes = [each.get_window_extent() for each in figure.legends]
        boxes += [axis.get_tightbbox() for axis in figure.axes]
        assert min(box.x0 for box in boxes) >= 0
        assert max(box.x1 for box in boxes) <= figure.bbox.x1 + 1
        assert min(box.y0 for box in boxes) >= 0
    shown = "".join(legend(perplexity_figure(series, narrow=narrow))).replace("\n", "")
    assert shown.count("(not causal)") == 2
    assert f"{name}1: full" in shown


def test_lines_of_two_lengths_never_mix():
    """Sixteen lines beside each other at a length stay left of those at the next."""
    records = [(f"run {i}", factory.perplexity((1024, 2048, 4096, 8192), (factory.FULL,), about=factory.model(f"m{i}")))
               for i in range(16)]  # fmt: skip
    at = np.array([line.get_xdata() for line in lines(perplexity_figure(series_of(records)).axes[0]).values()]).astype(
        float
    )
    assert at.shape == (16, 4)
    assert np.log2(at[:, 1:].min(axis=0) / at[:, :-1].max(axis=0)).min() > 0.3


def test_similarity_names_both_kinds_where_the_first_panel_has_one():
    first, second = factory.inspect(8), factory.inspect(8)
    first["conditions"][0]["slot_similarity"]["global"] = [[[1.0]]] * 8  # visibility all: one set for all segments
    figure = similarity_figure(series_of([("a", first), ("b", second)]))
    assert legend(figure) == ["local slots", "global slots"]
    assert all(float(tick).is_integer() for axis in figure.axes for tick in axis.get_xticks())


def test_speed_that_nothing_recorded_is_said():
    record = factory.perplexity()
    for entry in record["conditions"]:
        entry["tokens_per_second"] = None
    speed, memory = cost_figure(series_of([("a", record)])).axes
    assert [text.get_text() for text in speed.texts] == ["not recorded"]
    assert not memory.texts
