"""Draws docs/stages.png: one attention layer of HiCI, from segments to slots to the prefix of every segment.

    python docs/draw_stages.py        (or: make figures)

The picture shows visibility "all" with 12 tokens a segment, M = 4 and K = 2, and below it which summaries segment 3
gets under each visibility.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.patches import FancyBboxPatch, Polygon, Rectangle

from hici.report.figures import new_figure, save_figure

SEGMENTS = ("#4C78A8", "#3F9C63", "#A0679F", "#2E9CA6")  # one hue a segment
GLOBAL = "#EE9B2D"
INK, SOFT, BAND, LINE = "#1F2933", "#52606D", "#F4F6F8", "#9AA5B1"
TOKENS, LOCAL, SHARED = 12, 4, 2  # drawn; S, M and K
CELL = 0.255
WIDTH, HEIGHT = 24.0, 18.9  # axis units; two of them are an inch
COLUMNS = (4.85, 9.6, 14.35, 19.1)  # left edges of the segments
COLUMN = (SHARED + LOCAL + TOKENS) * CELL
SUBSCRIPTS = "₁₂₃₄"


def main() -> None:
    figure, axis = new_figure(width=WIDTH / 2, height=HEIGHT / 2)
    axis.set(xlim=(0, WIDTH), ylim=(0, HEIGHT), aspect="equal")
    axis.set_axis_off()
    draw_input(axis)
    draw_construct(axis)
    draw_integrate(axis)
    draw_broadcast(axis)
    draw_visibility(axis)
    print(save_figure(figure, Path(__file__).parent / "stages.png"))


def draw_input(axis: Any) -> None:
    label(axis, 18.5, "Input", "of the attention layer:\nT tokens in N segments\nof S tokens")
    for i, left in enumerate(COLUMNS):
        center = left + COLUMN / 2
        axis.text(center, 18.4, f"segment {i + 1}", ha="center", va="center", fontsize=11, color=INK)
        cells(axis, center - TOKENS * CELL / 2, 17.65, TOKENS, tint(SEGMENTS[i], 0.45))


def draw_construct(axis: Any) -> None:
    band(axis, 14.05, 16.75)
    label(axis, 16.35, "1  Construct", "M learned slots query\ntheir own segment:\nM local slots each")
    for i, left in enumerate(COLUMNS):
        center, half_top, half_bottom = left + COLUMN / 2, TOKENS * CELL / 2, LOCAL * CELL / 2
        corners = [
            (center - half_top, 17.6),
            (center + half_top, 17.6),
            (center + half_bottom, 15.05),
            (center - half_bottom, 15.05),
        ]
        axis.add_patch(Polygon(corners, facecolor=tint(SEGMENTS[i], 0.16), edgecolor="none"))
        axis.text(center, 16.25, "attention", ha="center", va="center", fontsize=10, color=SOFT)
        cells(axis, center - half_bottom, 14.75, LOCAL, SEGMENTS[i])
        axis.text(center, 14.38, f"L{SUBSCRIPTS[i]}", ha="center", va="center", fontsize=12, color=SEGMENTS[i],
                  fontweight="bold")  # fmt: skip


def draw_integrate(axis: Any) -> None:
    band(axis, 9.25, 13.8)
    label(
        axis,
        13.4,
        "2  Integrate",
        "five statistics over all\nvisible local slots, then\nattention by K learned\nqueries: K global slots",
    )
    middle = (COLUMNS[0] + COLUMNS[-1] + COLUMN) / 2
    names = (("mean", 1.9), ("max", 1.9), ("min", 1.9), ("std", 1.9), ("mean / ‖mean‖", 2.7))
    gap = 0.22
    start = middle - (sum(w for _, w in names) + 4 * gap) / 2
    for i, left in enumerate(COLUMNS):
        source = left + COLUMN / 2
        axis.plot((source, source), (14.14, 13.62), color=SEGMENTS[i], lw=2, solid_capstyle="butt")
    axis.plot((COLUMNS[0] + COLUMN / 2, COLUMNS[-1] + COLUMN / 2), (13.6, 13.6), color=LINE, lw=2)
    arrow(axis, middle, 13.6, middle, 13.08)
    x = start
    for name, w in names:
        chip(axis, x, 12.35, w, 0.7, name, facecolor="white", fontsize=10.5)
        x += w + gap
    steps = (
        ("compress each\nD → $\\mathregular{D_c}$ → $\\mathregular{D_b}$", 3.6),
        ("K learned queries\nattend to the five", 4.2),
        ("expand to D\n× softplus(gate)", 3.8),  # noqa: RUF001 - a multiplication sign
    )
    x = middle - (sum(w for _, w in steps) + 2 * 0.7) / 2
    first = x + steps[0][1] / 2
    axis.plot((start, x_end := 2 * middle - start), (12.14, 12.14), color=LINE, lw=2)
    for edge in (start, x_end):
        axis.plot((edge, edge), (12.14, 12.28), color=LINE, lw=2)
    arrow(axis, first, 12.14, first, 11.68)
    for i, (text, w) in enumerate(steps):
        chip(axis, x, 10.65, w, 1.0, text, facecolor=tint(GLOBAL, 0.18), fontsize=10.5)
        if i < len(steps) - 1:
            arrow(axis, x + w, 11.15, x + w + 0.7, 11.15)
        x += w + 0.7
    last = x - 0.7 - steps[-1][1] / 2
    axis.plot((last, last), (10.65, 9.9), color=LINE, lw=1.8)
    arrow(axis, last, 9.9, middle + SHARED * CELL / 2 + 0.12, 9.9)
    cells(axis, middle - SHARED * CELL / 2, 9.9 - CELL / 2, SHARED, GLOBAL)
    axis.text(middle - 0.62, 9.9, "G", ha="center", va="center", fontsize=13, color="#B86E0B", fontweight="bold")


def draw_broadcast(axis: Any) -> None:
    band(axis, 3.6, 9.0)
    label(axis, 8.45, "3  Broadcast", "slots go in front of the\nsegment's own keys\nand values")
    label(
        axis, 7.0, "", "each row is a query: a\ntoken of the segment.\nIt sees all slots, and\nthe tokens up to itself"
    )
    label(axis, 5.35, "", "drawn: S = 12, M = 4,\nK = 2, N = 4; defaults:\nM = 8, K = 4, N = 4")
    middle = (COLUMNS[0] + COLUMNS[-1] + COLUMN) / 2
    axis.plot((middle, middle), (9.72, 9.12), color=GLOBAL, lw=2, solid_capstyle="butt")
    ends = [left + SHARED * CELL / 2 for left in COLUMNS]
    axis.plot((ends[0], ends[-1]), (9.12, 9.12), color=GLOBAL, lw=2)
    for i, left in enumerate(COLUMNS):
        arrow(axis, ends[i], 9.12, ends[i], 8.05, color=GLOBAL)
        top = 7.75
        x_local, x_tokens = left + SHARED * CELL, left + (SHARED + LOCAL) * CELL
        cells(axis, left, top, SHARED, GLOBAL)
        cells(axis, x_local, top, LOCAL, SEGMENTS[i])
        cells(axis, x_tokens, top, TOKENS, tint(SEGMENTS[i], 0.45))
        y = top + CELL + 0.28
        axis.text(x_local + LOCAL * CELL / 2, y, f"L{SUBSCRIPTS[i]}", ha="center", va="center", fontsize=11,
                  color=SEGMENTS[i], fontweight="bold")  # fmt: skip
        axis.text(x_tokens + TOKENS * CELL / 2, y, f"segment {i + 1}", ha="center", va="center", fontsize=10.5,
                  color=INK)  # fmt: skip
        draw_mask(axis, left, top - 0.3, SEGMENTS[i])


def draw_mask(axis: Any, left: float, top: float, hue: str) -> None:
    """Which keys (columns) each token of a segment (rows) sees."""
    for row in range(TOKENS):
        y = top - (row + 1) * CELL
        for column in range(SHARED + LOCAL + TOKENS):
            if column < SHARED:
                color = tint(GLOBAL, 0.75)
            elif column < SHARED + LOCAL:
                color = tint(hue, 0.8)
            else:
                color = tint(hue, 0.35) if column - SHARED - LOCAL <= row else "white"
            axis.add_patch(
                Rectangle((left + column * CELL, y), CELL, CELL, facecolor=color, edgecolor="white", linewidth=0.7)
            )


def draw_visibility(axis: Any) -> None:
    """For segment 3: the segments that G and the local slots come from."""
    label(axis, 2.7, "Visibility", "what the slots of\nsegment 3 summarise")
    choices = (
        ("all", "not causal (drawn above)", (0, 1, 2, 3), 2),
        ("current", "not causal within the segment", (0, 1, 2), 2),
        ("past", "causal", (0, 1), 1),
    )
    size, gap = 0.62, 0.14
    for left, (name, causal, integrated, local) in zip((4.85, 11.2, 18.35), choices, strict=True):
        axis.text(left, 2.7, name, ha="left", va="center", fontsize=12, color=INK, family="monospace",
                  fontweight="bold")  # fmt: skip
        axis.text(left + 0.35 + 0.21 * len(name), 2.68, causal, ha="left", va="center", fontsize=10, color=SOFT)
        for i, hue in enumerate(SEGMENTS):
            x = left + i * (size + gap)
            axis.add_patch(Rectangle((x, 0.95), size, size, facecolor=tint(hue, 0.45), edgecolor=INK if i == 2 else
                                     "none", linewidth=2))  # fmt: skip
            axis.text(x + size / 2, 0.95 + size / 2, str(i + 1), ha="center", va="center", fontsize=10.5, color=INK)
            if i == local:
                axis.add_patch(Rectangle((x, 0.62), size, 0.16, facecolor=hue, edgecolor="none"))
                axis.text(x + size / 2, 0.28, f"L{SUBSCRIPTS[i]}", ha="center", va="center", fontsize=11, color=hue,
                          fontweight="bold")  # fmt: skip
        right = left + len(integrated) * (size + gap) - gap
        axis.add_patch(Rectangle((left, 1.74), right - left, 0.16, facecolor=GLOBAL, edgecolor="none"))
        axis.text(right + 0.14, 1.83, "G", ha="left", va="center", fontsize=11, color="#B86E0B",
                  fontweight="bold")  # fmt: skip


def label(axis: Any, top: float, title: str, text: str) -> None:
    """The left column of a stage."""
    if title:
        axis.text(0.35, top, title, ha="left", va="center", fontsize=14, color=INK, fontweight="bold")
    axis.text(0.35, top - 0.45, text, ha="left", va="top", fontsize=10.5, color=SOFT, linespacing=1.25)


def band(axis: Any, bottom: float, top: float) -> None:
    axis.add_patch(FancyBboxPatch((0.1, bottom), WIDTH - 0.2, top - bottom, boxstyle="round,pad=0,rounding_size=0.25",
                                  facecolor=BAND, edgecolor="none", zorder=0))  # fmt: skip


def chip(axis: Any, left: float, bottom: float, width: float, height: float, text: str, *, facecolor: Any,
         fontsize: float) -> None:  # fmt: skip
    axis.add_patch(FancyBboxPatch((left, bottom), width, height, boxstyle="round,pad=0,rounding_size=0.15",
                                  facecolor=facecolor, edgecolor=LINE, linewidth=1))  # fmt: skip
    axis.text(left + width / 2, bottom + height / 2, text, ha="center", va="center", fontsize=fontsize, color=INK)


def cells(axis: Any, left: float, bottom: float, count: int, color: Any) -> None:
    for i in range(count):
        axis.add_patch(
            Rectangle((left + i * CELL, bottom), CELL, CELL, facecolor=color, edgecolor="white", linewidth=1)
        )


def arrow(axis: Any, x0: float, y0: float, x1: float, y1: float, color: str = LINE) -> None:
    axis.annotate("", (x1, y1), (x0, y0), arrowprops={"arrowstyle": "-|>", "color": color, "lw": 1.8, "shrinkA": 0,
                                                      "shrinkB": 0})  # fmt: skip


def tint(color: str, strength: float) -> tuple[float, float, float]:
    """`color` mixed with white; strength 1 is the colour itself."""
    red, green, blue = (1 - strength * (1 - int(color[i : i + 2], 16) / 255) for i in (1, 3, 5))
    return red, green, blue


if __name__ == "__main__":
    main()
