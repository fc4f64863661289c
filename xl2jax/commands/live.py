"""`xl2jax infer --live`: a video is watched as it comes, and questions are answered meanwhile."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import xl2jax
from xl2jax.checkpoint.params import stored_config
from xl2jax.checkpoint.sources import find_checkpoint
from xl2jax.commands.flags import PrefillFlags, require_checkpoint
from xl2jax.commands.infer_flags import Args, ComputeArgs, FrameArgs
from xl2jax.errors import UserError
from xl2jax.inference.answering import Answer
from xl2jax.inference.bilevel import BilevelConfig
from xl2jax.inference.generate import TokenSampling, check_answer_options
from xl2jax.inference.live import LiveVideo
from xl2jax.inference.live_sizes import LiveMemory, check_rate
from xl2jax.inference.selection import check_pool
from xl2jax.inference.video_cache import CacheConfig
from xl2jax.prompt import check_unicode, suffix
from xl2jax.system.backend import start_backend
from xl2jax.system.terminal import OutputError, stdin_is_closed
from xl2jax.video.live_source import Stream

if TYPE_CHECKING:
    from xl2jax.inference.api import Model

logger = logging.getLogger(__name__)


def watch_live(args: Args) -> int:
    """Runs the command and returns its exit status."""
    settings, source = _checked(args)
    folder = find_checkpoint(args.checkpoint)
    config = stored_config(folder, args.compute.weights)
    check_pool(settings["bilevel"], config.visual_tokens)
    start_backend()
    model = xl2jax.load(folder, dtype=args.compute.dtype, weights=args.compute.weights, progress=True)
    for question in args.questions:
        suffix(model.tokenizer, question)  # one that is too long is refused before anything is watched
    with model.watch_live(source, **settings) as live:
        live.start(log_error=False)  # waiting raises it
        asker = _Asker(args, model, live, settings["bilevel"])
        status = asker.interact() if args.interactive else asker.ask_on()
        logger.info(
            "saw %d frames up to %s; left out %d out of order and %d that came too fast; damaged packets: %d",
            live.frames, clock_text(live.seconds), live.clock.late, live.dropped, source.damaged,
        )  # fmt: skip
    return status


def _checked(args: Args) -> tuple[dict[str, Any], Stream]:
    """What the flags say, for `Model.watch_live`. Raises UserError for all errors that can be seen in them."""
    flags, compute, frames = args.live, args.compute, args.frames
    if args.video is None or args.image or args.images_as_frames or args.text_only:
        raise UserError("--live watches --video alone: give it, and no pictures")
    if args.cache is not None or args.plot is not None or compute.offload or compute.top_chunks == "all":
        raise UserError("--live has no --cache, --plot, --offload and --top-chunks all: leave them out")
    if dataclasses.replace(frames, fps=1.0) != FrameArgs() or frames.fps == "uniform":
        raise UserError(
            "--live takes --fps frames a second: leave out uniform, --max-fps, --max-frames and --folder-fps"
        )
    every = flags.ask_every
    if every is not None and not 0 < every < math.inf:
        raise UserError(f"--ask-every must be above 0, not {every}")
    if every is not None and (args.interactive or not args.question):
        raise UserError("--ask-every repeats --question: give one, and leave out --interactive")
    if str(args.video) == "-" and stdin_is_closed():
        raise UserError("--video -: standard input is closed")
    if str(args.video) == "-" and args.interactive:
        raise UserError("--video - and --interactive both read standard input: choose one")
    require_checkpoint(args.checkpoint)
    check_answer_options(args.answer.max_new_tokens, args.answer.seed)
    TokenSampling(args.answer.temperature, args.answer.top_p)
    if args.split.devices().tensor > 1:
        raise UserError("--live watches on one device: leave --tensor out")
    assert frames.fps != "uniform"
    check_rate(frames.fps)
    settings = {
        "fps": frames.fps,
        "clock": flags.clock,
        "config": PrefillFlags(window_chunks=compute.window_chunks).config(),
        "bilevel": BilevelConfig(
            pool=compute.pool, top_chunks=None if compute.top_chunks == ComputeArgs.top_chunks else compute.top_chunks
        ),
        "cache": CacheConfig(compute.cache_dtype),
        "memory": LiveMemory(
            flags.dense_minutes,
            flags.minutes,
            flags.host_gib,
            flags.disk_gib,
            flags.disk_folder,
            pooled_dtype=compute.cache_dtype,
        ),
    }
    return settings, Stream(args.video, follow=flags.follow)


@dataclasses.dataclass
class _Asker:
    """Asks about a live video and prints the answers."""

    args: Args
    model: Model
    live: LiveVideo
    bilevel: BilevelConfig

    def ask_on(self) -> int:
        """Asks --question at every interval of the video and at its end, or at the end alone."""
        begin, every = 0.0, self.args.live.ask_every
        while True:
            target = math.inf if every is None else begin + every
            while not self.live.wait(target, timeout=0.5):
                pass  # Ctrl-C is noticed between two waits
            end = self.live.seconds
            if self.live.finished and not self.live.frames:
                raise UserError(f"{self.live.path}: gave no picture")
            if end >= target or (self.live.frames and (end > begin or begin == 0)):
                answers = [self.ask(question, (begin, end)) for question in self.args.questions]
                end = max([end, *(seen_until(answer, end) for answer in answers)])
            if self.live.finished and self.live.seconds <= end:
                return 0
            begin = end

    def interact(self) -> int:
        """Answers the questions on stdin. A refused question does not end the conversation."""
        turns: list[tuple[str, str]] = []
        refused = 0
        for question in self._asked():
            try:
                check_unicode(question)
                while not self.live.frames and not self.live.finished:
                    self.live.wait(timeout=0.1)
                answer = self.ask(question, (0.0, self.live.seconds), turns)
                turns.append((question, answer.text))
            except OutputError:
                raise
            except UserError as e:
                if self.live.error is not None and not self.live.frames:
                    raise
                print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
                refused += 1
        self.live.wait(timeout=0)  # raises what ended the watching
        return 2 if refused and not turns else 0

    def _asked(self) -> Iterator[str]:
        yield from self.args.questions
        while True:
            if sys.stdin.isatty():
                print("> ", end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
            if not line:
                return
            if line.strip():
                yield line.strip()

    def ask(self, question: str, span: tuple[float, float], turns: list[tuple[str, str]] | None = None) -> Answer:
        """Asks, and prints the answer with the span of time, in seconds, that is new since the last one."""
        args, answer_args = self.args, self.args.answer
        # The span of time that an answer read is known when it has begun.
        streams = not args.json and args.live.ask_every is None
        if not args.json and len(args.question) > 1:
            print(f"> {question}")
        answer = self.model.ask(
            self.live,
            question,
            max_new_tokens=answer_args.max_new_tokens,
            sampling=TokenSampling(answer_args.temperature, answer_args.top_p),
            seed=answer_args.seed,
            bilevel=self.bilevel,
            history=turns,
            on_text=(lambda piece: print(piece, end="", flush=True)) if streams else None,
        )
        if args.json:
            print(json.dumps(self._row(answer, span), allow_nan=False), flush=True)
        elif streams:
            print(flush=True)
        else:
            print(f"[{clock_text(span[0])} - {clock_text(seen_until(answer, span[1]))}] {answer.text}", flush=True)
        return answer

    def _row(self, answer: Answer, span: tuple[float, float]) -> dict[str, Any]:
        live = self.live
        return {
            "question": answer.question,
            "answer": answer.text,
            "from_s": span[0],
            "to_s": seen_until(answer, span[1]),
            "started_at": live.started_at,
            "finish_reason": answer.finish_reason,
            "new_tokens": answer.new_tokens,
            "context_tokens": answer.context_tokens,
            "chunks": [dataclasses.asdict(c) for c in answer.chunks if c.dense],
            "timings": answer.timings,
            "frames": live.frames,
            "dropped": live.dropped,
            "late": live.clock.late,
            "bytes": {"device": live.device_bytes, "host": live.host_bytes, "disk": live.disk_bytes},
        }


def seen_until(answer: Answer, asked: float) -> float:
    """Time of the last frame that an answer read. Frames may have come since it was `asked` for."""
    return answer.chunks[-1].end if answer.chunks else asked


def clock_text(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
