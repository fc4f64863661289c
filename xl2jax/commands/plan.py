"""`xl2jax plan`: predicts the memory and the time that a video or pictures take.

xl2jax plan --frames 10000 --device h200 [--checkpoint DIR]
xl2jax plan --image 2304x2304 --device rtx4090

Memory is the same prediction that `infer.py` checks before it begins. Time is a roofline model: operations divided by the
matrix rate of the device, or bytes divided by its memory bandwidth. Both rates are the datasheet's times the share of it
that the released model reached on an H200 (docs/performance.md). Other models and devices reach other shares, so that
the times are estimates only.
"""

from __future__ import annotations

import bisect
import dataclasses
import json
import re
from pathlib import Path
from typing import Literal

import jax
import tyro

from xl2jax.checkpoint.params import stored_config
from xl2jax.checkpoint.sources import find_checkpoint
from xl2jax.commands.flags import OFFLOAD_IS_DENSE, BilevelFlags, PrefillFlags, TensorFlags
from xl2jax.config import FRAMES_PER_GROUP, PRESETS, VideoXL2Config, Weights
from xl2jax.errors import UserError
from xl2jax.inference import flops, memory, prefill
from xl2jax.inference.bilevel import BilevelConfig
from xl2jax.inference.layout import VideoLayout
from xl2jax.inference.network import exact_pairs
from xl2jax.inference.selection import check_pool
from xl2jax.prompt import PREFIX, PromptTokenizer, time_text
from xl2jax.system.backend import start_backend
from xl2jax.system.cards import DEVICES
from xl2jax.system.terminal import flag_errors
from xl2jax.video.containers import MAX_PIXELS
from xl2jax.video.frame_sampling import MAX_FRAMES
from xl2jax.video.pictures import fit

VISION_SHARE, PREFILL_SHARE, DECODE_SHARE = 0.47, 0.56, 0.6
"""Shares that were reached of the datasheet's matrix rate (vision, prefill) and of its bandwidth (decoding)."""


@dataclasses.dataclass(frozen=True)
class PlanArgs:
    """Predicts memory and time of a video or of pictures, and whether they fit."""

    frames: int | None = None
    """Frames of the video: 1024, or none with --image."""
    image: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """WIDTHxHEIGHT of a picture in pixels; may be given several times, and beside --frames."""
    checkpoint: str | None = None
    """Checkpoint folder or hub id; by default the sizes of the released model."""
    device: Literal[
        "h200", "h100", "a100-80g", "a100-40g", "l40", "l4", "rtx5090", "rtx4090", "rtx3090", "rtx5060ti-16g",
        "rtx4060ti-16g", "rtx3060-12g", "rtx4060", "here",
    ] = "here"  # fmt: skip
    """The device to predict for; with --tensor so many of them. "here" is the device of this machine, whose memory alone
    is predicted."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """dtype of parameters and KV."""
    seconds_per_frame: float = 1.0
    """Seconds between two frames, on which the number of time tokens depends."""
    prefill: tyro.conf.OmitArgPrefixes[PrefillFlags] = dataclasses.field(default_factory=PrefillFlags)
    decode: tyro.conf.OmitArgPrefixes[BilevelFlags] = dataclasses.field(default_factory=BilevelFlags)
    weights: Weights | None = None
    """Quantises the LLM's matrices; by default they have --dtype."""
    cache_dtype: Literal["int8"] | None = None
    """dtype of the KV cache; by default --dtype."""
    offload: bool = False
    """Moves the visual KV to host memory once the video is watched."""
    split: tyro.conf.OmitArgPrefixes[TensorFlags] = dataclasses.field(default_factory=TensorFlags)
    json: bool = False
    """Prints one JSON object."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Predicted memory and time of a video."""

    tokens: int
    memory: dict[str, float]
    """Bytes by purpose."""
    total: float
    """Bytes at the peak. It is less than the sum where the KV is offloaded before it is pooled."""
    available: float
    """Bytes that XLA may use on the device, or those that are free on this machine."""
    seconds: dict[str, float] | None
    """Seconds by stage. None where the rates of the device are not known."""

    @property
    def fits(self) -> bool:
        return self.total <= self.available


def tiles_of(config: VideoXL2Config, args: PlanArgs) -> int:
    """Tiles of all pictures. Raises UserError for a size that is none."""
    tiles = 0
    for text in args.image:
        match = re.fullmatch(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", text)
        if not match or int(match[1]) * int(match[2]) > MAX_PIXELS:
            raise UserError(f"--image: should be WIDTHxHEIGHT with at most {MAX_PIXELS:,} pixels, not {text!r}")
        tiles += fit(int(match[1]), int(match[2]), config.vision.image_size, config.grids()).tiles
    return tiles


def predict_memory(config: VideoXL2Config, layout: VideoLayout, args: PlanArgs) -> tuple[dict[str, float], float]:
    """(bytes by purpose, bytes at the peak) as `infer.py` counts them, on each of the devices."""
    tensor = args.split.tensor
    config = config.with_weights(args.weights)
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
        key_channels=_key_channels(config),
        offload=args.offload,
        tensor=tensor,
        tiles=tiles_of(config, args),
    )
    weights = memory.weight_bytes(config, args.dtype, tensor)
    parts: dict[str, float] = {"weights": weights, "KV cache": need.cache}
    if args.offload:
        parts["KV cache kept on the device"] = need.kept
    if bilevel is not None:
        parts |= {"pooled KV": need.pooled, "mixed KV": need.mixed}
    return parts | {"activations and workspace": need.workspace}, weights + need.total


def _key_channels(config: VideoXL2Config) -> int:
    """The key channels that KV in 8 bits keeps. Only a checkpoint's biases tell whether it does: the plan counts them."""
    return 2 * exact_pairs(config.llm.head_width)


def _bilevel(args: PlanArgs, layout: VideoLayout) -> BilevelConfig | None:
    bilevel = args.decode.config() if layout.groups else None
    if bilevel is None or bilevel.top_chunks is None:
        return bilevel
    return dataclasses.replace(bilevel, top_chunks=min(bilevel.top_chunks, bilevel.blocks(layout)))


def _available(args: PlanArgs) -> float:
    if args.device == "here":
        return memory.available_bytes(args.split.devices().meshes()[0])
    return DEVICES[args.device].available


def predict(config: VideoXL2Config, layout: VideoLayout, args: PlanArgs) -> Prediction:
    """Predicts memory, and time by stage where the rates of the device are known."""
    parts, total = predict_memory(config, layout, args)
    if args.device == "here":
        return Prediction(layout.tokens, parts, total, _available(args), None)
    device = DEVICES[args.device]
    tensor = args.split.tensor
    slot = memory.slot_bytes(
        config, args.dtype, quantized=args.cache_dtype == "int8", key_channels=_key_channels(config), tensor=tensor
    )
    read = parts.get("mixed KV", layout.tokens * slot)
    weights = memory.weight_bytes_of_a_token(config, args.dtype, tensor)
    tiles = tiles_of(config, args)
    a_frame, a_group = flops.vision(config), flops.dts_and_projector(config)
    # Devices share the frames of a video, and each encodes all tiles.
    vision = layout.groups * (FRAMES_PER_GROUP * a_frame + a_group) / tensor + tiles * (a_frame + a_group)
    seconds = {
        "vision, DTS, projector": vision / device.matrix_rate / VISION_SHARE,
        "prefill": flops.prefill(config, layout, args.prefill.config()) / tensor / device.matrix_rate / PREFILL_SHARE,
        "decode, each token": (weights + read) / device.bandwidth / DECODE_SHARE,
    }
    return Prediction(layout.tokens, parts, total, _available(args), seconds)


def alternatives(config: VideoXL2Config, layout: VideoLayout, args: PlanArgs) -> list[str]:
    """Flags with which the same video fits, small changes first."""
    now = memory.Choices(_bilevel(args, layout), args.cache_dtype == "int8", args.offload, args.weights)
    out = []
    for flags, choices in memory.smaller_options(now, config.visual_tokens).items():
        if not config.can_have(choices.weights):
            continue
        pool = choices.bilevel.pool if choices.bilevel else args.decode.pool
        other = dataclasses.replace(
            args,
            decode=dataclasses.replace(args.decode, pool=pool),
            cache_dtype="int8" if choices.quantized else None,
            offload=choices.offload,
            weights=choices.weights,
        )
        if predict_memory(config, layout, other)[1] <= _available(args):
            out.append(flags)
    return memory.simplest(out)


def largest(config: VideoXL2Config, layout: VideoLayout, args: PlanArgs) -> int:
    """The largest number of frames of this video that fits, or 0."""
    available = _available(args)

    def too_long(groups: int) -> bool:
        shorter = dataclasses.replace(layout, time_lengths=layout.time_lengths[:groups])
        return predict_memory(config, shorter, args)[1] > available

    return bisect.bisect_left(range(1, layout.groups + 1), True, key=too_long) * FRAMES_PER_GROUP


def _not_measured(device: str | None) -> str:
    """What the times say of a card that nobody has measured."""
    return "" if device in ("h100", "h200", None) else "; nothing was measured on this card"


def layout_of(
    config: VideoXL2Config, tokenizer: PromptTokenizer | None, frames: int, seconds: float, tiles: int = 0
) -> VideoLayout:
    """The layout of a video of that many frames, behind pictures with that many tiles.

    Without a tokenizer, tokens are counted as Qwen's has them. Those between pictures are left out: they are few.
    """
    pictures = tiles * config.tile_tokens
    groups = frames // FRAMES_PER_GROUP
    times = [round(g * FRAMES_PER_GROUP * seconds, 1) for g in range(groups)]
    if tokenizer is None:  # a token each for "Time", a space, "s", ":", every digit and the point
        return VideoLayout(14 + pictures, tuple(len(str(t)) + 4 for t in times), config.visual_tokens)
    lengths = tuple(len(tokenizer.encode(time_text(t))) for t in times)
    return VideoLayout(len(tokenizer.encode(*PREFIX)) + pictures, lengths, config.visual_tokens)


def main() -> int:
    with flag_errors():
        args = tyro.cli(PlanArgs, prog="xl2jax plan")
    frames = 0 if args.image else 1024
    if args.frames is not None:
        frames = args.frames
        if not FRAMES_PER_GROUP <= frames <= MAX_FRAMES or frames % FRAMES_PER_GROUP:
            raise UserError(f"--frames: a multiple of {FRAMES_PER_GROUP} up to {MAX_FRAMES:,}, not {frames}")
    if not 0 < args.seconds_per_frame <= 3600:
        raise UserError(f"--seconds-per-frame must be above 0, and at most 3600, not {args.seconds_per_frame}")
    args.prefill.config()
    if args.decode.config() is None and args.offload:
        raise UserError(OFFLOAD_IS_DENSE)
    config, tokenizer = PRESETS["video-xl-2"], None
    if args.checkpoint is not None:
        folder: Path = find_checkpoint(args.checkpoint)
        config = stored_config(folder, args.weights)
        args = dataclasses.replace(args, weights=config.llm.weights)
        tokenizer = PromptTokenizer.load(folder, config.llm.vocab)
    args.split.devices().check(config.with_weights(args.weights))
    if args.device == "here":
        start_backend(keep_programs=False)
    layout = layout_of(config, tokenizer, frames, args.seconds_per_frame, tiles_of(config, args))
    if (bilevel := args.decode.config()) is not None:
        check_pool(bilevel, layout.visual_tokens)
    prediction = predict(config, layout, args)
    fitting = frames if prediction.fits else largest(config, layout, args)
    others = [] if prediction.fits else alternatives(config, layout, args)
    if args.json:
        verdict = {"fits": prediction.fits, "frames_that_fit": fitting, "would_fit_with": others}
        print(json.dumps({**dataclasses.asdict(prediction), **verdict}))
    else:
        print(_report(args, frames, prediction, fitting, others))
    return 0 if prediction.fits else 1


def _report(args: PlanArgs, frames: int, prediction: Prediction, fitting: int, others: list[str]) -> str:
    tensor = args.split.tensor
    place = f"on each of {tensor} devices ({args.device})" if tensor > 1 else f"on {args.device}"
    pictures = f"{len(args.image)} picture{'s' * (len(args.image) > 1)}"
    subject = " and ".join([f"{frames} frames"] * bool(frames) + [pictures] * bool(args.image))
    lines = [f"{subject}, {prediction.tokens:,} tokens, {args.dtype}, {place}", ""]
    sizes = {**prediction.memory, "in all at the peak": prediction.total, "available": prediction.available}
    lines += [f"{name:28} {size / 2**30:8.2f} GiB" for name, size in sizes.items()]
    if prediction.seconds is not None:
        lines += ["", *(f"{name:28} {s:8.3g} s" for name, s in prediction.seconds.items())]
        shares = f"{VISION_SHARE} for vision, {PREFILL_SHARE} for prefill, {DECODE_SHARE} of the bandwidth for decoding"
        alone = "; what the devices exchange is not counted" if tensor > 1 else ""
        lines.append(f"(estimates: datasheet rates x {shares}, as read on an H200{_not_measured(args.device)}{alone})")
    if prediction.fits:
        verdict = "it fits"
    elif not frames:
        verdict = "it does not fit"
    elif fitting:
        verdict = f"it does not fit: {fitting} frames would"
    else:
        verdict = f"it does not fit: not even {FRAMES_PER_GROUP} frames would"
    return "\n".join(
        [*lines, "", verdict, *(f"all {'frames fit' if frames else 'fits'} with {flags}" for flags in others)]
    )
