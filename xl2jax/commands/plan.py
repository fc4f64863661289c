"""What a video will take, before it is read: memory, and time by stage.

xl2jax plan --frames 10000 --device h200 [--checkpoint DIR]

Memory is what `infer.py` checks before it begins. Time is a roofline: operations over the device's matrix rate, or bytes
over its memory bandwidth, each times the share of the datasheet's figure that the released sizes reached on an H200
(README, Speed). Other models and devices reach other shares: read the times as a scale, not as a promise.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro
from flax import nnx

from xl2jax.checkpoint.sources import find_checkpoint
from xl2jax.commands.flags import BilevelFlags, PrefillFlags
from xl2jax.config import FRAMES_PER_GROUP, PRESETS, VideoXL2Config
from xl2jax.errors import UserError
from xl2jax.inference import flops, memory, prefill
from xl2jax.inference.bilevel import BilevelConfig
from xl2jax.inference.layout import VideoLayout
from xl2jax.models.param_tree import flatten
from xl2jax.models.video_xl2 import abstract_model
from xl2jax.prompt import PREFIX, PromptTokenizer, time_text
from xl2jax.system.backend import start_backend
from xl2jax.system.cards import DEVICES

VISION_SHARE, PREFILL_SHARE, DECODE_SHARE = 0.47, 0.56, 0.6
"""Of the datasheet's matrix rate, the same, and of its bandwidth: what the table in the README comes to."""


@dataclasses.dataclass(frozen=True)
class PlanArgs:
    """Predicts memory and time of a video, and whether it fits."""

    frames: int = 1024
    checkpoint: str | None = None
    """Folder or hub id; by default the released sizes."""
    device: Literal["h200", "h100", "a100-80g", "a100-40g", "l40", "rtx4090", "here"] = "here"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    seconds_per_frame: float = 1.0
    prefill: tyro.conf.OmitArgPrefixes[PrefillFlags] = dataclasses.field(default_factory=PrefillFlags)
    decode: tyro.conf.OmitArgPrefixes[BilevelFlags] = dataclasses.field(default_factory=BilevelFlags)
    cache_dtype: Literal["int8"] | None = None
    """Of the KV cache; --dtype by default."""
    offload: bool = False
    """Visual KV in host memory once the video is watched."""
    json: bool = False


@dataclasses.dataclass(frozen=True)
class Prediction:
    tokens: int
    memory: dict[str, float]
    """Bytes by purpose."""
    total: float
    """Bytes at the peak; less than the sum where the KV is offloaded before it is pooled."""
    available: float
    """Bytes that XLA may have on the device; here, those that are free."""
    seconds: dict[str, float] | None
    """By stage; None where the device's rates are not known."""

    @property
    def fits(self) -> bool:
        return self.total <= self.available


@functools.cache
def _parameters(config: VideoXL2Config) -> int:
    return sum(math.prod(s.shape) for s in flatten(nnx.state(abstract_model(config, jnp.float32))).values())


def predict_memory(config: VideoXL2Config, layout: VideoLayout, args: PlanArgs) -> tuple[dict[str, float], float]:
    """Bytes by purpose, and at the peak, as `infer.py` counts them on that device."""
    platform = "gpu" if args.device != "here" else jax.default_backend()
    plan = prefill.make_plan(layout, args.prefill.config(), platform)
    bilevel = _bilevel(args, layout)
    need = memory.memory_need(
        config,
        plan,
        layout,
        bilevel,
        args.dtype,
        platform,
        quantized=args.cache_dtype == "int8",
        offload=args.offload,
    )
    weights = _parameters(config) * jnp.dtype(args.dtype).itemsize
    parts: dict[str, float] = {"weights": weights, "KV cache": need.cache}
    if args.offload:
        parts["KV cache, of it kept"] = need.kept
    if bilevel is not None:
        parts |= {"pooled KV": need.pooled, "mixed KV": need.mixed}
    return parts | {"activations and workspace": need.workspace}, weights + need.total


def _bilevel(args: PlanArgs, layout: VideoLayout) -> BilevelConfig | None:
    bilevel = args.decode.config()
    if bilevel is None or bilevel.top_chunks is None:
        return bilevel
    return dataclasses.replace(bilevel, top_chunks=min(bilevel.top_chunks, bilevel.blocks(layout)))


def _available(args: PlanArgs) -> float:
    return memory.available_bytes() if args.device == "here" else DEVICES[args.device].available


def predict(config: VideoXL2Config, layout: VideoLayout, args: PlanArgs) -> Prediction:
    """Memory, and time by stage where the device's rates are known."""
    parts, total = predict_memory(config, layout, args)
    if args.device == "here":
        return Prediction(layout.tokens, parts, total, _available(args), None)
    device = DEVICES[args.device]
    read = parts.get("mixed KV", layout.tokens * memory.slot_bytes(config, args.dtype))
    embedding = 0 if config.llm.tied_embeddings else config.llm.vocab * config.llm.width
    weights = parts["weights"] - embedding * jnp.dtype(args.dtype).itemsize
    frames = layout.groups * FRAMES_PER_GROUP
    vision = frames * flops.vision(config) + layout.groups * flops.dts_and_projector(config)
    seconds = {
        "vision, DTS, projector": vision / device.matrix_rate / VISION_SHARE,
        "prefill": flops.prefill(config, layout, args.prefill.config()) / device.matrix_rate / PREFILL_SHARE,
        "decode, each token": (weights + read) / device.bandwidth / DECODE_SHARE,
    }
    return Prediction(layout.tokens, parts, total, _available(args), seconds)


def alternatives(config: VideoXL2Config, layout: VideoLayout, args: PlanArgs) -> list[str]:
    """Flags with which the same video fits, the least change first."""
    options = memory.smaller_options(
        _bilevel(args, layout), config.visual_tokens, quantized=args.cache_dtype == "int8", offload=args.offload
    )
    out = []
    for flags, (bilevel, quantized, offload) in options.items():
        other = dataclasses.replace(
            args,
            decode=dataclasses.replace(args.decode, pool=bilevel.pool if bilevel else args.decode.pool),
            cache_dtype="int8" if quantized else None,
            offload=offload,
        )
        if predict_memory(config, layout, other)[1] <= _available(args):
            out.append(flags)
    return out


def largest(config: VideoXL2Config, layout: VideoLayout, args: PlanArgs) -> int:
    """Most frames of a video like this one that fit; 0 if none do."""
    available = _available(args)

    def too_long(groups: int) -> bool:
        shorter = dataclasses.replace(layout, time_lengths=layout.time_lengths[:groups])
        return predict_memory(config, shorter, args)[1] > available

    return bisect.bisect_left(range(1, layout.groups + 1), True, key=too_long) * FRAMES_PER_GROUP


def layout_of(config: VideoXL2Config, tokenizer: PromptTokenizer | None, frames: int, seconds: float) -> VideoLayout:
    """The tokens of a video of that many frames. Without a tokenizer, those of Qwen's."""
    groups = frames // FRAMES_PER_GROUP
    times = [round(g * FRAMES_PER_GROUP * seconds, 1) for g in range(groups)]
    if tokenizer is None:  # "Time", a space, "s" and ":" are a token each, and so is every digit and the point
        return VideoLayout(14, tuple(len(str(t)) + 4 for t in times), config.visual_tokens)
    lengths = tuple(len(tokenizer.encode(time_text(t))) for t in times)
    return VideoLayout(len(tokenizer.encode(*PREFIX)), lengths, config.visual_tokens)


def main() -> int:
    args = tyro.cli(PlanArgs, prog="xl2jax plan")
    if args.frames < FRAMES_PER_GROUP or args.frames % FRAMES_PER_GROUP:
        raise UserError(f"--frames: a multiple of {FRAMES_PER_GROUP}, not {args.frames}")
    if not args.seconds_per_frame > 0:
        raise UserError(f"--seconds-per-frame must be above 0, not {args.seconds_per_frame}")
    args.prefill.config()
    if args.decode.config() is None and args.offload:
        raise UserError("--offload has no use with --top-chunks all, which reads all of the KV: leave one out")
    config, tokenizer = PRESETS["video-xl-2"], None
    if args.checkpoint is not None:
        folder: Path = find_checkpoint(args.checkpoint)
        config = VideoXL2Config.from_hf(folder)
        tokenizer = PromptTokenizer.load(folder, config.llm.vocab)
    if args.device == "here":
        start_backend(keep_programs=False)
    layout = layout_of(config, tokenizer, args.frames, args.seconds_per_frame)
    found = predict(config, layout, args)
    fitting = args.frames if found.fits else largest(config, layout, args)
    others = [] if found.fits else alternatives(config, layout, args)
    if args.json:
        verdict = {"fits": found.fits, "frames_that_fit": fitting, "would_fit_with": others}
        print(json.dumps({**dataclasses.asdict(found), **verdict}))
    else:
        print(_report(args, found, fitting, others))
    return 0 if found.fits else 1


def _report(args: PlanArgs, found: Prediction, fitting: int, others: list[str]) -> str:
    lines = [f"{args.frames} frames, {found.tokens:,} tokens, {args.dtype}, on {args.device}", ""]
    rows: dict[str, Any] = {**found.memory, "at the peak": found.total, "there": found.available}
    lines += [f"{name:28} {size / 2**30:8.2f} GiB" for name, size in rows.items()]
    if found.seconds is not None:
        lines += ["", *(f"{name:28} {s:8.3g} s" for name, s in found.seconds.items())]
        lines.append(
            f"(datasheet rates x {VISION_SHARE} for vision, {PREFILL_SHARE} for prefill, {DECODE_SHARE} of the bandwidth for decode)"
        )
    verdict = (
        "it fits" if found.fits else f"it does not fit: {fitting} frames would" if fitting else "not even 4 frames fit"
    )
    return "\n".join([*lines, "", verdict, *(f"all frames fit with {flags}" for flags in others)])
