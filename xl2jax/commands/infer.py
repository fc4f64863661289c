"""`xl2jax infer` and infer.py: answers questions about a video."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import tyro

import xl2jax
from xl2jax.checkpoint.params import stored_config
from xl2jax.checkpoint.sources import find_checkpoint
from xl2jax.commands.flags import DEFAULT_CHECKPOINT, OFFLOAD_IS_DENSE, PrefillFlags, TensorFlags, require_checkpoint
from xl2jax.config import Weights
from xl2jax.errors import UserError
from xl2jax.inference import memory
from xl2jax.inference.answering import Answer
from xl2jax.inference.api import Model
from xl2jax.inference.bilevel import BilevelConfig
from xl2jax.inference.generate import TokenSampling, check_answer_options
from xl2jax.inference.layout import PrefillConfig
from xl2jax.inference.selection import check_pool
from xl2jax.inference.store import cache_key, check_cache_file, load_cache, save_cache, video_key
from xl2jax.inference.video_cache import CacheConfig, WatchedVideo, read_thumbnails
from xl2jax.prompt import check_unicode, suffix
from xl2jax.system.atomic import check_file_target
from xl2jax.system.backend import ProgramCount, program_count, start_backend
from xl2jax.system.terminal import OutputError, argument_text, flag_errors, require_stdout, stdin_is_closed
from xl2jax.video.clip import Clip, FrameSampling, open_video
from xl2jax.video.containers import require_video_path

logger = logging.getLogger(__name__)


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


class Reading(NamedTuple):
    """How a video is watched and read for questions."""

    frames: FrameSampling
    folder_fps: float
    prefill: PrefillConfig
    bilevel: BilevelConfig | None
    cache: CacheConfig


def reading(frames: FrameArgs, compute: ComputeArgs) -> Reading:
    """What these flags say. Raises UserError where they exclude each other."""
    top = compute.top_chunks
    if compute.offload and top == "all":
        raise UserError(OFFLOAD_IS_DENSE)
    if not 0 < frames.folder_fps < math.inf:
        raise UserError(f"folder fps must be above 0, not {frames.folder_fps}")
    if top == "all" and compute.pool != ComputeArgs.pool:
        raise UserError("--pool has no effect with --top-chunks all, which pools nothing: leave one out")
    return Reading(
        FrameSampling(None if frames.fps == "uniform" else frames.fps, frames.max_fps, frames.max_frames),
        frames.folder_fps,
        PrefillFlags(window_chunks=compute.window_chunks).config(),
        None if top == "all" else BilevelConfig(pool=compute.pool, top_chunks=top),
        CacheConfig(compute.cache_dtype, compute.offload),
    )


@dataclasses.dataclass(frozen=True)
class Args:
    """Answers questions about a video with Video-XL-2."""

    video: Path
    """A video file, or a folder of images."""
    question: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What to ask; may be given several times."""
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
    split: tyro.conf.OmitArgPrefixes[TensorFlags] = dataclasses.field(default_factory=TensorFlags)

    @property
    def questions(self) -> tuple[str, ...]:
        return tuple(map(argument_text, self.question))


@dataclasses.dataclass(frozen=True)
class Request:
    """The flags as settings of the library, checked as far as possible without the model."""

    args: Args
    frames: FrameSampling
    folder_fps: float
    prefill: PrefillConfig
    bilevel: BilevelConfig | None
    cache: CacheConfig
    tokens: TokenSampling
    reads_cache: bool

    @classmethod
    def check(cls, args: Args) -> Request:
        """Checks the flags. Raises UserError for all errors that can be seen before anything is loaded."""
        _check_questions(args)
        require_checkpoint(args.checkpoint)
        check_answer_options(args.answer.max_new_tokens, args.answer.seed)
        args.split.devices()  # raises UserError for numbers out of range
        require_video_path(args.video)
        _check_files(args)
        compute = args.compute
        request = cls(
            args,
            *reading(args.frames, compute),
            tokens=TokenSampling(args.answer.temperature, args.answer.top_p),
            reads_cache=args.cache is not None and args.cache.exists(),
        )
        if args.cache is not None and request.reads_cache:
            key = video_key(args.video, request.frames, request.folder_fps, request.prefill)
            if compute.cache_dtype is not None or compute.dtype is not None:
                key["dtype"] = compute.cache_dtype or compute.dtype
            check_cache_file(args.cache, key)
        return request

    def open(self) -> Clip:
        """Opens the video, so that an unreadable one is refused before weights are read."""
        clip = open_video(self.args.video, self.frames, folder_fps=self.folder_fps)
        clip.check()
        return clip


def _check_questions(args: Args) -> None:
    require_stdout()
    if not args.question and not args.interactive:
        raise UserError("nothing to ask: give --question or --interactive")
    if args.interactive and stdin_is_closed():
        raise UserError("standard input is closed: --interactive has no questions to read")
    for question in args.questions:
        if not question.strip():
            raise UserError("the question is empty")
        check_unicode(question)


def _check_files(args: Args) -> None:
    named: dict[str, str] = {}
    for flag, file in {"--video": args.video, "--cache": args.cache, "--plot": args.plot}.items():
        if file is not None and (other := named.setdefault(os.path.realpath(file), flag)) != flag:
            raise UserError(f"{flag} and {other} name the same file {file}")
    if args.plot is not None:
        check_file_target(args.plot)
    if args.cache is not None and not args.cache.exists():
        check_file_target(args.cache)


def main() -> int:
    """Runs the command and returns its exit status."""
    with flag_errors():
        args = tyro.cli(Args, prog=None if sys.argv[0].startswith("xl2jax") else "python infer.py")
    request = Request.check(args)
    programs = program_count()
    clip = None if request.reads_cache else request.open()
    folder = find_checkpoint(args.checkpoint)
    config = stored_config(folder, args.compute.weights)
    if request.bilevel is not None:
        check_pool(request.bilevel, config.visual_tokens)
    args.split.devices().check(config)
    start_backend()
    started = time.perf_counter()
    model = xl2jax.load(
        folder, dtype=args.compute.dtype, weights=args.compute.weights, progress=True, tensor=args.split.tensor
    )
    load_seconds = time.perf_counter() - started
    for question in args.questions:
        suffix(model.tokenizer, question)  # a question that is too long is refused before the video is watched
    video = _watch(request, model, clip)
    answers = [_ask(request, model, video, q) for q in args.questions]
    refused = 0
    if args.interactive:
        further, refused = _interact(request, model, video, answers)
        answers += further
    if args.plot is not None:
        from xl2jax.inference.timeline import plot_answers

        if not video.thumbnails:  # the cache came from a file
            video.thumbnails = read_thumbnails(request.open())
        plot_answers(args.plot, video, answers)
    if args.json:
        print(json.dumps(_report(model, video, answers, load_seconds, programs), allow_nan=False))
    else:
        _print_timings(video, answers, load_seconds, programs)
    return 2 if refused and not answers else 0


def _watch(request: Request, model: Model, clip: Clip | None) -> WatchedVideo:
    """Watches the clip, or reads its KV from the cache file where `clip` is None."""
    file = request.args.cache
    if file is None:
        assert clip is not None
        return model.watch(clip, config=request.prefill, bilevel=request.bilevel, cache=request.cache, progress=True)
    key = cache_key(model, request.args.video, request.frames, request.folder_fps, request.prefill, request.cache)
    if clip is None:
        logger.info("%s: reading the video's KV from this file", file)
        return load_cache(file, model, key, request.args.video, request.bilevel, request.cache)
    video = model.watch(clip, config=request.prefill, bilevel=request.bilevel, cache=request.cache, progress=True)
    save_cache(file, video, key)
    logger.info("%s: wrote the video's KV to this file", file)
    return video


def _ask(
    request: Request, model: Model, video: WatchedVideo, question: str, history: list[tuple[str, str]] | None = None
) -> Answer:
    args = request.args
    stream: Callable[[str], None] | None = None
    if not args.json:
        if len(args.question) > 1:
            print(f"> {question}")

        def stream(piece: str) -> None:
            print(piece, end="", flush=True)

    answer = model.ask(
        video,
        question,
        max_new_tokens=args.answer.max_new_tokens,
        sampling=request.tokens,
        seed=args.answer.seed,
        bilevel=request.bilevel,
        history=history,
        on_text=stream,
    )
    if not args.json:
        print(flush=True)
        if answer.finish_reason == "length":
            logger.info("the answer was cut off at %d tokens (--max-new-tokens)", answer.new_tokens)
    return answer


def _interact(request: Request, model: Model, video: WatchedVideo, earlier: list[Answer]) -> tuple[list[Answer], int]:
    """Answers the questions on stdin. Returns the answers and the number of refused questions."""
    answers: list[Answer] = []
    refused = 0
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return answers, refused
        if not line.strip():
            continue
        try:
            question = line.strip()
            check_unicode(question)
            history = [(a.question, a.text) for a in [*earlier, *answers]]
            answers.append(_ask(request, model, video, question, history))
        except OutputError:
            raise
        except UserError as e:  # a refused question does not end the conversation
            print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
            refused += 1


def _report(
    model: Model, video: WatchedVideo, answers: list[Answer], load_seconds: float, programs: ProgramCount
) -> dict[str, Any]:
    kv, device = video.kv, jax.devices()[0]
    layout = kv.layout
    rows = [
        {
            "question": a.question,
            "answer": a.text,
            "finish_reason": a.finish_reason,
            "new_tokens": a.new_tokens,
            "suffix_tokens": a.suffix_tokens,
            "context_tokens": a.context_tokens,
            "chunks": [dataclasses.asdict(c) for c in a.chunks],
            "timings": a.timings,
        }
        for a in answers
    ]
    return {
        "video": video.path,
        "duration_s": round(video.duration, 3),
        "frames": len(video.times),
        "groups": layout.groups,
        "tokens": {
            "prefix": layout.prefix,
            "video": layout.tokens - layout.prefix,
            "suffix": answers[0].suffix_tokens if answers else 0,
        },
        "prefill": dataclasses.asdict(kv.plan.config),
        "answers": rows,
        "timings": {"load": load_seconds, **video.timings},
        "peak_memory_bytes": memory.peak_bytes(),
        "programs": {"compiled": programs.compiled, "from_cache": programs.from_cache},
        "device": f"{device.platform}: {device.device_kind}",
        "tensor": model.network.tensor,
        "dtype": model.dtype,
        "weights": model.config.llm.weights,
        "cache": {
            "bytes": sum(x.nbytes for x in jax.tree.leaves((kv.cache.k, kv.cache.v))),
            "host_bytes": 0 if kv.host is None else kv.host.nbytes,
        },
        "versions": {"python": platform.python_version()} | {p: version(p) for p in ("xl2jax", "jax", "flax")},
    }


def _print_timings(video: WatchedVideo, answers: list[Answer], load_seconds: float, programs: ProgramCount) -> None:
    rows = [("load", f"{load_seconds:8.2f} s")] + [(k, f"{v:8.2f} s") for k, v in video.timings.items()]
    for i, a in enumerate(answers, 1):
        label = f"answer {i}" if len(answers) > 1 else "answer"
        t = a.timings
        rows.append(
            (label, f"{t['select'] + t['question']:8.2f} s to first token, {t['decode_tokens_per_s']:.1f} tokens/s")
        )
    rows.append(("programs", f"{programs.compiled:5} compiled, {programs.from_cache} from earlier runs"))
    rows.append(("peak memory", f"{memory.peak_bytes() / 2**30:8.2f} GiB"))
    for name, value in rows:
        print(f"{name:12} {value}", file=sys.stderr)
