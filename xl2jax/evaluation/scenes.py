"""Endless seeded scenes with questions whose answers are known: coloured shapes over a moving texture.

A scene is a number of frame groups (4 frames) of which some show one shape each; no two shapes of a scene have both
the same colour and the same form. A needle is a shape that lasts one group. Everything follows from the seed.
Training scenes have even seeds and never show the `HELD_OUT` combinations; test scenes have odd seeds.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from xl2jax.config import FRAMES_PER_GROUP
from xl2jax.video.clip import Clip, Reader, frame_times
from xl2jax.video.read_ahead import resize

COLOURS = {
    "red": (220, 30, 30), "green": (30, 160, 50), "blue": (30, 60, 225), "yellow": (240, 220, 30),
    "purple": (140, 30, 170), "orange": (245, 130, 20), "cyan": (40, 210, 225), "white": (250, 250, 250),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "cross")
PAIRS = tuple((c, s) for c in COLOURS for s in SHAPES)
HELD_OUT = frozenset({("red", "star"), ("blue", "cross"), ("yellow", "circle"), ("cyan", "triangle")})
"""Never in training: the test asks whether colour and form are recognised apart."""

type Kind = Literal["colour", "shape", "time", "exists", "count", "first", "colour_of", "shape_of"]

# The last template of each kind is never trained on; its words are.
TEMPLATES: dict[Kind, tuple[str, ...]] = {
    "colour": (
        "Which colour appeared at {time} seconds?", "At {time} seconds, which colour was the shape?",
        "What colour did the shape have at {time} seconds?", "What colour appeared at {time} seconds?",
        "At {time} seconds, what colour was there?", "Which colour was there at {time} seconds?",
        "At {time} seconds, what colour did the shape have?",
    ),
    "shape": (
        "Which shape appeared at {time} seconds?", "At {time} seconds, which shape was there?",
        "What shape was there at {time} seconds?", "What shape appeared at {time} seconds?",
        "At {time} seconds, which shape appeared?", "Which shape did the video show at {time} seconds?",
        "At {time} seconds, what shape appeared?",
    ),
    "time": (
        "When did the {colour} {shape} appear?", "At what time did the {colour} {shape} appear?",
        "When was there {a} {colour} {shape}?", "When was the {colour} {shape} there?",
        "At what time was the {colour} {shape} there?", "When did {a} {colour} {shape} appear?",
        "At what time was there {a} {colour} {shape}?",
    ),
    "exists": (
        "Was there {a} {colour} {shape}?", "Did {a} {colour} {shape} appear?",
        "Did the video show {a} {colour} {shape}?", "Did {a} {colour} {shape} appear in the video?",
        "Was there {a} {colour} {shape} in the video?",
    ),
    "count": (
        "How many shapes appeared?", "How many shapes were there in the video?",
        "How many shapes did the video show?", "How many shapes appeared in the video?",
        "How many shapes were there?",
    ),
    "first": (
        "Which came first, the {one} or the {two}?", "Which appeared first, the {one} or the {two}?",
        "Did the {one} or the {two} come first?", "Did the {one} or the {two} appear first?",
    ),
    "colour_of": (
        "What colour was the {shape}?", "Which colour was the {shape}?", "What colour did the {shape} have?",
        "Which colour did the {shape} have?",
    ),
    "shape_of": (
        "Which shape was {colour}?", "What shape was {colour}?", "Which {colour} shape appeared?",
        "Which {colour} shape was there?", "What {colour} shape appeared?",
    ),
}  # fmt: skip
MOST_COUNTED = 9
"""Shapes of a video that is asked how many it has: an answer of one digit."""
NEEDLE_KINDS: tuple[Kind, ...] = ("colour_of", "shape_of", "colour", "shape", "time")


@dataclasses.dataclass(frozen=True)
class Event:
    """A shape that is seen in `groups` groups from group `start` on. Places and sizes are shares of the frame."""

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
    """A video before it is drawn."""

    seed: int
    groups: int
    events: tuple[Event, ...]

    @property
    def frames(self) -> int:
        return self.groups * FRAMES_PER_GROUP

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
        side = len(texture) // 2  # a window of half the texture, there and back
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
            turn = -math.pi / 2 + i * 2 * math.pi / (points * (1 if shape == "triangle" else 2))
            far = r * 1.1 * (inner if i % 2 and shape == "star" else 1.0)
            corners.append((cx + far * math.cos(turn), cy + far * math.sin(turn)))
        draw.polygon(corners, fill=colour)


def make_scene(
    seed: int,
    groups: int,
    *,
    events: int | None = None,
    most: int = MOST_COUNTED,
    longest: int = 3,
    needle_at: int | None = None,
) -> Scene:
    """A scene of `groups` groups. Odd seeds may show held-out combinations.

    Args:
      events: shapes; by default 1 to `most`, as many as fit.
      longest: most groups that a shape stays.
      needle_at: the first event is a needle in this group; the others are elsewhere, of other colours and forms.
    """
    rng = np.random.default_rng([seed, 0])
    allowed = [p for p in PAIRS if seed % 2 or p not in HELD_OUT]
    wanted = int(rng.integers(1, min(most, groups) + 1)) if events is None else events
    free = np.ones(groups, bool)
    out = []
    order = [allowed[int(i)] for i in rng.permutation(len(allowed))]
    if needle_at is not None:
        order = order[:1] + [p for p in order[1:] if p[0] != order[0][0] and p[1] != order[0][1]]
    for number, (colour, shape) in enumerate(order[:wanted]):
        needle = needle_at is not None and number == 0
        stay = 1 if needle else min(int(rng.integers(1, longest + 1)), groups)
        starts = [needle_at] if needle else [s for s in range(groups - stay + 1) if free[s : s + stay].all()]
        if not starts:
            break
        start = int(starts[int(rng.integers(len(starts)))])  # type: ignore[arg-type]
        free[start : start + stay] = False
        radius = rng.uniform(0.17, 0.26)
        x, y = rng.uniform(radius + 0.05, 0.95 - radius, 2)
        dx, dy = rng.uniform(-0.01, 0.01, 2)
        out.append(Event(start, stay, colour, shape, *map(float, (x, y, radius, dx, dy))))
    return Scene(seed, groups, tuple(out))


@dataclasses.dataclass(frozen=True)
class Question:
    kind: Kind
    text: str
    answer: str
    group: int | None
    """Group that the answer is seen in."""


def ask(
    scene: Scene, kind: Kind, seconds: float, rng: np.random.Generator, *, template: int | None = None,
    event: Event | None = None, start: float = 0.0,
) -> Question | None:  # fmt: skip
    """A question about a scene whose groups are `seconds` apart.

    None where it has none of that kind: a colour or form that is not unique, too many shapes to count, one to order.

    Args:
      template: by default one of those that are trained on.
      event: what it is about; by default any. "first" and "count" are about the whole video.
      start: seconds at the first group.
    """
    choices = TEMPLATES[kind]
    text = choices[int(rng.integers(len(choices) - 1)) if template is None else template]
    event = event or scene.events[int(rng.integers(len(scene.events)))]

    def when(group: int) -> str:
        return str(round(float(start + group * seconds), 1))

    def about(colour: str, shape: str) -> str:
        return text.format(a="an" if colour[0] == "o" else "a", colour=colour, shape=shape)

    if kind in ("colour_of", "shape_of"):
        of_colour = kind == "colour_of"
        if sum((e.shape == event.shape) if of_colour else (e.colour == event.colour) for e in scene.events) > 1:
            return None
        answer = event.colour if of_colour else event.shape
        return Question(kind, about(event.colour, event.shape), f"{answer.capitalize()}.", event.start)
    if kind in ("colour", "shape"):
        group = event.start + int(rng.integers(event.groups))
        answer = event.colour if kind == "colour" else event.shape
        return Question(kind, text.format(time=when(group)), f"{answer.capitalize()}.", group)
    if kind == "time":
        return Question(kind, about(event.colour, event.shape), f"At {when(event.start)} seconds.", event.start)
    if kind == "exists":
        if rng.random() < 0.5:
            return Question(kind, about(event.colour, event.shape), "Yes.", event.start)
        shown = {(e.colour, e.shape) for e in scene.events}
        absent = [p for p in PAIRS if p not in shown and (scene.seed % 2 or p not in HELD_OUT)]
        colour, shape = absent[int(rng.integers(len(absent)))]
        return Question(kind, about(colour, shape), "No.", None)
    if kind == "count":
        if len(scene.events) > MOST_COUNTED:
            return None
        return Question(kind, text, f"{len(scene.events)}.", None)
    if len(scene.events) < 2:
        return None
    one, two = (scene.events[int(i)] for i in rng.permutation(len(scene.events))[:2])
    first = min(one, two, key=lambda e: e.start)
    return Question(kind, text.format(one=one.name, two=two.name), f"The {first.name}.", first.start)


SIZES = ((64, 64), (80, 64), (64, 80), (96, 54))
"""Widths and heights that training videos are drawn in."""


def group_frames(scene: Scene, size: int) -> np.ndarray:
    """uint8 [4, size, size, 3] of a scene's first group, drawn in one of `SIZES`."""
    width, height = SIZES[scene.seed // 2 % len(SIZES)]
    return np.stack([resize(scene.frame(f, width, height), size) for f in range(FRAMES_PER_GROUP)])


class SceneReader(Reader):
    """A scene as an open video of one frame a second (times `seconds / 4` apart): no file, no codec."""

    def __init__(self, scene: Scene, seconds: float = FRAMES_PER_GROUP, *, width: int = 112, height: int = 112):
        self._scene, self._size = scene, (width, height)
        self.total, self.fps = scene.frames, FRAMES_PER_GROUP / seconds

    def spans(self, indices: np.ndarray) -> list[np.ndarray]:
        return [indices]

    def frames(self, indices: np.ndarray) -> Iterator[np.ndarray]:
        for i in indices:
            yield self._scene.frame(int(i), *self._size)


def scene_clip(scene: Scene, seconds: float = FRAMES_PER_GROUP) -> Clip:
    """All frames of a scene, for `Model.watch`."""
    reader = SceneReader(scene, seconds)
    indices = np.arange(scene.frames)
    return Clip(Path(f"scene-{scene.seed}"), reader, indices, frame_times(indices, reader.fps))


def corpus() -> Iterator[str]:
    """Every word that questions, answers and times are made of: what a tokenizer learns from."""
    kinds: tuple[Kind, ...] = ("colour", "shape", "time", "exists", "count", "first")  # the others have the same words
    for kind in kinds:
        for text in TEMPLATES[kind]:
            yield (
                text.format(a="a", time="0.0", colour="red", shape="circle", one="blue star", two="red cross")
                + f" {kind}"
            )
    for colour in COLOURS:
        for shape in SHAPES:
            yield f"the {colour} {shape} a {colour} {shape}? an {colour} {shape}"
            yield f"{colour.capitalize()}. {shape.capitalize()}. The {colour} {shape}. At 0.0 seconds. Yes. No."
    yield from ["system\nYou are a helpful assistant.", "user\n", "assistant\n", "Time 0.0s:"] * 20
