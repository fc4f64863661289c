"""Answers the rows of a part, a video at a time, with the one inference core."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from xl2jax.errors import UserError, first_line
from xl2jax.inference.answering import Answer
from xl2jax.inference.api import Model
from xl2jax.inference.bilevel import BilevelConfig
from xl2jax.inference.devices import Devices
from xl2jax.inference.generate import TokenSampling
from xl2jax.inference.layout import PrefillConfig
from xl2jax.inference.video_cache import CacheConfig, WatchedVideo
from xl2jax.ray.output import Answered, Journal
from xl2jax.ray.rows import Row
from xl2jax.system.terminal import explain
from xl2jax.video.clip import FrameSampling

logger = logging.getLogger(__name__)

MOST_TRIES = 3
"""A video at which actors died so often is given up: its rows get an error."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The model, and how it watches and answers.

    checkpoint: a folder that all hosts see, or a hub id. load: further arguments of `xl2jax.load`, such as dtype, weights
    and tensor. together: how many answers about a video are decoded at a time. The others are arguments of `Model.watch` and
    `Model.ask`.
    """

    checkpoint: str
    load: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sampling: FrameSampling = dataclasses.field(default_factory=FrameSampling)
    folder_fps: float = 1.0
    prefill: PrefillConfig = dataclasses.field(default_factory=PrefillConfig)
    bilevel: BilevelConfig | None = dataclasses.field(default_factory=BilevelConfig)
    cache: CacheConfig = dataclasses.field(default_factory=CacheConfig)
    tokens: TokenSampling = dataclasses.field(default_factory=TokenSampling)
    max_new_tokens: int = 128
    seed: int = 0
    together: int = 8

    @property
    def tensor(self) -> int:
        """Devices over which each model is split. Raises UserError for what is no number of devices."""
        return Devices(self.load.get("tensor", 1)).tensor

    def described(self) -> dict[str, Any]:
        """What answers depend on."""
        values = dataclasses.asdict(self)
        del values["together"]
        values["load"].pop("tensor", None)  # answers are the same on any number of devices
        return values


class Fault(Exception):
    """An error that is no fault of the input. The process may be unusable after it."""


def answer_rows(model: Model, rows: Sequence[Row], root: Path, settings: Settings, journal: Journal) -> None:
    """Answers those of `rows` that are not in the journal yet, which it adds to. Paths of videos are relative to `root`.

    What is wrong with a row becomes its error. Raises Fault where the program or the device failed, which the journal
    counts as a try.
    """
    for group in _videos(rows[len(journal.rows) :]):
        asked = [row for row in group if row.problem is None]
        problems = {row.number: row.problem for row in group}
        answers: dict[int, Answer | str] = {}
        frames = None
        if asked and journal.tries >= MOST_TRIES:
            reason = journal.fault or "the process died"
            answers = {row.number: f"given up after {journal.tries} tries: {reason}" for row in asked}
        elif asked:
            journal.begin(group[0].number)
            try:
                frames, answers = _ask(model, asked, root, settings)
            except Fault as e:
                journal.failed(str(e))
                raise
        journal.add([_answered(row, answers.get(row.number, problems[row.number]), frames) for row in group])


def _videos(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Consecutive rows about the same video."""
    for _, group in itertools.groupby(rows, key=lambda row: row.video):
        yield list(group)


def _answered(row: Row, result: Answer | str | None, frames: int | None) -> Answered:
    common: dict[str, Any] = {"row": row.number, "id": row.id, "video": row.video, "question": row.question}
    if isinstance(result, Answer):
        return Answered(
            **common,
            answer=result.text,
            finish_reason=result.finish_reason,
            new_tokens=result.new_tokens,
            frames=frames,
        )
    return Answered(**common, error=result)


def _ask(
    model: Model, rows: Sequence[Row], root: Path, settings: Settings
) -> tuple[int | None, dict[int, Answer | str]]:
    """How many frames of the rows' video were watched, and the answer or the error of each row. Raises Fault."""
    try:
        path = Path(os.path.normpath(root / (rows[0].video or "")))
        watched = model.watch(
            path,
            settings.sampling,
            settings.prefill,
            folder_fps=settings.folder_fps,
            bilevel=settings.bilevel,
            cache=settings.cache,
        )
    except Exception as e:
        error = _one_line(e)
        return None, {row.number: error for row in rows}
    with watched as video:
        return len(video.times), _ask_all(model, video, rows, settings)


def _ask_all(model: Model, video: WatchedVideo, rows: Sequence[Row], settings: Settings) -> dict[int, Answer | str]:
    def ask(some: Sequence[Row]) -> list[Answer]:
        return model.ask_many(
            [(video, row.question or "") for row in some],
            together=settings.together,
            max_new_tokens=settings.max_new_tokens,
            sampling=settings.tokens,
            seed=settings.seed,
            bilevel=settings.bilevel,
        )

    try:
        return dict(zip((row.number for row in rows), ask(rows), strict=True))
    except Exception as e:
        error = _one_line(e)
        if len(rows) == 1:
            return {rows[0].number: error}
    # One of them failed, and the others' answers went with it.
    return {number: answer for row in rows for number, answer in _ask_all(model, video, [row], settings).items()}


def _one_line(error: Exception) -> str:
    """The error of a row. Raises Fault where the row is not to blame."""
    line = str(error) if isinstance(error, UserError) else explain(error)
    if line is None:
        logger.error("a video could not be answered", exc_info=error)
        raise Fault(f"{type(error).__name__}: {first_line(error)}") from error
    return " ".join(line.split())
