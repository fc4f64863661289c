"""Watches each video once and asks all questions about it; reading goes ahead of watching and answering."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from xl2jax.benchmarks.dataset import DataFolder, row_values
from xl2jax.benchmarks.engine import Ask, Engine, Opened, ReadAhead, Video
from xl2jax.benchmarks.extraction import rewrite_times
from xl2jax.benchmarks.records import AnswerLog, Record
from xl2jax.benchmarks.selection_keys import SelectionTable
from xl2jax.benchmarks.settings import View
from xl2jax.benchmarks.subtitles import subtitle_text
from xl2jax.benchmarks.task import Task
from xl2jax.benchmarks.videomme import VideoMME
from xl2jax.errors import NotEnoughMemory, UserError, listing
from xl2jax.system.schema import read_bytes

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Question:
    task: Task
    doc_id: int
    row: Any
    subtitles: Path | None
    """The file of subtitles, for tasks that have them in the prompt."""

    @property
    def key(self) -> tuple[str, int]:
        return self.task.name, self.doc_id


@dataclasses.dataclass(frozen=True)
class Group:
    """Questions that share one watched video."""

    name: str
    path: Path | None
    """None where the data folder has no such video."""
    view: View
    questions: list[Question]


def collect(data: DataFolder, tasks: Sequence[Task], views: Mapping[str, View], limit: int | None) -> list[Group]:
    """The questions of all tasks, grouped by the name of the video, in the order of the rows.

    The groups do not depend on which videos the folder has, so that hosts which lack some divide a run alike. `views` are
    by task; `limit` takes the first rows of each task.

    Raises UserError where rows are missing or wrong.
    """
    groups: dict[tuple[str, str, View], Group] = {}
    for task in tasks:
        for doc_id, row in enumerate(data.rows(task)[:limit]):
            name = task.video(row)
            subtitles = None
            if task.subtitle_frames is not None and isinstance(task, VideoMME):
                subtitles = data.find(task, task.subtitle_path(row))
            view = views[task.name]
            key = (task.folder, name, view)
            if key not in groups:
                groups[key] = Group(name, data.find(task, name), view, [])
            groups[key].questions.append(Question(task, doc_id, row, subtitles))
    return list(groups.values())


def describe_questions(groups: Sequence[Group], views: Mapping[str, Any]) -> dict[str, Any]:
    """The tasks for `run.json`: how many questions, a hash of their rows, and how videos are read.

    `without_subtitles` is the number of questions whose file of subtitles is missing, for tasks with subtitles.
    """
    rows: dict[str, list[tuple[int, Any]]] = {name: [] for name in views}
    bare: dict[str, int] = {}
    for group in groups:
        for question in group.questions:
            name = question.task.name
            rows[name].append((question.doc_id, row_values(question.row)))
            if question.task.subtitle_frames is not None:
                bare[name] = bare.get(name, 0) + (question.subtitles is None)
    described = {}
    for name, found in rows.items():
        text = json.dumps(sorted(found, key=lambda pair: pair[0]), ensure_ascii=False, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        described[name] = {"questions": len(found), "rows": digest, "view": views[name]}
        if name in bare:
            described[name]["without_subtitles"] = bare[name]
    return described


def missing_videos(groups: Sequence[Group]) -> list[str]:
    """Names of the videos that the data folder lacks."""
    return [group.name for group in groups if group.path is None]


def entries(groups: Sequence[Group], table: SelectionTable) -> dict[str, list[bool]]:
    """By task, whether each question has an entry in the selection files. (No key depends on subtitles.)"""
    found: dict[str, list[bool]] = {}
    for group in groups:
        if group.path is None:
            continue
        for q in group.questions:
            entry = table.find(q.task.prompt(q.row, ""), group.path.name)
            found.setdefault(q.task.name, []).append(entry is not None)
    return found


@dataclasses.dataclass
class Run:
    """Asks the questions of `groups` that are not in `log`.

    table: upstream's selection files, if they choose what is read densely.
    strict: whether a video that is missing or cannot be read ends the run.
    number: of this run among those that share the log, each with another part of the groups and a model of its own.
    ended: set where one of them has failed, which ends the others behind the video that they watch.
    """

    engine: Engine
    log: AnswerLog
    table: SelectionTable | None = None
    strict: bool = False
    number: int = 0
    ended: threading.Event = dataclasses.field(default_factory=threading.Event)
    failed: list[str] = dataclasses.field(default_factory=list)
    seconds: dict[str, float] = dataclasses.field(
        default_factory=lambda: dict.fromkeys(("read", "watch", "answer"), 0.0)
    )
    """Waiting for frames, watching and answering so far, in seconds."""

    def run(self, groups: Sequence[Group]) -> int:
        """Returns how many questions were answered. Raises UserError where `strict` ends the run, or memory does."""
        todo = [self._unanswered(group) for group in groups]
        todo = [group for group in todo if group.questions]
        for group in todo:
            if group.path is None:
                self._fail(group, UserError(f"{group.name}: no such video in the data folder"))
        todo = [group for group in todo if group.path is not None]
        count = sum(len(group.questions) for group in todo)
        started = time.perf_counter()
        with (
            ReadAhead(todo, lambda group: self.engine.open(group.path, group.view)) as ahead,
            tqdm(total=count, desc="answer", unit="question", position=self.number) as bar,
            self._ending_others(),
        ):
            for group in todo:
                if self.ended.is_set():
                    break
                try:
                    self._watch(group, ahead)
                except NotEnoughMemory:
                    raise
                except UserError as e:
                    ahead.drain()
                    self._fail(self._unanswered(group), e)
                bar.update(len(group.questions))
        answered = sum(question.key in self.log.done for group in todo for question in group.questions)
        self._log_times(time.perf_counter() - started, answered)
        return answered

    @contextlib.contextmanager
    def _ending_others(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.ended.set()
            raise

    def _log_times(self, seconds: float, answered: int) -> None:
        needed = self.seconds["watch"] + self.seconds["answer"]
        if answered:
            logger.info(
                "%d questions in %.1f s, %.3f times what watching each video once (%.1f s) and answering (%.1f s) took",
                answered, seconds, seconds / needed if needed else 1.0, self.seconds["watch"], self.seconds["answer"],
            )  # fmt: skip

    def _unanswered(self, group: Group) -> Group:
        left = [question for question in group.questions if question.key not in self.log.done]
        return dataclasses.replace(group, questions=left)

    def _fail(self, group: Group, error: UserError) -> None:
        if self.strict:
            raise error
        self.failed.append(group.name)
        logger.warning("warning: %s: %d questions are left out", error, len(group.questions))
        for q in group.questions:
            self.log.add(
                Record(
                    task=q.task.name,
                    doc_id=q.doc_id,
                    row=row_values(q.row),
                    video=group.name,
                    error=" ".join(str(error).split()),
                    seconds={},
                )
            )

    def _watch(self, group: Group, ahead: ReadAhead) -> None:
        opened = ahead.next()
        started = time.perf_counter()
        waited = ahead.read_seconds
        video = opened.watch(ahead.batches())
        watched = time.perf_counter() - started
        seconds = {"read": ahead.read_seconds, "watch": watched + waited - ahead.read_seconds}
        with contextlib.closing(video):
            for question in group.questions:
                record = self._ask(question, group, opened, video, seconds)
                self.seconds["answer"] += record.seconds.get("answer", 0.0)
                self.log.add(record)
        for name, value in seconds.items():
            self.seconds[name] += value

    def _ask(self, question: Question, group: Group, opened: Opened, video: Video, seconds: dict[str, float]) -> Record:
        task = question.task
        common: dict[str, Any] = {
            "task": task.name,
            "doc_id": question.doc_id,
            "row": row_values(question.row),
            "video": group.name,
            "duration": round(opened.duration, 3),
            "frames": video.frames,
            "chosen_frames": opened.chosen_frames,
            "damaged_frames": opened.damaged_frames,
        }
        started = time.perf_counter()
        try:
            prompt = task.prompt(question.row, _subtitles(question, opened))
            reply = video.ask(self._asked(task, prompt, group))
        except NotEnoughMemory:
            raise
        except UserError as e:
            if self.strict:
                raise
            logger.warning("warning: question %d of %s is left out: %s", question.doc_id, task.name, e)
            return Record(**common, error=" ".join(str(e).split()), seconds={})
        seconds = {**seconds, "answer": time.perf_counter() - started}
        return Record(
            **common,
            prompt=prompt,
            text=reply.text.strip(),
            dense=reply.dense,
            input_tokens=reply.input_tokens,
            output_tokens=reply.output_tokens,
            seconds={name: round(value, 4) for name, value in seconds.items()},  # type: ignore[misc]
        )

    def _asked(self, task: Task, prompt: str, group: Group) -> Ask:
        text = rewrite_times(prompt) if task.variant == "upstream" else prompt
        by_file = self.table is not None and group.view.bilevel is not None
        selection = self.table.find(prompt, group.path.name) if by_file and self.table and group.path else None
        return Ask(text, task.max_new_tokens, by_file, selection)


def _subtitles(question: Question, opened: Opened) -> str | None:
    frames = question.task.subtitle_frames
    if frames is None:
        return None
    srt = None
    if question.subtitles is not None:
        try:
            srt = read_bytes(question.subtitles).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError:
            raise UserError(f"{question.subtitles}: not UTF-8") from None
    try:
        return subtitle_text(srt, opened.frame_count, opened.fps, frames)
    except (ValueError, IndexError) as e:
        raise UserError(f"{question.subtitles}: not in the format of .srt files ({e})") from None


def missing_line(names: Sequence[str]) -> str:
    """One line about missing videos."""
    return f"{len(names)} video{'s are' if len(names) > 1 else ' is'} missing: {listing(names)}"
