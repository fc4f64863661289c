"""Figures that need no screen, and how they are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xl2jax.system.atomic import replacing_file

BLUE, GREY = "#2b6cb0", "#cbd5e0"


def new_figure(width: float, height: float) -> Any:
    """A figure that needs no screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Writes a PNG. Raises UserError where `path` cannot be written."""
    with replacing_file(path) as beside:
        figure.savefig(beside, dpi=120, format="png")
