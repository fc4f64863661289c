"""Data sets of seeded scenes: mp4 files, and train.json in upstream's format with questions and right answers.

python -m xl2jax.recipes.demo.datasets build/data --videos 1000
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from tqdm import tqdm

from xl2jax.config import FRAMES_PER_GROUP
from xl2jax.errors import UserError
from xl2jax.evaluation.questions import TEMPLATES, Kind, ask
from xl2jax.evaluation.scenes import SIZES, make_scene, write_scene
from xl2jax.system.atomic import replacing_file
from xl2jax.system.process_pool import in_processes
from xl2jax.system.terminal import flag_errors, run_command
from xl2jax.training.records import IMAGE

MAX_SECONDS = 8192.0
"""Limit on the duration of a training video."""
MAX_GROUPS = 65_536
"""Limit on the groups of a video: 73 hours at one frame a second."""
_FRAME_INTERVALS = (0.25, 0.5, 1.0, 1.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)


def draw_frame_interval(frames: int, rng: np.random.Generator) -> float:
    """Seconds between the frames of a training video."""
    intervals = [x for x in _FRAME_INTERVALS if x * frames <= MAX_SECONDS] or _FRAME_INTERVALS[:1]
    return intervals[int(rng.integers(len(intervals)))]


@dataclasses.dataclass(frozen=True)
class DatasetArgs:
    """Writes mp4 files of one frame a second, and train.json with several conversations about each file."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder for the files. It is made if it does not exist."""
    videos: int = 1000
    groups: tuple[int, ...] = (4, 8)
    """Lengths of videos in groups of 4 frames. Each video gets one of them."""
    records: int = 2
    """Conversations about each video."""
    turns: int = 6
    """Limit on the questions of a conversation, which asks no question twice."""
    kinds: tuple[Kind, ...] = tuple(TEMPLATES)
    """Kinds of question, drawn with equal probability."""
    seed: int = 0
    processes: int = 2
    """Processes that write videos."""

    def __post_init__(self) -> None:
        for name in ("videos", "records", "turns", "processes"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be 1 or more, not {getattr(self, name)}")
        if self.seed < 0:
            raise UserError(f"--seed must be 0 or more, not {self.seed}")
        if not self.groups or not self.kinds:
            raise UserError("--groups and --kinds need one value or more")
        for groups in self.groups:
            if not 1 <= groups <= MAX_GROUPS:
                raise UserError(f"--groups must be from 1 to {MAX_GROUPS}, not {groups}")


def _make_video(args: DatasetArgs, number: int) -> list[dict[str, Any]]:
    """Writes one video unless it exists, and returns its records."""
    seed = 2 * (args.seed * 10_000_000 + number)
    rng = np.random.default_rng([seed, 2])
    scene = make_scene(seed, args.groups[int(rng.integers(len(args.groups)))])
    width, height = SIZES[int(rng.integers(len(SIZES)))]
    name = f"{number:06d}.mp4"
    if not (args.folder / name).exists():
        write_scene(args.folder / name, scene, width=width, height=height)
    records = []
    for part in range(args.records):
        interval = draw_frame_interval(scene.frames, rng)
        turns: list[dict[str, str]] = []
        asked = set()
        for _ in range(2 * args.turns):
            question = ask(scene, args.kinds[int(rng.integers(len(args.kinds)))], FRAMES_PER_GROUP * interval, rng)
            if question is not None and (key := (question.kind, question.answer, question.group)) not in asked:
                asked.add(key)
                prefix = "" if turns else f"{IMAGE}\n"
                turns += [{"from": "human", "value": prefix + question.text}, {"from": "gpt", "value": question.answer}]
            if len(turns) == 2 * args.turns:
                break
        records.append({"id": f"{number}-{part}", "video": name, "scale": interval, "conversations": turns})
    return records


def write_dataset(args: DatasetArgs) -> None:
    """Writes the videos and train.json. Videos that exist already are kept, because the seed determines them.

    Raises UserError if train.json exists or if a file cannot be written.
    """
    target = args.folder / "train.json"
    if target.exists():
        raise UserError(f"{target}: already exists; choose another place or remove it first")
    try:
        args.folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{args.folder}: cannot be made ({e.strerror})") from None
    try:
        make = functools.partial(_make_video, args)
        parts = in_processes(min(args.processes, args.videos), make, range(args.videos))
        records = [r for part in tqdm(parts, "write videos", args.videos, file=sys.stderr) for r in part]
        with replacing_file(target) as unfinished:
            unfinished.write_text(json.dumps(records) + "\n")
    except BaseException:
        with contextlib.suppress(OSError):
            args.folder.rmdir()  # only an empty folder is removed
        raise


def main() -> None:
    with flag_errors():
        args = tyro.cli(DatasetArgs, prog="python -m xl2jax.recipes.demo.datasets")
    write_dataset(args)


if __name__ == "__main__":
    run_command(main)
