"""Training rows whose videos are composed of groups that were encoded once.

The visual tokens of a group depend on its own four frames only, so any sequence of encoded groups is a video, and
training on it reads no frames. A row also holds the targets of auxiliary heads (`composed_training`).
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from xl2jax.arithmetic import round_up
from xl2jax.config import FRAMES_PER_GROUP
from xl2jax.evaluation.questions import Kind, Question, ask
from xl2jax.evaluation.scenes import COLOURS, HELD_OUT, PAIRS, SHAPES, Scene, make_scene
from xl2jax.prompt import IM_START, PromptTokenizer
from xl2jax.recipes.demo.datasets import MAX_SECONDS, draw_frame_interval
from xl2jax.training.loss import IGNORE
from xl2jax.training.samples import tokenise

_TRAINED_PAIRS = [p for p in PAIRS if p not in HELD_OUT]
_EMPTY_CLASSES = range(len(_TRAINED_PAIRS), len(_TRAINED_PAIRS) + 10)
GROUP_CLASSES: tuple[tuple[str, str] | None, ...] = (*_TRAINED_PAIRS, *len(_EMPTY_CLASSES) * [None])
"""The content of encoded groups: each combination of colour and form that is trained, and ten classes without a shape.
Every class has equally many encoded groups, in this order."""

# How often each kind is the first choice for a question about a shape. Difficult kinds come more often.
_KIND_WEIGHTS: dict[Kind, float] = {"colour_of": 1.5, "shape_of": 1.5, "colour": 2, "shape": 3, "time": 3, "exists": 1}
_MAX_SHAPES = 12  # in a video

DIGITS = 5
"""Digits of a time, from the tenths of a second up."""
TARGET_CLASSES = (*DIGITS * (11,), len(COLOURS) + 1, len(SHAPES) + 1)
"""Classes of each target of the heads: digits of a time, colour, form. The last class of each means that there is
none."""
NO_TARGET = -1

MAX_REPRESENTED_GROUPS = 1024
"""Groups of the longest video that a row can represent.

A row that represents a video n times as long as its own has the distances of that video, through gaps in the positions
(PoSE, arXiv 2309.10400). Its groups without a shape, except the first group, count n times as keys of the attention, to
represent the noise of that video."""
_TIME_TOKENS = 10  # of a group's time, approximately


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of the training on composed videos: `steps` steps of `batch` rows."""

    name: str
    groups: int
    """Groups of the longest video."""
    batch: int
    steps: int
    learning_rate: float
    """The peak of the schedule."""
    seed: int

    def tokens(self, visual_tokens: int) -> int:
        """Length of a row: its groups, a question about each shape, and two more questions. Longer rows are cut."""
        needed = 30 + (_TIME_TOKENS + visual_tokens) * self.groups + 17 * (min(self.groups, _MAX_SHAPES) + 2)
        return round_up(needed, 16)


class Rows[A](NamedTuple):
    """B composed videos of up to G groups with their conversations of T tokens, and the targets of the heads.

    The arrays are NumPy's or JAX's, and int32 unless a field says otherwise.
    """

    groups: A
    """[B, G]: the number of the encoded group at each place. Zeros follow the last group of a shorter video."""
    ids: A
    """[B, T]; `ids`, `visual` and `labels` are those of a TokenBatch."""
    visual: A
    labels: A
    positions: A
    """[B, T]: rising, with gaps."""
    weights: A
    """float32 [B, T]: the logarithm of how many times a token counts as a key of the attention."""
    early: A
    """int8 [B, T, 7]: targets of the early head (digits of a time, colour, form), NO_TARGET where there is none."""
    late: A
    """int8 [B, T, 7]: targets of the late head."""


def digits(seconds: float) -> list[int]:
    """The digits of a time in tenths of a second, lowest first; 10 where the number has no such digit."""
    tenths = round(seconds * 10)
    return [tenths // 10**p % 10 if tenths >= 10**p or p < 2 else 10 for p in range(DIGITS)]


def compose(
    seed: int, phase: Phase, tokenizer: PromptTokenizer, visual_tokens: int, groups_per_class: int
) -> Rows[np.ndarray]:
    """One row: NumPy arrays without the batch axis.

    No question gives away the answer to another: each shape has one question, and the order of two shapes comes last.
    A third of the rows are shorter videos. Half of the rows have a needle, half start later than at 0 seconds, and half
    represent a longer video, of up to `MAX_REPRESENTED_GROUPS` groups.
    """
    rng = np.random.default_rng([seed, 3])
    count = phase.groups if rng.random() < 2 / 3 else round(float(np.exp(rng.uniform(0, np.log(phase.groups)))))
    needle_at = int(rng.integers(count)) if rng.random() < 0.5 else None
    scene = make_scene(2 * seed, count, max_events=_MAX_SHAPES, needle_at=needle_at)
    seconds = FRAMES_PER_GROUP * draw_frame_interval(scene.frames, rng)
    latest_start = int(MAX_SECONDS / seconds) - count  # in groups
    start = seconds * int(rng.integers(max(latest_start, 1))) if rng.random() < 0.5 else 0.0
    times = [round(float(start + g * seconds), 1) for g in range(count)]
    classes = rng.choice(_EMPTY_CLASSES, count)
    for event in scene.events:
        classes[event.start : event.start + event.groups] = _TRAINED_PAIRS.index((event.colour, event.shape))

    questions = _questions(scene, seconds, start, rng)
    turns = [turn for q in questions for turn in (("user", q.text), ("assistant", q.answer))]
    length = phase.tokens(visual_tokens)
    row = tokenise(turns, times, tokenizer, visual_tokens, length)
    used = len(row.ids)

    early, late = (np.full((length, len(TARGET_CLASSES)), NO_TARGET, np.int8) for _ in range(2))
    is_visual = row.visual >= 0
    early[:used][is_visual, :DIGITS] = np.array([digits(t) for t in times])[row.visual[is_visual] // visual_tokens]
    (opening,), (assistant,) = tokenizer.encode(IM_START), tokenizer.encode("assistant")
    begins = np.flatnonzero((row.ids[:-2] == opening) & (row.ids[1:-1] == assistant)) + 2
    for begin, question in zip(begins.tolist(), questions, strict=False):  # the row may be cut before the last ones
        words = question.text.rstrip("?").split()
        answer = slice(begin, begin + 1)
        if question.kind == "time":
            assert question.group is not None
            answer = slice(begin, min(begin + len(tokenizer.encode(question.answer)) - 1, used))
            late[answer, :DIGITS] = digits(times[question.group])
        if question.kind in ("colour", "shape"):
            assert question.group is not None
            early[answer, :DIGITS] = digits(times[question.group])
        if question.kind in ("time", "exists", "colour_of", "shape_of"):
            for target, names in ((DIGITS, tuple(COLOURS)), (DIGITS + 1, SHAPES)):
                early[answer, target] = next((i for i, name in enumerate(names) if name in words), len(names))

    positions, weights = np.arange(length, dtype=np.int32), np.zeros(length, np.float32)
    if rng.random() < 0.5 and count < MAX_REPRESENTED_GROUPS:
        ends = np.flatnonzero(is_visual & (row.visual % visual_tokens == visual_tokens - 1)) + 1
        factor = float(np.exp(rng.uniform(0, np.log(MAX_REPRESENTED_GROUPS / count))))
        gaps = rng.choice(ends, int(rng.integers(1, 4)))
        for gap, share in zip(gaps, rng.dirichlet(np.ones(len(gaps))), strict=True):
            positions[gap:] += int(share * (factor - 1) * count * (_TIME_TOKENS + visual_tokens))
        empty = np.repeat(np.isin(classes, _EMPTY_CLASSES)[1:], np.diff(ends))
        weights[ends[0] : ends[-1]][empty] = np.log(factor)
    ids, visual, labels = (
        np.pad(x, (0, length - used), constant_values=fill)
        for x, fill in ((row.ids, 0), (row.visual, -1), (row.labels, IGNORE))
    )
    groups = np.zeros(phase.groups, np.int32)
    groups[:count] = classes * groups_per_class + rng.integers(0, groups_per_class, count)
    return Rows(groups, ids, visual, labels, positions, weights, early, late)


def compose_batch(
    phase: Phase, tokenizer: PromptTokenizer, visual_tokens: int, groups_per_class: int, step: int
) -> Rows[np.ndarray]:
    """The rows of a step of the training."""
    first = phase.seed * 10_000_000 + step * phase.batch
    rows = [compose(first + i, phase, tokenizer, visual_tokens, groups_per_class) for i in range(phase.batch)]
    return Rows(*map(np.stack, zip(*rows, strict=True)))


def _questions(scene: Scene, seconds: float, start: float, rng: np.random.Generator) -> list[Question]:
    """A question about each shape that allows one, and in half of the cases each: the number of shapes, at any place,
    and the order of two shapes, at the end because it names shapes that other questions ask for."""
    kinds, weights = list(_KIND_WEIGHTS), np.array(list(_KIND_WEIGHTS.values()))
    questions: list[Question | None] = []
    for i in rng.permutation(len(scene.events)):
        order = rng.choice(len(kinds), len(kinds), replace=False, p=weights / weights.sum())
        candidates = (ask(scene, kinds[k], seconds, rng, event=scene.events[int(i)], start=start) for k in order)
        questions.append(next((q for q in candidates if q is not None), None))
    if rng.random() < 0.5:
        questions.insert(int(rng.integers(len(questions) + 1)), ask(scene, "count", seconds, rng))
    if rng.random() < 0.5:
        questions.append(ask(scene, "first", seconds, rng))
    return [q for q in questions if q is not None]
