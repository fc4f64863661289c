"""Converts a record to model inputs: frames, token ids and labels (upstream: train.py, preprocess_qwen).

The conversation is tokenised piece by piece, as upstream does: role, newline, text, `<|im_end|>`, newline. The turn
with the video consists of `<|im_start|>user\\n`, the video, a newline, and the text after `<image>`. The loss counts
the assistant's text, and in all turns `<|im_start|>`, `<|im_end|>` and the newline after it. The name of a control
token in the text of a turn is plain text; only the template contains control tokens.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np

from xl2jax.config import FRAMES_PER_GROUP
from xl2jax.errors import UserError
from xl2jax.prompt import IM_END, IM_START, SYSTEM, PromptTokenizer, time_text
from xl2jax.system.terminal import machine_fault
from xl2jax.training.loss import IGNORE
from xl2jax.training.records import Record
from xl2jax.video.clip import Clip, open_video
from xl2jax.video.frame_sampling import FrameSampling, frame_times
from xl2jax.video.image_files import ImageReader

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """One sample's columns of a TokenBatch, int32 [T]. `cut` says that the sample was longer than the limit."""

    ids: np.ndarray
    visual: np.ndarray
    labels: np.ndarray
    cut: bool


def group_times(clip: Clip, scale: float) -> list[float]:
    """Time of each group's first frame in seconds, multiplied by the record's scale, rounded to a tenth."""
    times = clip.times if scale == 1.0 else [round(t * scale, 1) for t in clip.times]
    return times[::FRAMES_PER_GROUP]


def tokenise(
    turns: Sequence[tuple[str, str]],
    times: Sequence[float | None],
    tokenizer: PromptTokenizer,
    visual_tokens: int,
    max_length: int,
) -> Tokens:
    """Token ids, places of visual tokens and labels of a conversation.

    `times` has one entry for each group of frames: its time, or None for an image, which has no time text. As upstream
    does, tokens after the first `max_length` are cut off.

    Raises:
      UserError: the first `max_length` tokens contain no part of an answer.
    """
    start, end, newline = (tokenizer.encode(t) for t in (IM_START, IM_END, "\n"))
    ids: list[int] = []
    visual: list[int] = []
    labels: list[int] = []
    answer_starts: list[int] = []

    def add(tokens: Sequence[int], counted: bool) -> None:
        ids.extend(tokens)
        visual.extend([-1] * len(tokens))
        labels.extend(tokens if counted else [IGNORE] * len(tokens))

    def add_turn(role: str, text: str, groups: Sequence[float | None]) -> None:
        add(start, True)
        add([*tokenizer.encode(role), *newline], False)
        for g, seconds in enumerate(groups):
            add([] if seconds is None else tokenizer.encode(time_text(seconds)), False)
            ids.extend([0] * visual_tokens)
            visual.extend(range(g * visual_tokens, (g + 1) * visual_tokens))
            labels.extend([IGNORE] * visual_tokens)
        if groups:
            add(newline, False)
        if role == "assistant":
            answer_starts.append(len(ids))
        add(tokenizer.encode(text), role == "assistant")
        add([*end, *newline], True)

    add_turn("system", SYSTEM, ())
    for number, (role, text) in enumerate(turns):
        add_turn(role, text, times if number == 0 else ())
    cut = len(ids) > max_length
    if answer_starts[0] >= max_length:
        raise UserError(f"{len(ids)} tokens: the first {max_length} contain no part of an answer")
    arrays = [np.asarray(x[:max_length], np.int32) for x in (ids, visual, labels)]
    return Tokens(arrays[0], arrays[1], arrays[2], cut)


def unusable(error: Exception) -> str:
    """The reason why a sample is skipped. Errors of the machine, such as running out of memory, are raised again.

    For an unexpected error of a reader, the reason names the type, and the traceback is logged at debug level.
    """
    if machine_fault(error) is not None:
        raise error
    if isinstance(error, UserError):
        return str(error)
    logger.debug("a sample is skipped", exc_info=error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def open_media(record: Record, sampling: FrameSampling) -> Clip | None:
    """Opens the media of a record: a video file, a folder of frames (1 a second), or an image as 4 equal frames.

    Raises:
      UserError: it cannot be opened.
    """
    if record.kind == "text":
        return None
    assert record.media is not None
    if record.kind == "video":
        return open_video(record.media, sampling, threads=1)
    if not record.media.is_file():
        raise UserError(f"{record.media}: no such image")
    reader = ImageReader([record.media], fps=1.0)
    indices = np.zeros(FRAMES_PER_GROUP, np.int64)
    return Clip(record.media, reader, indices, frame_times(indices, 1.0))


def sample_tokens(
    record: Record, clip: Clip | None, tokenizer: PromptTokenizer, visual_tokens: int, max_length: int
) -> Tokens:
    """The tokens of a record whose media are open."""
    times: list[float | None] = []
    if clip is not None:
        times = [None] if record.kind == "image" else list(group_times(clip, record.scale))
    return tokenise(record.turns, times, tokenizer, visual_tokens, max_length)


def read_frames(record: Record, clip: Clip | None, size: int) -> np.ndarray:
    """All frames of a record whose media are open, uint8 [F, size, size, 3].

    Raises:
      UserError: some frame cannot be read. Training does not use a part of a video.
    """
    if clip is None:
        return np.zeros((0, size, size, 3), np.uint8)
    frames = np.concatenate(list(clip.batches(len(clip.indices), size)))
    if len(frames) < len(clip.indices):
        raise UserError(f"{record.media}: only {len(frames)} of {len(clip.indices)} frames can be read")
    return frames
