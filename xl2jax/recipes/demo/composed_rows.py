"""Training rows whose videos are composed of groups that were encoded once.

The visual tokens of a group depend on its own four frames only, so any sequence of encoded groups is a video, and
training on it reads no frames. A row also holds the targets of auxiliary heads (`composed_training`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from xl2jax.arithmetic import round_up
from xl2jax.config import FRAMES_PER_GROUP
from xl2jax.evaluation.questions import Kind, Question, ask
from xl2jax.evaluation.scenes import COLOURS, HELD_OUT, PAIRS, SHAPES, Scene, make_scene
from xl2jax.prompt import IM_START, PromptTokenizer
from xl2jax.recipes.demo.datasets import draw_frame_interval
from xl2jax.training.loss import IGNORE
from xl2jax.training.samples import tokenise

_TRAINED_PAIRS = [p for p in PAIRS if p not in HELD_OUT]
_EMPTY_CLASSES = range(len(_TRAINED_PAIRS), len(_TRAINED_PAIRS) + 10)
GROUP_CLASSES: tuple[tuple[str, str] | None, ...] = (*_TRAINED_PAIRS, *len(_EMPTY_CLASSES) * [None])
"""The content of encoded groups: each combination of colour and form that is trained, and ten classes without a shape.
Every class has equally many encoded groups, in this order."""

# How often each kind is the first choice for a question about a shape. Difficult kinds come more often.
_KIND_WEIGHTS: dict[Kind, float] = {"colour_of": 1.5, "shape_of": 1.5, "colour": 3, "shape": 3, "time": 3, "exists": 1}
_MAX_SHAPES = 12  # in a video

DIGITS = 6
"""Digits of a time, from the tenths of a second up."""
TARGET_CLASSES = (*DIGITS * (11,), len(COLOURS) + 1, len(SHAPES) + 1)
"""Classes of each target of the early and the late head: digits of a time, colour, form. The last class of each means
that there is none."""
COUNT_CLASSES = (2, _MAX_SHAPES + 1)
"""Classes of the targets of the heads that count: whether a shape began in the group before, and how many have begun."""
NO_TARGET = -1

MAX_REPRESENTED_GROUPS = 10_240
"""Groups of the longest video that a row can represent.

A row that represents a video n times as long as its own has the times of that video and its distances, through gaps in
the positions (PoSE, arXiv 2309.10400). Its groups without a shape, except the first group, count n times as keys of the
attention, to represent the noise of that video."""
_ROUND_GROUPS = 250  # as many groups that are 4, 8 or 16 seconds apart are thousands of seconds
_TIME_TOKENS = 12  # of a group's time, approximately
MAX_SECONDS = 65_536.0
"""Limit on the times of a row. The limit of each row is drawn between this and a 16th of it."""


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
    hidden: A
    """bool [B, T]: visual tokens that blind tokens do not see."""
    blind: A
    """bool [B, T]: tokens of a question that has to be answered from the time tokens."""
    early: A
    """int8 [B, T, 8]: targets of the early head (digits of a time, colour, form), NO_TARGET where there is none."""
    late: A
    """int8 [B, T, 8]: targets of the late head."""
    counts: A
    """int8 [B, T, 2]: targets of the heads that count, for time tokens."""


def digits(seconds: float) -> list[int]:
    """The digits of a time in tenths of a second, lowest first; 10 where the number has no such digit."""
    tenths = round(seconds * 10)
    return [tenths // 10**p % 10 if tenths >= 10**p or p < 2 else 10 for p in range(DIGITS)]


def compose(
    seed: int, phase: Phase, tokenizer: PromptTokenizer, visual_tokens: int, groups_per_class: int
) -> Rows[np.ndarray]:
    """One row: NumPy arrays without the batch axis.

    No question gives away the answer to another: each shape has one question, and the order of two shapes comes last.
    A third of the rows are shorter videos. Half of the rows have a needle, half start later than at 0 seconds, and about
    half represent a longer video, of up to `MAX_REPRESENTED_GROUPS` groups, from which groups were left out at one to three
    places. In many of those a multiple of 250 groups is left out, so that times before and after have the same last digits
    and a lookup needs the first ones.

    Time tokens see the whole video before them, also in chunked prefill, and stay as they are in bi-level decoding. Heads
    make them hold the number of shapes that have begun. Half of the questions for the number of shapes are
    blind: they come first and see the visual tokens of no group but the last, so that they have to read it there.
    """
    rng = np.random.default_rng([seed, 3])
    count = phase.groups if rng.random() < 2 / 3 else round(float(np.exp(rng.uniform(0, np.log(phase.groups)))))
    needle_at = int(rng.integers(count)) if rng.random() < 0.5 else None
    scene = make_scene(2 * seed, count, max_events=_MAX_SHAPES, needle_at=needle_at)
    left_out = _left_out(count, rng) if rng.random() < 0.5 else np.zeros(count + 1, int)
    represented = count + int(left_out.sum())
    limit = MAX_SECONDS / float(np.exp(rng.uniform(0, np.log(16))))
    seconds = FRAMES_PER_GROUP * draw_frame_interval(FRAMES_PER_GROUP * represented, rng, limit)
    first = int(rng.integers(max(int(limit / seconds) - represented, 1))) if rng.random() < 0.5 else 0
    times = [round(float(seconds * g), 1) for g in first + np.arange(count) + np.cumsum(left_out)[:count]]
    classes = rng.choice(_EMPTY_CLASSES, count)
    for event in scene.events:
        classes[event.start : event.start + event.groups] = _TRAINED_PAIRS.index((event.colour, event.shape))

    questions = _questions(scene, times, rng)
    is_blind = rng.random() < 0.5 and any(q.kind == "count" for q in questions)
    if is_blind:
        questions.sort(key=lambda q: q.kind != "count")
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

    ends = np.flatnonzero(is_visual & (row.visual % visual_tokens == visual_tokens - 1)) + 1
    hidden, blind = np.zeros((2, length), bool)
    hidden[: ends[-1] - visual_tokens] = is_visual[: ends[-1] - visual_tokens]
    if is_blind:
        later = np.flatnonzero(row.ids == opening)
        blind[ends[-1] : min([used, *later[later > begins[0]].tolist()])] = True
    counts = np.full((length, len(COUNT_CLASSES)), NO_TARGET, np.int8)
    begins_in = np.bincount([e.start for e in scene.events], minlength=count)
    targets = np.stack([begins_in, np.cumsum(begins_in)], axis=1)
    for target, (end, next_end) in zip(targets, itertools.pairwise(ends.tolist()), strict=False):
        counts[end : next_end - visual_tokens] = target

    positions, weights = np.arange(length, dtype=np.int32), np.zeros(length, np.float32)
    for end, groups_left_out in zip(ends.tolist(), left_out[1:].tolist(), strict=True):
        positions[end:] += groups_left_out * (_TIME_TOKENS + visual_tokens)
    empty = np.repeat(np.isin(classes, _EMPTY_CLASSES)[1:], np.diff(ends))
    weights[ends[0] : ends[-1]][empty] = np.log(represented / count)
    ids, visual, labels = (
        np.pad(x, (0, length - used), constant_values=fill)
        for x, fill in ((row.ids, 0), (row.visual, -1), (row.labels, IGNORE))
    )
    groups = np.zeros(phase.groups, np.int32)
    groups[:count] = classes * groups_per_class + rng.integers(0, groups_per_class, count)
    return Rows(groups, ids, visual, labels, positions, weights, hidden, blind, early, late, counts)


def compose_batch(
    phase: Phase, tokenizer: PromptTokenizer, visual_tokens: int, groups_per_class: int, step: int
) -> Rows[np.ndarray]:
    """The rows of a step of the training."""
    first = phase.seed * 10_000_000 + step * phase.batch
    rows = [compose(first + i, phase, tokenizer, visual_tokens, groups_per_class) for i in range(phase.batch)]
    return Rows(*map(np.stack, zip(*rows, strict=True)))


def _left_out(groups: int, rng: np.random.Generator) -> np.ndarray:
    """How many groups of a longer video are left out before each group of a row and behind the last: int [groups + 1]."""
    left_out = np.zeros(groups + 1, int)
    if groups < MAX_REPRESENTED_GROUPS:
        missing = groups * (float(np.exp(rng.uniform(0, np.log(MAX_REPRESENTED_GROUPS / groups)))) - 1)
        places = 1 + rng.choice(groups, int(rng.integers(1, 4)))
        unit = _ROUND_GROUPS if missing >= len(places) * _ROUND_GROUPS and rng.random() < 0.7 else 1
        shares = rng.dirichlet(np.ones(len(places)))
        np.add.at(left_out, places, (shares * missing / unit).astype(int) * unit)
    return left_out


def _questions(scene: Scene, times: Sequence[float], rng: np.random.Generator) -> list[Question]:
    """A question about each shape that allows one; in nine of ten cases the number of shapes, at any place; and in
    three of four the order of two shapes, at the end because it names shapes that other questions ask for."""
    kinds, weights = list(_KIND_WEIGHTS), np.array(list(_KIND_WEIGHTS.values()))
    questions: list[Question | None] = []
    for i in rng.permutation(len(scene.events)):
        order = rng.choice(len(kinds), len(kinds), replace=False, p=weights / weights.sum())
        candidates = (ask(scene, kinds[k], times, rng, event=scene.events[int(i)]) for k in order)
        questions.append(next((q for q in candidates if q is not None), None))
    if rng.random() < 0.9:
        questions.insert(int(rng.integers(len(questions) + 1)), ask(scene, "count", times, rng))
    if rng.random() < 0.75:
        questions.append(ask(scene, "first", times, rng))
    return [q for q in questions if q is not None]
