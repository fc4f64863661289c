"""The heat maps of needle retrieval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from xl2jax.evaluation.needle import FAMILIES, Result
from xl2jax.system.figures import new_figure, save_figure


def plot_needle(path: Path, results: Sequence[Result]) -> None:
    """Plots a heat map for each mode and family of questions: accuracy by length (across) and depth (down)."""
    modes = list(dict.fromkeys(r.mode for r in results))
    lengths, depths = sorted({r.frames for r in results}), sorted({r.depth for r in results})
    families = {f: kinds for f, kinds in FAMILIES.items() if any(r.kind in kinds for r in results)}
    figure = new_figure(1.5 + 2.1 * len(modes), len(families) * (1.2 + 0.45 * len(depths)))
    axes = figure.subplots(len(families), len(modes), squeeze=False)
    image = None
    for (row, column), axis in np.ndenumerate(axes):
        grid = np.full((len(depths), len(lengths)), np.nan)
        family, kinds = list(families.items())[row]
        map_results = [r for r in results if r.kind in kinds and r.mode == modes[column]]
        for i, depth in enumerate(depths):
            for j, length in enumerate(lengths):
                correct = [r.correct for r in map_results if (r.frames, r.depth) == (length, depth)]
                grid[i, j] = np.mean(correct) if correct else np.nan
        image = axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for (i, j), value in np.ndenumerate(grid):
            axis.text(j, i, f"{value:.0%}", ha="center", va="center", fontsize=7)
        axis.set_title(f"{modes[column]}, {family.replace('_', ' ')}", fontsize=9)
        axis.set_xticks(range(len(lengths)), map(str, lengths), fontsize=7)
        axis.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths], fontsize=7)
        axis.set_xlabel("frames", fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("depth of the needle", fontsize=8)
    figure.colorbar(image, ax=list(axes.flat), label="accuracy", shrink=0.8)
    save_figure(figure, path)
