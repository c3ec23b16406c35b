"""Curves and numbers of training runs."""

from __future__ import annotations

from hici.report.gather import Gathered
from hici.report.numbers import MISSING
from hici.report.page import Block, Figure, Table
from hici.report.section import Section
from hici.report.training import name_of, run_facts, smoothed, smoothing_window, training_figure


def _draw(gathered: Gathered) -> list[Block]:
    runs = gathered.runs

    def draw(narrow: bool) -> object:
        return training_figure(runs, narrow=narrow)

    facts = [run_facts(run) for run in runs]
    names = list(dict.fromkeys(name for one in facts for name in one))
    rows = [[name, *(one.get(name, MISSING) for one in facts)] for name in names]
    sentences = [f"{run.label}: " + "; ".join(f"{name} {value}" for name, value in one.items()) + "."
                 for run, one in zip(runs, facts, strict=True)]  # fmt: skip
    several = " Every run has a colour and a dash of its own." if len(runs) > 1 else ""
    return [
        Table("Training runs.", ["", *(run.label for run in runs)], rows, text_columns=None),
        Figure(
            "training",
            draw,
            "Loss, gradient norms before clipping, learning rates, speed and memory by optimizer step. Pale: every "
            f"step; strong: the mean around it; markers: held-out losses, hollow where they are not causal.{several}",
            "Training curves. " + " ".join(sentences),
            _table(gathered),
        ),
    ]


def _table(gathered: Gathered) -> Table:
    """The smoothed loss at up to 20 steps of each run."""
    rows = []
    for run in gathered.runs:
        steps, losses = run.points("loss")
        means = smoothed(losses, smoothing_window(len(losses)))
        chosen = sorted({round(i * (len(steps) - 1) / 19) for i in range(20)}) if steps else []
        rows += [[name_of(run), f"{steps[i]:,}", f"{losses[i]:.4f}", f"{means[i]:.4f}"] for i in chosen]
    return Table(
        "Loss at up to 20 steps of each run (metrics.jsonl has all)", ["run", "step", "loss", "mean around it"], rows
    )


SECTION = Section(90, "Training", lambda gathered: bool(gathered.runs), _draw)
