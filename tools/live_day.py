"""A day of live video, accelerated: memory by the hour, and what is compiled.

python tools/live_day.py --hours 24

Feeds frames of a synthetic scene, one a second of the video, as fast as the bundled model takes them, and asks a question
every hour. Prints a row an hour: frames a second, bytes on the device and in the host's store, those of the process before
the question and at most within the hour (a question has a cache of its own while it is answered), programs compiled so far,
and the time to the first token.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator

import tyro

import xl2jax
from xl2jax.commands.flags import DEFAULT_CHECKPOINT, require_checkpoint
from xl2jax.errors import UserError
from xl2jax.evaluation.scenes import make_scene
from xl2jax.inference.live_sizes import LiveMemory
from xl2jax.inference.memory import used_bytes
from xl2jax.system.backend import program_count
from xl2jax.system.terminal import flag_errors, run_command


@dataclasses.dataclass(frozen=True)
class Args:
    """Memory of a live video by the hour."""

    hours: int = 24
    dense_minutes: float = 10.0
    minutes: float = 60.0
    host_gib: float = 2.0
    checkpoint: str = str(DEFAULT_CHECKPOINT)


class Most:
    """The most bytes that the process had since the last `take`, looked at every 50 ms."""

    bytes = 0

    def take(self) -> int:
        most, self.bytes = max(self.bytes, used_bytes()), 0
        return most


@contextlib.contextmanager
def most_bytes() -> Iterator[Most]:
    most, over = Most(), threading.Event()

    def look() -> None:
        while not over.wait(0.05):
            most.bytes = max(most.bytes, used_bytes())

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield most
    finally:
        over.set()
        looking.join()


def main() -> None:
    with flag_errors():
        args = tyro.cli(Args, prog="python tools/live_day.py")
    if args.hours < 1:
        raise UserError(f"--hours must be 1 or more, not {args.hours}")
    memory = LiveMemory(args.dense_minutes, args.minutes, args.host_gib)
    require_checkpoint(args.checkpoint)
    with most_bytes() as most:
        run(args, memory, most)


def run(args: Args, memory: LiveMemory, most: Most) -> None:
    programs = program_count()
    model = xl2jax.load(args.checkpoint)
    scene = make_scene(1, 64)
    images = [scene.frame(i, 112, 112) for i in range(scene.frames)]
    live = model.watch_live(memory=memory)
    print("| hour | frames/s | device MiB | host store MiB | process MiB | at most | programs | first token s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for hour in range(1, args.hours + 1):
        started = time.perf_counter()
        for second in range(3600 * (hour - 1), 3600 * hour):
            live.add(float(second), images[second % len(images)])
        live.flush()
        rate, process = 3600 / (time.perf_counter() - started), used_bytes()
        times = model.ask(live, "What colour was the circle?", max_new_tokens=4).timings
        sizes = [x / 2**20 for x in (live.device_bytes, live.host_bytes, process, most.take())]
        first = times["select"] + times["question"]
        cells = [f"{rate:.0f}", *(f"{size:.0f}" for size in sizes), str(programs.requested), f"{first:.2f}"]
        print(f"| {hour} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    run_command(main)
