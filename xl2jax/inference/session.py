"""The one driver of the compiled programs: prefix, segments, pooling, scores, choice, mixture, question, answer.

Functions of a `Network`, a `PrefillPlan` and a `VideoKV`, without files and without text. The Python interface,
`verify`, the benchmarks, the needle test and the tests all call them, so that they run the same programs.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import threading
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xl2jax.config import FRAMES_PER_GROUP, TILE_POOL
from xl2jax.errors import UserError
from xl2jax.inference import compiled, memory, prefill
from xl2jax.inference.bilevel import (
    BilevelConfig,
    GroupTable,
    MixedSource,
    PooledKV,
    blocks_of_units,
    group_table,
    mixed_slots,
)
from xl2jax.inference.cache import KVCache
from xl2jax.inference.generate import DecodeState, SuffixIds, TokenSampling
from xl2jax.inference.layout import VideoLayout, bucket
from xl2jax.inference.network import Network
from xl2jax.inference.offload import HostKV, fetch, pool_host
from xl2jax.inference.prefill import PrefillPlan, Step, Stretch
from xl2jax.inference.relevance import AttentionScorer

_TEXT_SIZES = (32, 128, 512, 2048)  # larger sizes are powers of two


# --- the video, once ---------------------------------------------------------------------------


def encode(network: Network, plan: PrefillPlan, frames: np.ndarray) -> jax.Array:
    """Frames [F, H, W, 3] of one segment, or fewer -> visual tokens [segment_groups, V, D] on the device.

    Frames are uint8, or floating-point pixels in [-1, 1]. Missing frames are padded with zeros.
    """
    segment_frames = plan.segment_groups * FRAMES_PER_GROUP
    missing = segment_frames - len(frames)
    if missing:
        frames = np.pad(frames, ((0, missing), (0, 0), (0, 0), (0, 0)))
    return compiled.encode(network, frames, frames_at_once=plan.step_groups * FRAMES_PER_GROUP)


class TileTokens:
    """The visual tokens of the tiles of all pictures of a prompt.

    Tiles are encoded a few at a time. Their number in a program is a power of two, so that few are compiled.

    Attributes:
      filled: how many of the tiles have been encoded.
      tokens: [N, D], those of the tiles in their order; the rest is unused.
    """

    def __init__(self, network: Network, tiles: int, *, pool: int = TILE_POOL):
        """`pool`: see `VideoXL2.encode_tiles`."""
        self._network, self._pool, self.filled = network, pool, 0
        most, width = tiles_at_once(network.platform), network.config.llm.width
        rows = bucket(tiles // most * most + _power_of_two(tiles % most)) * (network.config.grid // pool) ** 2
        self.tokens = jnp.zeros((rows, width), network.dtype)

    def add(self, tiles: np.ndarray) -> None:
        """Encodes the next tiles [n, H, W, 3], uint8 or pixels, of which `tiles_at_once` go together."""
        most = tiles_at_once(self._network.platform)
        for first in range(0, len(tiles), most):
            part = tiles[first : first + most]
            padded = np.pad(part, ((0, _power_of_two(len(part)) - len(part)), (0, 0), (0, 0), (0, 0)))
            at = np.int32(self.filled)
            self.tokens = compiled.encode_tiles(self._network, self.tokens, padded, at, pool=self._pool)
            self.filled += len(part)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length() if number else 0


def tiles_at_once(platform: str) -> int:
    """How many tiles are encoded together on "cpu" or "gpu": as many as groups of frames, which take more memory."""
    return prefill.default_steps(platform)[0]


def empty_video_cache(network: Network, slots: int, visual_start: int, *, quantized: bool) -> KVCache:
    """An empty cache for a video. In 8 bits it keeps key channels with large biases as they are."""
    channels = network.exact_key_channels() if quantized else None
    return compiled.new_cache(
        network.config.llm,
        slots,
        network.dtype,
        visual_start,
        quantized=quantized,
        key_channels=channels,
        mesh=network.mesh,
    )


class VideoPrefill:
    """Puts a video into a KV cache: the prefix at once, then a segment with every `add`.

    Attributes:
      layout: of the video; shortened where it ended early.
      cache: the KV so far. `add` donates it and puts another one in its place.
      hidden: hidden states [T, D] of each part of the prefix and the tail, where they are kept.
    """

    def __init__(
        self,
        network: Network,
        layout: VideoLayout,
        plan: PrefillPlan,
        prefix: Sequence[int] | Stretch,
        time_ids: list[list[int]],
        *,
        pictures: jax.Array | None = None,
        quantized: bool = False,
        keep_hidden: bool = False,
    ):
        """`pictures`: the visual tokens [N, D] to which the prefix and the tail refer."""
        self._network, self._plan, self._time_ids = network, plan, time_ids
        self.layout = layout
        self._groups = 0
        self._pictures, self._keep_hidden = pictures, keep_hidden
        self._segments = prefill.segments(prefill.steps(layout, plan, time_ids), plan) if layout.groups else iter(())
        self.hidden: list[jax.Array] = []
        self.cache = empty_video_cache(network, plan.slots, plan.visual_start, quantized=quantized)
        self.add_globals(prefix if isinstance(prefix, Stretch) else Stretch.of_text(prefix))

    def add_globals(self, stretch: Stretch) -> None:
        """Prefills the prefix, or behind the last segment the tail."""
        for block, length in prefill.blocks(stretch, self._network.platform):
            pictures = self._pictures if block.visual.max() >= 0 else None
            self.cache, hidden = compiled.prefill_globals(self._network, self.cache, block, pictures, np.int32(length))
            if self._keep_hidden:
                self.hidden.append(hidden[:length])

    def add(self, visual: jax.Array, groups: int | None = None) -> tuple[Step, jax.Array]:
        """Prefills the next segment from visual tokens [segment_groups, V, D].

        `groups` is given where the video ended early, so that the segment has fewer groups.
        Returns the segment's steps and their hidden states [steps, tokens of a step, D].
        """
        segment = next(self._segments)
        expected = min(self._plan.segment_groups, self.layout.groups - self._groups)
        groups = expected if groups is None else groups
        self._groups += groups
        if groups < expected:
            self.layout = dataclasses.replace(self.layout, time_lengths=self.layout.time_lengths[: self._groups])
            *_, segment = prefill.segments(
                prefill.steps(self.layout, self._plan, self._time_ids[: self._groups]), self._plan
            )
        self.cache, hidden = compiled.prefill_segment(self._network, self.cache, visual, segment)
        return segment, hidden

    def finish(self) -> VideoKV:
        """The video as questions read it. Raises UserError where its KV is not finite."""
        if not bool(compiled.all_finite(self.cache)):
            raise self._network.not_finite("the video's KV")
        lengths = self.layout.time_lengths[: self._groups]
        return VideoKV(dataclasses.replace(self.layout, time_lengths=lengths), self._plan, self.cache)


@dataclasses.dataclass(eq=False)
class VideoKV:
    """A video's KV and its layout. Questions never change it, and several threads may read it."""

    layout: VideoLayout
    plan: PrefillPlan
    cache: KVCache
    host: HostKV | None = None
    """The visual KV where it was offloaded. `cache` then holds only the globals."""
    pooled: dict[int, PooledKV] = dataclasses.field(default_factory=dict)
    """The pooled KV by pool size. Only the size that was asked for last is kept."""
    piece_groups: int | None = None
    """How many groups are scored together by dense KV that is not on the device; None where it is not scored."""
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    """Held while `pooled` is made, so that threads that ask at once make it once."""

    @functools.cached_property
    def table(self) -> GroupTable:
        return group_table(self.layout, self.group_capacity)

    @property
    def grows(self) -> bool:
        """Whether the video is still being watched, so that it may have fewer chunks than a question asks for."""
        return False

    @property
    def group_capacity(self) -> int:
        """Gcap, the number of groups that the table and the pooled KV have room for."""
        return self.plan.group_capacity

    @property
    def on_device(self) -> bool:
        """Whether the dense KV of all groups is in `cache`."""
        return self.host is None

    def make_pooled(self, network: Network, pool: int) -> PooledKV:
        """The pooled KV of all groups."""
        llm, visual_tokens = network.config.llm, self.layout.visual_tokens
        if self.host is None:
            return compiled.pool_cache(llm, self.cache, self.table, visual_tokens=visual_tokens, pool=pool)
        return pool_host(llm, self.cache, self.host, self.table, visual_tokens=visual_tokens, pool=pool)

    def readable(self, dense: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
        """Those of groups `dense` [Gcap] whose dense KV can be read: all of them, in a video that has ended."""
        return dense

    def with_dense(self, dense: jax.Array | np.ndarray, limit: int) -> KVCache:
        """A cache that holds the visual tokens of groups `dense` [Gcap], at most `limit`.

        Where `on_device` is false it holds no other ones, one group behind the other.
        """
        if self.host is None:
            return self.cache
        exists = np.arange(self.group_capacity) < self.layout.groups
        return fetch(self.cache, self.host, np.asarray(dense) & exists, visual_tokens=self.layout.visual_tokens)

    def mixed_slots(self, dense_limit: int, bilevel: BilevelConfig) -> int:
        """Capacity of a mixed cache with at most `dense_limit` dense groups."""
        return mixed_slots(self.layout, dense_limit, bilevel)


# --- what a question reads ---------------------------------------------------------------------


class Chosen(NamedTuple):
    """The cache that an answer reads, and how it was chosen."""

    context: KVCache
    dense_blocks: np.ndarray
    """Boolean [Bcap]: selection blocks that stay dense."""
    scores: np.ndarray | None
    """float32 [Bcap]: relevance of each selection block. None where blocks were not scored."""


type Scorer = AttentionScorer | Literal["random", "none"]
"""How chunks are scored. random: random scores, the same ones for the same question. none: no chunk is chosen."""


def whole_cache(kv: VideoKV) -> KVCache:
    """The whole dense cache. Raises UserError where it is not on the device."""
    if not kv.on_device:
        raise UserError("the video's KV was offloaded: it is read with bi-level decoding and chosen chunks only")
    return kv.cache


def choose_context(network: Network, kv: VideoKV, suffix: SuffixIds, bilevel: BilevelConfig, scorer: Scorer) -> Chosen:
    """Scores the selection blocks for a question, keeps the best of them dense, and pools all others.

    Raises UserError where a score is not finite.
    """
    size = bilevel.select_chunk_groups
    top = 0 if scorer == "none" else bilevel.top(kv.layout)
    pooled = pooled_kv(network, kv, bilevel.pool)
    group_scores = score_groups(network, kv, suffix, bilevel, scorer, pooled)
    scores, dense = compiled.choose(group_scores, kv.table.groups, select_chunk_groups=size, top=top)
    dense = kv.readable(dense)
    context, _ = mix(network, kv, pooled, dense, (top + 2) * size, bilevel)
    blocks = np.asarray(dense)[::size]
    if scorer == "none":
        return Chosen(context, blocks, None)
    if not np.isfinite(scores).all():
        raise network.not_finite("the chunks' relevance")
    return Chosen(context, blocks, np.asarray(scores))


def context_of_units(network: Network, kv: VideoKV, units: Sequence[int], bilevel: BilevelConfig) -> Chosen:
    """The context whose dense blocks are those of upstream's selected `units` (see `bilevel.blocks_of_units`)."""
    groups, size = kv.layout.groups, bilevel.select_chunk_groups
    blocks = blocks_of_units(units, groups, size)
    dense = np.zeros(kv.group_capacity, bool)
    dense[:groups] = np.repeat(blocks, size)[:groups]
    pooled = pooled_kv(network, kv, bilevel.pool)
    context, _ = mix(network, kv, pooled, dense, int(dense.sum()), bilevel)
    return Chosen(context, blocks, None)


def pooled_kv(network: Network, kv: VideoKV, pool: int) -> PooledKV:
    """The pooled KV, made when it is first asked for. Only the last pool size is kept."""
    with kv.lock:
        if pool not in kv.pooled:
            kv.pooled.clear()
            kv.pooled[pool] = kv.make_pooled(network, pool)
        return kv.pooled[pool]


def mix(
    network: Network,
    kv: VideoKV,
    pooled: PooledKV,
    dense: jax.Array | np.ndarray,
    dense_limit: int,
    bilevel: BilevelConfig,
) -> tuple[KVCache, MixedSource]:
    """The mixed cache whose groups `dense` [Gcap], at most `dense_limit` of them, are whole."""
    return compiled.mix(
        network.config.llm,
        kv.with_dense(dense, dense_limit),
        pooled,
        kv.table,
        jnp.asarray(dense),
        visual_tokens=kv.layout.visual_tokens,
        pool=bilevel.pool,
        slots=kv.mixed_slots(dense_limit, bilevel),
        compact=not kv.on_device,
    )


def score_groups(
    network: Network, kv: VideoKV, suffix: SuffixIds, bilevel: BilevelConfig, scorer: Scorer, pooled: PooledKV
) -> jax.Array:
    """Relevance of every group, float32 [Gcap]. Groups whose dense KV cannot be read are scored by their pooled KV.

    Raises UserError where the scorer needs the dense KV and it was offloaded.
    """
    capacity = kv.group_capacity
    if scorer == "none":
        return jnp.zeros(capacity)
    if scorer == "random":
        ids = np.asarray(suffix.ids)[: int(suffix.end)].tolist()
        seed = int.from_bytes(hashlib.blake2b(repr(ids).encode(), digest_size=4).digest(), "little")
        return jax.random.uniform(jax.random.key(seed), (capacity,))

    def scores(context: KVCache, group: jax.Array) -> jax.Array:
        text = new_text(network, suffix, 0)
        return compiled.attention_scores(network, context, group, text, suffix, scorer=scorer, groups=capacity)

    def mixed_scores(dense: np.ndarray, limit: int) -> jax.Array:
        context, source = mix(network, kv, pooled, dense, limit, bilevel)
        return scores(context, jnp.where(source.valid, source.group, -1))

    if scorer.keys != "pooled" and kv.on_device:
        return scores(kv.cache, compiled.slot_groups(kv.table, kv.cache, visual_tokens=kv.layout.visual_tokens))
    if scorer.keys == "dense" and kv.piece_groups is None:
        raise UserError("the dense KV was offloaded: score chunks by the pooled KV (relevance keys auto or pooled)")
    nothing, read = np.zeros(capacity, bool), np.arange(capacity) >= kv.layout.groups
    found = jnp.zeros(capacity)
    if scorer.keys != "pooled" and kv.piece_groups is not None:
        # Each piece is dense in its turn while all others are pooled, so that the scores of all pieces can be compared.
        # The newest come first: where old ones were dropped, the rest is in few pieces.
        for end in range(kv.layout.groups, 0, -kv.piece_groups):
            piece = nothing.copy()
            piece[max(end - kv.piece_groups, 0) : end] = True
            piece = np.asarray(kv.readable(piece))
            if piece.any():
                found = jnp.where(piece, mixed_scores(piece, kv.piece_groups), found)
                jax.block_until_ready(found)  # otherwise the caches of several pieces are there at once
            read |= piece
    return found if read.all() else jnp.where(read, found, mixed_scores(nothing, 0))


# --- the answer --------------------------------------------------------------------------------


def suffix_ids(ids: Sequence[int], first: int, last: int) -> SuffixIds:
    """The tokens behind the video, padded to one of few sizes. The question is `ids[first:last]`."""
    padded = np.zeros(text_size(len(ids)), np.int32)
    padded[: len(ids)] = ids
    return SuffixIds(padded, np.int32(first), np.int32(last), np.int32(len(ids)))


def text_size(tokens: int) -> int:
    """`tokens` rounded up to one of few sizes, so that questions and answers of other lengths compile nothing."""
    return next((size for size in _TEXT_SIZES if size >= tokens), 1 << (tokens - 1).bit_length())


def new_text(network: Network, suffix: SuffixIds, new_tokens: int) -> KVCache:
    """An empty cache for a suffix. Raises UserError where there is no memory for it and `new_tokens` more."""
    slots = text_slots(network, int(suffix.end) + new_tokens)
    slot = memory.slot_bytes(network.config, network.dtype, tensor=network.tensor)
    need, free = slots * slot, memory.available_bytes(network.mesh)
    if need > free:
        raise UserError(
            f"the question and up to {new_tokens} new tokens need {need / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are "
            "free: shorten the question or ask for fewer new tokens"
        )
    slots = text_slots(network, len(suffix.ids))
    return compiled.new_cache(network.config.llm, slots, network.dtype, mesh=network.mesh)


def text_slots(network: Network, tokens: int) -> int:
    """Slots of a cache that has to hold `tokens` of a question and its answer, one of few sizes.

    CPUs read all slots of an answer, so that theirs begin with fewer.
    """
    slots = 128 if network.platform == "cpu" else 512
    while slots < tokens:
        slots *= 4
    return slots


def start_answer(
    network: Network,
    context: KVCache,
    suffix: SuffixIds,
    *,
    new_tokens: int,
    stop: jax.Array | np.ndarray,
    sampling: TokenSampling,
    seed: int = 0,
) -> tuple[DecodeState, jax.Array]:
    """Runs the suffix behind `context` and samples the first of up to `new_tokens` tokens.

    Returns the state that `answer_tokens` continues from, and the hidden states of the suffix [T, D].
    """
    text = new_text(network, suffix, new_tokens)
    return compiled.ask(network, context, text, suffix, jax.random.key(seed), stop, sampling.traced())
