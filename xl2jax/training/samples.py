"""Converts a record to model inputs: frames, token ids and labels (upstream: train.py, preprocess_qwen).

The conversation is tokenised piece by piece, as upstream does: role, newline, text, `<|im_end|>`, newline. A turn with
the video or with pictures consists of `<|im_start|>user\\n`, the video or the tiles of all of its pictures with nothing
between them, a newline, and the text after `<image>`. Only a video has times. The loss counts
the assistant's text, and in all turns `<|im_start|>`, `<|im_end|>` and the newline after it. The name of a control
token in the text of a turn is plain text; only the template contains control tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from xl2jax.config import FRAMES_PER_GROUP, VideoXL2Config
from xl2jax.errors import UserError
from xl2jax.prompt import IM_END, IM_START, SYSTEM, PromptTokenizer, time_text
from xl2jax.system.terminal import machine_fault
from xl2jax.training.loss import IGNORE
from xl2jax.training.records import Record
from xl2jax.video.clip import Clip, open_video
from xl2jax.video.frame_sampling import FrameSampling
from xl2jax.video.image_files import image_size, read_image
from xl2jax.video.pictures import cut, fit

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
    times: Sequence[float],
    tokenizer: PromptTokenizer,
    visual_tokens: int,
    max_length: int,
    *,
    pictures: Sequence[int] = (),
) -> Tokens:
    """Token ids, places of visual tokens and labels of a conversation.

    `times` has the time of each group of frames, which has `visual_tokens`. `pictures` has the number of visual tokens of
    all pictures of each turn. As upstream does, tokens after the first `max_length` are cut off.

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

    def add_visual(count: int, first: int) -> None:
        ids.extend([0] * count)
        visual.extend(range(first, first + count))
        labels.extend([IGNORE] * count)

    def add_turn(role: str, text: str, groups: Sequence[float] = (), tiles: int = 0, before: int = 0) -> None:
        add(start, True)
        add([*tokenizer.encode(role), *newline], False)
        for g, seconds in enumerate(groups):
            add(tokenizer.encode(time_text(seconds)), False)
            add_visual(visual_tokens, g * visual_tokens)
        add_visual(tiles, before)
        if groups or tiles:
            add(newline, role == "assistant")
        if role == "assistant":
            answer_starts.append(len(ids))
        add(tokenizer.encode(text), role == "assistant")
        add([*end, *newline], True)

    add_turn("system", SYSTEM)
    counts = [*pictures, *[0] * (len(turns) - len(pictures))]
    for number, (role, text) in enumerate(turns):
        add_turn(role, text, times if number == 0 else (), counts[number], sum(counts[:number]))
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


class Media(NamedTuple):
    """The open video of a record, or how its pictures are cut into tiles."""

    clip: Clip | None = None
    tiles: tuple[int, ...] = ()
    """The number of tiles of each picture."""

    @property
    def groups(self) -> int:
        return 0 if self.clip is None else len(self.clip.indices) // FRAMES_PER_GROUP


def open_media(record: Record, sampling: FrameSampling, model: VideoXL2Config) -> Media:
    """Opens the video of a record: a file, or a folder of frames (1 a second). Of pictures it reads the sizes.

    Raises:
      UserError: it cannot be opened.
    """
    if record.media is not None:
        return Media(clip=open_video(record.media, sampling, threads=1))
    size, grids = model.vision.image_size, model.grids() if record.pictures else ()
    return Media(tiles=tuple(fit(*image_size(path), size, grids).tiles for path in record.pictures))


def sample_tokens(
    record: Record, media: Media, tokenizer: PromptTokenizer, model: VideoXL2Config, max_length: int
) -> Tokens:
    """The tokens of a record whose media are open."""
    times = [] if media.clip is None else group_times(media.clip, record.scale)
    counts, pictures = iter(media.tiles), []
    for places in record.places:
        pictures.append(sum(itertools.islice(counts, places)) * model.tile_tokens)
    return tokenise(record.turns, times, tokenizer, model.visual_tokens, max_length, pictures=pictures)


def read_frames(record: Record, media: Media, size: int) -> np.ndarray:
    """All frames of a record whose media are open, uint8 [F, size, size, 3].

    Raises:
      UserError: some frame cannot be read. Training does not use a part of a video.
    """
    clip = media.clip
    if clip is None:
        return np.zeros((0, size, size, 3), np.uint8)
    frames = np.concatenate(list(clip.batches(len(clip.indices), size)))
    if len(frames) < len(clip.indices):
        raise UserError(f"{record.media}: only {len(frames)} of {len(clip.indices)} frames can be read")
    return frames


def read_tiles(record: Record, model: VideoXL2Config) -> np.ndarray:
    """The tiles of all pictures of a record, uint8 [N, size, size, 3]. Raises UserError where one cannot be read."""
    size = model.vision.image_size
    tiles = [cut(read_image(path, still=True), size, model.grids()) for path in record.pictures]
    return np.concatenate([*tiles, np.zeros((0, size, size, 3), np.uint8)])
