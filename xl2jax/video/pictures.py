"""Pictures as upstream sees them: cut into a grid of square tiles (anyres), of which each is encoded by itself.

The grid is the one of a fixed list on which the picture keeps most of its pixels. The picture is resized to fit it with
its aspect ratio kept, centred on black, and cut row by row. Upstream also makes a view of the whole picture, encodes it
and then drops it; it is not made here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from xl2jax.errors import UserError
from xl2jax.video.image_files import read_image, rgb_pixels

type Grid = tuple[int, int]
"""Columns and rows of tiles."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """How a picture is placed on its grid: its size once it is resized, and its left upper corner, in pixels."""

    grid: Grid
    size: tuple[int, int]
    corner: tuple[int, int]

    @property
    def tiles(self) -> int:
        return self.grid[0] * self.grid[1]


def fit(width: int, height: int, tile: int, grids: Sequence[Grid]) -> Fit:
    """The grid for a picture of this size, and its place there (upstream: select_best_resolution, resize_and_pad_image).

    Of all grids, the picture keeps most of its pixels on the chosen one, and the fewest are wasted there; the first one
    wins a tie.
    """

    def quality(grid: Grid) -> tuple[int, int]:
        across, down = tile * grid[0], tile * grid[1]
        scale = min(across / width, down / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, -(across * down - kept)

    grid = max(grids, key=quality)
    across, down = tile * grid[0], tile * grid[1]
    scale_x, scale_y = across / width, down / height
    if scale_x < scale_y:
        size = across, min(math.ceil(height * scale_x), down)
    else:
        size = min(math.ceil(width * scale_y), across), down
    return Fit(grid, size, ((across - size[0]) // 2, (down - size[1]) // 2))


def cut(picture: np.ndarray, tile: int, grids: Sequence[Grid]) -> np.ndarray:
    """uint8 RGB [H, W, 3] -> its tiles [n, tile, tile, 3], row by row."""
    height, width = picture.shape[:2]
    placed = fit(width, height, tile, grids)
    columns, rows = placed.grid
    canvas = np.zeros((rows * tile, columns * tile, 3), np.uint8)
    resized = np.asarray(Image.fromarray(picture).resize(placed.size, Image.Resampling.BICUBIC))
    left, top = placed.corner
    canvas[top : top + placed.size[1], left : left + placed.size[0]] = resized
    return canvas.reshape(rows, tile, columns, tile, 3).swapaxes(1, 2).reshape(-1, tile, tile, 3)


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture in memory, uint8 RGB [H, W, 3], and a name for messages."""

    name: str
    pixels: np.ndarray

    def __post_init__(self) -> None:
        x = self.pixels
        if not (isinstance(x, np.ndarray) and x.dtype == np.uint8 and x.ndim == 3 and x.shape[2] == 3 and x.size):
            raise UserError(f"{self.name}: a picture in memory is a uint8 array [height, width, 3]")

    @classmethod
    def read(cls, path: str | Path, max_pixels: int | None = None) -> Picture:
        """Reads an image file (see `read_image`). Raises UserError where it cannot be read, or is an animation."""
        return cls(str(path), read_image(Path(path), max_pixels, still=True))

    @classmethod
    def of(cls, source: str | Path | np.ndarray | Image.Image | Picture, number: int) -> Picture:
        """A picture from a file, an array or a PIL image. `number` names those without a file."""
        if isinstance(source, Picture):
            return source
        if isinstance(source, str | Path):
            return cls.read(source)
        if isinstance(source, Image.Image):
            source = rgb_pixels(source)
        return cls(f"picture {number}", source)
