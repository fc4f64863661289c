"""The figure of `bench e2e --video`: seconds by stage, and memory at the peak."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xl2jax.system.figures import new_figure, save_figure


def plot_stages(path: Path, rows: Sequence[dict[str, Any]], stages: Sequence[str]) -> None:
    """Plots the seconds of each stage and the peak memory over the number of frames. All axes are logarithmic."""
    frames = [row["frames"] for row in rows]
    figure = new_figure(9, 3.6)
    time_axis, memory_axis = figure.subplots(1, 2)
    for stage in stages:
        time_axis.plot(frames, [row[stage] for row in rows], marker="o", label=stage.removesuffix("_s"))
    time_axis.plot(frames, [row["seconds"] for row in rows], marker="s", color="black", label="watch, all")
    time_axis.set_ylabel("seconds")
    time_axis.legend(fontsize=7)
    for name, label in (
        ("peak_memory_bytes", "process or device"),
        ("cache_bytes", "KV cache"),
        ("reader_bytes", "reader"),
    ):
        memory_axis.plot(frames, [row[name] / 1e6 for row in rows], marker="o", label=label)
    memory_axis.set_ylabel("MB at the peak")
    memory_axis.legend(fontsize=7)
    for axis in (time_axis, memory_axis):
        axis.set_xlabel("frames")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    save_figure(figure, path)
