"""The compiled programs. Each takes the `Network`, whose config and choices are static.

Shapes depend on buckets of lengths only, so another video or question of about the same length compiles nothing.
Some programs return hidden states that only `verify` reads, so that it checks the same programs that answer questions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xl2jax.arithmetic import ceil_div
from xl2jax.config import FRAMES_PER_GROUP, LLMConfig
from xl2jax.inference import bilevel, generate, prefill, relevance
from xl2jax.inference.bilevel import GroupTable, MixedSource, PooledKV
from xl2jax.inference.cache import KVCache, RowArray, RowCache, empty_cache
from xl2jax.inference.generate import DecodeState, RowState, Sampling, SuffixIds
from xl2jax.inference.network import Network
from xl2jax.inference.prefill import Step, Stretch
from xl2jax.inference.relevance import AttentionScorer
from xl2jax.models.video_xl2 import normalise
from xl2jax.ops.kv import KVArray, QuantizedKV, TurnedKeys
from xl2jax.ops.split import on_parts, part_of, splits, whole
from xl2jax.system.backend import COMPILER_OPTIONS


def program(function: Callable[..., Any], **options: Any) -> Any:
    """Compiles a function whose first argument is the `Network`, in the network's matmul precision and on its devices."""

    @functools.wraps(function)
    def precise(network: Network, *args: Any, **kwargs: Any) -> Any:
        with network.precision(), network.in_mesh():
            return function(network, *args, **kwargs)

    return _Program(jax.jit(precise, compiler_options=COMPILER_OPTIONS, **options))


class _Program:
    """A jitted function. Where it runs on several devices, one thread launches it at a time.

    Devices that exchange something wait for each other. All of them must begin such programs in the same order, and two
    threads that launch at once could mix the orders up.
    """

    _launching = threading.RLock()

    def __init__(self, jitted: Any):
        self._jitted = jitted

    def __call__(self, tree: Any, *args: Any, **kwargs: Any) -> Any:
        first = next((x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)), None)
        split = not isinstance(first, jax.core.Tracer | None) and len(first.sharding.device_set) > 1
        with self._launching if split else contextlib.nullcontext():
            return self._jitted(tree, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._jitted, name)


@functools.partial(program, static_argnames="frames_at_once")
def encode(network: Network, frames: jax.Array, *, frames_at_once: int) -> jax.Array:
    """Frames [F, H, W, 3] -> visual tokens [G, V, D]. Frames are uint8, or floating-point pixels in [-1, 1].

    F is a multiple of `frames_at_once`, which bounds the activations. Several devices encode whole groups of them each.
    """
    count, llm = splits(), network.params["llm"]
    own = nnx.State({name: value for name, value in network.params.items() if name != "llm"})

    def encoded(own: nnx.State, frames: jax.Array) -> jax.Array:
        model = dataclasses.replace(network, params=nnx.State({**own, "llm": llm})).model

        def part(frames: jax.Array) -> jax.Array:
            return model.encode_frames(normalise(frames) if frames.dtype == jnp.uint8 else frames)

        return jax.lax.map(part, frames)

    frames = frames.reshape(-1, frames_at_once, *frames.shape[1:])
    if count == 1:
        visual = encoded(own, frames)
        return visual.reshape(-1, *visual.shape[2:])
    # Each device gets as many groups. Those that are missing are encoded as black frames.
    groups = frames_at_once // FRAMES_PER_GROUP
    missing = FRAMES_PER_GROUP * (-groups % count)
    frames = jnp.pad(frames, ((0, 0), (0, missing), *((0, 0),) * 3))
    visual = on_parts(encoded, (PartitionSpec(), part_of(1)), part_of(1))(own, frames)
    return whole(visual, 1)[:, :groups].reshape(-1, *visual.shape[2:])


@functools.partial(program, static_argnames="pool", donate_argnames="tokens")
def encode_tiles(network: Network, tokens: jax.Array, tiles: jax.Array, at: jax.Array, *, pool: int) -> jax.Array:
    """Writes the visual tokens of tiles [F, H, W, 3] to `tokens` [N, D], behind those of the first `at` tiles.

    Tiles are uint8 or pixels, as in `encode`.
    """
    pixels = normalise(tiles) if tiles.dtype == jnp.uint8 else tiles
    visual = network.model.encode_tiles(pixels, pool=pool)
    rows = visual.reshape(-1, visual.shape[-1]).astype(tokens.dtype)
    return jax.lax.dynamic_update_slice(tokens, rows, (at * jnp.int32(visual.shape[1]), jnp.int32(0)))


@_Program
@jax.jit
def checksum(x: jax.Array) -> jax.Array:
    """A uint32 hash of all bits of an array, for telling checkpoints apart. A changed or moved element goes unnoticed
    with a probability of about 1 in 2**32."""
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").reshape(-1)
    h = bits.astype(jnp.uint32) + jnp.arange(bits.size, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # MurmurHash3's finaliser
        h = (h ^ (h >> shift)) * jnp.uint32(factor)
    return jnp.sum(h ^ (h >> 16), dtype=jnp.uint32)


@_Program
@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Whether every floating-point element of a pytree is finite."""
    parts = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.stack(parts))


def _kv_shardings(tree: Any, mesh: Mesh) -> Any:
    """Keys and values [L, K, S, ...] are split over the heads, and everything else is whole."""
    return jax.tree.map(lambda x: NamedSharding(mesh, part_of(1) if x.ndim >= 3 else PartitionSpec()), tree)


def _split_kv[T](tree: T, mesh: Mesh | None) -> T:
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, _kv_shardings(tree, mesh))


def place_cache(cache: KVCache, mesh: Mesh | None) -> KVCache:
    """A cache of arrays on the host, on the devices of `mesh`."""
    return jax.device_put(cache, None if mesh is None else _kv_shardings(cache, mesh))


@functools.partial(jax.jit, static_argnames=("config", "slots", "dtype", "quantized", "mesh"))
def new_cache(
    config: LLMConfig,
    slots: int,
    dtype: str,
    visual_start: int | jax.Array | None = None,
    *,
    quantized: bool = False,
    key_channels: jax.Array | None = None,
    mesh: Mesh | None = None,
) -> KVCache:
    """An empty cache on the devices of `mesh`; its visual region begins at `visual_start`, by default behind the last
    slot."""
    cache = empty_cache(config, slots, dtype, quantized=quantized, key_channels=key_channels)
    cache = cache if visual_start is None else cache._replace(visual_start=jnp.int32(visual_start))
    return _split_kv(cache, mesh)


@functools.partial(program, donate_argnames="cache")
def prefill_globals(
    network: Network, cache: KVCache, block: Stretch, pictures: jax.Array | None, length: jax.Array
) -> tuple[KVCache, jax.Array]:
    """See `prefill.prefill_globals`."""
    llm = network.model.llm
    return prefill.prefill_globals(llm, cache, block, pictures, length, attention=network.attention)


@functools.partial(program, donate_argnames="cache")
def prefill_segment(network: Network, cache: KVCache, visual: jax.Array, segment: Step) -> tuple[KVCache, jax.Array]:
    """See `prefill.prefill_segment`."""
    llm = network.model.llm
    return prefill.prefill_segment(llm, cache, visual, segment, attention=network.attention)


@functools.partial(jax.jit, static_argnames=("config", "visual_tokens", "pool"))
def pool_cache(config: LLMConfig, cache: KVCache, table: GroupTable, *, visual_tokens: int, pool: int) -> PooledKV:
    """See `bilevel.pool_cache`."""
    return bilevel.pool_cache(cache, table, visual_tokens=visual_tokens, pool=pool, theta=config.rope_theta)


@functools.partial(jax.jit, static_argnames=("config", "visual_tokens", "pool", "slots", "compact"))
def mix(
    config: LLMConfig,
    cache: KVCache,
    pooled: PooledKV,
    table: GroupTable,
    dense: jax.Array,
    *,
    visual_tokens: int,
    pool: int,
    slots: int,
    compact: bool = False,
) -> tuple[KVCache, MixedSource]:
    """The mixed cache of `slots` slots whose groups `dense` [Gcap] are whole, and the source of each slot."""
    source = bilevel.mixed_source(
        table, dense, cache.visual_start, visual_tokens=visual_tokens, pool=pool, slots=slots, compact=compact
    )
    return bilevel.mix(cache, pooled, source, theta=config.rope_theta), source


@functools.partial(jax.jit, static_argnames="visual_tokens")
def slot_groups(table: GroupTable, cache: KVCache, *, visual_tokens: int) -> jax.Array:
    """See `bilevel.slot_groups`."""
    return bilevel.slot_groups(table, cache, visual_tokens)


@functools.partial(program, static_argnames=("scorer", "groups"))
def attention_scores(
    network: Network,
    context: KVCache,
    group: jax.Array,
    text: KVCache,
    suffix: SuffixIds,
    *,
    scorer: AttentionScorer,
    groups: int,
) -> jax.Array:
    """See `relevance.attention_scores`."""
    llm = network.model.llm
    return relevance.attention_scores(llm, context, group, text, suffix, scorer, groups, attention=network.attention)


@functools.partial(jax.jit, static_argnames=("select_chunk_groups", "top"))
def choose(scores: jax.Array, groups: jax.Array, *, select_chunk_groups: int, top: int) -> tuple[jax.Array, jax.Array]:
    """Group scores [Gcap] -> (block scores [Bcap], dense groups [Gcap], which are whole blocks)."""
    by_block = relevance.block_scores(scores, groups, select_chunk_groups)
    blocks = ceil_div(groups, select_chunk_groups)
    dense = bilevel.choose_blocks(by_block, blocks, top)
    return by_block, dense[jnp.arange(scores.shape[0]) // select_chunk_groups]


@functools.partial(program, donate_argnames="text")
def ask(
    network: Network,
    context: KVCache,
    text: KVCache,
    suffix: SuffixIds,
    key: jax.Array,
    stop: jax.Array,
    sampling: Sampling,
) -> tuple[DecodeState, jax.Array]:
    """Runs the suffix behind `context` and samples the first token of the answer.

    Returns the state that decoding continues from, and the hidden states of the suffix [T, D].
    """
    llm = network.model.llm
    text, hidden = generate.extend(llm, context, text, suffix.ids, suffix.end, attention=network.attention)
    return generate.first_token(llm, text, hidden, suffix.end, key, stop, sampling), hidden


@functools.partial(program, static_argnames="size", donate_argnames="state")
def decode(
    network: Network,
    layers: Sequence[Any] | None,
    contexts: RowCache,
    state: RowState,
    limits: jax.Array,
    stop: jax.Array,
    sampling: Sampling,
    *,
    size: int,
) -> tuple[RowState, jax.Array, jax.Array]:
    """See `generate.decode`. `layers` are those of the network."""
    return generate.decode(
        network.model.llm,
        contexts,
        state,
        limits,
        stop,
        sampling,
        size=size,
        attention=network.attention,
        platform=network.platform,
        layers=layers,
    )


@functools.partial(
    jax.jit,
    static_argnames=("config", "rows", "slots", "dtype", "quantized", "key_channels", "separate", "turned", "mesh"),
)
def empty_rows(
    config: LLMConfig,
    rows: int,
    slots: int,
    dtype: str,
    *,
    quantized: bool = False,
    key_channels: int = 0,
    separate: bool = False,
    turned: bool = False,
    mesh: Mesh | None = None,
) -> RowCache:
    """Caches of `rows` answers with `slots` slots each, in which nothing is seen: see `cache.RowArray`.

    `key_channels`: how many channels of each key are kept exactly in 8 bits. `separate`: each layer has an array of its
    own. `turned`: keys of 16 or 32 bits are `TurnedKeys`, in arrays of their own.
    """
    layers, none = config.layers, jnp.zeros(rows, jnp.int32)

    def array(leading: int, exact: int) -> KVArray:
        shape = (leading, config.kv_heads, slots, config.head_width)
        if quantized:
            kept = jnp.zeros((*shape[:-1], exact), dtype) if exact else None
            return QuantizedKV(jnp.zeros(shape, jnp.int8), jnp.zeros(shape[:-1], dtype), kept)
        return jnp.zeros(shape, dtype)

    def arrays(exact: int = 0) -> RowArray:
        return tuple(array(rows, exact) for _ in range(layers)) if separate else array(layers * rows, exact)

    k = arrays(key_channels)
    if turned and not quantized:
        k = tuple(
            TurnedKeys(jnp.zeros((rows, config.kv_heads, config.head_width, slots), dtype)) for _ in range(layers)
        )
    return _split_kv(RowCache(k, arrays(), none, none, none), mesh)


@functools.partial(jax.jit, static_argnames=("config", "rows", "slots", "dtype", "separate", "turned", "mesh"))
def empty_state(
    config: LLMConfig,
    rows: int,
    slots: int,
    dtype: str,
    *,
    separate: bool,
    turned: bool = False,
    mesh: Mesh | None = None,
) -> tuple[RowState, Sampling]:
    """The state of `rows` answers that have ended, with `slots` slots of text each, and their sampling."""
    text = empty_rows(config, rows, slots, dtype, separate=separate, turned=turned, mesh=mesh)
    keys = jnp.broadcast_to(jax.random.key(0), (rows,))
    none, zero = jnp.zeros(rows, jnp.int32), jnp.zeros(rows)
    state = RowState(none, text, keys, jnp.ones(rows, bool), jnp.ones(rows, bool)), Sampling(zero, zero)
    return _split_kv(state, mesh)


@functools.partial(jax.jit, static_argnames="layers", donate_argnames="target")
def move_row[T](target: T, source: T, row: jax.Array, source_row: jax.Array, *, layers: int | None) -> T:
    """Copies an answer from a row of `source` to a row of `target`: trees of arrays [B], and of keys and values.

    `layers`: the number of layers in each array of keys and values; None where each layer has its own. Slots that
    `target` lacks are left out, and those that `source` lacks become zeros: an answer before it may have left NaN there.
    """

    def move(new: jax.Array | TurnedKeys, old: jax.Array | TurnedKeys) -> jax.Array | TurnedKeys:
        if isinstance(new, TurnedKeys):
            turned = old.values if isinstance(old, TurnedKeys) else jnp.swapaxes(old, 2, 3)
            return TurnedKeys(put(new.values, turned, 3))
        assert isinstance(old, jax.Array)
        return put(new, old, 2) if new.ndim > 1 else new.at[row].set(old[source_row])

    def put(new: jax.Array, old: jax.Array, slots: int) -> jax.Array:
        """`slots`: the axis of the slots."""
        by_layer, old_by_layer = (x.reshape(layers or 1, -1, *x.shape[1:]) for x in (new, old))
        moved = jax.lax.dynamic_slice_in_dim(old_by_layer, source_row, 1, axis=1)
        moved = jax.lax.slice_in_dim(moved, 0, min(new.shape[slots], old.shape[slots]), axis=slots + 1)
        behind = max(new.shape[slots] - old.shape[slots], 0)
        moved = jnp.pad(moved, [(0, behind if axis == slots + 1 else 0) for axis in range(moved.ndim)])
        at = [jnp.int32(0), row, *(jnp.int32(0) for _ in new.shape[1:])]
        return jax.lax.dynamic_update_slice(by_layer, moved, at).reshape(new.shape)

    return jax.tree.map(move, target, source, is_leaf=lambda x: isinstance(x, TurnedKeys))
