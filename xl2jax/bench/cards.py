"""`bench cards`: what several cards of one host bring, against one of them, in one run."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro
from flax import nnx

from xl2jax.bench.answers import decode_seconds
from xl2jax.bench.e2e import Profiler, random_frames, watch
from xl2jax.bench.kernels import ceilings
from xl2jax.bench.setup import DECODE_TOKENS, Setup, random_params, timed
from xl2jax.bench.train import TrainBenchArgs, halved, train_rows
from xl2jax.commands.flags import BilevelFlags, choices, whole_numbers
from xl2jax.config import FRAMES_PER_GROUP, PRESETS, VideoXL2Config, Weights
from xl2jax.errors import UserError, require_whole
from xl2jax.inference import memory, session
from xl2jax.inference.copies import share
from xl2jax.inference.decoding import MOST_TOGETHER
from xl2jax.inference.layout import PrefillConfig
from xl2jax.inference.selection import check_bilevel
from xl2jax.models.param_tree import flatten, unflatten
from xl2jax.models.sharding import check_split, head_copies, inference_sharding, tensor_mesh
from xl2jax.ops.attention import check_name
from xl2jax.ops.split import TENSOR, on_parts, part_of

PARTS = ("tensor", "data", "answers", "train")


@dataclasses.dataclass(frozen=True)
class CardsArgs:
    """Times decoding, prefill, watching and training on 1, 2, 4 ... cards of this host, on random weights."""

    parts: str = "tensor,data,answers"
    """Comma-separated: tensor (one video over several cards), data (videos over copies of the model), answers (16 at once
    against one, on one card), train (optimizer steps). Rows are printed as they are ready, in this order."""
    preset: str = "video-xl-2"
    """The sizes of the model, by name: video-xl-2 is the released one."""
    cards: str | None = None
    """Comma-separated numbers of cards; by default 1, 2, 4 ... up to those that there are."""
    frames: str = "2048,10000"
    """Comma-separated lengths of the videos for `tensor`."""
    videos: int = 8
    """Videos that are watched for `data`."""
    video_frames: int = 512
    """Frames of each of them."""
    together: int = 16
    """Answers at once for `answers`."""
    answer_frames: int = 512
    """Frames of the video that they are about."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """The type of weights and activations."""
    weights: Weights | None = None
    """Has the LLM's matrices in 8 or 4 bits."""
    cache_dtype: Literal["int8"] | None = None
    """dtype of the videos' KV; by default --dtype."""
    decode: tyro.conf.OmitArgPrefixes[BilevelFlags] = dataclasses.field(default_factory=BilevelFlags)
    train: Literal["lora", "all"] = "lora"
    """Which parameters `train` trains."""
    save: Path | None = None
    """With --parts train: also saves each state in a new folder here, and resumes on half of the cards; the folder is
    removed, but not where the process is killed."""
    attention: str = "auto"
    """auto (the fastest one for this device and dtype), blockwise, reference, wgmma or mma."""
    profile: int = 0
    """Prints this many of the costliest kernels of a decode step and of a prefill on each number of cards."""
    json: bool = False
    """Prints the rows as JSON."""

    def chosen(self) -> list[str]:
        return choices("--parts", self.parts, PARTS)

    def config(self) -> VideoXL2Config:
        return PRESETS[self.preset].with_weights(self.weights)

    def check(self) -> None:
        """Raises UserError for flags that are out of range."""
        self.chosen()
        if self.preset not in PRESETS:
            raise UserError(f"--preset: choose from {', '.join(PRESETS)}, not {self.preset!r}")
        for flag, text in (("--frames", self.frames), ("--video-frames", str(self.video_frames))):
            if any(n % FRAMES_PER_GROUP for n in whole_numbers(flag, text)):
                raise UserError(f"{flag}: multiples of {FRAMES_PER_GROUP}, not {text!r}")
        if self.answer_frames < FRAMES_PER_GROUP or self.answer_frames % FRAMES_PER_GROUP:
            raise UserError(f"--answer-frames: a multiple of {FRAMES_PER_GROUP}, not {self.answer_frames}")
        if not 2 <= self.together <= MOST_TOGETHER or self.videos < 1:
            raise UserError(f"--together must be from 2 to {MOST_TOGETHER}, and --videos 1 or more")
        require_whole("--profile", self.profile, 0)
        if "train" in self.chosen() and self.train == "all" and self.weights is not None:
            raise UserError("--weights has no use with --train all: quantised matrices cannot be trained themselves")
        if self.save is not None:
            if "train" not in self.chosen():
                raise UserError("--save goes with --parts train")
            if not self.save.is_dir():
                raise UserError(f"--save {self.save}: no such folder")
        self.decode.bilevel()
        check_name(self.attention)
        if self.cards is not None:
            whole_numbers("--cards", self.cards)

    def counts(self) -> list[int]:
        """Numbers of cards. Raises UserError where there are not as many."""
        there = jax.device_count()
        if self.cards is None:
            return [1 << i for i in range(there.bit_length())]
        counts = sorted(set(whole_numbers("--cards", self.cards)) | {1})
        if counts[-1] > there:
            raise UserError(f"--cards {counts[-1]}: {there} are there")
        if self.save is not None:
            for count in counts:
                halved(count, 1, 1)
        return counts


def card_rows(args: CardsArgs) -> Iterator[dict[str, Any]]:
    """Yields a row for each card, then those of the chosen parts."""
    counts, parts = args.counts(), args.chosen()
    for number, device in enumerate(jax.devices()[: counts[-1]]):
        with jax.default_device(device):
            yield {"card": number, **ceilings()}
    profiler = Profiler(args.profile)
    if parts != ["train"]:
        params = random_params(args.config(), args.dtype)
        if "tensor" in parts:
            yield from _tensor_rows(args, params, counts, profiler)
        if "data" in parts:
            yield from _data_rows(args, params, counts)
        if "answers" in parts:
            yield from _answer_rows(args, params)
        del params
    if "train" in parts:
        yield from _train_rows(args, counts)


def split_params(config: VideoXL2Config, params: nnx.State, mesh: jax.sharding.Mesh) -> nnx.State:
    """Parameters of one device, on the devices of a mesh."""
    flat = flatten(params)
    return unflatten(
        {name: jax.device_put(x, inference_sharding(name, x.shape, mesh)) for name, x in flat.items()}, config
    )


def _setup(args: CardsArgs, params: nnx.State, frames: int, mesh: jax.sharding.Mesh | None) -> Setup:
    return Setup(
        args.config(),
        params,
        frames // FRAMES_PER_GROUP,
        PrefillConfig(),
        None,
        args.attention,
        quantized=args.cache_dtype == "int8",
        mesh=mesh,
    )


# --- one video over several cards -----------------------------------------------------------------


def _tensor_rows(args: CardsArgs, params: nnx.State, counts: list[int], profiler: Profiler) -> Iterator[dict[str, Any]]:
    one: dict[int, dict[str, Any]] = {}
    config = args.config()
    for count in counts:
        try:
            check_split(config, count)
        except UserError as e:
            yield {"part": "tensor", "cards": count, "left_out": str(e)}
            continue
        if head_copies(config, count) > 1:
            yield {"part": "tensor", "cards": count, "left_out": "more cards than KV heads"}
            continue
        mesh = None if count == 1 else tensor_mesh(jax.devices()[:count])
        own = params if mesh is None else split_params(config, params, mesh)
        exchange = {} if mesh is None else _exchange(mesh, config.llm.width, args.dtype)
        for frames in sorted(whole_numbers("--frames", args.frames)):
            row = _video_row(args, own, frames, mesh, profiler)
            first = one.setdefault(frames, row)
            for name in ("prefill_s", "decode_step_ms", "question_s"):
                row[f"{name.rpartition('_')[0]}_of_one"] = row[name] / first[name]
            yield {"part": "tensor", "cards": count, **row, **exchange}


def _video_row(
    args: CardsArgs, params: nnx.State, frames: int, mesh: jax.sharding.Mesh | None, profiler: Profiler
) -> dict[str, Any]:
    """Prefill of a video of random embeddings, a question about it, and a decode step of the answer."""
    setup, bilevel = _setup(args, params, frames, mesh), args.decode.bilevel()
    check_bilevel(bilevel, setup.layout)
    compiling = timed(lambda: setup.prefill(segments=1))[0]
    prefill, kv = timed(setup.prefill)
    if prefill < 4:  # short ones vary
        del kv
        again, kv = timed(setup.prefill)
        prefill = min(prefill, again)
    session.pooled_kv(setup.network, kv, bilevel.pool)  # made once for a video

    def question() -> Any:
        context = setup.read(kv, bilevel)
        return context, setup.first_token(context)

    timed(question)
    asking = statistics.median(timed(question)[0] for _ in range(3))
    context = question()[0]
    decode = functools.partial(_decode, setup, context)
    decode()  # compiles
    step = statistics.median(decode() for _ in range(3))
    profiler("decode", lambda: _decode(setup, context))
    profiler("prefill, one segment", lambda: setup.prefill(segments=1).cache)
    return {
        "frames": frames,
        "tokens": setup.layout.tokens,
        "prefill_s": prefill,
        "question_s": asking,
        "decode_step_ms": 1e3 * step / DECODE_TOKENS,
        "context_tokens": int(context.length),
        "compile_s": compiling,
        "peak_gib": memory.peak_bytes() / 2**30,
    }


def _decode(setup: Setup, context: Any) -> float:
    """Seconds of `DECODE_TOKENS` steps."""
    answer = setup.first_token(context)
    started = time.perf_counter()
    setup.decode([answer])
    return time.perf_counter() - started


def _exchange(mesh: jax.sharding.Mesh, width: int, dtype: str) -> dict[str, float]:
    """Seconds of the sum over the cards of what a layer exchanges: for a decode step, and for a step of prefill."""
    out = {}
    for name, rows, times in (("exchange_decode_us", 8, 200), ("exchange_prefill_us", 4992, 20)):

        @functools.partial(jax.jit, static_argnums=1)
        def many(x: jax.Array, times: int) -> jax.Array:
            def summed(x: jax.Array) -> jax.Array:
                return jax.lax.fori_loop(0, times, lambda _, x: jax.lax.psum(x, TENSOR) / mesh.size, x)

            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return on_parts(summed, part_of(0), part_of(0))(x)

        sharding = jax.sharding.NamedSharding(mesh, part_of(0))
        x = jax.device_put(jnp.ones((rows * mesh.size, width), dtype), sharding)
        timed(functools.partial(many, x, times))
        out[name] = 1e6 * min(timed(functools.partial(many, x, times))[0] for _ in range(3)) / times
    return out


# --- videos over copies of the model --------------------------------------------------------------


def _data_rows(args: CardsArgs, params: nnx.State, counts: list[int]) -> Iterator[dict[str, Any]]:
    meshes = [tensor_mesh([device]) for device in jax.devices()[: counts[-1]]]
    setups = [_setup(args, split_params(args.config(), params, mesh), args.video_frames, mesh) for mesh in meshes]
    frames = random_frames(args.config(), setups[0].plan.segment_groups * FRAMES_PER_GROUP)

    def one(setup: Setup, _: int) -> None:
        jax.block_until_ready(watch(setup, frames).cache)

    # Every card has programs of its own.
    compiling, first = timed(lambda: share(setups, one, range(2 * len(setups))))[0], None
    for count in counts:
        watch_all = functools.partial(share, setups[:count], one, range(args.videos))
        seconds = min(timed(watch_all)[0] for _ in range(2))
        rate = args.videos * args.video_frames / seconds
        first = first or rate
        yield {
            "part": "data",
            "cards": count,
            "videos": args.videos,
            "frames": args.video_frames,
            "seconds": seconds,
            "frames_s": rate,
            "x_one": rate / first,
            "compile_s": compiling,
        }


# --- answers at once ------------------------------------------------------------------------------


def _answer_rows(args: CardsArgs, params: nnx.State) -> Iterator[dict[str, Any]]:
    setup, bilevel, tokens = _setup(args, params, args.answer_frames, None), args.decode.bilevel(), 97
    check_bilevel(bilevel, setup.layout)
    context = setup.read(setup.prefill(), bilevel)
    alone = 0.0
    for count in (1, args.together):
        each = [(setup, context)] * count
        decode_seconds(each, tokens)  # compiles
        seconds = min(decode_seconds(each, tokens) for _ in range(3))
        rate = count * (tokens - 1) / seconds
        alone = alone or rate
        yield {
            "part": "answers",
            "together": count,
            "context_tokens": int(context.length),
            "tokens_s": rate,
            "x_one": rate / alone,
            "step_ms": 1e3 * seconds / (tokens - 1),
        }


# --- training -------------------------------------------------------------------------------------


def _train_rows(args: CardsArgs, counts: list[int]) -> Iterator[dict[str, Any]]:
    """Steps on one card, then on more cards with copies, with fsdp, with tensor, and with half of each."""
    if jax.process_count() > 1:
        raise UserError("--parts train is for one process")
    meshes = [(1, 1, 1)]
    for count in counts[1:]:
        meshes += [(count, 1, 1), (count, count, 1), (count, 1, count)]
        meshes += [(count, count // 2, 2)] if count >= 4 and count % 2 == 0 else []
    first: dict[str, Any] | None = None
    for count, fsdp, tensor in meshes:
        bench = TrainBenchArgs(
            preset=args.preset,
            train=args.train,
            compute_dtype=args.dtype,
            weights=args.weights,
            devices=count,
            fsdp=fsdp,
            tensor=tensor,
            steps=3,
            save=args.save if count > 1 else None,
        )
        try:
            for row in train_rows(bench, rates={}):
                if "step_s" not in row:  # of saving
                    yield {"part": "train", "cards": count, **row}
                    continue
                rate = row["rows"] / row["step_s"]
                first = first or {"rate": rate}
                yield {"part": "train", "cards": count, **row, "samples_s": rate, "x_one": rate / first["rate"]}
        except (UserError, jax.errors.JaxRuntimeError) as e:
            if isinstance(e, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(e):
                raise
            kind = str(e) if isinstance(e, UserError) else "training does not fit"
            yield {"part": "train", "cards": count, "fsdp": fsdp, "tensor": tensor, "left_out": kind}
