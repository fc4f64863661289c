"""A run on disk: `run.json` says what was asked and how, and `answers-I-of-N.jsonl` has a line for every question.

A line is on the disk before the next question is asked. A killed run goes on from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Annotated, Any, Literal

from pydantic import Field, field_validator

from xl2jax.errors import UserError
from xl2jax.system.atomic import replacing_file
from xl2jax.system.json_lines import append_line, finished_lines, locked_lines
from xl2jax.system.schema import Schema, read_json

RUN, ANSWERS = "run.json", re.compile(r"answers-(\d+)-of-(\d+)\.jsonl")


class Record(Schema):
    """One question. `text` is None where it could not be asked, and `error` says why.

    row: the columns of the data set that the task reads. frames: how many were watched, of `chosen_frames`.
    seconds: waiting for frames, watching (shared by all questions about the video) and answering.
    """

    task: str
    doc_id: int
    row: dict[str, Any]
    prompt: str = ""
    video: str
    text: str | None = None
    error: str | None = None
    duration: float | None = None
    frames: int = 0
    chosen_frames: int = 0
    damaged_frames: int = 0
    dense: bool = True
    """Whether the answer read the whole dense cache."""
    input_tokens: int = 0
    output_tokens: int = 0
    seconds: Annotated[dict[Literal["read", "watch", "answer"], float], Field(default_factory=dict)]

    @property
    def key(self) -> tuple[str, int]:
        return self.task, self.doc_id


class RunInfo(Schema):
    """What a run asks, and how. Runs whose `asked` differ are never mixed.

    asked: variant, setting, limit, the dtype and weights that were asked for, and for each task the number and the hash
      of its questions and how videos are read.
    files: the hash of the checkpoint's files. shards: into how many the folder's run is divided.
    model: the loaded model's hash, dtype and weights.
    """

    format: Literal[1] = 1
    xl2jax: str
    checkpoint: Annotated[str, Field(max_length=4096, pattern=r"^[^\x00]*$")]
    files: str
    shards: int
    asked: dict[str, Any]
    model: dict[str, Any]

    @field_validator("asked")
    @classmethod
    def _complete(cls, asked: dict[str, Any]) -> dict[str, Any]:
        tasks = asked.get("tasks")
        if asked.get("variant") not in ("upstream", "lmms-eval") or not isinstance(asked.get("setting"), str):
            raise ValueError("needs a variant and a setting")
        if not isinstance(tasks, dict) or not tasks:
            raise ValueError("needs tasks")
        for name, task in tasks.items():
            if not isinstance(task, dict) or not isinstance(task.get("questions"), int) or task["questions"] < 1:
                raise ValueError(f"task {name!r} needs a number of questions")
            if not isinstance(task.get("view", {}), dict):
                raise ValueError(f"task {name!r}: view should be an object")
        return asked

    def difference(self, other: RunInfo) -> str | None:
        """The first setting in which two runs differ, in words."""
        return _difference(self.asked, other.asked) or _difference(self.model, other.model)


def _difference(mine: Any, theirs: Any, where: str = "") -> str | None:
    """The first place in which two values differ, at any depth of objects."""
    if mine == theirs:
        return None
    if isinstance(mine, dict) and isinstance(theirs, dict):
        name = next(name for name in sorted({*mine, *theirs}) if mine.get(name) != theirs.get(name))
        return _difference(mine.get(name), theirs.get(name), f"{where}.{name}" if where else name)
    return f"{where}: {_brief(mine)}, not {_brief(theirs)}"


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else text[:197] + "..."


def read_info(folder: Path) -> RunInfo | None:
    """What a folder's run is; None where there is none. Raises UserError for a damaged file."""
    file = folder / RUN
    return read_json(file, RunInfo) if file.exists() else None


def write_info(folder: Path, info: RunInfo) -> None:
    """Writes `run.json`, or compares it with the one that is there.

    Raises UserError where the folder holds a run with other settings or in other shards, or cannot be written.
    """
    there = read_info(folder)
    if there is None:
        with replacing_file(folder / RUN) as beside:
            beside.write_text(json.dumps(info.model_dump(), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        return
    difference = there.difference(info)
    if difference is not None:
        raise UserError(f"{folder}: holds a run with other settings ({difference}): choose another --output")
    if there.shards != info.shards:
        raise UserError(
            f"{folder}: holds a run in shards i/{there.shards}, not i/{info.shards}, whose answers would not be found: "
            "choose another --output"
        )


def answers_file(folder: Path, shard: tuple[int, int]) -> Path:
    return folder / f"answers-{shard[0]}-of-{shard[1]}.jsonl"


@dataclasses.dataclass
class AnswerLog:
    """The open file of answers. `done` are the questions that it has an answer to. Several threads may add some."""

    path: Path
    done: set[tuple[str, int]]
    _out: IO[bytes]
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def add(self, record: Record) -> None:
        """Appends a line that is on the disk when this returns. Raises UserError where it cannot be written."""
        try:
            with self._lock:
                append_line(self._out, record.model_dump(exclude_defaults=True))
        except OSError as e:
            raise UserError(f"{self.path}: cannot be written ({e.strerror})") from None
        if record.text is not None:
            self.done.add(record.key)


@contextlib.contextmanager
def open_log(folder: Path, shard: tuple[int, int]) -> Iterator[AnswerLog]:
    """Opens a shard's file of answers, which no other process may do meanwhile.

    Questions that could not be asked are not done: they are tried again.

    Raises UserError where another process has it open, or where it holds something else.
    """
    path = answers_file(folder, shard)
    with locked_lines(path, "give each its own --shard") as out:
        done = {record.key for record in finished_lines(path, Record, repair=True) if record.text is not None}
        yield AnswerLog(path, done, out)


def read_records(folders: Iterable[Path]) -> dict[tuple[str, int], Record]:
    """All questions of one or more folders by task and row. Of several lines the last answer counts, else the last error.

    Raises UserError where a file is damaged, or where two answers to one question differ.
    """
    records: dict[tuple[str, int], Record] = {}
    for folder in folders:
        for file in sorted(folder.iterdir()):
            if not ANSWERS.fullmatch(file.name):
                continue
            for record in finished_lines(file, Record, repair=False):
                earlier = records.get(record.key)
                if earlier is not None and earlier.text is not None:
                    if record.text not in (None, earlier.text):
                        raise UserError(
                            f"{file}: question {record.doc_id} of {record.task} was answered twice, in different words"
                        )
                    continue
                records[record.key] = record
    return dict(sorted(records.items()))


def count_by_task(info: RunInfo) -> Mapping[str, int]:
    """How many questions each task of a run has."""
    return {name: task["questions"] for name, task in info.asked["tasks"].items()}
