"""The flags of `xl2jax infer`."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Literal

import tyro

from xl2jax.commands.flags import DEFAULT_CHECKPOINT, TensorFlags
from xl2jax.config import Weights
from xl2jax.errors import UserError
from xl2jax.inference.pictures import IMAGE, check_places, split_question
from xl2jax.system.terminal import argument_text


@dataclasses.dataclass(frozen=True)
class FrameArgs:
    """Which frames are read."""

    fps: float | Literal["uniform"] = 1.0
    """Frames per second to read. uniform reads --max-frames frames, spread evenly over the video."""
    max_fps: int = 4
    """Short videos are read at up to this many frames per second, as long as --max-frames is not exceeded."""
    max_frames: int = 256
    """The largest number of frames; a longer video is sampled evenly."""
    folder_fps: float = 1.0
    """Frames per second at which a folder of images was taken."""


@dataclasses.dataclass(frozen=True)
class AnswerArgs:
    """How answers are written."""

    max_new_tokens: int = 128
    """An answer is cut off at this many tokens."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy decoding."""
    top_p: float = 1.0
    """Samples from the most likely tokens that together have this probability."""
    seed: int = 0
    """Seed of the sampling."""


@dataclasses.dataclass(frozen=True)
class ComputeArgs:
    """Settings that trade accuracy for memory and time."""

    dtype: Literal["bfloat16", "float32", "float16"] | None = None
    """dtype of parameters, KV and activations; by default that of the checkpoint."""
    weights: Weights | None = None
    """Quantises the LLM's matrices to 8 or 4 bits on loading; by default they are as the checkpoint stores them."""
    window_chunks: int | Literal["all"] = 3
    """How many chunks (of 16 frames) before its own a visual token sees during prefill; all is dense prefill."""
    top_chunks: int | Literal["all"] | None = None
    """How many chunks (of 16 frames) stay dense because they matter to the question: by default 2; all is dense
    decoding."""
    pool: int = 4
    """How many visual tokens are averaged into one in all other chunks."""
    cache_dtype: Literal["int8"] | None = None
    """Keeps the video's KV in 8 bits, with a scale for each token and head."""
    offload: bool = False
    """Moves the video's dense KV to host memory; the device keeps the pooled KV and the chosen chunks."""


@dataclasses.dataclass(frozen=True)
class LiveArgs:
    """A video that is watched as it comes."""

    live: bool = False
    """Watches --video as it comes: an address (rtsp://, http:// and others), a file that is read once, a pipe, or - for
    standard input. --question is asked at its end, --interactive and --ask-every meanwhile. With --json each answer is a
    line."""
    ask_every: float | None = None
    """Asks --question each time that so many seconds of the video have passed, and at its end."""
    follow: bool = False
    """--video is a file that another program is still writing. It ends when nothing was added for 15 seconds."""
    clock: Literal["stream", "wall"] = "stream"
    """Whose time the model reads: the video's, or this machine's when a frame came. Both begin with 0."""
    dense_minutes: float = 10.0
    """How many minutes of a live video stay dense on the device."""
    minutes: float = 60.0
    """How many are remembered at all; what is older than --dense-minutes is pooled on the device."""
    host_gib: float = 2.0
    """GiB of host memory for dense KV that has left the device and that questions bring back."""
    disk_gib: float = 0.0
    """GiB in --disk-folder for dense KV that the host has no room for."""
    disk_folder: Path | None = None
    """Folder for these files. They are removed at the end."""


@dataclasses.dataclass(frozen=True)
class Args:
    """Answers questions about a video, or about pictures, with Video-XL-2."""

    video: Path | None = None
    """A video file, or a folder of images that are its frames."""
    image: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """A picture, which is seen in tiles; may be given several times, and beside --video."""
    images_as_frames: bool = False
    """Shows the pictures as upstream's benchmarks do: as frames of a video, one a second, padded to squares."""
    text_only: bool = False
    """Asks without a video and without pictures."""
    question: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What to ask; may be given several times. <image> in it is the place of a picture, and <video> beside pictures that
    of the video; by default they come first."""
    interactive: bool = False
    """Reads further questions from stdin, a line each; earlier turns are kept."""
    checkpoint: str = str(DEFAULT_CHECKPOINT)
    """Orbax folder, PyTorch folder or hub id (BAAI/Video-XL-2)."""
    cache: Path | None = None
    """File for the video's KV: it is read if it exists, and written otherwise."""
    json: bool = False
    """Prints one JSON object."""
    plot: Path | None = None
    """PNG of the timeline: thumbnails, the relevance of every chunk, and which chunks stayed dense."""
    frames: tyro.conf.OmitArgPrefixes[FrameArgs] = FrameArgs()
    answer: tyro.conf.OmitArgPrefixes[AnswerArgs] = AnswerArgs()
    compute: tyro.conf.OmitArgPrefixes[ComputeArgs] = ComputeArgs()
    live: tyro.conf.OmitArgPrefixes[LiveArgs] = LiveArgs()
    split: tyro.conf.OmitArgPrefixes[TensorFlags] = dataclasses.field(default_factory=TensorFlags)

    @property
    def pictures(self) -> tuple[Path, ...]:
        """The pictures that are seen in tiles."""
        return () if self.images_as_frames else self.image

    @property
    def has_frames(self) -> bool:
        return self.video is not None or self.images_as_frames

    @property
    def text(self) -> str | None:
        """What stands before all questions, where they name the places of pictures."""
        return self._split[0][0] if self._split else None

    @property
    def questions(self) -> tuple[str, ...]:
        """The questions without `text`."""
        return tuple(question for _, question in self._split)

    @functools.cached_property
    def _split(self) -> list[tuple[str | None, str]]:
        questions = map(argument_text, self.question)
        return [split_question(q) if self.pictures else (None, q) for q in questions]

    def check_media(self) -> None:
        """Raises UserError unless the flags say what to look at, and the questions agree on the places of pictures."""
        if self.live != LiveArgs():
            raise UserError("flags of a live video have no effect without --live: add it, or leave them out")
        given = self.video is not None or bool(self.image)
        if self.text_only and given:
            raise UserError("--text-only has no use with --video or --image: leave it out")
        if not self.text_only and not given:
            raise UserError("nothing to look at: give --video or --image (or --text-only, to ask without)")
        if self.images_as_frames and (self.video is not None or not self.image):
            raise UserError("--images-as-frames makes a video of --image: give pictures, and no --video")
        if self.images_as_frames and any(IMAGE in question for question in self.questions):
            raise UserError(
                f"{IMAGE} has no place with --images-as-frames, which shows pictures as a video: leave it out"
            )
        if len({text for text, _ in self._split}) > 1:
            raise UserError("the questions have <image> in different places: ask them in runs of their own")
        if self.text is not None:
            check_places(self.text, len(self.pictures), video=self.video is not None)
        if not self.has_frames:
            compute = dataclasses.replace(self.compute, dtype=None, weights=None, cache_dtype=None)
            if self.frames != FrameArgs() or compute != ComputeArgs() or self.plot is not None:
                raise UserError(
                    "without a video, flags for its frames and chunks have no effect: leave out --fps, --max-fps, "
                    "--max-frames, --folder-fps, --window-chunks, --top-chunks, --pool, --offload and --plot"
                )
        if self.images_as_frames and self.frames != FrameArgs():
            raise UserError("--images-as-frames shows all pictures: leave out the flags for frames")
