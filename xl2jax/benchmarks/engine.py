"""The model as a run uses it: a thread opens videos and reads ahead, the caller watches them and asks."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty, Queue
from typing import Any, Protocol

import numpy as np

from xl2jax.benchmarks.settings import View
from xl2jax.config import FRAMES_PER_GROUP
from xl2jax.errors import UserError
from xl2jax.inference.api import Model
from xl2jax.inference.selection import RelevanceConfig
from xl2jax.inference.selection_files import Selection
from xl2jax.video.clip import Clip, open_video
from xl2jax.video.read_ahead import default_workers

_AHEAD_BYTES = 512 << 20
"""About how many bytes of resized frames wait, of the present video and of the next ones."""


@dataclasses.dataclass(frozen=True)
class Reply:
    """An answer, and what it cost in tokens. `dense`: whether it read the whole dense cache."""

    text: str
    input_tokens: int
    output_tokens: int
    dense: bool


@dataclasses.dataclass(frozen=True)
class Ask:
    """A question about a watched video. `selection` is its entry in upstream's selection file, which `by_file` asks for:
    without an entry the whole dense cache is read."""

    prompt: str
    max_new_tokens: int
    by_file: bool = False
    selection: Selection | None = None


class Video(Protocol):
    """A watched video."""

    frames: int

    def ask(self, question: Ask) -> Reply: ...

    def close(self) -> None: ...


class Opened(Protocol):
    """A video that was opened, before anything of it is watched."""

    duration: float
    fps: float
    frame_count: int
    chosen_frames: int

    @property
    def damaged_frames(self) -> int:
        """How many of the chosen frames were found damaged so far; the next good frame stands for each."""
        ...

    def batches(self) -> Iterator[np.ndarray]:
        """Frames to watch. A thread reads them."""

    def watch(self, batches: Iterator[np.ndarray]) -> Video: ...


class Engine(Protocol):
    def open(self, path: Path, view: View) -> Opened:
        """Raises UserError where the video cannot be read."""


class ModelEngine:
    """`Engine` by a loaded model."""

    def __init__(self, model: Model):
        self._model = model

    def open(self, path: Path, view: View) -> Opened:
        clip = open_video(path, view.sampling, backend=view.backend, last_group=view.last_group)
        clip.check()
        return _OpenedClip(self._model, clip, view)


class _OpenedClip:
    def __init__(self, model: Model, clip: Clip, view: View):
        self._model, self._clip, self._view = model, clip, view
        self.duration, self.fps, self.frame_count = clip.duration, clip.reader.fps, clip.reader.total
        self.chosen_frames = len(clip.indices)

    @property
    def damaged_frames(self) -> int:
        return int(np.isin(self._clip.indices, list(self._clip.reader.damaged)).sum())

    def batches(self) -> Iterator[np.ndarray]:
        model = self._model
        layout = model.layout(model.tokenizer.time_ids(self._clip.times))
        frames = model.plan(layout, self._view.prefill).segment_groups * FRAMES_PER_GROUP
        return self._clip.batches(frames, model.config.vision.image_size, workers=default_workers())

    def watch(self, batches: Iterator[np.ndarray]) -> Video:
        view = self._view
        watching = self._model.start_watch(self._clip, view.prefill, bilevel=view.bilevel, cache=view.cache)
        for frames in batches:
            watching.add(frames)
        return _WatchedClip(self._model, self._model.adopt(watching.finish()), view)


class _WatchedClip:
    def __init__(self, model: Model, video: Any, view: View):
        self._model, self._video, self._view = model, video, view
        self.frames = len(video.times)

    def ask(self, question: Ask) -> Reply:
        bilevel, relevance = self._view.bilevel, None
        if question.by_file:
            bilevel = None
            if question.selection is not None:
                relevance = RelevanceConfig("file", selection=question.selection)
        answer = self._model.ask(
            self._video,
            question.prompt,
            max_new_tokens=question.max_new_tokens,
            bilevel=bilevel,
            relevance=relevance,
        )
        tokens = answer.context_tokens + answer.suffix_tokens
        return Reply(answer.text, tokens, answer.new_tokens, dense=not answer.chunks)

    def close(self) -> None:
        self._video.close()


class ReadAhead:
    """Opens videos in order and reads their frames, in one thread, ahead of the caller.

    `open` is called in the thread for each of `items`. At most about half a gigabyte of frames waits. Closing it ends the
    thread.
    """

    def __init__(self, items: list[Any], open_item: Callable[[Any], Opened]):
        self._items, self._open = items, open_item
        self._queue: Queue[Any] = Queue()
        self._room = threading.Condition()
        self._waiting, self._closed, self._reading = 0, False, False
        self.read_seconds = 0.0
        """Seconds that the caller waited for the thread, of the present video."""
        threading.Thread(target=self._work, daemon=True, name="read videos ahead").start()

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, *_: object) -> None:
        with self._room:
            self._closed = True
            self._room.notify_all()

    def next(self) -> Opened:
        """The next video. Raises what opening it raised."""
        self.read_seconds = 0.0
        opened: Opened = self._take()
        self._reading = True
        return opened

    def batches(self) -> Iterator[np.ndarray]:
        """The frames of the video that `next` gave. Raises what reading them raised."""
        while self._reading:
            frames = self._take()
            if frames is None:
                self._reading = False
            else:
                yield frames

    def drain(self) -> None:
        """Passes over the frames that are left of the present video."""
        with contextlib.suppress(UserError):
            for _ in self.batches():
                pass

    def _take(self) -> Any:
        started = time.perf_counter()
        while True:
            try:
                item = self._queue.get(timeout=1.0)  # wakes up regularly so that Ctrl-C is noticed
            except Empty:
                continue
            break
        self.read_seconds += time.perf_counter() - started
        if isinstance(item, BaseException):
            self._reading = False
            raise item
        if isinstance(item, np.ndarray):
            with self._room:
                self._waiting -= item.nbytes
                self._room.notify_all()
        return item

    def _work(self) -> None:
        for item in self._items:
            if self._closed:
                return
            try:
                opened = self._open(item)
            except BaseException as e:
                self._queue.put(e)
                continue
            self._queue.put(opened)
            try:
                with contextlib.closing(_generator(opened.batches())) as batches:
                    for frames in batches:
                        if not self._put(frames):
                            return
                self._queue.put(None)
            except BaseException as e:
                self._queue.put(e)

    def _put(self, frames: np.ndarray) -> bool:
        """Waits for room, but never with nothing waiting. False where the caller has stopped."""
        with self._room:
            self._room.wait_for(
                lambda: self._closed or not self._waiting or self._waiting + frames.nbytes <= _AHEAD_BYTES
            )
            if self._closed:
                return False
            self._waiting += frames.nbytes
        self._queue.put(frames)
        return True


def _generator(batches: Iterator[np.ndarray]) -> Any:
    yield from batches
