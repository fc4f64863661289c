"""The picture of a training run: loss over steps, a panel for each stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from xl2jax.system.figures import BLUE, new_figure, save_figure


def plot_losses(path: Path, curves: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """Loss over steps, a panel a stage of training; the loss is logarithmic and the same in all."""
    figure = new_figure(1 + 2.2 * len(curves), 2.8)
    axes = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for axis, (name, curve) in zip(axes, curves.items(), strict=True):
        axis.plot(*zip(*curve, strict=True), color=BLUE, linewidth=0.8)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.set_yscale("log")
        axis.tick_params(labelsize=7)
        axis.grid(visible=True, alpha=0.3)
    axes[0].set_ylabel("loss", fontsize=8)
    save_figure(figure, path)
