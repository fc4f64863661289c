"""`bench e2e`: the whole model stage by stage, from pixels on the host to the first token and beyond.

Everything runs in one process with ascending lengths, so that each row's peak memory is its own. Times are medians after
a warm-up that compiles. The whole run is timed once. MFU is relative to the matrix rate of the card, which is measured
first.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from xl2jax.bench.check import check_rows
from xl2jax.bench.kernels import ceilings
from xl2jax.bench.setup import DECODE_TOKENS, Setup, random_params, timed
from xl2jax.commands.flags import BilevelFlags, PrefillFlags, whole_numbers
from xl2jax.config import FRAMES_PER_GROUP, PRESETS, VideoXL2Config, Weights
from xl2jax.inference import compiled, flops, memory, session
from xl2jax.inference.bilevel import BilevelConfig
from xl2jax.inference.layout import PrefillConfig
from xl2jax.inference.network import Network
from xl2jax.inference.prefill import default_steps
from xl2jax.inference.selection import check_bilevel
from xl2jax.models.video_xl2 import normalise


@dataclasses.dataclass(frozen=True)
class E2EArgs:
    """Times every stage of the whole model on random weights and random frames."""

    frames: str = "256,512,1024,2048,4096,10000"
    """Comma-separated numbers of frames."""
    video: Path | None = None
    """A video file: times reading it, watching it with --checkpoint, and answering."""
    synthetic: str | None = None
    """Instead of --video, a video that is made first, such as 20m@1080p or 1h@720p."""
    checkpoint: str | None = None
    """Checkpoint for --video and --synthetic; by default the bundled one."""
    fps: float = 1.0
    """Frames a second that are taken from the file, up to --frames."""
    cache_dtype: Literal["int8"] | None = None
    """dtype of the video's KV; by default --dtype."""
    offload: bool = False
    """Keeps the dense video KV in host memory."""
    plot: Path | None = None
    """PNG of seconds by stage and of peak memory, with --video or --synthetic."""
    preset: str = "video-xl-2"
    """The sizes of the model, by name: video-xl-2 is the released one."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """The type of weights and activations."""
    weights: Weights | None = None
    """Has the LLM's matrices in 8 or 4 bits."""
    prefill: tyro.conf.OmitArgPrefixes[PrefillFlags] = dataclasses.field(default_factory=PrefillFlags)
    step_groups: int | None = None
    """Groups that go through the networks together; by default as many as in infer.py on this device."""
    decode: tyro.conf.OmitArgPrefixes[BilevelFlags] = dataclasses.field(default_factory=BilevelFlags)
    dense_up_to: int = 2048
    """Dense prefill is also timed, up to this many frames."""
    whole: bool = True
    """Also times the whole run, from pixels to the first token."""
    check: bool = True
    """First compares results with float32 and with XLA, at full width with few layers."""
    profile: int = 0
    """Prints this many of the costliest kernels of each stage."""
    attention: str = "auto"
    """auto (the fastest one for this device and dtype), blockwise, reference, wgmma or mma."""
    json: bool = False
    """Prints the rows as JSON."""


def kernels_of(run: Callable[[], Any], limit: int) -> list[dict[str, Any]]:
    """The costliest kernels of one run on the GPU: name, calls, milliseconds."""
    totals: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        for path in Path(folder).rglob("*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
                if not plane.name.startswith("/device:"):
                    continue
                for line in plane.lines:
                    if line.name.startswith("Stream"):
                        for event in line.events:
                            total = totals[event.name]
                            total[0] += 1
                            total[1] += event.duration_ns / 1e6
    ranked = sorted(totals.items(), key=lambda item: -item[1][1])[:limit]
    return [{"kernel": name, "calls": int(n), "ms": ms} for name, (n, ms) in ranked]


class Profiler:
    """Prints the costliest kernels of a stage to stderr, unless `limit` is 0."""

    def __init__(self, limit: int):
        self.limit = limit

    def __call__(self, stage: str, run: Callable[[], Any]) -> None:
        if self.limit:
            for row in kernels_of(run, self.limit):
                print(f"  {stage}: {row['ms']:9.2f} ms {row['calls']:6d} x {row['kernel'][:110]}", file=sys.stderr)


def _median(run: Callable[[], Any], repeats: int = 5) -> float:
    timed(run)
    return float(np.median([timed(run)[0] for _ in range(repeats)]))


@compiled.program
def _vision(network: Network, frames: jax.Array) -> jax.Array:
    return network.model.vision(normalise(frames))


def random_frames(config: VideoXL2Config, count: int) -> np.ndarray:
    size = config.vision.image_size
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


def vision_row(args: E2EArgs, params: nnx.State, ceiling: float, profile: Profiler) -> dict[str, Any]:
    """Frames per second of the tower alone, and of tower, DTS and projector."""
    config = PRESETS[args.preset].with_weights(args.weights)
    network = Network.create(config, params, args.attention)
    count = (args.step_groups or default_steps(network.platform)[0]) * FRAMES_PER_GROUP
    frames = jnp.asarray(random_frames(config, count))
    tower = functools.partial(_vision, network, frames)
    whole = functools.partial(compiled.encode, network, frames, frames_at_once=count)
    alone, both = _median(tower), _median(whole)
    profile("encode", whole)
    work = count * flops.vision(config)
    rest = count / FRAMES_PER_GROUP * flops.dts_and_projector(config)
    return {
        "stage": "vision",
        "batch": count,
        "tower_frames_s": count / alone,
        "tower_mfu": work / alone / ceiling,
        "frames_s": count / both,
        "mfu": (work + rest) / both / ceiling,
    }


def encode(setup: Setup, frames: np.ndarray) -> jax.Array:
    return session.encode(setup.network, setup.plan, frames)


def watch(setup: Setup, frames: np.ndarray) -> session.VideoKV:
    """From pixels on the host to a full cache, segment by segment, as in `Model.watch` without a file to read."""
    video, previous = setup.start(), None
    for _ in range(setup.segments):
        visual = encode(setup, frames)
        video.add(visual)
        jax.block_until_ready(previous)  # as `Model.watch` does, so that no more frames wait on the device
        previous = visual
    return video.finish()


def cached_row(
    setup: Setup, config: PrefillConfig, bilevel: BilevelConfig, ceiling: float, profile: Profiler
) -> dict[str, Any]:
    """Times the prefill of a video, a question about it, and the steps of its answer."""
    compiling = timed(lambda: setup.prefill(segments=1))[0]  # its cache is freed
    seconds, kv = timed(setup.prefill)
    work = flops.prefill(setup.network.config, setup.layout, config)
    row = {"compile_s": compiling, "prefill_s": seconds, "prefill_mfu": work / seconds / ceiling}
    session.pooled_kv(setup.network, kv, bilevel.pool)  # made once for a video, so that no question is timed with it

    def question() -> Any:
        context = setup.read(kv, bilevel)
        return context, setup.first_token(context)

    row["question_s"] = _median(question, 3)
    profile("question", question)
    for name, read in (("dense", kv.cache), ("bilevel", question()[0])):
        decode = functools.partial(setup.decode, [setup.first_token(read)])
        decode()  # compiles
        step_times = [timed(decode)[0] for _ in range(3)]
        row[f"{name}_step_ms"] = 1e3 * float(np.median(step_times)) / DECODE_TOKENS
        row[f"{name}_tokens"] = int(read.length)
        profile(f"decode {name}", decode)
    # This is last, since it donates the cache.
    profile("prefill, last segment", lambda: _last_segment(setup, kv))
    return row


def _last_segment(setup: Setup, kv: session.VideoKV) -> Any:
    last = setup.last_steps()
    return compiled.prefill_segment(setup.network, kv.cache, setup.visual, last)


def whole_row(setup: Setup, bilevel: BilevelConfig) -> dict[str, Any]:
    """Times pixels on the host to the first token of an answer, when everything else is compiled."""
    frames = random_frames(setup.network.config, setup.plan.segment_groups * FRAMES_PER_GROUP)
    jax.block_until_ready(encode(setup, frames))

    def first_token() -> Any:
        return setup.first_token(setup.read(watch(setup, frames), bilevel))

    return {"pixels_to_first_token_s": timed(first_token)[0]}


def video_row(args: E2EArgs, params: nnx.State, count: int, ceiling: float, profile: Profiler) -> dict[str, Any]:
    """Times one video: prefill, a question, decoding, and the whole run. Its memory is freed afterwards."""

    def setup(config: PrefillConfig) -> Setup:
        groups = count // FRAMES_PER_GROUP
        model, quantized = PRESETS[args.preset].with_weights(args.weights), args.cache_dtype == "int8"
        return Setup(model, params, groups, config, args.step_groups, args.attention, quantized=quantized)

    config = args.prefill.config()
    video = setup(config)
    bilevel = args.decode.bilevel()
    check_bilevel(bilevel, video.layout)
    row: dict[str, Any] = {"stage": "video", "frames": count, "tokens": video.layout.tokens}
    row |= cached_row(video, config, bilevel, ceiling, profile)
    row |= whole_row(video, bilevel) if args.whole else {}
    row["peak_gib"] = memory.peak_bytes() / 2**30
    if count <= args.dense_up_to:
        dense = setup(dataclasses.replace(config, window_chunks=None))
        row["dense_prefill_s"] = _median(dense.prefill, 1)
    return row


def e2e_rows(args: E2EArgs) -> Iterator[dict[str, Any]]:
    """Yields a row for the card, rows of checks, a row for the vision tower and DTS, and one for each length."""
    card = ceilings()
    yield {"stage": "card", **card}
    ceiling = card["matrix_tflops"] * 1e12
    profile = Profiler(args.profile)
    config = PRESETS[args.preset].with_weights(args.weights)
    if args.check:
        yield from check_rows(config, args.dtype, random_frames(config, 32), args.attention)
    params = random_params(config, args.dtype)
    yield vision_row(args, params, ceiling, profile)
    for count in sorted(whole_numbers("--frames", args.frames)):
        yield video_row(args, params, count, ceiling, profile)
