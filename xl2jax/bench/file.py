"""`bench e2e --video`: from a file on disk to an answer, with reading and computing side by side."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jax

import xl2jax
from xl2jax.bench.e2e import E2EArgs
from xl2jax.bench.read import ensure_video
from xl2jax.commands.flags import DEFAULT_CHECKPOINT
from xl2jax.inference import memory
from xl2jax.inference.video_cache import CacheConfig
from xl2jax.video.clip import FrameSampling, open_video
from xl2jax.video.read_ahead import default_workers

_QUESTION = "What is shown?"
STAGES = ("read_alone_s", "read_wait_s", "vision_s", "prefill_s", "first_token_s")


class _Compilation:
    """Counts the seconds that XLA spends compiling from now on."""

    def __init__(self) -> None:
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._add)

    def _add(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.seconds += duration_secs


def file_row(args: E2EArgs, _: str, frames: int) -> dict[str, Any]:
    """Times watching `frames` frames of a file, and a question about them.

    `read_alone_s` is the time of reading the same frames while nothing is computed. `overlap` is the time of watching
    divided by the longer one of reading alone and of computing (vision and prefill), without compilation. It is 1 where
    the shorter one is hidden altogether. `reader_bytes` is how far reading alone raised the peak memory of the process.
    """
    path = ensure_video(args.video, args.synthetic or "")
    sampling = FrameSampling(args.fps, None, frames)
    model = xl2jax.load(
        args.checkpoint or DEFAULT_CHECKPOINT, dtype=args.dtype, weights=args.weights, implementation=args.attention
    )
    before, started = memory.host_peak_bytes(), time.perf_counter()
    clip = open_video(path, sampling)
    for _batch in clip.batches(64, model.config.vision.image_size, workers=default_workers()):
        pass
    alone, reader = time.perf_counter() - started, memory.host_peak_bytes() - before
    compilation = _Compilation()
    started = time.perf_counter()
    bilevel = args.decode.bilevel()
    video = model.watch(
        path,
        sampling,
        args.prefill.config(),
        bilevel=bilevel,
        cache=CacheConfig(args.cache_dtype, args.offload),
        progress=True,
        measure_stages=True,
    )
    watching = time.perf_counter() - started
    compile_s = compilation.seconds
    for _repeat in range(2):  # the first question compiles
        started = time.perf_counter()
        answer = model.ask(video, _QUESTION, max_new_tokens=16, bilevel=bilevel)
    timings = answer.timings
    computing = video.timings["vision"] + video.timings["prefill"] - compile_s
    return {
        "mode": "watch",
        "frames": len(video.times),
        "tokens": video.kv.layout.tokens,
        "read_alone_s": alone,
        "seconds": watching,
        "read_wait_s": video.timings["read"],
        "vision_s": video.timings["vision"],
        "prefill_s": video.timings["prefill"],
        "compile_s": compile_s,
        "overlap": (watching - compile_s) / max(alone, computing),
        "first_token_s": timings["select"] + timings["question"],
        "tokens_per_s": timings["decode_tokens_per_s"],
        "reader_bytes": reader,
        "cache_bytes": sum(x.nbytes for x in jax.tree.leaves((video.kv.cache.k, video.kv.cache.v))),
        "peak_memory_bytes": memory.peak_bytes(),
    }


def plot_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Plots seconds by stage and peak memory over the number of frames."""
    from xl2jax.bench.figures import plot_stages

    plot_stages(path, rows, STAGES)
