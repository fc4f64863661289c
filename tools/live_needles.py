"""Needles in a live stream: accuracy by the age of what is asked about, for several budgets of memory.

python tools/live_needles.py --streams 4 --json needles.jsonl --plot needles.png

A synthetic stream of one frame a second shows one shape for 4 seconds at each age (minutes before its end, give or take 20
seconds), and nothing else but a moving texture. No two shapes have the same colour. Every frame is drawn, none is repeated.
The model watches the stream in order and as fast as it can, once for each budget, with the newest 10 minutes dense. At the
end each shape is asked about by content (which shape was red) and by time (what was there at 300 seconds, and when it was
there), in the words of training.

Each stream adds a line for each budget to the JSON file as soon as it ends. A run that is started again with the same file
and settings goes on with the streams that are missing; with --streams 0 it only prints the table and draws the picture.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

import xl2jax
from xl2jax.bench.setup import machine
from xl2jax.checkpoint.params import stored_config
from xl2jax.checkpoint.sources import find_checkpoint
from xl2jax.commands.flags import DEFAULT_CHECKPOINT, choices, require_checkpoint, whole_numbers
from xl2jax.config import FRAMES_PER_GROUP
from xl2jax.errors import UserError
from xl2jax.evaluation.needle import FAMILIES
from xl2jax.evaluation.questions import NEEDLE_KINDS, Question, ask
from xl2jax.evaluation.scenes import COLOURS, SHAPES, Event, Scene
from xl2jax.inference.live import LiveVideo
from xl2jax.inference.live_sizes import LiveMemory
from xl2jax.system.atomic import check_file_target
from xl2jax.system.backend import start_backend
from xl2jax.system.figures import new_figure, save_figure
from xl2jax.system.json_lines import finished_lines, resumed_rows
from xl2jax.system.process_pool import in_processes
from xl2jax.system.tables import print_table
from xl2jax.system.terminal import flag_errors, run_command
from xl2jax.video.read_ahead import resize

BUDGETS = {
    "10": "10 minutes",
    "60": "1 hour",
    "all": "everything",
    "pooled": "everything, older than 10 minutes pooled only",
}
FAMILY_NAMES = {"by_content": "by content", "by_time": "by time"}
BLOCK = 960
"""Frames that are drawn together."""
JITTER = 5
"""Groups by which a shape is shown earlier or later than its age says."""


@dataclasses.dataclass(frozen=True)
class Args:
    """Accuracy of a live video by age."""

    ages: str = "1,4,8,20,50,120,300,600"
    """Minutes before the question at which shapes are shown, at most 8."""
    budgets: str = "10,60,all,pooled"
    """What is remembered: 10 or 60 minutes, all, or pooled, which is all without the dense KV of old parts."""
    streams: int = 4
    """Streams, each with other shapes in other places."""
    seed: int = 0
    dense_minutes: float = 10.0
    host_gib: float = 8.0
    """Host memory for the dense KV of older parts."""
    checkpoint: str = str(DEFAULT_CHECKPOINT)
    limit_s: float | None = None
    """Begins no stream that would not end by then, to judge by the one before it; the first one always runs."""
    processes: int = os.cpu_count() or 1
    """Processes that draw frames."""
    json: Path | None = None
    """File of JSON lines, to which results are added."""
    plot: Path | None = None
    """PNG of accuracy by age."""


def make_stream(seed: int, ages: Sequence[int]) -> Scene:
    """A scene with a needle at each age, of other colours each and of other shapes as far as there are any."""
    rng = np.random.default_rng([seed, 6])
    groups = (max(ages) + 2) * 60 // FRAMES_PER_GROUP
    colours = rng.permutation(list(COLOURS))[: len(ages)].tolist()
    shapes = np.concatenate([rng.permutation(SHAPES) for _ in range(2)])[: len(ages)].tolist()
    events = []
    for number in rng.permutation(len(ages)).tolist():
        place = groups - 1 - ages[number] * 60 // FRAMES_PER_GROUP + int(rng.integers(-JITTER, JITTER + 1))
        x, y = rng.uniform(0.35, 0.65, 2).tolist()
        radius = float(rng.uniform(0.17, 0.26))
        events.append(Event(place, 1, colours[number], shapes[number], x, y, radius, 0.0, 0.0))
    return Scene(2 * seed + 1, groups, tuple(sorted(events, key=lambda e: -e.start)))


def draw(size: int, part: tuple[Scene, int]) -> np.ndarray:
    """uint8 [n, size, size, 3]: up to `BLOCK` frames of a scene."""
    scene, first = part
    frames = range(first, min(first + BLOCK, scene.frames))
    return np.stack([resize(scene.frame(i, 112, 112), size) for i in frames])


def memory_of(budget: str, args: Args, minutes: int) -> LiveMemory:
    remembered = float(budget) if budget.isdigit() else minutes
    host = 0.0 if budget == "pooled" else args.host_gib
    return LiveMemory(min(args.dense_minutes, remembered), remembered, host)


def watch(lives: Sequence[LiveVideo], drawn: Iterator[np.ndarray], total: int) -> list[list[list[float]]]:
    """Feeds the frames of a stream. Returns, for each video, [minute, MiB on the device, MiB in host memory] by the hour."""
    held: list[list[list[float]]] = [[] for _ in lives]
    at = 0
    while at < total:
        block = next(drawn)
        for live, rows in zip(lives, held, strict=True):
            for i, frame in enumerate(block, at):
                live.add(float(i), frame)
            if (at + len(block)) // 3600 > at // 3600 or at + len(block) == total:
                sizes = (live.device_bytes, live.host_bytes)
                rows.append([(at + len(block)) / 60, *(round(x / 2**20, 1) for x in sizes)])
        at += len(block)
    for live in lives:
        live.end()
    return held


def answered(model: xl2jax.Model, live: LiveVideo, question: Question, age: int) -> dict[str, Any]:
    """One question: whether the answer is right, and how the chunk that holds it was read."""
    answer = model.ask(live, question.text, max_new_tokens=16)
    assert question.group is not None
    when = question.group * FRAMES_PER_GROUP
    read = next((("dense" if c.dense else "pooled") for c in answer.chunks if c.start <= when <= c.end), "forgotten")
    return {"age": age, "kind": question.kind, "correct": answer.text.strip() == question.answer, "read": read}


def questions_of(scene: Scene, ages: Sequence[int]) -> list[tuple[int, Question]]:
    rng, times = np.random.default_rng([scene.seed, 7]), scene.times()
    asked = [
        (age, ask(scene, kind, times, rng, event=event))
        for age, event in zip(sorted(ages), scene.events, strict=True)
        for kind in NEEDLE_KINDS
    ]
    return [(age, question) for age, question in asked if question is not None]


def run(args: Args, ages: list[int], budgets: list[str], rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The results of the streams that `rows` lack."""
    done = {(row["stream"], row["budget"]) for row in rows}
    missing = {s: [b for b in budgets if (s, b) not in done] for s in range(args.streams)}
    missing = {s: left for s, left in missing.items() if left}
    if not missing:
        return
    started, longest = time.perf_counter(), 0.0
    model = xl2jax.load(args.checkpoint)
    scenes = {s: make_stream(args.seed + s, ages) for s in missing}
    parts = ((scene, first) for scene in scenes.values() for first in range(0, scene.frames, BLOCK))
    size = model.config.vision.image_size
    with contextlib.closing(in_processes(args.processes, functools.partial(draw, size), parts)) as drawn:
        for stream, left in missing.items():
            begin = time.perf_counter()
            if args.limit_s is not None and longest and begin - started + longest > args.limit_s:
                print(f"no time for stream {stream}: the limit of {args.limit_s:g} s", file=sys.stderr)
                return
            scene = scenes[stream]
            with contextlib.ExitStack() as opened:
                minutes = math.ceil(scene.frames / 60)
                lives = [
                    opened.enter_context(model.watch_live(memory=memory_of(budget, args, minutes))) for budget in left
                ]
                held = watch(lives, drawn, scene.frames)
                watched = time.perf_counter() - begin
                print(f"stream {stream}: watched {len(left)} times in {watched:.0f} s", file=sys.stderr)
                for budget, live, sizes in zip(left, lives, held, strict=True):
                    asking = time.perf_counter()
                    answers = [answered(model, live, question, age) for age, question in questions_of(scene, ages)]
                    asked = time.perf_counter() - asking
                    right = sum(a["correct"] for a in answers)
                    print(f"  {budget}: {right} of {len(answers)} right, in {asked:.0f} s", file=sys.stderr, flush=True)
                    yield {
                        "stream": stream, "budget": budget, "held": sizes, "answers": answers,
                        "watch_s": round(watched, 1), "ask_s": round(asked, 1),
                    }  # fmt: skip
            longest = max(longest, time.perf_counter() - begin)


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each budget and family: MiB at the end, and by age the share of right answers and of chunks read densely."""
    table = []
    for budget in [b for b in BUDGETS if any(row["budget"] == b for row in rows)]:
        mine = [row for row in rows if row["budget"] == budget]
        for family, name in FAMILY_NAMES.items():
            cells = defaultdict[int, list[dict[str, Any]]](list)
            for answer in (a for row in mine for a in row["answers"] if a["kind"] in FAMILIES[family]):
                cells[answer["age"]].append(answer)
            table.append(
                {
                    "budget": budget,
                    "family": name,
                    "device_mib": max(size[1] for row in mine for size in row["held"]),
                    "host_mib": max(size[2] for row in mine for size in row["held"]),
                    "cells": {
                        age: {
                            "right": sum(a["correct"] for a in cell) / len(cell),
                            "dense": sum(a["read"] == "dense" for a in cell) / len(cell),
                            "forgotten": all(a["read"] == "forgotten" for a in cell),
                            "count": len(cell),
                        }
                        for age, cell in sorted(cells.items())
                    },
                }
            )
    return table


def print_summary(rows: Sequence[dict[str, Any]]) -> None:
    """Cells: right answers, and in brackets how often the chunk was read densely."""

    def text(cell: dict[str, Any]) -> str:
        read = "forgotten" if cell["forgotten"] else f"{100 * cell['dense']:.0f} %"
        return f"{100 * cell['right']:.0f} % ({read})"

    table = [
        {
            "remembered": BUDGETS[row["budget"]],
            "questions": row["family"],
            "device MiB": round(row["device_mib"]),
            "host MiB": round(row["host_mib"]),
        }
        | {f"{age} min": text(cell) for age, cell in row["cells"].items()}
        for row in summary(rows)
    ]
    print_table(table, decimals=1)
    counts = sorted({cell["count"] for row in summary(rows) for cell in row["cells"].values()})
    print(f"{len({row['stream'] for row in rows})} streams, {counts[0]} to {counts[-1]} questions a cell")


def plot(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Accuracy by age, a line for each budget; hollow where all of the answers were forgotten."""
    figure = new_figure(9.5, 3.6)
    axes = figure.subplots(1, len(FAMILY_NAMES), sharey=True)
    styles = dict(zip(BUDGETS, (("#d97706", "o"), ("#0f766e", "s"), ("#2b6cb0", "D"), ("#9d4edd", "^")), strict=True))
    for axis, family in zip(axes, FAMILY_NAMES.values(), strict=True):
        for row in (r for r in summary(rows) if r["family"] == family):
            colour, mark = styles[row["budget"]]
            ages = list(row["cells"])
            shares = [100 * cell["right"] for cell in row["cells"].values()]
            label = f"{BUDGETS[row['budget']]} ({row['device_mib']:.0f} + {row['host_mib']:.0f} MiB)"
            axis.plot(ages, shares, color=colour, linewidth=1.5, label=label)
            for age, share, cell in zip(ages, shares, row["cells"].values(), strict=True):
                fill = "white" if cell["forgotten"] else colour
                axis.plot([age], [share], mark, color=colour, markerfacecolor=fill, markersize=5)
        axis.set_xscale("log")
        ages = sorted({age for r in summary(rows) for age in r["cells"]})
        axis.set_xticks(ages, [f"{a} min" if a < 60 else f"{a / 60:g} h" for a in ages], fontsize=8)
        axis.minorticks_off()
        axis.set_ylim(-4, 104)
        axis.grid(alpha=0.3)
        axis.set_title(f"questions {family}", fontsize=10)
        axis.set_xlabel("age of what is asked about", fontsize=9)
    axes[0].set_ylabel("right answers, %", fontsize=9)
    axes[1].legend(fontsize=7, title="remembered (device + host memory)", title_fontsize=7)
    save_figure(figure, path)


def main() -> None:
    with flag_errors():
        args = tyro.cli(Args, prog="python tools/live_needles.py")
    ages, budgets = whole_numbers("--ages", args.ages), choices("--budgets", args.budgets, tuple(BUDGETS))
    if not len(set(ages)) == len(ages) <= len(COLOURS):
        raise UserError(f"--ages: up to {len(COLOURS)} different ones, not {args.ages}")
    for name, least in (("streams", 0), ("seed", 0), ("processes", 1)):
        if (number := getattr(args, name)) < least:
            raise UserError(f"--{name} must be {least} or more, not {number}")
    for budget in budgets:
        memory_of(budget, args, max(ages))
    if args.plot is not None:
        check_file_target(args.plot)
    if not args.streams:
        header, *rows = [{}] if args.json is None else [*finished_lines(args.json, dict, repair=False), {}]
        report(args, header, [row for row in rows if "stream" in row])
        return
    require_checkpoint(args.checkpoint)
    stored_config(find_checkpoint(args.checkpoint))
    start_backend()
    settings = {"ages": ages, "seed": args.seed, "dense_minutes": args.dense_minutes, "host_gib": args.host_gib}
    settings |= {"checkpoint": Path(args.checkpoint).name, "machine": machine()}
    with contextlib.ExitStack() as opened:
        rows = []
        add = rows.append
        if args.json is not None:
            rows, add = opened.enter_context(resumed_rows(args.json, settings))
        for row in run(args, ages, budgets, rows):
            add(row)
    report(args, settings, rows)


def report(args: Args, header: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    if not rows:
        raise UserError("there are no results: give --streams")
    print(header["machine"])
    print_summary(rows)
    if args.plot is not None:
        plot(args.plot, rows)


if __name__ == "__main__":
    run_command(main)
