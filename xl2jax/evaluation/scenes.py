"""Endless seeded videos of coloured shapes that appear over a moving texture.

A scene is a number of frame groups (4 frames each). Some of them show one shape. No two shapes of a scene have both the
same colour and the same form. A needle is a shape that lasts one group. The seed determines the whole scene.
Training scenes have even seeds and never show the `HELD_OUT` combinations; test scenes have odd seeds.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from xl2jax.config import FRAMES_PER_GROUP
from xl2jax.system.atomic import replacing_file
from xl2jax.video.clip import Clip, Reader, frame_times
from xl2jax.video.read_ahead import resize
from xl2jax.video.writer import write_frames

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (30, 60, 225),
    "yellow": (240, 220, 30),
    "purple": (140, 30, 170),
    "orange": (245, 130, 20),
    "cyan": (40, 210, 225),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
PAIRS = tuple((c, s) for c in COLOURS for s in SHAPES)
HELD_OUT = frozenset({("red", "star"), ("blue", "cross"), ("yellow", "circle"), ("cyan", "triangle")})
"""Combinations that training never shows: they test whether colour and form are recognised independently."""
MAX_EVENTS = 9
"""Default limit on the shapes of a scene, so that their number is one digit."""
SIZES = ((64, 64), (80, 64), (64, 80), (96, 54))
"""Widths and heights of training videos."""


@dataclasses.dataclass(frozen=True)
class Event:
    """A shape that is visible in `groups` groups from group `start` on.

    Places (x, y), the radius and the movement per frame (dx, dy) are fractions of the frame's size.
    """

    start: int
    groups: int
    colour: str
    shape: str
    x: float
    y: float
    radius: float
    dx: float
    dy: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclasses.dataclass(frozen=True)
class Scene:
    """The content of a video."""

    seed: int
    groups: int
    events: tuple[Event, ...]

    @property
    def frames(self) -> int:
        return self.groups * FRAMES_PER_GROUP

    def times(self, seconds: float = FRAMES_PER_GROUP) -> list[float]:
        """When each group begins, in seconds, in a video whose groups are `seconds` apart."""
        return [group * seconds for group in range(self.groups)]

    @functools.cached_property
    def _texture(self) -> tuple[np.ndarray, tuple[float, float, float, float]]:
        rng = np.random.default_rng([self.seed, 1])
        base, tint = rng.uniform(70, 150), rng.uniform(-25, 25, 3)
        small = [rng.uniform(-1, 1, (n, n)).astype(np.float32) for n in (8, 33)]
        layers = [np.asarray(Image.fromarray(x).resize((256, 256), Image.Resampling.BICUBIC)) for x in small]
        value = (base + tint)[None, None] + (30 * layers[0] + 25 * layers[1])[..., None]
        dx, dy = map(float, rng.uniform(-0.02, 0.02, 2))
        px, py = map(float, rng.uniform(0, 1, 2))
        return np.clip(value, 0, 255).astype(np.uint8), (dx, dy, px, py)

    def frame(self, index: int, width: int, height: int) -> np.ndarray:
        """RGB uint8 [height, width, 3] of frame `index`."""
        texture, (dx, dy, px, py) = self._texture
        side = len(texture) // 2  # a window of half the texture's width moves over it and back
        x = int(side * abs((px + dx * index) % 2 - 1))
        y = int(side * abs((py + dy * index) % 2 - 1))
        image = Image.fromarray(texture[y : y + side, x : x + side]).resize((width, height))
        draw = ImageDraw.Draw(image)
        for event in self.events:
            age = index - event.start * FRAMES_PER_GROUP
            if 0 <= age < event.groups * FRAMES_PER_GROUP:
                radius = event.radius * min(width, height)
                centre = ((event.x + event.dx * age) * width, (event.y + event.dy * age) * height)
                _draw(draw, event.shape, COLOURS[event.colour], centre, radius)
        return np.asarray(image)


def _draw(
    draw: ImageDraw.ImageDraw, shape: str, colour: tuple[int, int, int], centre: tuple[float, float], r: float
) -> None:
    cx, cy = centre
    if shape == "circle":
        draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=colour)
    elif shape == "square":
        s = 0.85 * r
        draw.rectangle((cx - s, cy - s, cx + s, cy + s), fill=colour)
    elif shape == "cross":
        s = 0.33 * r
        draw.rectangle((cx - r, cy - s, cx + r, cy + s), fill=colour)
        draw.rectangle((cx - s, cy - r, cx + s, cy + r), fill=colour)
    else:
        points, inner = (3, 1.0) if shape == "triangle" else (5, 0.42)
        corners = []
        for i in range(points * (1 if shape == "triangle" else 2)):
            angle = -math.pi / 2 + i * 2 * math.pi / (points * (1 if shape == "triangle" else 2))
            distance = r * 1.1 * (inner if i % 2 and shape == "star" else 1.0)
            corners.append((cx + distance * math.cos(angle), cy + distance * math.sin(angle)))
        draw.polygon(corners, fill=colour)


_MAX_DURATION = 3  # groups
_SIDE = 112  # of the frames of a scene that is not written to a file


def make_scene(
    seed: int,
    groups: int,
    *,
    events: int | None = None,
    max_events: int = MAX_EVENTS,
    needle_at: int | None = None,
) -> Scene:
    """A scene of `groups` groups. Odd seeds may show held-out combinations.

    Args:
      events: number of shapes; by default 1 to `max_events`. Shapes that find no free groups are left out.
      needle_at: the first event is a needle in this group. The others appear in other groups and have other colours
        and forms.
    """
    rng = np.random.default_rng([seed, 0])
    allowed = [p for p in PAIRS if seed % 2 or p not in HELD_OUT]
    count = int(rng.integers(1, min(max_events, groups) + 1)) if events is None else events
    free = np.ones(groups, bool)
    shown: list[Event] = []
    order = [allowed[int(i)] for i in rng.permutation(len(allowed))]
    if needle_at is not None:
        order = order[:1] + [p for p in order[1:] if p[0] != order[0][0] and p[1] != order[0][1]]
    for number, (colour, shape) in enumerate(order[:count]):
        if needle_at is not None and number == 0:
            duration, starts = 1, [needle_at]
        else:
            duration = min(int(rng.integers(1, _MAX_DURATION + 1)), groups)
            starts = [s for s in range(groups - duration + 1) if free[s : s + duration].all()]
        if not starts:
            break
        start = starts[int(rng.integers(len(starts)))]
        free[start : start + duration] = False
        radius = rng.uniform(0.17, 0.26)
        x, y = rng.uniform(radius + 0.05, 0.95 - radius, 2)
        dx, dy = rng.uniform(-0.01, 0.01, 2)
        shown.append(Event(start, duration, colour, shape, *map(float, (x, y, radius, dx, dy))))
    return Scene(seed, groups, tuple(shown))


MAX_PICTURE_SHAPES = 4
PICTURE_SIZES = ((56, 56), (112, 56), (56, 112), (100, 75), (112, 112), (168, 112))
"""Widths and heights of training pictures: of one tile and of several, where a tile has 56 pixels."""


def make_picture(seed: int, *, shapes: int | None = None) -> Scene:
    """A scene of one group whose first frame is a picture of several shapes, each in a quarter of its own.

    Odd seeds may show held-out combinations. `shapes`: by default 1 to `MAX_PICTURE_SHAPES`.
    """
    rng = np.random.default_rng([seed, 4])
    allowed = [p for p in PAIRS if seed % 2 or p not in HELD_OUT]
    count = int(rng.integers(1, MAX_PICTURE_SHAPES + 1)) if shapes is None else shapes
    pairs = [allowed[int(i)] for i in rng.permutation(len(allowed))[:count]]
    shown = []
    for quarter, (colour, shape) in zip(rng.permutation(MAX_PICTURE_SHAPES).tolist(), pairs, strict=False):
        x, y = (0.25 + 0.5 * at + float(rng.uniform(-0.04, 0.04)) for at in divmod(quarter, 2))
        shown.append(Event(0, 1, colour, shape, x, y, float(rng.uniform(0.13, 0.19)), 0.0, 0.0))
    return Scene(seed, 1, tuple(shown))


def group_frames(scene: Scene, size: int) -> np.ndarray:
    """uint8 [4, size, size, 3] of a scene's first group, drawn in one of `SIZES`."""
    width, height = SIZES[scene.seed // 2 % len(SIZES)]
    return np.stack([resize(scene.frame(f, width, height), size) for f in range(FRAMES_PER_GROUP)])


class SceneReader(Reader):
    """A scene as an open video without file and codec.

    Args:
      seconds: time from one group to the next; by default one frame a second.
      drawn: the result of `draw_scene`, if the frames were drawn before.
    """

    def __init__(
        self,
        scene: Scene,
        seconds: float = FRAMES_PER_GROUP,
        *,
        width: int = _SIDE,
        height: int = _SIDE,
        drawn: np.ndarray | None = None,
    ):
        self._scene, self._size, self._drawn = scene, (width, height), drawn
        self.total, self.fps = scene.frames, FRAMES_PER_GROUP / seconds

    def spans(self, indices: np.ndarray) -> list[np.ndarray]:
        return [indices]

    def frames(self, indices: np.ndarray) -> Iterator[np.ndarray]:
        for i in indices:
            yield self._scene.frame(int(i), *self._size) if self._drawn is None else self._drawn[i]


def draw_scene(size: int, scene: Scene) -> np.ndarray:
    """uint8 [F, size, size, 3]: the frames of `scene_clip`, resized for a model whose frames have this size."""
    return draw_frames(size, scene, range(scene.frames))


def draw_frames(size: int, scene: Scene, numbers: Iterable[int]) -> np.ndarray:
    """uint8 [N, size, size, 3]: the frames of `scene_clip` that have these numbers, resized as in `draw_scene`."""
    return np.stack([resize(scene.frame(i, _SIDE, _SIDE), size) for i in numbers])


def scene_clip(scene: Scene, seconds: float = FRAMES_PER_GROUP, drawn: np.ndarray | None = None) -> Clip:
    """All frames of a scene, for `Model.watch`. Groups are `seconds` apart. `drawn` is that of SceneReader."""
    reader = SceneReader(scene, seconds, drawn=drawn)
    indices = np.arange(scene.frames)
    return Clip(Path(f"scene-{scene.seed}"), reader, indices, frame_times(indices, reader.fps))


def write_scene(path: Path, scene: Scene, *, width: int, height: int) -> None:
    """Writes a scene as an H.264 file (mp4) of one frame a second. The same scene gives the same bytes.

    Raises UserError if the file cannot be written.
    """
    with replacing_file(path) as unfinished:
        frames = (scene.frame(i, width, height) for i in range(scene.frames))
        write_frames(unfinished, frames, 1, container="mp4")
