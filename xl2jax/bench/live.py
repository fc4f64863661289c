"""`bench live`: how fast a live video is watched while questions are asked, and how long these wait.

One model watches frames of noise whose times are a second apart. First they come as fast as the model takes them, until
everything that is remembered was replaced once, so that all sizes are those of a video without an end. The stages after
that are timed, and compile nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from xl2jax.bench.setup import random_params
from xl2jax.commands.flags import DEFAULT_CHECKPOINT, require_checkpoint
from xl2jax.config import FRAMES_PER_GROUP, PRESETS, Weights
from xl2jax.errors import UserError, require_number, require_whole
from xl2jax.inference import memory
from xl2jax.inference.api import Model, load
from xl2jax.inference.live import LiveMemory, LiveVideo
from xl2jax.inference.video_cache import CacheConfig, WatchedVideo
from xl2jax.ops.attention import check_name
from xl2jax.prompt import PromptTokenizer
from xl2jax.system.backend import program_count
from xl2jax.testing import make_tokenizer
from xl2jax.video.clip import Clip, Reader

_QUESTION = "What colour was the circle?"


@dataclasses.dataclass(frozen=True)
class LiveBenchArgs:
    """Times a live video: frames a second, how far it is behind, and the first token of questions meanwhile."""

    checkpoint: str = str(DEFAULT_CHECKPOINT)
    """The model: a folder or a hub id."""
    preset: str | None = None
    """Instead of a checkpoint, random weights of these sizes: video-xl-2 is the released one."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """The type of weights and activations; by default that of the checkpoint, or bfloat16 for random weights."""
    weights: Weights | None = None
    """Has the LLM's matrices in 8 or 4 bits."""
    cache_dtype: Literal["int8"] | None = None
    """dtype of the video's KV; by default --dtype."""
    dense_minutes: float = 10.0
    minutes: float = 60.0
    """What is dense on the device, and what is remembered, at one frame a second of the video's time."""
    host_gib: float = 2.0
    """Host memory for the dense KV of older parts."""
    seconds: float = 30.0
    """Length of each stage that is timed."""
    every: float = 10.0
    """Seconds from one question to the next while frames come as fast as they are taken."""
    rate: float = 4.0
    """Frames a second in the stage in which they come at a steady rate."""
    questions: int = 12
    """Questions while frames come at that rate, and as many about the finished video."""
    tokens: int = 32
    """Tokens of each answer."""
    attention: str = "auto"
    """auto (the fastest one for this device and dtype), blockwise, reference, wgmma or mma."""
    json: bool = False
    """Prints the rows as JSON."""

    def check(self) -> None:
        """Raises UserError for flags that are out of range or contradict each other."""
        check_name(self.attention)
        self.memory()
        for name in ("seconds", "every", "rate"):
            require_number(f"--{name}", getattr(self, name))
            if not 0 < getattr(self, name) <= 1e5:
                raise UserError(f"--{name} must be above 0, and at most 100,000, not {getattr(self, name)}")
        require_whole("--questions", self.questions, 1)
        require_whole("--tokens", self.tokens, 1)
        if self.preset is None:
            require_checkpoint(self.checkpoint)
        elif self.preset not in PRESETS:
            raise UserError(f"--preset: choose from {', '.join(PRESETS)}, not {self.preset!r}")
        elif self.checkpoint != str(DEFAULT_CHECKPOINT):
            raise UserError("--preset has random weights: give either it or --checkpoint")

    def memory(self) -> LiveMemory:
        """Raises UserError for sizes out of range."""
        return LiveMemory(self.dense_minutes, self.minutes, self.host_gib, pooled_dtype=self.cache_dtype)


class _Noise(Reader):
    """A few frames of noise that are repeated for ever, as an open video of one frame a second."""

    def __init__(self, size: int, total: int):
        self._bank = np.random.default_rng(0).integers(0, 256, (64, size, size, 3), np.uint8)
        self.total, self.fps = total, 1.0

    def spans(self, indices: np.ndarray) -> list[np.ndarray]:
        return [indices]

    def frames(self, indices: np.ndarray) -> Iterator[np.ndarray]:
        for i in indices:
            yield self.frame(int(i))

    def frame(self, number: int) -> np.ndarray:
        return self._bank[number % len(self._bank)]


def _model(args: LiveBenchArgs) -> Model:
    if args.preset is None:
        return load(args.checkpoint, dtype=args.dtype, weights=args.weights, implementation=args.attention)
    config = PRESETS[args.preset].with_weights(args.weights)
    params = random_params(config, args.dtype or "bfloat16")
    return Model(config, params, PromptTokenizer(make_tokenizer(config.llm.vocab - 300)), implementation=args.attention)


def live_rows(args: LiveBenchArgs) -> Iterator[dict[str, Any]]:
    """Yields a row for each stage.

    full: frames as fast as they are taken, until what is remembered was replaced once. flat out: the same, with a question
    every so often. steady: frames at a rate; `lag_s` is by how much the latest frame was behind its time when it had been
    taken. finished: the same video after its end. file: a video of as many frames that was watched at once.

    `first_token_s` is the median over questions, from the call on, `worst_s` the largest. `ratio` is that of the steady
    stage's median to this stage's.
    """
    programs = program_count()
    model = _model(args)
    noise = _Noise(model.config.vision.image_size, 1 << 30)
    numbers = itertools.count()
    live = model.watch_live(memory=args.memory(), cache=CacheConfig(args.cache_dtype))
    with live:

        def feed(stop: threading.Event | None = None, frames: int | None = None, rate: float | None = None) -> _Fed:
            return _feed(live, noise, numbers, stop, frames, rate)

        def state() -> dict[str, Any]:
            sizes = {"device": live.device_bytes, "host": live.host_bytes, "in_use": memory.used_bytes()}
            return {f"{name}_mib": size / 2**20 for name, size in sizes.items()} | {"programs": programs.requested}

        # Half as much again as is remembered, and a question at the end for all sizes of questions.
        remembered = round(60 * args.minutes)
        fed = feed(frames=FRAMES_PER_GROUP * (remembered * 3 // 2 // FRAMES_PER_GROUP + 1))
        _ask(model, live, 3, args.tokens)
        yield {"stage": "full", "frames": live.frames, "frames_s": fed.rate} | state()

        with ThreadPoolExecutor(1) as pool:
            stop = threading.Event()
            feeding = pool.submit(feed, stop)
            try:
                begin, first, whole = time.perf_counter(), list[float](), list[float]()
                while (now := time.perf_counter() - begin) < args.seconds and not feeding.done():
                    if now >= args.every * (len(first) + 1):
                        times = _ask(model, live, 1, args.tokens)
                        first += times[0]
                        whole += times[1]
                    time.sleep(0.01)
            finally:
                stop.set()
            fed = feeding.result()
            yield {
                "stage": "flat out", "frames_s": fed.rate, "answers": len(first), **_first_token(first),
                "answer_s": float(np.median(whole)) if whole else None,
            } | state()  # fmt: skip

            feeding = pool.submit(feed, None, round(args.rate * args.seconds), args.rate)
            first = []
            for number in range(args.questions):
                time.sleep(max(0.0, args.seconds * (number + 0.5) / args.questions - (time.perf_counter() - fed.ended)))
                first += _ask(model, live, 1, args.tokens)[0]
            fed = feeding.result()
            steady = float(np.median(first))
            yield {
                "stage": "steady", "frames_s": fed.rate, "lag_s": fed.lag, "answers": len(first), **_first_token(first)
            } | state()  # fmt: skip

        live.end()
        first = _ask(model, live, args.questions, args.tokens)[0]
        yield {"stage": "finished", **_first_token(first), "ratio": steady / float(np.median(first))} | state()
        frames = live.frames
    indices = np.arange(min(remembered, frames))
    clip = Clip(
        Path("noise"), _Noise(model.config.vision.image_size, len(indices)), indices, indices.astype(float).tolist()
    )
    video = model.watch(clip, cache=CacheConfig(args.cache_dtype))
    _ask(model, video, 3, args.tokens)
    first = _ask(model, video, args.questions, args.tokens)[0]
    yield {"stage": "file", "frames": len(indices), **_first_token(first), "ratio": steady / float(np.median(first))}


@dataclasses.dataclass(frozen=True)
class _Fed:
    """What became of frames that were fed."""

    rate: float
    """Frames a second."""
    lag: float
    """The most seconds by which a frame was taken after its time."""
    ended: float


def _feed(
    live: LiveVideo,
    noise: _Noise,
    numbers: Iterator[int],
    stop: threading.Event | None,
    frames: int | None,
    rate: float | None,
) -> _Fed:
    """Feeds so many frames, or until `stop`; at `rate` frames a second, or as fast as they are taken."""
    begin, lag, count = time.perf_counter(), 0.0, 0
    while (frames is None or count < frames) and not (stop is not None and stop.is_set()):
        number = next(numbers)
        if rate is not None:
            due = begin + count / rate
            time.sleep(max(0.0, due - time.perf_counter()))
        live.add(float(number), noise.frame(number))
        if rate is not None:
            lag = max(lag, time.perf_counter() - due)
        count += 1
    live.flush()
    with live.snapshot() as seen:
        jax.block_until_ready(seen.kv.cache)
    ended = time.perf_counter()
    return _Fed(count / (ended - begin), lag, ended)


def _ask(model: Model, video: LiveVideo | WatchedVideo, count: int, tokens: int) -> tuple[list[float], list[float]]:
    """Seconds until the first token of each of `count` answers, and until their end."""
    first, whole = [], []
    for _ in range(count):
        begin = time.perf_counter()
        answering = model.start_answer(video, _QUESTION, max_new_tokens=tokens)
        try:
            answering.step()
            first.append(time.perf_counter() - begin)
            while not answering.finished:
                answering.step()
        finally:
            answering.close()
        whole.append(time.perf_counter() - begin)
    return first, whole


def _first_token(first: list[float]) -> dict[str, Any]:
    if not first:
        return {}
    return {"first_token_s": float(np.median(first)), "worst_s": max(first)}
