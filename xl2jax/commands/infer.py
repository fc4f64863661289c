"""`xl2jax infer` and infer.py: answers questions about a video, or about pictures."""

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
from typing import Any, NamedTuple

import jax
import tyro

import xl2jax
from xl2jax.checkpoint.params import stored_config
from xl2jax.checkpoint.sources import find_checkpoint
from xl2jax.commands.flags import OFFLOAD_IS_DENSE, PrefillFlags, require_checkpoint
from xl2jax.commands.infer_flags import Args, ComputeArgs, FrameArgs
from xl2jax.commands.live import watch_live
from xl2jax.errors import UserError
from xl2jax.inference import memory
from xl2jax.inference.answering import Answer
from xl2jax.inference.api import Model
from xl2jax.inference.bilevel import BilevelConfig
from xl2jax.inference.generate import TokenSampling, check_answer_options
from xl2jax.inference.layout import PrefillConfig
from xl2jax.inference.selection import check_pool
from xl2jax.inference.store import check_cache_file, load_cache, model_key, pictures_key, save_cache, video_key
from xl2jax.inference.video_cache import CacheConfig, WatchedVideo, read_thumbnails
from xl2jax.prompt import check_unicode, suffix
from xl2jax.system.atomic import check_file_target
from xl2jax.system.backend import ProgramCount, program_count, start_backend
from xl2jax.system.terminal import OutputError, argument_text, flag_errors, require_stdout, stdin_is_closed
from xl2jax.video.clip import Clip, FrameSampling, open_video, pictures_as_frames
from xl2jax.video.containers import require_video_path
from xl2jax.video.pictures import Picture

logger = logging.getLogger(__name__)


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
        args.check_media()
        require_checkpoint(args.checkpoint)
        check_answer_options(args.answer.max_new_tokens, args.answer.seed)
        args.split.devices()  # raises UserError for numbers out of range
        if args.video is not None:
            require_video_path(args.video)
        for path in args.image:
            require_video_path(path, "picture")
        _check_files(args)
        compute = args.compute
        request = cls(
            args,
            *reading(args.frames, compute),
            tokens=TokenSampling(args.answer.temperature, args.answer.top_p),
            reads_cache=args.cache is not None and args.cache.exists(),
        )
        if args.cache is not None and request.reads_cache:
            key = request.key
            if compute.cache_dtype is not None or compute.dtype is not None:
                key["dtype"] = compute.cache_dtype or compute.dtype
            check_cache_file(args.cache, key)
        return request

    @property
    def key(self) -> dict[str, Any]:
        """The part of a cache's key that is known before a model is loaded. It hashes the files."""
        args, key = self.args, dict[str, Any]()
        if args.image or args.text_only:
            key = pictures_key(args.image, "as frames" if args.images_as_frames else args.text, self.prefill)
        return key if args.video is None else key | video_key(args.video, self.frames, self.folder_fps, self.prefill)

    def open(self) -> Opened:
        """Opens what is looked at, so that unreadable files are refused before weights are read."""
        args, clip = self.args, None
        pictures = [Picture.read(path) for path in args.pictures]
        if args.has_frames:
            clip = (
                pictures_as_frames(args.image)
                if args.video is None
                else open_video(args.video, self.frames, folder_fps=self.folder_fps)
            )
            clip.check()
        return Opened(clip, pictures)


class Opened(NamedTuple):
    """The video and the pictures of a run."""

    clip: Clip | None
    pictures: list[Picture]


def _check_questions(args: Args) -> None:
    require_stdout()
    if not args.question and not args.interactive:
        raise UserError("nothing to ask: give --question or --interactive")
    if args.interactive and stdin_is_closed():
        raise UserError("standard input is closed: --interactive has no questions to read")
    for question in map(argument_text, args.question):
        if not question.strip():
            raise UserError("the question is empty")
        check_unicode(question)


def _check_files(args: Args) -> None:
    named: dict[str, str] = {}
    given = {"--video": args.video, "--cache": args.cache, "--plot": args.plot}
    for flag, file in [*given.items(), *(("--image", file) for file in args.image)]:
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
    if args.live.live:
        _check_questions(args)
        return watch_live(args)
    request = Request.check(args)
    programs = program_count()
    opened = None if request.reads_cache else request.open()
    folder = find_checkpoint(args.checkpoint)
    config = stored_config(folder, args.compute.weights)
    if args.pictures:
        config.grids()
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
        # A question that is too long is refused before the video is watched.
        suffix(model.tokenizer, question, lead="" if args.text else "\n")
    video = _watch(request, model, opened)
    answers = [_ask(request, model, video, q) for q in args.questions]
    refused = 0
    if args.interactive:
        further, refused = _interact(request, model, video, answers)
        answers += further
    if args.plot is not None:
        from xl2jax.inference.timeline import plot_answers

        if not video.thumbnails:  # the cache came from a file
            clip = request.open().clip
            assert clip is not None
            video.thumbnails = read_thumbnails(clip)
        plot_answers(args.plot, video, answers)
    if args.json:
        print(json.dumps(_report(args, model, video, answers, load_seconds, programs), allow_nan=False))
    else:
        _print_timings(video, answers, load_seconds, programs)
    return 2 if refused and not answers else 0


def _watch(request: Request, model: Model, opened: Opened | None) -> WatchedVideo:
    """Watches what was opened, or reads its KV from the cache file where that is None."""
    args, file = request.args, request.args.cache
    key = {} if file is None else request.key | model_key(model, request.cache)
    if opened is None:
        assert file is not None
        logger.info("%s: reading the video's KV from this file", file)
        name = args.video or Path(", ".join(map(str, args.image)))
        return load_cache(file, model, key, name, request.bilevel, request.cache)
    settings: dict[str, Any] = {"config": request.prefill, "bilevel": request.bilevel, "cache": request.cache}
    if opened.clip is not None and not opened.pictures:
        video = model.watch(opened.clip, progress=True, **settings)
    else:
        video = model.see(opened.pictures, args.text, video=opened.clip, progress=True, **settings)
    if file is None:
        return video
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
            if request.args.pictures and "<image>" in question:
                raise UserError("<image> names the place of a picture in --question only: ask without it")
            history = [(a.question, a.text) for a in [*earlier, *answers]]
            answers.append(_ask(request, model, video, question, history))
        except OutputError:
            raise
        except UserError as e:  # a refused question does not end the conversation
            print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
            refused += 1


def _report(
    args: Args, model: Model, video: WatchedVideo, answers: list[Answer], load_seconds: float, programs: ProgramCount
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
        "video": video.path if layout.groups else None,
        "images": [str(path) for path in args.image],
        "duration_s": round(video.duration, 3),
        "frames": len(video.times),
        "groups": layout.groups,
        "tokens": {
            "prefix": layout.prefix,
            "pictures": video.picture_tokens,
            "video": layout.tokens - layout.prefix - layout.tail,
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
