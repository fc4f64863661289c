"""The jitted entry points. Each takes the config as its only static model argument.

One compilation a bucket of lengths: nothing here depends on a video's exact length.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from xl2jax.config import LLMConfig, VideoXL2Config
from xl2jax.inference import bilevel, generate, prefill, relevance
from xl2jax.inference.bilevel import GroupTable, MixedSource, PooledKV
from xl2jax.inference.cache import KVCache, empty_cache
from xl2jax.inference.generate import DecodeState, Sampling
from xl2jax.inference.prefill import Step
from xl2jax.inference.relevance import AttentionScorer
from xl2jax.models.video_xl2 import VideoXL2, abstract_model, normalise

COMPILER_OPTIONS = {"xla_gpu_enable_triton_gemm": False}
"""XLA's own Triton products want each scanned layer's weights copied first, and leave bias and GELU to
kernels of their own. cuBLAS reads the weights in place and takes both along: on an H200 that halves a
decode step and makes the vision tower an eighth faster. Without effect on other devices."""


@functools.cache
def _graphdef(config: VideoXL2Config) -> nnx.GraphDef:
    return nnx.graphdef(abstract_model(config, jnp.float32))


def merge_model(config: VideoXL2Config, params: nnx.State) -> VideoXL2:
    """The model over `params`, inside or outside a transformation."""
    return nnx.merge(_graphdef(config), params)


@functools.partial(jax.jit, static_argnames=("config", "frames_at_once"), compiler_options=COMPILER_OPTIONS)
def encode(
    config: VideoXL2Config, params: nnx.State, frames: jax.Array, *, frames_at_once: int
) -> tuple[jax.Array, jax.Array]:
    """uint8 frames [F, H, W, 3] -> visual tokens [G, V, D] and their `unit_features` [G, D].

    F is a multiple of `frames_at_once`, which bounds the activations.
    """
    model = merge_model(config, params)

    def part(frames: jax.Array) -> jax.Array:
        return model.encode_frames(normalise(frames))

    visual = jax.lax.map(part, frames.reshape(-1, frames_at_once, *frames.shape[1:]))
    visual = visual.reshape(-1, *visual.shape[2:])
    return visual, relevance.unit_features(visual)


@jax.jit
def checksum(x: jax.Array) -> jax.Array:
    """uint32 over all bits of an array, for telling checkpoints apart: a changed or moved element changes it, but for
    a chance of about 1 in 2**32."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint16 if x.dtype.itemsize == 2 else jnp.uint32).reshape(-1)
    h = bits.astype(jnp.uint32) + jnp.arange(bits.size, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # MurmurHash3's finaliser
        h = (h ^ (h >> shift)) * jnp.uint32(factor)
    return jnp.sum(h ^ (h >> 16), dtype=jnp.uint32)


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Whether every floating-point element of a pytree is a number."""
    parts = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.stack(parts))


@functools.partial(jax.jit, static_argnames=("config", "slots", "dtype", "quantized"))
def new_cache(
    config: LLMConfig, slots: int, dtype: str, visual_start: int | jax.Array | None = None, *, quantized: bool = False
) -> KVCache:
    cache = empty_cache(config, slots, dtype, quantized=quantized)
    return cache if visual_start is None else cache._replace(visual_start=jnp.int32(visual_start))


@functools.partial(
    jax.jit, static_argnames=("config", "implementation"), donate_argnames="cache", compiler_options=COMPILER_OPTIONS
)
def prefill_prefix(
    config: VideoXL2Config, params: nnx.State, cache: KVCache, ids: jax.Array, length: jax.Array, *, implementation: str
) -> KVCache:  # fmt: skip
    llm = merge_model(config, params).llm
    return prefill.prefill_prefix(llm, cache, ids, length, implementation=implementation)[0]


@functools.partial(
    jax.jit, static_argnames=("config", "implementation"), donate_argnames="cache", compiler_options=COMPILER_OPTIONS
)
def prefill_segment(
    config: VideoXL2Config, params: nnx.State, cache: KVCache, visual: jax.Array, segment: Step, *, implementation: str
) -> KVCache:  # fmt: skip
    llm = merge_model(config, params).llm
    return prefill.prefill_segment(llm, cache, visual, segment, implementation=implementation)[0]


@functools.partial(jax.jit, static_argnames=("config", "visual_tokens", "pool"))
def pool_cache(config: LLMConfig, cache: KVCache, table: GroupTable, *, visual_tokens: int, pool: int) -> PooledKV:
    return bilevel.pool_cache(cache, table, visual_tokens=visual_tokens, pool=pool, theta=config.rope_theta)


@functools.partial(jax.jit, static_argnames=("config", "visual_tokens", "pool", "slots", "compact"))
def mix(
    config: LLMConfig, cache: KVCache, pooled: PooledKV, table: GroupTable, dense: jax.Array,
    *, visual_tokens: int, pool: int, slots: int, compact: bool = False,
) -> tuple[KVCache, MixedSource]:  # fmt: skip
    """The mixed cache with groups `dense` [Gcap] whole, in `slots` slots, and its index list."""
    source = bilevel.mixed_source(
        table, dense, cache.visual_start, visual_tokens=visual_tokens, pool=pool, slots=slots, compact=compact
    )
    return bilevel.mix(cache, pooled, source, theta=config.rope_theta), source


@functools.partial(jax.jit, static_argnames="visual_tokens")
def slot_groups(table: GroupTable, cache: KVCache, *, visual_tokens: int) -> jax.Array:
    return bilevel.slot_groups(table, cache, visual_tokens)


@functools.partial(
    jax.jit, static_argnames=("config", "scorer", "groups", "implementation"), compiler_options=COMPILER_OPTIONS
)
def attention_scores(
    config: VideoXL2Config, params: nnx.State, context: KVCache, group: jax.Array, text: KVCache,
    ids: jax.Array, first: jax.Array, last: jax.Array, end: jax.Array,
    *, scorer: AttentionScorer, groups: int, implementation: str,
) -> jax.Array:  # fmt: skip
    llm = merge_model(config, params).llm
    return relevance.attention_scores(
        llm, context, group, text, ids, first, last, end, scorer, groups, implementation=implementation
    )


@functools.partial(jax.jit, static_argnames="config")
def similarity_scores(
    config: VideoXL2Config, params: nnx.State, features: jax.Array, ids: jax.Array, first: jax.Array, last: jax.Array
) -> jax.Array:
    return relevance.similarity_scores(merge_model(config, params).llm, features, ids, first, last)


@functools.partial(jax.jit, static_argnames=("select_chunk_groups", "top"))
def choose(
    scores: jax.Array, groups: jax.Array, *, select_chunk_groups: int, top: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Group scores [Gcap] -> (block scores [Bcap], dense blocks [Bcap], dense groups [Gcap])."""
    by_block = relevance.block_scores(scores, groups, select_chunk_groups)
    blocks = -(-groups // select_chunk_groups)
    dense = bilevel.choose_blocks(by_block, blocks, top)
    return by_block, dense, dense[jnp.arange(scores.shape[0]) // select_chunk_groups]


@functools.partial(
    jax.jit,
    static_argnames=("config", "implementation"),
    donate_argnames="text",
    compiler_options=COMPILER_OPTIONS,
)
def ask(
    config: VideoXL2Config, params: nnx.State, context: KVCache, text: KVCache, ids: jax.Array, length: jax.Array,
    key: jax.Array, stop: jax.Array, sampling: Sampling, *, implementation: str,
) -> DecodeState:  # fmt: skip
    """Runs the suffix behind `context` and samples the first token of the answer."""
    llm = merge_model(config, params).llm
    text, hidden = generate.extend(llm, context, text, ids, length, implementation=implementation)
    return generate.first_token(llm, text, hidden, length, key, stop, sampling)


@functools.partial(
    jax.jit,
    static_argnames=("config", "size", "implementation"),
    donate_argnames="state",
    compiler_options=COMPILER_OPTIONS,
)
def decode(
    config: VideoXL2Config, params: nnx.State, context: KVCache, state: DecodeState, limit: jax.Array,
    stop: jax.Array, sampling: Sampling, *, size: int, implementation: str,
) -> tuple[DecodeState, jax.Array, jax.Array]:  # fmt: skip
    """Up to min(limit, size) further tokens."""
    llm = merge_model(config, params).llm
    return generate.decode(llm, context, state, limit, stop, sampling, size=size, implementation=implementation)
