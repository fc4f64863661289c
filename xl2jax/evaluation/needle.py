"""Needle retrieval in a video: does the answer survive chunked prefill and bi-level decoding?

Every case is a scene of `xl2jax.evaluation.scenes` with an odd seed, which no training scene has. One shape, the needle,
is shown for one group at a given depth, and other shapes are shown elsewhere. Only this group answers the questions:
what colour the circle was or which shape was red (by content), which colour or shape was there at its time, and when it
was there (by time). Other kinds of question need the whole video.

Each case is asked after dense prefill (every token sees all tokens before it), after chunked prefill, and with bi-level
decoding that keeps the best N chunks dense (`topN`) or, as the control, N chunks chosen at random (`randomN`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from xl2jax.arithmetic import ceil_div
from xl2jax.config import FRAMES_PER_GROUP
from xl2jax.errors import UserError
from xl2jax.evaluation.questions import NEEDLE_KINDS, TEMPLATES, Kind, Question, ask
from xl2jax.evaluation.scenes import Scene, draw_scene, make_scene, scene_clip
from xl2jax.inference.answering import Answer
from xl2jax.inference.api import Model
from xl2jax.inference.bilevel import BilevelConfig
from xl2jax.inference.copies import share
from xl2jax.inference.layout import PrefillConfig
from xl2jax.inference.relevance import AttentionScorer
from xl2jax.inference.selection import RelevanceConfig
from xl2jax.inference.video_cache import CacheConfig, WatchedVideo
from xl2jax.system.process_pool import in_processes

FAMILIES: Mapping[str, tuple[Kind, ...]] = {
    "by_content": ("colour_of", "shape_of"), "by_time": ("colour", "shape", "time"), "whole": ("exists", "count", "first"),
}  # fmt: skip
"""Families of questions that tables and figures report separately."""
KINDS: tuple[Kind, ...] = tuple(kind for kinds in FAMILIES.values() for kind in kinds)


@dataclasses.dataclass(frozen=True)
class NeedleConfig:
    """The cases, and how the model reads them."""

    frames: tuple[int, ...] = (64, 256, 1024)
    """Lengths of the videos."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Positions of the needle, as shares of the video."""
    cases: int = 6
    """Videos of each length and depth. Each is asked one question of every kind."""
    modes: tuple[Mode, ...] = ()
    others: tuple[int, int] = (5, 5)
    """The fewest and the most other shapes in a video. Cases take the numbers in turn."""
    kinds: tuple[Kind, ...] = NEEDLE_KINDS
    """Kinds of question."""
    frame_seconds: float = 1.0
    """Time from one frame to the next."""
    seed: int = 0
    held_out_template: bool = False
    """Whether questions use a wording that was never used in training."""
    prefill: PrefillConfig = PrefillConfig()  # noqa: RUF009 (frozen)
    bilevel: BilevelConfig = BilevelConfig()  # noqa: RUF009 (frozen)
    cache: CacheConfig = CacheConfig()  # noqa: RUF009 (frozen)
    scorer: AttentionScorer = AttentionScorer()  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        if any(f < FRAMES_PER_GROUP or f % FRAMES_PER_GROUP for f in self.frames):
            raise UserError(f"--frames: multiples of {FRAMES_PER_GROUP}, not {','.join(map(str, self.frames))}")
        for name, values in (("frames", self.frames), ("depths", self.depths), ("modes", [m.name for m in self.modes])):
            if len(set(values)) < len(values):
                raise UserError(f"--{name}: {','.join(map(str, values))} names one more than once")
        if self.cases < 1:
            raise UserError("--cases must be 1 or more")
        if not 0.1 <= self.frame_seconds <= 60:
            raise UserError(f"--frame-seconds must be from 0.1 to 60, not {self.frame_seconds}")
        if not 0 <= self.others[0] <= self.others[1]:
            raise UserError(f"--others: a number, or the fewest and the most such as 0-8, not {self.others}")
        if self.seed < 0:
            raise UserError(f"--seed must be 0 or more, not {self.seed}")


@dataclasses.dataclass(frozen=True)
class Mode:
    """One way of reading: dense, chunked, top (the best `chunks` stay dense) or random (`chunks` at random do)."""

    name: str
    kind: str
    chunks: int


@dataclasses.dataclass(frozen=True)
class Case:
    """One video and its questions, at most one of each kind."""

    frames: int
    depth: float
    scene: Scene
    questions: tuple[Question, ...]


@dataclasses.dataclass(frozen=True)
class Result:
    frames: int
    depth: float
    mode: str
    kind: str
    correct: bool
    selected: bool | None
    """Whether the chunk that holds the answer stayed dense. None where it always does (the first chunk, the last one,
    dense reading), and where no single chunk holds the answer."""


def parse_modes(text: str) -> tuple[Mode, ...]:
    """Parses comma-separated modes: dense, chunked, topN or randomN. Raises UserError."""
    modes = []
    for name in text.split(","):
        kind = name.rstrip("0123456789")
        count = name.removeprefix(kind)
        if kind not in ("dense", "chunked", "top", "random") or (kind in ("top", "random")) != bool(count):
            raise UserError(f"--modes: dense, chunked, topN or randomN, not {name!r}")
        modes.append(Mode(name, kind, int(count or 0)))
    return tuple(modes)


def make_cases(config: NeedleConfig) -> Iterator[Case]:
    """The cases in order of length."""
    for length in config.frames:
        groups = length // FRAMES_PER_GROUP
        for depth in config.depths:
            for number in range(config.cases):
                place = (config.seed * 1000 + round(depth * 100)) * 1000 + number
                scene_seed = 2 * (place * 10_000 + groups) + 1
                needle_at = round(depth * (groups - 1))
                fewest, most = config.others
                others = fewest + number % (most - fewest + 1)
                scene = make_scene(scene_seed, groups, events=others + 1, needle_at=needle_at)
                times = scene.times(FRAMES_PER_GROUP * config.frame_seconds)
                rng = np.random.default_rng([scene_seed, 3])
                questions = []
                for kind in config.kinds:
                    template = len(TEMPLATES[kind]) - 1 if config.held_out_template else None
                    question = ask(scene, kind, times, rng, template=template, event=scene.events[0])
                    if question is not None:  # some scenes do not allow every kind
                        questions.append(question)
                yield Case(length, depth, scene, tuple(questions))


def run_case(model: Model, case: Case, config: NeedleConfig, drawn: np.ndarray | None = None) -> Iterator[Result]:
    """Watches a video once for each kind of prefill, and asks its questions in every mode.

    `drawn` is the result of `draw_scene`, if the frames were drawn before.
    """
    watched: dict[bool, WatchedVideo] = {}
    size = config.bilevel.select_chunk_groups
    for mode in config.modes:
        dense = mode.kind == "dense"
        if dense not in watched:
            prefill = dataclasses.replace(config.prefill, window_chunks=None) if dense else config.prefill
            clip = scene_clip(case.scene, FRAMES_PER_GROUP * config.frame_seconds, drawn)
            watched[dense] = model.watch(clip, None, prefill, cache=config.cache)
        bilevel, relevance = None, None
        if mode.kind in ("top", "random"):
            blocks = ceil_div(case.scene.groups, size)
            bilevel = dataclasses.replace(config.bilevel, top_chunks=min(mode.chunks, blocks))
            relevance = RelevanceConfig("random" if mode.kind == "random" else "attention", config.scorer)
        for question in case.questions:
            answer = model.ask(watched[dense], question.text, max_new_tokens=16, bilevel=bilevel, relevance=relevance)
            yield Result(
                frames=case.frames,
                depth=case.depth,
                mode=mode.name,
                kind=question.kind,
                correct=answer.text.strip() == question.answer,
                selected=_selected(answer, question, size),
            )


def _selected(answer: Answer, question: Question, select_chunk_groups: int) -> bool | None:
    if question.group is None:
        return None
    block = question.group // select_chunk_groups
    return answer.chunks[block].dense if 0 < block < len(answer.chunks) - 1 else None


def summary(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Accuracy by mode and length, and how often the answer's chunk was selected (recall)."""
    rows = []
    for mode in dict.fromkeys(r.mode for r in results):
        for frames in dict.fromkeys(r.frames for r in results):
            matching = [r for r in results if (r.mode, r.frames) == (mode, frames)]
            row: dict[str, Any] = {"mode": mode, "frames": frames, "cases": len(matching)}
            row |= {"accuracy": _accuracy(matching), "recall": _recall(matching)}
            for family, kinds in FAMILIES.items():
                if part := [r for r in matching if r.kind in kinds]:
                    row |= {family: _accuracy(part), f"{family}_recall": _recall(part)}
            asked = [k for k in KINDS if any(r.kind == k for r in matching)]
            rows.append(row | {k: _accuracy([r for r in matching if r.kind == k]) for k in asked})
    return rows


def _accuracy(results: Sequence[Result]) -> float:
    return sum(r.correct for r in results) / len(results)


def _recall(results: Sequence[Result]) -> float | None:
    picked = [r.selected for r in results if r.selected is not None]
    return sum(picked) / len(picked) if picked else None


def needle(config: NeedleConfig, models: Sequence[Model], processes: int = 0) -> list[Result]:
    """Runs all cases, which copies of a model share, with a progress bar on stderr.

    With `processes` the frames are drawn in that many processes, ahead of the model: drawing 10,000 frames takes longer
    than reading them.
    """
    cases = list(make_cases(config))
    for length, kind in itertools.product(config.frames, config.kinds):
        if not any(q.kind == kind for c in cases if c.frames == length for q in c.questions):
            raise UserError(f"--kinds {kind}: no such question about {length} frames with so many other shapes")
    draw = functools.partial(draw_scene, models[0].config.vision.image_size)
    scenes = (case.scene for case in cases)
    with contextlib.ExitStack() as stack:
        drawn: Iterator[np.ndarray | None] = itertools.repeat(None)
        if processes:
            drawn = stack.enter_context(contextlib.closing(in_processes(processes, draw, scenes)))
        bar = stack.enter_context(tqdm(total=len(cases), desc="needle", unit="video", file=sys.stderr))

        def run(model: Model, item: tuple[Case, np.ndarray | None]) -> list[Result]:
            results = list(run_case(model, item[0], config, item[1]))
            bar.update()
            return results

        return [result for results in share(models, run, zip(cases, drawn, strict=False)) for result in results]
