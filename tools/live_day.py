"""A day of live video, accelerated: memory by the hour, and what is compiled.

python tools/live_day.py --hours 24 --minutes 60 --host-gib 0.25

Feeds frames of a synthetic scene, one a second of the video, as fast as the bundled model takes them, and asks a question
every hour. Prints a row an hour: frames a second, bytes on the device, in the host's store and of the process, programs
compiled so far, and the time to the first token.
"""

from __future__ import annotations

import dataclasses
import time

import tyro

import xl2jax
from xl2jax.commands.flags import DEFAULT_CHECKPOINT
from xl2jax.evaluation.scenes import make_scene
from xl2jax.inference.live_sizes import LiveMemory
from xl2jax.inference.memory import used_bytes
from xl2jax.system.backend import program_count


@dataclasses.dataclass(frozen=True)
class Args:
    """Memory of a live video by the hour."""

    hours: int = 24
    dense_minutes: float = 10.0
    minutes: float = 60.0
    host_gib: float = 0.25
    checkpoint: str = str(DEFAULT_CHECKPOINT)


def main() -> None:
    args = tyro.cli(Args)
    programs = program_count()
    model = xl2jax.load(args.checkpoint)
    scene = make_scene(1, 64)
    images = [scene.frame(i, 112, 112) for i in range(scene.frames)]
    live = model.watch_live(memory=LiveMemory(args.dense_minutes, args.minutes, args.host_gib))
    print("| hour | frames/s | device MiB | host store MiB | process MiB | programs | first token s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for hour in range(1, args.hours + 1):
        started = time.perf_counter()
        for second in range(3600 * (hour - 1), 3600 * hour):
            live.add(float(second), images[second % len(images)])
        live.flush()
        rate = 3600 / (time.perf_counter() - started)
        times = model.ask(live, "What colour was the circle?", max_new_tokens=4).timings
        sizes = [x / 2**20 for x in (live.device_bytes, live.host_bytes, used_bytes())]
        first = times["select"] + times["question"]
        cells = [f"{rate:.0f}", *(f"{size:.0f}" for size in sizes), str(programs.requested), f"{first:.2f}"]
        print(f"| {hour} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
