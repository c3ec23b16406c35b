"""The picture beside train.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hici.report.figures import new_figure, save_figure


def plot_training(steps: list[dict[str, Any]], target: Path) -> Path:
    """Loss (left) and both gradient norms before clipping (right, logarithmic) by optimizer step, as PNG."""
    figure, (losses, norms) = new_figure(columns=2)
    number = [entry["step"] for entry in steps]
    losses.plot(number, [entry["loss"] for entry in steps], color="tab:blue")
    losses.set(xlabel="optimizer step", ylabel="training loss (nats a token)", title="loss")
    for key, label in (("hici_grad_norm", "HiCI modules"), ("other_grad_norm", "LoRA, embeddings, norms")):
        points = [(entry["step"], entry[key]) for entry in steps if key in entry]
        if points:
            norms.plot(*zip(*points, strict=True), label=label)
    norms.set(xlabel="optimizer step", ylabel="gradient norm", title="gradient norms before clipping", yscale="log")
    norms.legend()
    return save_figure(figure, target)
