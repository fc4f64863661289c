"""Pictures: an answer's timeline, and accuracy by length and depth."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xl2jax.evaluation.needle import FAMILIES, Result
from xl2jax.inference.api import Answer
from xl2jax.inference.video_cache import WatchedVideo
from xl2jax.system.atomic import replacing_file

_DENSE, _POOLED = "#2b6cb0", "#cbd5e0"


def _figure(width: float, height: float) -> Any:
    """A figure that needs no screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    with replacing_file(path) as beside:
        figure.savefig(beside, dpi=120, format="png")


def plot_answers(path: Path, video: WatchedVideo, answers: Sequence[Answer]) -> None:
    """Thumbnails over time; under them, for every answer, the score of each chunk and which ones stayed dense.

    Raises UserError where `path` cannot be written.
    """
    rows = max(len(answers), 1)
    figure = _figure(10, 1.3 + 1.7 * rows)
    axes = figure.subplots(rows + 1, 1, sharex=True, height_ratios=[0.9, *[1.0] * rows], squeeze=False)[:, 0]
    end = max(video.times[-1], 1e-6)
    axes[0].set_title(Path(video.path).name, fontsize=9, loc="left")
    shown = video.thumbnails
    for number, (_, image) in enumerate(shown):
        left = end * number / len(shown)
        axes[0].imshow(image, extent=(left, left + 0.96 * end / len(shown), 0, 1), aspect="auto")
    axes[0].set_xlim(0, end)
    axes[0].set_ylim(0, 1)
    axes[0].axis("off")
    for axis, answer in zip(axes[1:], answers, strict=False):
        asked = textwrap.shorten(answer.question, 90, placeholder="…")
        said = textwrap.shorten(answer.text, 110, placeholder="…")
        axis.set_title(f"{asked}\n{said}", fontsize=8, loc="left")
        scores = [c.score for c in answer.chunks]
        known = [s for s in scores if s is not None]
        top = max(known, default=0.0) or 1.0
        for chunk in answer.chunks:
            height = 1.0 if chunk.score is None else chunk.score / top
            width = max(chunk.end - chunk.start, end / 200)
            colour = _DENSE if chunk.dense else _POOLED
            axis.bar(
                chunk.start, max(height, 0.02), width, align="edge", color=colour, edgecolor="white", linewidth=0.4
            )
        if not answer.chunks:
            axis.bar(0, 1.0, end, align="edge", color=_DENSE)
        axis.set_yticks([])
        axis.set_ylabel("relevance", fontsize=7)
    axes[-1].set_xlabel("seconds (dark: dense KV, light: pooled KV)", fontsize=8)
    _save(figure, path)


def plot_needle(path: Path, results: Sequence[Result]) -> None:
    """A heat map for each mode and family of questions: length across, depth down, accuracy as colour."""
    modes = list(dict.fromkeys(r.mode for r in results))
    lengths, depths = sorted({r.frames for r in results}), sorted({r.depth for r in results})
    families = {f: kinds for f, kinds in FAMILIES.items() if any(r.kind in kinds for r in results)}
    figure = _figure(1.5 + 2.1 * len(modes), len(families) * (1.2 + 0.45 * len(depths)))
    axes = figure.subplots(len(families), len(modes), squeeze=False)
    image = None
    for (row, column), axis in np.ndenumerate(axes):
        grid = np.full((len(depths), len(lengths)), np.nan)
        family, kinds = list(families.items())[row]
        here = [r for r in results if r.kind in kinds and r.mode == modes[column]]
        for i, depth in enumerate(depths):
            for j, length in enumerate(lengths):
                own = [r.correct for r in here if (r.frames, r.depth) == (length, depth)]
                grid[i, j] = np.mean(own) if own else np.nan
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
    _save(figure, path)


def plot_losses(path: Path, curves: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """Loss over steps, a panel a stage of training; the loss is logarithmic and the same in all."""
    figure = _figure(1 + 2.2 * len(curves), 2.8)
    axes = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for axis, (name, curve) in zip(axes, curves.items(), strict=True):
        axis.plot(*zip(*curve, strict=True), color=_DENSE, linewidth=0.8)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.set_yscale("log")
        axis.tick_params(labelsize=7)
        axis.grid(visible=True, alpha=0.3)
    axes[0].set_ylabel("loss", fontsize=8)
    _save(figure, path)


def plot_stages(path: Path, rows: Sequence[dict[str, Any]], stages: Sequence[str]) -> None:
    """Seconds of each stage and bytes at the peak over the number of frames, both axes logarithmic."""
    frames = [row["frames"] for row in rows]
    figure = _figure(9, 3.6)
    time_axis, memory_axis = figure.subplots(1, 2)
    for stage in stages:
        time_axis.plot(frames, [row[stage] for row in rows], marker="o", label=stage.removesuffix("_s"))
    time_axis.plot(frames, [row["seconds"] for row in rows], marker="s", color="black", label="watch, all")
    time_axis.set_ylabel("seconds")
    time_axis.legend(fontsize=7)
    for name, label in (
        ("peak_memory_bytes", "process or device"), ("cache_bytes", "KV cache"), ("reader_bytes", "reader")
    ):  # fmt: skip
        memory_axis.plot(frames, [row[name] / 1e6 for row in rows], marker="o", label=label)
    memory_axis.set_ylabel("MB at the peak")
    memory_axis.legend(fontsize=7)
    for axis in (time_axis, memory_axis):
        axis.set_xlabel("frames")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    _save(figure, path)
