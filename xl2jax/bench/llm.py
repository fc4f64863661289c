"""`bench prefill` and `bench decode`: the LLM alone, on random embeddings."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any, Literal

import jax
import numpy as np
import tyro

from xl2jax.bench.setup import DECODE_TOKENS, Setup, random_params, timed
from xl2jax.commands.flags import BilevelFlags, PrefillFlags
from xl2jax.config import PRESETS, Weights
from xl2jax.inference import memory
from xl2jax.inference.cache import KVCache
from xl2jax.inference.layout import PrefillConfig
from xl2jax.inference.selection import check_bilevel


@dataclasses.dataclass(frozen=True)
class PrefillArgs:
    """Times the LLM prefill alone."""

    groups: str = "64,128,256,512"
    """Comma-separated lengths of the video, in groups of 4 frames."""
    modes: str = "chunked,dense"
    """Comma-separated: chunked sees a window of chunks, dense the whole video."""
    preset: str = "bench"
    """The sizes of the model, by name: video-xl-2 is the released one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The type of weights and activations."""
    weights: Weights | None = None
    """Has the LLM's matrices in 8 or 4 bits."""
    prefill: tyro.conf.OmitArgPrefixes[PrefillFlags] = dataclasses.field(default_factory=PrefillFlags)
    step_groups: int | None = None
    """Groups that go through the layers together; by default as many as in infer.py on this device."""
    attention: str = "auto"
    """auto (the fastest one for this device and dtype), blockwise, reference, wgmma or mma."""
    json: bool = False
    """Prints the rows as JSON."""


@dataclasses.dataclass(frozen=True)
class DecodeArgs:
    """Times a decode step and the first token of a question, on dense and bi-level caches."""

    groups: str = "64,128,256"
    """Comma-separated lengths of the video, in groups of 4 frames."""
    modes: str = "dense,bilevel"
    """Comma-separated: dense reads all of the KV, bilevel the chosen chunks and pooled KV."""
    preset: str = "bench"
    """The sizes of the model, by name: video-xl-2 is the released one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The type of weights and activations."""
    weights: Weights | None = None
    """Has the LLM's matrices in 8 or 4 bits."""
    decode: tyro.conf.OmitArgPrefixes[BilevelFlags] = dataclasses.field(default_factory=BilevelFlags)
    attention: str = "auto"
    """auto (the fastest one for this device and dtype), blockwise, reference, wgmma or mma."""
    json: bool = False
    """Prints the rows as JSON."""


def prefill_row(args: PrefillArgs, mode: str, groups: int) -> dict[str, Any]:
    config = args.prefill.config()
    if mode == "dense":
        config = dataclasses.replace(config, window_chunks=None)
    model = PRESETS[args.preset].with_weights(args.weights)
    setup = Setup(model, random_params(model, args.dtype), groups, config, args.step_groups, args.attention)
    jax.block_until_ready((setup.network.params, setup.visual))
    before = memory.used_bytes()  # of imports, runtime and parameters
    compiling = timed(lambda: setup.prefill(segments=1))[0]
    seconds, kv = timed(setup.prefill)
    return {
        "mode": mode,
        "groups": groups,
        "tokens": setup.layout.tokens,
        "seconds": seconds,
        "compile_seconds": compiling,
        "tokens_per_s": setup.layout.tokens / seconds,
        "peak_memory_bytes": memory.peak_bytes() - before,
        "cache_bytes": kv.cache.k.nbytes + kv.cache.v.nbytes,
    }


def decode_row(args: DecodeArgs, mode: str, groups: int) -> dict[str, Any]:
    model = PRESETS[args.preset].with_weights(args.weights)
    setup = Setup(model, random_params(model, args.dtype), groups, PrefillConfig(), None, args.attention)
    jax.block_until_ready((setup.network.params, setup.visual))
    before = memory.used_bytes()
    setup.prefill(segments=1)
    prefilling, kv = timed(setup.prefill)
    config = args.decode.bilevel()
    check_bilevel(config, setup.layout)

    def question() -> tuple[KVCache, Any]:
        context = kv.cache if mode == "dense" else setup.read(kv, config)
        return context, setup.first_token(context)

    question()  # compiles
    first, (context, answer) = timed(question)
    with contextlib.closing(answer):
        # The first run compiles.
        seconds = [timed(functools.partial(setup.decode, [answer]))[0] for _ in range(4)]
    return {
        "mode": mode,
        "groups": groups,
        "tokens": setup.layout.tokens,
        "context_tokens": int(context.length),
        "prefill_seconds": prefilling,
        "question_seconds": first,
        "step_ms": 1e3 * float(np.median(seconds[1:])) / DECODE_TOKENS,
        "peak_memory_bytes": memory.peak_bytes() - before,
    }
