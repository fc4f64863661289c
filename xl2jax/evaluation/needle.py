"""Needle in a video: does the answer survive chunked prefill and bi-level decoding?

python -m xl2jax needle --checkpoint DIR --frames 64,256,1024 --depths 0,0.25,0.5,0.75,1 --plot needle.png

Every case is a scene of `xl2jax.recipes.demo.datasets` with an odd seed (never trained on) and a shape that lasts one group at
a given depth, among others elsewhere, and questions that only this group answers: what colour the circle was, which
shape was red (by content), colour and form at its time, and its time (by time). `--kinds` also has some that the whole
video answers.
The same cases are asked of the dense model (every token sees all before it), after chunked prefill, and with
bi-level decoding: the best 1, 2 and 4 chunks, and as many chosen at random (`random`), as the control.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from tqdm import tqdm

import xl2jax
from xl2jax.config import FRAMES_PER_GROUP
from xl2jax.errors import UserError
from xl2jax.evaluation.questions import NEEDLE_KINDS, TEMPLATES, Kind, Question, ask
from xl2jax.evaluation.scenes import Scene, make_scene, scene_clip
from xl2jax.inference.api import Answer, Model
from xl2jax.inference.bilevel import BilevelConfig
from xl2jax.inference.layout import PrefillConfig
from xl2jax.inference.relevance import AttentionScorer
from xl2jax.inference.selection import RelevanceConfig
from xl2jax.inference.video_cache import CacheConfig, WatchedVideo
from xl2jax.system.backend import start_backend
from xl2jax.system.terminal import run_command

FAMILIES: Mapping[str, tuple[Kind, ...]] = {
    "by_content": ("colour_of", "shape_of"), "by_time": ("colour", "shape", "time"), "whole": ("exists", "count", "first"),
}  # fmt: skip
"""Kinds of question that are told apart in tables and pictures: what was it, when was it, about the whole video."""
_KINDS = tuple(kind for kinds in FAMILIES.values() for kind in kinds)


@dataclasses.dataclass(frozen=True)
class NeedleArgs:
    """Accuracy by length and depth for dense, chunked and bi-level reading."""

    checkpoint: str
    """Any checkpoint folder or hub id."""
    frames: str = "64,256,1024"
    """Lengths of the videos in frames."""
    depths: str = "0,0.25,0.5,0.75,1"
    """Where the needle is, as shares of the video."""
    cases: int = 6
    """Videos of each length and depth; each is asked all kinds of question."""
    modes: str = "dense,chunked,top1,top2,top4,random2"
    """What to compare: dense, chunked, topN and randomN (N chunks stay dense besides the first and the last)."""
    others: int = 5
    """Other shapes in the video."""
    kinds: str = ",".join(NEEDLE_KINDS)
    """Of questions: by content (colour_of, shape_of), by time (colour, shape), for a time (time), and, about the whole
    video, exists, count, first."""
    seed: int = 0
    chunk_groups: int = 4
    window_chunks: int = 3
    select_chunk_groups: int = 4
    pool: int = 4
    relevance: Literal["attention", "similarity"] = "attention"
    relevance_layers: tuple[float, float] = (AttentionScorer.first_layer, AttentionScorer.last_layer)
    relevance_heads: Literal["squared", "mean", "max"] = AttentionScorer.heads
    relevance_keys: Literal["auto", "dense", "pooled"] = AttentionScorer.keys
    cache_dtype: Literal["int8"] | None = None
    """Of the video's KV; the model's by default."""
    held_out_template: bool = False
    """Asks in words that were never put together like this in training."""
    dtype: Literal["bfloat16", "float32"] | None = None
    json: bool = False
    plot: Path | None = None
    """PNG of accuracy by length and depth."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One video and its questions, at most one of a kind."""

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
    """Whether the answer's chunk stayed dense; None where it always does (the first, the last, dense reading), and
    where there is none (how many, what was not there)."""


def numbers(flag: str, text: str, low: float, high: float) -> list[float]:
    """Comma-separated numbers within [low, high]. Raises UserError."""
    try:
        out = [float(x) for x in text.split(",")]
    except ValueError:
        out = []
    if not out or not all(low <= x <= high for x in out):
        raise UserError(f"{flag}: numbers from {low:g} to {high:g} separated by commas, not {text!r}")
    return out


def parse_modes(text: str) -> dict[str, tuple[str, int]]:
    """Mode name -> (dense | chunked | top | random, chunks). Raises UserError."""
    out = {}
    for name in text.split(","):
        kind = name.rstrip("0123456789")
        count = name.removeprefix(kind)
        if kind not in ("dense", "chunked", "top", "random") or (kind in ("top", "random")) != bool(count):
            raise UserError(f"--modes: dense, chunked, topN or randomN, not {name!r}")
        out[name] = (kind, int(count or 0))
    return out


def parse_kinds(text: str) -> list[Kind]:
    """Raises UserError."""
    kinds = [k for k in _KINDS if k in text.split(",")]
    if not kinds or len(kinds) != len(text.split(",")):
        raise UserError(f"--kinds: some of {', '.join(_KINDS)}, not {text!r}")
    return kinds


def make_cases(
    frames: Sequence[int],
    depths: Sequence[float],
    cases: int,
    others: int,
    seed: int,
    *,
    kinds: Sequence[Kind] = NEEDLE_KINDS,
    held_out_template: bool = False,
) -> Iterator[Case]:
    """The cases in order of length."""
    for length in frames:
        groups = length // FRAMES_PER_GROUP
        for depth in depths:
            for number in range(cases):
                scene_seed = 2 * (((seed * 1000 + round(depth * 100)) * 1000 + number) * 10_000 + groups) + 1
                needle_at = round(depth * (groups - 1))
                scene = make_scene(scene_seed, groups, events=others + 1, needle_at=needle_at)
                rng = np.random.default_rng([scene_seed, 3])
                questions = []
                for kind in kinds:
                    template = len(TEMPLATES[kind]) - 1 if held_out_template else None
                    question = ask(scene, kind, FRAMES_PER_GROUP, rng, template=template, event=scene.events[0])
                    if question is not None:  # a scene with one shape has no first
                        questions.append(question)
                yield Case(length, depth, scene, tuple(questions))


def _scorer(args: NeedleArgs) -> AttentionScorer:
    return AttentionScorer(*args.relevance_layers, args.relevance_heads, args.relevance_keys)


def run_case(model: Model, case: Case, modes: dict[str, tuple[str, int]], args: NeedleArgs) -> Iterator[Result]:
    """One video watched once per kind of prefill, and asked in every mode."""
    watched: dict[bool, WatchedVideo] = {}
    for mode, (kind, top) in modes.items():
        dense = kind == "dense"
        if dense not in watched:
            prefill = PrefillConfig(args.chunk_groups, None if dense else args.window_chunks)
            watched[dense] = model.watch(scene_clip(case.scene), None, prefill, cache=CacheConfig(args.cache_dtype))
        bilevel, relevance = None, None
        if kind in ("top", "random"):
            blocks = -(-case.scene.groups // args.select_chunk_groups)
            bilevel = BilevelConfig(args.select_chunk_groups, args.pool, min(top, blocks))
            relevance = RelevanceConfig("random" if kind == "random" else args.relevance, _scorer(args))
        for question in case.questions:
            answer = model.ask(watched[dense], question.text, max_new_tokens=16, bilevel=bilevel, relevance=relevance)
            yield Result(
                case.frames, case.depth, mode, question.kind, answer.text.strip() == question.answer,
                _selected(answer, question, args.select_chunk_groups),
            )  # fmt: skip


def _selected(answer: Answer, question: Question, select_chunk_groups: int) -> bool | None:
    if question.group is None:
        return None
    block = question.group // select_chunk_groups
    return answer.chunks[block].dense if 0 < block < len(answer.chunks) - 1 else None


def summary(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Accuracy by mode and length; recall where chunks were selected."""
    rows = []
    for mode in dict.fromkeys(r.mode for r in results):
        for frames in dict.fromkeys(r.frames for r in results):
            own = [r for r in results if (r.mode, r.frames) == (mode, frames)]
            row: dict[str, Any] = {"mode": mode, "frames": frames, "cases": len(own)}
            row |= {"accuracy": _accuracy(own), "recall": _recall(own)}
            for family, kinds in FAMILIES.items():
                if part := [r for r in own if r.kind in kinds]:
                    row |= {family: _accuracy(part), f"{family}_recall": _recall(part)}
            asked = [k for k in _KINDS if any(r.kind == k for r in own)]
            rows.append(row | {k: _accuracy([r for r in own if r.kind == k]) for k in asked})
    return rows


def _accuracy(results: Sequence[Result]) -> float:
    return sum(r.correct for r in results) / len(results)


def _recall(results: Sequence[Result]) -> float | None:
    picked = [r.selected for r in results if r.selected is not None]
    return sum(picked) / len(picked) if picked else None


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = [names]
    for row in rows:
        cells = [row.get(n) for n in names]
        text = ["-" if c is None else f"{c:.3f}" if isinstance(c, float) else str(c) for c in cells]
        table.append(text)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for text in table:
        print("  ".join(t.rjust(w) for t, w in zip(text, widths, strict=True)))


def needle(args: NeedleArgs, model: Model) -> list[Result]:
    """All results, with a progress bar."""
    lengths = [int(f) for f in numbers("--frames", args.frames, FRAMES_PER_GROUP, 1e6)]
    if any(f % FRAMES_PER_GROUP for f in lengths):
        raise UserError(f"--frames: multiples of {FRAMES_PER_GROUP}, not {args.frames!r}")
    depths, modes = numbers("--depths", args.depths, 0, 1), parse_modes(args.modes)
    if args.cases < 1 or args.others < 0:
        raise UserError("--cases must be 1 or more, --others 0 or more")
    cases = list(
        make_cases(
            lengths,
            depths,
            args.cases,
            args.others,
            args.seed,
            kinds=parse_kinds(args.kinds),
            held_out_template=args.held_out_template,
        )
    )
    for length, kind in itertools.product(lengths, parse_kinds(args.kinds)):
        if not any(q.kind == kind for c in cases if c.frames == length for q in c.questions):
            raise UserError(f"--kinds {kind}: no such question about {length} frames with {args.others} other shapes")
    bar = tqdm(cases, "needle", unit="video", file=sys.stderr)
    return [result for case in bar for result in run_case(model, case, modes, args)]


def main() -> None:
    args = tyro.cli(NeedleArgs, prog="python -m xl2jax needle")
    numbers("--frames", args.frames, FRAMES_PER_GROUP, 1e6)
    numbers("--depths", args.depths, 0, 1)
    parse_modes(args.modes)
    parse_kinds(args.kinds)
    _scorer(args).check(args.relevance)
    start_backend()
    model = xl2jax.load(args.checkpoint, dtype=args.dtype)
    results = needle(args, model)
    rows = summary(results)
    if args.plot is not None:
        from xl2jax.inference.timeline import plot_needle

        plot_needle(args.plot, results)
    if args.json:
        print(json.dumps({"rows": rows, "cases": [dataclasses.asdict(r) for r in results]}))
    else:
        _print_table(rows)


if __name__ == "__main__":
    run_command(main)
