"""Needles in a live stream: accuracy by the age of what is asked about, for several budgets.

python tools/live_needles.py --ages 1,10,30,60 --minutes 10,60

A synthetic stream of one frame a second shows one shape for 4 seconds at each age (minutes before the question), and
nothing else but a moving texture. All shapes and colours differ. The bundled model watches it in real order, as fast as it
can, with 10 minutes dense on the device. Each shape is asked about by content, and when it was shown.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict

import numpy as np
import tyro

import xl2jax
from xl2jax.commands.flags import DEFAULT_CHECKPOINT, whole_numbers
from xl2jax.config import FRAMES_PER_GROUP
from xl2jax.evaluation.questions import Kind, ask
from xl2jax.evaluation.scenes import COLOURS, SHAPES, Event, Scene
from xl2jax.inference.live_sizes import LiveMemory

KINDS: tuple[Kind, ...] = ("colour_of", "shape_of", "time")


@dataclasses.dataclass(frozen=True)
class Args:
    """Accuracy of a live video by age."""

    ages: str = "1,10,30,60"
    """Minutes before the question at which a shape is shown, at most 5."""
    minutes: str = "10,60"
    """Budgets: minutes that are remembered. The whole stream is the last one."""
    streams: int = 4
    host_gib: float = 4.0
    dense_minutes: float = 10.0
    checkpoint: str = str(DEFAULT_CHECKPOINT)


def make_stream(seed: int, groups: int, places: list[int]) -> Scene:
    """A scene with a needle in each of the groups `places`, of other colours and shapes each."""
    rng = np.random.default_rng([seed, 6])
    colours, shapes = rng.permutation(list(COLOURS))[: len(places)], rng.permutation(SHAPES)[: len(places)]
    events = []
    for place, colour, shape in zip(places, colours.tolist(), shapes.tolist(), strict=True):
        x, y = rng.uniform(0.35, 0.65, 2).tolist()
        events.append(Event(place, 1, colour, shape, x, y, float(rng.uniform(0.17, 0.26)), 0.0, 0.0))
    return Scene(2 * seed + 1, groups, tuple(events))


def main() -> None:
    args = tyro.cli(Args)
    ages = whole_numbers("--ages", args.ages)
    budgets = whole_numbers("--minutes", args.minutes)
    model = xl2jax.load(args.checkpoint)
    groups = (max(ages) + 2) * 60 // FRAMES_PER_GROUP
    budgets = [*budgets, max(ages) + 2]
    right, asked, dense = (defaultdict[tuple[int, int, str], int](int) for _ in range(3))
    device = dict[int, float]()
    for seed in range(args.streams):
        scene = make_stream(seed, groups, [groups - 1 - age * 60 // FRAMES_PER_GROUP for age in ages])
        rng = np.random.default_rng([seed, 7])
        questions = [
            (age, ask(scene, k, FRAMES_PER_GROUP, rng, event=e))
            for age, e in zip(ages, scene.events, strict=True)
            for k in KINDS
        ]
        for minutes in budgets:
            memory = LiveMemory(min(args.dense_minutes, minutes), minutes, args.host_gib)
            with model.watch_live(memory=memory) as live:
                for i in range(scene.frames):
                    live.add(float(i), scene.frame(i, 112, 112))
                live.end()
                device[minutes] = live.device_bytes / 2**20
                for age, question in questions:
                    assert question is not None
                    answer = model.ask(live, question.text, max_new_tokens=16)
                    family = "time" if question.kind == "time" else "content"
                    key = minutes, age, family
                    asked[key] += 1
                    right[key] += answer.text.strip() == question.answer
                    when = scene.events[ages.index(age)].start * FRAMES_PER_GROUP
                    dense[key] += any(c.dense and c.start <= when <= c.end for c in answer.chunks)
    print(f"| remembered | device MiB | {' | '.join(f'{age} min' for age in ages)} |")
    print(f"| --- | --- |{' --- |' * len(ages)}")
    for minutes in budgets:
        cells = []
        for age in ages:
            shares = [100 * right[minutes, age, f] / asked[minutes, age, f] for f in ("content", "time")]
            found = sum(dense[minutes, age, f] for f in ("content", "time"))
            found = 100 * found / sum(asked[minutes, age, f] for f in ("content", "time"))
            cells.append(f"{shares[0]:.0f} / {shares[1]:.0f} % ({found:.0f} %)")
        print(f"| {minutes} min | {device[minutes]:.0f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
