"""Scores of benchmarks: a dot for every run, a row for every data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hici.report.figures import legend_below, legend_height, new_panels, plain
from hici.report.series import Series


def score_figure(
    series: Sequence[Series], *, name: str, value: str, label: str, error: str | None = None, narrow: bool = False
) -> Any:
    """Rows by the entries' field `name`, in the order of the first series; dots at the field `value`.

    Args:
        label: of the axis. error: the field of a standard error, drawn as a bar of 1.96 of them.
    """
    rows = list(dict.fromkeys(entry[name] for one in series for entry in one.entries))
    names = [one.name for one in series]
    row_height = 0.22 + 0.1 * len(series)
    height = 0.9 + row_height * len(rows)
    figure, (axis,) = new_panels(1, narrow=narrow, height=height, below=legend_height(names, narrow=narrow))
    step = 0.62 / max(1, len(series))
    for i, one in enumerate(series):
        look = one.look
        values = [entry[value] for entry in one.entries]
        at = [rows.index(entry[name]) + step * (i - (len(series) - 1) / 2) for entry in one.entries]
        bars = None if error is None else [1.96 * (entry.get(error) or 0.0) for entry in one.entries]
        axis.errorbar(values, at, xerr=bars, linestyle="none", color=look.colour, marker=look.marker, markersize=8,
                      markerfacecolor=look.face, markeredgecolor=look.colour, markeredgewidth=1.6, capsize=3,
                      label=plain(one.name))  # fmt: skip
    axis.set_yticks(range(len(rows)), [plain(str(row)) for row in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlim(left=min(0.0, axis.get_xlim()[0]))
    axis.set_xlabel(label)
    legend_below(figure, axis, narrow=narrow)
    return figure
