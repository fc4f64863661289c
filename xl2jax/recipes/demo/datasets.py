"""Data sets of seeded scenes: mp4 and png files, and train.json in upstream's format with questions and right answers.

python -m xl2jax.recipes.demo.datasets build/data --videos 1000 --pictures 1000
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from PIL import Image
from tqdm import tqdm

from xl2jax.config import FRAMES_PER_GROUP
from xl2jax.errors import UserError
from xl2jax.evaluation.questions import (
    PICTURE_KINDS,
    TEMPLATES,
    Kind,
    Question,
    ask,
    ask_about_picture,
    ask_which_picture,
)
from xl2jax.evaluation.scenes import PICTURE_SIZES, SIZES, Scene, make_picture, make_scene, write_scene
from xl2jax.system.atomic import replacing_file
from xl2jax.system.process_pool import in_processes
from xl2jax.system.terminal import flag_errors, run_command
from xl2jax.training.records import IMAGE

MAX_SECONDS = 8192.0
"""Limit on the duration of a training video."""
MAX_GROUPS = 65_536
"""Limit on the groups of a video: 73 hours at one frame a second."""
_FRAME_INTERVALS = (0.25, 0.5, 1.0, 1.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)


def draw_frame_interval(frames: int, rng: np.random.Generator, limit: float = MAX_SECONDS) -> float:
    """Seconds between the frames of a training video of at most `limit` seconds."""
    intervals = [x for x in _FRAME_INTERVALS if x * frames <= limit] or _FRAME_INTERVALS[:1]
    return intervals[int(rng.integers(len(intervals)))]


@dataclasses.dataclass(frozen=True)
class DatasetArgs:
    """Writes mp4 files of one frame a second, pictures, and train.json with several conversations about each file."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder for the files. It is made if it does not exist."""
    videos: int = 1000
    pictures: int = 0
    """Pictures (png). Each has a conversation of its own, and every second one another about it and the one before."""
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
        if min(self.videos, self.pictures) < 0 or self.videos + self.pictures < 1:
            raise UserError(f"--videos and --pictures need 1 or more together, not {self.videos} and {self.pictures}")
        for name in ("records", "turns", "processes"):
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
            question = ask(
                scene, args.kinds[int(rng.integers(len(args.kinds)))], scene.times(FRAMES_PER_GROUP * interval), rng
            )
            if question is not None and (key := (question.kind, question.answer, question.group)) not in asked:
                asked.add(key)
                prefix = "" if turns else f"{IMAGE}\n"
                turns += [{"from": "human", "value": prefix + question.text}, {"from": "gpt", "value": question.answer}]
            if len(turns) == 2 * args.turns:
                break
        records.append({"id": f"{number}-{part}", "video": name, "scale": interval, "conversations": turns})
    return records


def _picture(args: DatasetArgs, number: int) -> tuple[str, Scene, np.random.Generator]:
    """The file name and the content of a picture, and a generator for what is asked about it."""
    seed = 2 * (args.seed * 10_000_000 + 5_000_000 + number)
    return f"{number:06d}.png", make_picture(seed), np.random.default_rng([seed, 2])


def _make_picture(args: DatasetArgs, number: int) -> list[dict[str, Any]]:
    """Writes one picture unless it exists, and returns its records."""
    name, scene, rng = _picture(args, number)
    width, height = PICTURE_SIZES[int(rng.integers(len(PICTURE_SIZES)))]
    if not (args.folder / name).exists():
        with replacing_file(args.folder / name) as unfinished:
            Image.fromarray(scene.frame(0, width, height)).save(unfinished, "PNG")
    kinds = [PICTURE_KINDS[int(i)] for i in rng.integers(len(PICTURE_KINDS), size=2 * args.turns)]
    questions = [q for kind in kinds if (q := ask_about_picture(scene, kind, rng)) is not None]
    asked = dict.fromkeys((q.text, q.answer) for q in [*questions, *_counted(scene, rng)])
    turns = _turns(list(asked)[: args.turns], 1)
    records = [{"id": f"picture {number}", "image": name, "conversations": turns}]
    if number % 2:
        other, before, _ = _picture(args, number - 1)
        if (asked_both := ask_which_picture((before, scene), rng)) is not None:
            both = {"id": f"pictures {number}", "image": [other, name], "conversations": _turns([asked_both], 2)}
            records.append(both)
    return records


def _counted(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """A question that every picture allows."""
    question = ask_about_picture(scene, "count", rng)
    return [] if question is None else [question]


def _turns(asked: Sequence[tuple[str, str]], pictures: int) -> list[dict[str, str]]:
    """Questions and answers as turns, the first of them with the places of the pictures."""
    turns = []
    for number, (question, answer) in enumerate(asked):
        prefix = "" if number else f"{IMAGE * pictures}\n"
        turns += [{"from": "human", "value": prefix + question}, {"from": "gpt", "value": answer}]
    return turns


def write_dataset(args: DatasetArgs) -> None:
    """Writes the files and train.json. Files that exist already are kept, because the seed determines them.

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
        records = []
        for what, make, count in (("videos", _make_video, args.videos), ("pictures", _make_picture, args.pictures)):
            if count:
                parts = in_processes(min(args.processes, count), functools.partial(make, args), range(count))
                records += [r for part in tqdm(parts, f"write {what}", count, file=sys.stderr) for r in part]
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
