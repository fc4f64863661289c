"""Questions about seeded scenes, in a small grammar, with their right answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from xl2jax.evaluation.scenes import COLOURS, HELD_OUT, MAX_EVENTS, PAIRS, SHAPES, Event, Scene

type Kind = Literal["colour", "shape", "time", "exists", "count", "first", "colour_of", "shape_of"]

# Training never uses the last template of a kind, but other templates contain all of its words.
TEMPLATES: dict[Kind, tuple[str, ...]] = {
    "colour": (
        "Which colour appeared at {time} seconds?",
        "At {time} seconds, which colour was the shape?",
        "What colour did the shape have at {time} seconds?",
        "What colour appeared at {time} seconds?",
        "At {time} seconds, what colour was there?",
        "Which colour was there at {time} seconds?",
        "At {time} seconds, what colour did the shape have?",
    ),
    "shape": (
        "Which shape appeared at {time} seconds?",
        "At {time} seconds, which shape was there?",
        "What shape was there at {time} seconds?",
        "What shape appeared at {time} seconds?",
        "At {time} seconds, which shape appeared?",
        "Which shape did the video show at {time} seconds?",
        "At {time} seconds, what shape appeared?",
    ),
    "time": (
        "When did the {colour} {shape} appear?",
        "At what time did the {colour} {shape} appear?",
        "When was there {a} {colour} {shape}?",
        "When was the {colour} {shape} there?",
        "At what time was the {colour} {shape} there?",
        "When did {a} {colour} {shape} appear?",
        "At what time was there {a} {colour} {shape}?",
    ),
    "exists": (
        "Was there {a} {colour} {shape}?",
        "Did {a} {colour} {shape} appear?",
        "Did the video show {a} {colour} {shape}?",
        "Did {a} {colour} {shape} appear in the video?",
        "Was there {a} {colour} {shape} in the video?",
    ),
    "count": (
        "How many shapes appeared?",
        "How many shapes were there in the video?",
        "How many shapes did the video show?",
        "How many shapes appeared in the video?",
        "How many shapes were there?",
    ),
    "first": (
        "Which came first, the {one} or the {two}?",
        "Which appeared first, the {one} or the {two}?",
        "Did the {one} or the {two} come first?",
        "Did the {one} or the {two} appear first?",
    ),
    "colour_of": (
        "What colour was the {shape}?",
        "Which colour was the {shape}?",
        "What colour did the {shape} have?",
        "Which colour did the {shape} have?",
    ),
    "shape_of": (
        "Which shape was {colour}?",
        "What shape was {colour}?",
        "Which {colour} shape appeared?",
        "Which {colour} shape was there?",
        "What {colour} shape appeared?",
    ),
}
NEEDLE_KINDS: tuple[Kind, ...] = ("colour_of", "shape_of", "colour", "shape", "time")
"""Kinds of question about one shape."""


PICTURE_KINDS: tuple[Kind, ...] = ("colour_of", "shape_of", "exists", "count")
"""Kinds of question about a picture."""


@dataclasses.dataclass(frozen=True)
class Question:
    kind: Kind
    text: str
    answer: str
    group: int | None
    """The group that shows the answer; None where no single group does."""


def ask(
    scene: Scene,
    kind: Kind,
    times: Sequence[float],
    rng: np.random.Generator,
    *,
    template: int | None = None,
    event: Event | None = None,
) -> Question | None:
    """A question about a scene whose groups begin at `times`, in seconds.

    Returns None if the scene allows no question of this kind: the colour or the form is not unique, there are too many
    shapes to count, or there is only one shape to order.

    Args:
      template: number of the template; by default one of those that training uses.
      event: the shape that the question is about; by default any. "first" and "count" are about the whole video.
    """
    choices = TEMPLATES[kind]
    text = choices[int(rng.integers(len(choices) - 1)) if template is None else template]
    event = event or scene.events[int(rng.integers(len(scene.events)))]

    def time_of(group: int) -> str:
        return str(round(float(times[group]), 1))

    def naming(colour: str, shape: str) -> str:
        return text.format(a="an" if colour[0] == "o" else "a", colour=colour, shape=shape)

    if kind in ("colour_of", "shape_of"):
        of_colour = kind == "colour_of"
        if sum((e.shape == event.shape) if of_colour else (e.colour == event.colour) for e in scene.events) > 1:
            return None
        answer = event.colour if of_colour else event.shape
        return Question(kind, naming(event.colour, event.shape), f"{answer.capitalize()}.", event.start)
    if kind in ("colour", "shape"):
        group = event.start + int(rng.integers(event.groups))
        answer = event.colour if kind == "colour" else event.shape
        return Question(kind, text.format(time=time_of(group)), f"{answer.capitalize()}.", group)
    if kind == "time":
        return Question(kind, naming(event.colour, event.shape), f"At {time_of(event.start)} seconds.", event.start)
    if kind == "exists":
        if rng.random() < 0.5:
            return Question(kind, naming(event.colour, event.shape), "Yes.", event.start)
        shown = {(e.colour, e.shape) for e in scene.events}
        absent = [p for p in PAIRS if p not in shown and (scene.seed % 2 or p not in HELD_OUT)]
        colour, shape = absent[int(rng.integers(len(absent)))]
        return Question(kind, naming(colour, shape), "No.", None)
    if kind == "count":
        if len(scene.events) > MAX_EVENTS:
            return None
        return Question(kind, text, f"{len(scene.events)}.", None)
    if len(scene.events) < 2:
        return None
    one, two = (scene.events[int(i)] for i in rng.permutation(len(scene.events))[:2])
    first = min(one, two, key=lambda e: e.start)
    return Question(kind, text.format(one=one.name, two=two.name), f"The {first.name}.", first.start)


def ask_about_picture(scene: Scene, kind: Kind, rng: np.random.Generator) -> Question | None:
    """A question about a picture, one of `PICTURE_KINDS`, in words that training uses and that name no video."""
    words = [number for number, text in enumerate(TEMPLATES[kind][:-1]) if "video" not in text]
    return ask(scene, kind, (0.0,), rng, template=words[int(rng.integers(len(words)))])


def ask_which_picture(scenes: Sequence[Scene], rng: np.random.Generator) -> tuple[str, str] | None:
    """A question about two pictures and its answer; None where both show the same shapes."""
    pairs = [{(e.colour, e.shape) for e in scene.events} for scene in scenes]
    right = int(rng.integers(2))
    only = sorted(pairs[right] - pairs[1 - right])
    if not only:
        return None
    colour, shape = only[int(rng.integers(len(only)))]
    return f"Which picture shows the {colour} {shape}, the first or the second?", f"The {('first', 'second')[right]}."


def corpus() -> Iterator[str]:
    """Texts with every word of questions, answers and times, for training a tokenizer."""
    # The templates of the other kinds have the same words.
    kinds: tuple[Kind, ...] = ("colour", "shape", "time", "exists", "count", "first")
    for kind in kinds:
        for text in TEMPLATES[kind]:
            example = text.format(a="a", time="0.0", colour="red", shape="circle", one="blue star", two="red cross")
            yield f"{example} {kind}"
    for colour in COLOURS:
        for shape in SHAPES:
            yield f"the {colour} {shape} a {colour} {shape}? an {colour} {shape}"
            yield f"{colour.capitalize()}. {shape.capitalize()}. The {colour} {shape}. At 0.0 seconds. Yes. No."
    yield from ["system\nYou are a helpful assistant.", "user\n", "assistant\n", "Time 0.0s:"] * 20
