"""The command line of infer.py: flags, the table of timings, JSON."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import jax
import tyro

import xl2jax
from xl2jax.errors import UserError
from xl2jax.inference import memory
from xl2jax.inference.api import Answer, Model
from xl2jax.inference.bilevel import BilevelConfig
from xl2jax.inference.generate import TokenSampling
from xl2jax.inference.layout import PrefillConfig
from xl2jax.inference.relevance import AttentionScorer
from xl2jax.inference.selection import RelevanceConfig, selection_for
from xl2jax.inference.store import cache_key, check_cache_file, load_cache, save_cache, video_key
from xl2jax.inference.video_cache import CacheConfig, WatchedVideo, read_thumbnails
from xl2jax.prompt import check_unicode, suffix
from xl2jax.system.atomic import check_file_target
from xl2jax.system.backend import ProgramCount, program_count, start_backend
from xl2jax.system.terminal import OutputError, argument_text, require_stdout, run_command, stdin_is_closed
from xl2jax.video.clip import Backend, Clip, FrameSampling, FrameTimes, open_video
from xl2jax.video.containers import require_video_path

logger = logging.getLogger(__name__)

DEFAULT_CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "demo"
"""The bundled checkpoint of a source checkout; an installed wheel has none."""


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

    fps: float | Literal["uniform"] = 1.0
    """Frames a second; uniform takes exactly --max-frames frames, spread evenly over the video."""
    max_fps: int | None = 4
    """Rate to rise to while --max-frames is not reached."""
    max_frames: int = 256
    """Most frames; beyond it they are spread evenly."""
    frame_times: FrameTimes = "auto"
    """What the model is told. auto: frame number / rate, or the frames' own times where these differ by more than half a
    second; upstream: always frame number / rate."""
    folder_fps: float = 1.0
    """Frames a second of a folder of images."""
    video_backend: Literal["auto", "decord", "pyav"] = "auto"
    """What reads videos; auto is pyav."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    seed: int = 0

    dtype: Literal["bfloat16", "float32", "float16"] | None = None
    """Of parameters, cache and activations; the checkpoint's own by default."""
    verify_checksums: bool = True
    """Compares each tensor of an Orbax checkpoint with the checksum that was kept when it was made."""
    compile_cache: bool = True
    """Keeps compiled programs between runs, so that the next one starts at once."""
    attention: str = "auto"
    """Attention implementation: auto, or one by name."""

    prefill: Literal["chunked", "dense"] = "chunked"
    chunk_groups: int = 4
    """Groups (of 4 frames) in a prefill chunk."""
    window_chunks: int = 3
    """Chunks before its own that a visual token sees."""

    decode: Literal["bilevel", "dense"] = "bilevel"
    top_chunks: int | None = None
    """Chunks that stay dense by relevance; 2 by default."""
    select_chunk_groups: int = 4
    """Groups in a selection chunk."""
    pool: int = 4
    """Visual tokens averaged into one where KV is pooled."""
    relevance: Literal["attention", "similarity", "file", "none", "random"] = "attention"
    relevance_layers: tuple[float, float] = (AttentionScorer.first_layer, AttentionScorer.last_layer)
    """Layers that the attention scorer counts, as shares of the depth."""
    relevance_heads: Literal["squared", "mean", "max"] = AttentionScorer.heads
    """How it sums over heads; squared: heads that look at one place count most."""
    relevance_keys: Literal["auto", "dense", "pooled"] = AttentionScorer.keys
    """Which KV it looks at. auto: dense, or pooled with --offload."""
    relevance_file: Path | None = None
    """Upstream's selection file."""
    relevance_category: str | None = None
    """Category in that file; all are searched by default."""
    relevance_missing: Literal["error", "dense"] = "error"
    """What to do with a question that the file lacks."""

    cache_dtype: Literal["bfloat16", "float32", "float16", "int8"] | None = None
    """Of the video's KV: int8 (a scale for each token and head), or --dtype by default."""
    offload: bool = False
    """Moves the video's dense KV to host memory; the device keeps pooled KV and the chosen chunks."""
    save_cache: Path | None = None
    """Keeps the video's KV cache in a file."""
    load_cache: Path | None = None
    """Reads it back; it must be of this video, checkpoint and settings."""

    json: bool = False
    """Prints one JSON object."""
    plot: Path | None = None
    """PNG of the timeline: thumbnails, relevance of every chunk, which ones stayed dense, the answers."""

    def sampling(self) -> FrameSampling:
        fps = None if self.fps == "uniform" else self.fps
        return FrameSampling(fps, self.max_fps, self.max_frames, self.frame_times)

    def prefill_config(self) -> PrefillConfig:
        if self.chunk_groups < 1 or self.window_chunks < 0:
            raise UserError("chunk groups must be 1 or more, window chunks 0 or more")
        return PrefillConfig(self.chunk_groups, self.window_chunks if self.prefill == "chunked" else None)

    def bilevel(self) -> BilevelConfig | None:
        if self.decode == "dense":
            return None
        if self.select_chunk_groups < 1 or self.pool < 1 or (self.top_chunks is not None and self.top_chunks < 0):
            raise UserError("select chunk groups and pool must be 1 or more, top chunks 0 or more")
        return BilevelConfig(self.select_chunk_groups, self.pool, self.top_chunks)

    def cache_config(self) -> CacheConfig:
        if self.offload and self.decode == "dense":
            raise UserError("--offload has no use with --decode dense, which reads all of the KV: leave one out")
        if self.offload and self.relevance_keys == "dense":
            raise UserError(
                "--relevance-keys dense: with --offload only the pooled KV is there to look at (auto or pooled)"
            )
        return CacheConfig(self.cache_dtype, self.offload)

    def relevance_config(self) -> RelevanceConfig:
        scorer = AttentionScorer(*self.relevance_layers, self.relevance_heads, self.relevance_keys)
        scorer.check(self.relevance)
        if (self.relevance == "file") != (self.relevance_file is not None):
            raise UserError("--relevance file and --relevance-file go together")
        if self.relevance_file is None and (self.relevance_category is not None or self.relevance_missing != "error"):
            raise UserError("--relevance-category and --relevance-missing need --relevance file")
        if self.top_chunks is not None and self.relevance in ("file", "none"):
            raise UserError(f"--top-chunks has no effect with --relevance {self.relevance}: leave it out")
        if self.decode == "dense" and (self.top_chunks is not None or self.relevance != "attention"):
            raise UserError("--top-chunks and --relevance have no effect with --decode dense: leave them out")
        return RelevanceConfig(
            self.relevance, scorer,
            self.relevance_file, self.relevance_category, self.relevance_missing,
        )  # fmt: skip

    @property
    def questions(self) -> tuple[str, ...]:
        return tuple(map(argument_text, self.question))

    def check(self) -> None:
        """What can be refused before anything is loaded."""
        require_stdout()
        if not self.question and not self.interactive:
            raise UserError("nothing to ask: give --question or --interactive")
        if self.interactive and stdin_is_closed():
            raise UserError("standard input is closed: --interactive has no questions to read")
        for question in self.questions:
            if not question.strip():
                raise UserError("the question is empty")
            check_unicode(question)
        if self.checkpoint == str(DEFAULT_CHECKPOINT) and not DEFAULT_CHECKPOINT.is_dir():
            raise UserError(
                "no checkpoint is installed: give --checkpoint with a folder or a hub id (BAAI/Video-XL-2), "
                "or run from a source checkout, which has checkpoints/demo"
            )
        if self.max_new_tokens < 1:
            raise UserError(f"max new tokens must be 1 or more, not {self.max_new_tokens}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed must be from 0 to {2**32 - 1}, not {self.seed}")
        require_video_path(self.video)
        if self.save_cache is not None and self.load_cache is not None:
            raise UserError("give --save-cache or --load-cache, not both")
        files = {
            "--video": self.video,
            "--save-cache": self.save_cache,
            "--load-cache": self.load_cache,
            "--plot": self.plot,
        }
        named: dict[str, str] = {}
        for flag, file in files.items():
            if file is not None and (other := named.setdefault(os.path.realpath(file), flag)) != flag:
                raise UserError(f"{flag} and {other} name the same file {file}")
        for target in filter(None, (self.save_cache, self.plot)):
            check_file_target(target)
        TokenSampling(self.temperature, self.top_p).check()
        for check in (self.sampling, self.prefill_config, self.bilevel, self.cache_config):
            check()
        if self.load_cache is not None:
            key = video_key(self.video, self.sampling(), self.folder_fps, self.prefill_config())
            check_cache_file(self.load_cache, key)
        relevance = self.relevance_config()
        if relevance.file is not None and relevance.missing == "error":
            for question in self.questions:
                selection_for(relevance, self.video, question)


def infer() -> int:
    """The command."""
    args = tyro.cli(Args, prog=None if sys.argv[0].startswith("xl2jax") else "python infer.py")
    args.check()
    programs = program_count()
    clip = None if args.load_cache is not None else _open(args)
    start_backend(keep_programs=args.compile_cache)
    started = time.perf_counter()
    model = xl2jax.load(
        args.checkpoint,
        dtype=args.dtype,
        implementation=args.attention,
        progress=True,
        verify_checksums=args.verify_checksums,
    )
    load_seconds = time.perf_counter() - started
    for question in args.questions:
        suffix(model.tokenizer, question)  # one that is too long is refused before the video is watched
    video = _watch(args, model, clip)
    answers = [_ask(args, model, video, q) for q in args.questions]
    refused = 0
    if args.interactive:
        further, refused = _interact(args, model, video, answers)
        answers += further
    if args.plot is not None:
        from xl2jax.inference.timeline import plot_answers

        if not video.thumbnails:  # the cache came from a file
            video.thumbnails = read_thumbnails(_open(args))
        plot_answers(args.plot, video, answers)
    if args.json:
        print(json.dumps(_report(model, video, answers, load_seconds, programs), allow_nan=False))
    else:
        _print_timings(video, answers, load_seconds, programs)
    return 2 if refused and not answers else 0


def _open(args: Args) -> Clip:
    """An unreadable video is refused here, before weights are read."""
    backend: Backend = args.video_backend
    clip = open_video(args.video, args.sampling(), backend=backend, folder_fps=args.folder_fps)
    clip.check()
    return clip


def _watch(args: Args, model: Model, clip: Clip | None) -> WatchedVideo:
    """Watches the clip, or reads the cache that was kept of it where there is no clip."""
    sampling, config, cache = args.sampling(), args.prefill_config(), args.cache_config()
    key: dict[str, Any] | None = None
    if args.save_cache is not None or args.load_cache is not None:
        key = cache_key(model, args.video, sampling, args.folder_fps, config, cache)
    if clip is None:
        assert args.load_cache is not None
        assert key is not None
        return load_cache(args.load_cache, model, key, args.video, args.bilevel(), cache)
    video = model.watch(clip, config=config, bilevel=args.bilevel(), cache=cache, progress=True)
    if args.save_cache is not None and key is not None:
        save_cache(args.save_cache, video, key)
    return video


def _ask(
    args: Args, model: Model, video: WatchedVideo, question: str, history: list[tuple[str, str]] | None = None
) -> Answer:
    stream: Callable[[str], None] | None = None
    if not args.json:
        if len(args.question) > 1:
            print(f"> {question}")

        def stream(piece: str) -> None:
            print(piece, end="", flush=True)

    answer = model.ask(
        video, question, max_new_tokens=args.max_new_tokens, sampling=TokenSampling(args.temperature, args.top_p),
        seed=args.seed, bilevel=args.bilevel(), relevance=args.relevance_config(), history=history, on_text=stream,
    )  # fmt: skip
    if not args.json:
        print(flush=True)
        if answer.finish_reason == "length":
            logger.info("the answer was cut off at %d tokens (--max-new-tokens)", answer.new_tokens)
    return answer


def _interact(args: Args, model: Model, video: WatchedVideo, earlier: list[Answer]) -> tuple[list[Answer], int]:
    """Answers the questions on stdin. Returns the answers, and how many questions were refused."""
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
            check_unicode(line)
            answers.append(_ask(args, model, video, line.strip(), [(a.question, a.text) for a in [*earlier, *answers]]))
        except OutputError:
            raise
        except UserError as e:  # one bad question does not end the conversation
            print(f"error: {e}", file=sys.stderr)
            refused += 1


def _report(
    model: Model, video: WatchedVideo, answers: list[Answer], load_seconds: float, programs: ProgramCount
) -> dict[str, Any]:
    layout, device = video.layout, jax.devices()[0]
    rows = [
        {
            "question": a.question, "answer": a.text, "finish_reason": a.finish_reason, "new_tokens": a.new_tokens, "suffix_tokens": a.suffix_tokens,
            "context_tokens": a.context_tokens, "chunks": [dataclasses.asdict(c) for c in a.chunks],
            "timings": a.timings,
        }
        for a in answers
    ]  # fmt: skip
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
        "prefill": dataclasses.asdict(video.plan.config),
        "answers": rows,
        "timings": {"load": load_seconds, **video.timings},
        "peak_memory_bytes": memory.peak_bytes(),
        "programs": {"compiled": programs.compiled, "from_cache": programs.from_cache},
        "device": f"{device.platform}: {device.device_kind}",
        "dtype": model.dtype,
        "cache": {
            "bytes": sum(x.nbytes for x in jax.tree.leaves((video.cache.k, video.cache.v))),
            "host_bytes": 0 if video.host is None else video.host.nbytes,
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
    rows.append(("programs", f"{programs.compiled:5} compiled, {programs.from_cache} kept from earlier runs"))
    rows.append(("peak memory", f"{memory.peak_bytes() / 2**30:8.2f} GiB"))
    for name, value in rows:
        print(f"{name:12} {value}", file=sys.stderr)


if __name__ == "__main__":
    run_command(infer)
