"""A small data set in Video-MME's layout, of videos of coloured shapes, that the bundled checkpoint can answer.

The bundled checkpoint knows neither Video-MME's instruction nor letters. It is asked the bare question here, and its
answer is looked up among the options. A model that knows letters can be asked the same rows as the task `videomme`.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xl2jax.benchmarks.dataset import import_pyarrow
from xl2jax.benchmarks.task import Reading, Variant, percent
from xl2jax.benchmarks.videomme import DURATIONS, VideoMMELayout, VideoMMERow
from xl2jax.config import FRAMES_PER_GROUP
from xl2jax.evaluation.questions import Kind, Question, ask
from xl2jax.evaluation.scenes import COLOURS, SHAPES, Scene, make_scene, write_scene
from xl2jax.system.atomic import replacing_folder

_KINDS: dict[Kind, str] = {
    "colour_of": "Attribute Perception",
    "shape_of": "Object Recognition",
    "colour": "Temporal Perception",
    "shape": "Object Reasoning",
    "time": "Temporal Reasoning",
}
"""Kinds of question, and what Video-MME would call them."""
_WIDTH, _HEIGHT = 112, 112


class Synthetic(VideoMMELayout):
    dataset = "synthetic"
    metric = "synthetic_score"

    def __init__(self, name: str, variant: Variant):
        super().__init__(name, variant)

    @property
    def files(self) -> tuple[str, ...]:
        return (self.split,)

    def prompt(self, row: VideoMMERow, subtitles: str | None = None) -> str:
        return row.question

    def read(self, row: VideoMMERow, text: str) -> Reading:
        letter = next((option[0] for option in row.options if option[3:] == text.strip()), "")
        return Reading(letter, letter == row.answer)

    def sample(self, row: VideoMMERow, text: str, rng: random.Random) -> dict[str, Any]:
        return {
            "question_id": row.question_id,
            "duration": row.duration,
            "task_category": row.task_type,
            "pred_answer": self.read(row, text).extracted,
            "answer": row.answer,
        }

    def score(self, sample: Any) -> float:
        return float(sample["pred_answer"] == sample["answer"])

    def aggregate(self, samples: Sequence[dict[str, Any]]) -> float:
        return percent(round(sum(map(self.score, samples))), len(samples))


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large the data set is. `groups` are the lengths of short, medium and long videos, in groups of 4 seconds."""

    videos: int = 12
    questions: int = 3
    groups: tuple[int, int, int] = (8, 24, 64)
    seed: int = 0


def write_synthetic(folder: Path, sizes: Sizes) -> int:
    """Writes the rows and the videos into a new folder, and returns the number of questions.

    Raises UserError where the folder exists or cannot be written.
    """
    pyarrow = import_pyarrow()
    with replacing_folder(folder) as beside:
        rows: list[dict[str, Any]] = []
        (beside / "videomme").mkdir()
        (beside / "data").mkdir()
        for number in range(sizes.videos):
            length = number % len(DURATIONS)
            # Odd seeds: training scenes have even ones.
            scene = make_scene(2 * (1000 * sizes.seed + number) + 1, sizes.groups[length], events=5)
            video = f"scene{number:04d}"
            write_scene(beside / "data" / f"{video}.mp4", scene, width=_WIDTH, height=_HEIGHT)
            rows += _rows(scene, video, number, DURATIONS[length], sizes.questions)
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows), beside / "videomme" / "test-00000-of-00001.parquet"
        )
    return len(rows)


def _rows(scene: Scene, video: str, number: int, duration: str, count: int) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng([scene.seed, 4])
    kinds = list(_KINDS)
    asked: set[str] = set()
    for attempt in range(20 * count):
        kind = kinds[(number + attempt) % len(kinds)]
        question = ask(scene, kind, scene.times(), rng)
        if question is None or question.text in asked:
            continue
        asked.add(question.text)
        options = _options(question, scene, rng)
        yield {
            "video_id": f"{number + 1:03d}",
            "duration": duration,
            "domain": "Life Record",
            "sub_category": "Daily Life",
            "url": "",
            "videoID": video,
            "question_id": f"{number + 1:03d}-{len(asked)}",
            "task_type": _KINDS[kind],
            "question": question.text,
            "options": [f"{letter}. {text}" for letter, text in zip("ABCD", options, strict=True)],
            "answer": "ABCD"[options.index(question.answer)],
        }
        if len(asked) == count:
            return


def _options(question: Question, scene: Scene, rng: np.random.Generator) -> list[str]:
    """The right answer and three others, in random order."""
    if question.kind in ("colour", "colour_of"):
        others = [f"{colour.capitalize()}." for colour in COLOURS]
    elif question.kind in ("shape", "shape_of"):
        others = [f"{shape.capitalize()}." for shape in SHAPES]
    else:
        others = [f"At {float(FRAMES_PER_GROUP * group)} seconds." for group in range(scene.groups)]
    others = [text for text in others if text != question.answer]
    options = [question.answer, *(others[int(i)] for i in rng.permutation(len(others))[:3])]
    return [options[int(i)] for i in rng.permutation(4)]
