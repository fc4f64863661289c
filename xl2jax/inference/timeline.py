"""The figure of `infer --plot`: thumbnails over time, and which chunks each answer read in full."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from xl2jax.inference.answering import Answer
from xl2jax.inference.video_cache import WatchedVideo
from xl2jax.system.figures import BLUE, GREY, new_figure, save_figure


def plot_answers(path: Path, video: WatchedVideo, answers: Sequence[Answer]) -> None:
    """Plots thumbnails over time and, for every answer, the score of each chunk and whether it stayed dense.

    Raises UserError where `path` cannot be written.
    """
    rows = max(len(answers), 1)
    figure = new_figure(10, 1.3 + 1.7 * rows)
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
        replied = textwrap.shorten(answer.text, 110, placeholder="…")
        axis.set_title(f"{asked}\n{replied}", fontsize=8, loc="left")
        scores = [c.score for c in answer.chunks]
        top = max((s for s in scores if s is not None), default=0.0) or 1.0
        for chunk in answer.chunks:
            height = 1.0 if chunk.score is None else chunk.score / top
            width = max(chunk.end - chunk.start, end / 200)
            colour = BLUE if chunk.dense else GREY
            axis.bar(
                chunk.start, max(height, 0.02), width, align="edge", color=colour, edgecolor="white", linewidth=0.4
            )
        if not answer.chunks:
            axis.bar(0, 1.0, end, align="edge", color=BLUE)
        axis.set_yticks([])
        axis.set_ylabel("relevance", fontsize=7)
    axes[-1].set_xlabel("seconds (dark: dense KV, light: pooled KV)", fontsize=8)
    save_figure(figure, path)
