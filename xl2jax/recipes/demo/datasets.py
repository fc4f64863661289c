"""Videos of seeded scenes as files, with questions whose answers are known.

python -m xl2jax.recipes.demo.datasets dataset build/data --videos 1000     # mp4 files, train.json in upstream's format
python -m xl2jax.recipes.demo.datasets clip build/clip.mp4 --seed 3         # one file, its questions on stdout
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from tqdm import tqdm

from xl2jax.config import FRAMES_PER_GROUP
from xl2jax.errors import UserError
from xl2jax.evaluation.scenes import SIZES, TEMPLATES, Kind, Scene, ask, make_scene
from xl2jax.system.atomic import replacing_file
from xl2jax.system.process_pool import in_processes
from xl2jax.system.terminal import require_stdout, run_command
from xl2jax.training.records import IMAGE

_SCALES = (0.25, 0.5, 1.0, 1.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
LONGEST = 8192.0
"""Seconds that a training video lasts, at most."""


MOST_GROUPS = 65_536
"""Of one video: 73 hours at one frame a second."""


def draw_scale(frames: int, rng: np.random.Generator) -> float:
    """Seconds between the frames of a training video."""
    scales = [x for x in _SCALES if x * frames <= LONGEST] or _SCALES[:1]
    return scales[int(rng.integers(len(scales)))]


def write_video(
    path: Path, scene: Scene, *, fps: float = 1.0, width: int = 112, height: int = 112, repeat: int = 1
) -> None:
    """H.264 with a constant quantiser (the same bytes each time); each frame stands `repeat` times."""
    import av

    with replacing_file(path) as beside, av.open(str(beside), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps * repeat).limit_denominator(1000))
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"qp": "22", "preset": "veryfast"}
        for i in range(scene.frames):
            frame = scene.frame(i, width, height)
            for _ in range(repeat):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


@dataclasses.dataclass(frozen=True)
class DatasetArgs:
    """Writes mp4 files at one frame a second, and train.json with several records a file."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder to make."""
    videos: int = 1000
    groups: tuple[int, ...] = (4, 8)
    """Lengths of videos in groups of 4 frames: one of these each."""
    records: int = 2
    """Conversations about each video."""
    turns: int = 6
    """Questions of each, at most: the same is not asked twice."""
    kinds: tuple[Kind, ...] = tuple(TEMPLATES)
    """Of these, all as often."""
    seed: int = 0
    processes: int = 2

    def __post_init__(self) -> None:
        for name in ("videos", "records", "turns", "processes"):
            _require(name, getattr(self, name), 1)
        _require("seed", self.seed, 0)
        if not self.groups or not self.kinds:
            raise UserError("--groups and --kinds need one value or more")
        for groups in self.groups:
            _require("groups", groups, 1, MOST_GROUPS)


def _require(name: str, value: int, least: int, most: int = 10**9) -> None:
    """Raises UserError unless a flag's value is in its range."""
    if not least <= value <= most:
        raise UserError(f"--{name} must be from {least:,} to {most:,}, not {value:,}")


def _one_video(args: DatasetArgs, number: int) -> list[dict[str, Any]]:
    seed = 2 * (args.seed * 10_000_000 + number)
    rng = np.random.default_rng([seed, 2])
    scene = make_scene(seed, args.groups[int(rng.integers(len(args.groups)))])
    width, height = SIZES[int(rng.integers(len(SIZES)))]
    name = f"{number:06d}.mp4"
    if not (args.folder / name).exists():
        write_video(args.folder / name, scene, width=width, height=height)
    rows = []
    for part in range(args.records):
        scale = draw_scale(scene.frames, rng)
        turns: list[dict[str, str]] = []
        asked = set()
        for _ in range(2 * args.turns):
            question = ask(scene, args.kinds[int(rng.integers(len(args.kinds)))], FRAMES_PER_GROUP * scale, rng)
            if question is not None and (what := (question.kind, question.answer, question.group)) not in asked:
                asked.add(what)
                head = "" if turns else f"{IMAGE}\n"
                turns += [{"from": "human", "value": head + question.text}, {"from": "gpt", "value": question.answer}]
            if len(turns) == 2 * args.turns:
                break
        rows.append({"id": f"{number}-{part}", "video": name, "scale": scale, "conversations": turns})
    return rows


def write_dataset(args: DatasetArgs) -> None:
    """Videos that are there already stay (they follow from the seed).

    Raises UserError if train.json is there or if a file cannot be written.
    """
    target = args.folder / "train.json"
    if target.exists():
        raise UserError(f"{target}: already exists; choose another place or remove it first")
    one = functools.partial(_one_video, args)
    with _filling(args.folder):
        parts = in_processes(min(args.processes, args.videos), one, range(args.videos))
        rows = [row for part in tqdm(parts, "write videos", args.videos, file=sys.stderr) for row in part]
        with replacing_file(target) as beside:
            beside.write_text(json.dumps(rows) + "\n")


@dataclasses.dataclass(frozen=True)
class ClipArgs:
    """Writes one test video (H.264) and prints questions about it with their answers."""

    path: Annotated[Path, tyro.conf.Positional]
    """File to write."""
    seed: int = 1
    groups: int = 8
    kinds: tuple[Kind, ...] = ("colour_of", "time", "exists")
    """Of the questions."""
    width: int = 640
    height: int = 360

    def __post_init__(self) -> None:
        _require("seed", self.seed, 0)
        _require("groups", self.groups, 1, MOST_GROUPS)
        for name in ("width", "height"):
            _require(name, getattr(self, name), 16, 8192)
            if getattr(self, name) % 2:
                raise UserError(f"--{name} must be even, as H.264 has it, not {getattr(self, name)}")


@contextlib.contextmanager
def _filling(folder: Path) -> Iterator[None]:
    """Makes a folder for what the block writes; where that fails and nothing is in it, it vanishes again."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{folder}: cannot be made ({e.strerror})") from None
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            folder.rmdir()  # (refused unless it is empty)
        raise


def main() -> None:
    args = tyro.extras.subcommand_cli_from_dict(
        {"dataset": DatasetArgs, "clip": ClipArgs}, prog="python -m xl2jax.recipes.demo.datasets"
    )
    if isinstance(args, DatasetArgs):
        write_dataset(args)
        return
    require_stdout()
    scene = make_scene(2 * args.seed + 1, args.groups)
    with _filling(args.path.parent):
        write_video(args.path, scene, fps=1.0, width=args.width, height=args.height)
    rng = np.random.default_rng(args.seed)
    for kind in args.kinds:  # about the first shape, in a random order, of which this can be asked
        events = [scene.events[int(i)] for i in rng.permutation(len(scene.events))]
        found = (ask(scene, kind, FRAMES_PER_GROUP, rng, event=event) for event in events)
        question = next((q for q in found if q is not None), None)
        if question is not None:
            print(f"{question.text}\t{question.answer}")


if __name__ == "__main__":
    run_command(main)
