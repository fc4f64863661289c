"""What an answer reads: which chunks of a watched video stay dense, and the cache that follows from it."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
import numpy as np

from xl2jax.config import FRAMES_PER_GROUP
from xl2jax.errors import UserError
from xl2jax.inference import compiled, memory
from xl2jax.inference.bilevel import BilevelConfig, MixedSource, PooledKV, blocks_of_units, mixed_slots
from xl2jax.inference.cache import KVCache
from xl2jax.inference.layout import VideoLayout
from xl2jax.inference.offload import fetch, pool_host
from xl2jax.inference.relevance import AttentionScorer
from xl2jax.inference.selection_files import Selection, read_selection
from xl2jax.inference.video_cache import WatchedVideo
from xl2jax.prompt import Suffix

if TYPE_CHECKING:
    from xl2jax.inference.api import Model

logger = logging.getLogger(__name__)

_TEXT_SIZES = (128, 512, 2048)  # beyond them powers of two
_LEAST_TEXT_SLOTS = 512


@dataclasses.dataclass(frozen=True)
class RelevanceConfig:
    """How the chunks that stay dense are found.

    attention: the question's attention to the video, as `AttentionScorer` has it. similarity: the question's embedding
    against the visual tokens. file: upstream's selection file. none: blocks 1 and B only. random: the same
    chunks for the same question, whatever it asks; the control of experiments.
    """

    scorer: Literal["attention", "similarity", "file", "none", "random"] = "attention"
    attention: AttentionScorer = AttentionScorer()  # noqa: RUF009 (frozen)
    file: Path | None = None
    category: str | None = None
    missing: Literal["error", "dense"] = "error"
    """What to do with a question that the file lacks."""


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A selection block of the video."""

    number: int
    start: float
    end: float
    """Times of its first frame and of its last, seconds."""
    score: float | None
    dense: bool


def check_bilevel(bilevel: BilevelConfig, layout: VideoLayout) -> None:
    """Raises UserError for settings that do not fit a video."""
    if bilevel.select_chunk_groups < 1:
        raise UserError(f"select chunk groups must be 1 or more, not {bilevel.select_chunk_groups}")
    if not 1 <= bilevel.pool <= layout.visual_tokens:
        raise UserError(f"pool must be from 1 to {layout.visual_tokens} (visual tokens a group), not {bilevel.pool}")
    blocks, top = bilevel.blocks(layout), bilevel.top(layout)
    if not 0 <= top <= blocks:
        raise UserError(f"top chunks must be from 0 to {blocks} (the video has {blocks} chunks), not {top}")


def selection_for(relevance: RelevanceConfig, video: Path, question: str) -> Selection | None:
    """A question's entry in the selection file; None where it has none and `missing` is `dense`."""
    if relevance.file is None:
        raise UserError("the file scorer needs a selection file (--relevance-file)")
    found = read_selection(relevance.file, video.name, question, relevance.category)
    if found is None and relevance.missing == "error":
        raise UserError(
            f"{relevance.file}: no entry for {video.name} and {question!r} "
            "(--relevance-missing dense reads the whole cache instead)"
        )
    return found


def choose_context(
    model: Model, video: WatchedVideo, question: str, text: Suffix, bilevel: BilevelConfig | None, relevance: RelevanceConfig
) -> tuple[KVCache, list[Chunk]]:  # fmt: skip
    """The cache that an answer reads, and the selection blocks it was made of."""
    if bilevel is None:
        return whole_cache(video), []
    check_bilevel(bilevel, video.layout)
    units: list[int] | None = None
    if relevance.scorer == "file":
        found = selection_for(relevance, Path(video.path), question)
        if found is None:
            logger.info("%s has no entry for this question: reading the whole dense cache", relevance.file)
            return whole_cache(video), []
        units = found.units
        bilevel = BilevelConfig(found.select_chunk_groups, found.pool, 0)
        check_bilevel(bilevel, video.layout)
        most = -(-video.layout.groups // 2)
        if any(not 0 <= u < most for u in units):
            raise UserError(f"{relevance.file}: selects unit {max(units)}, the video has {most} as it was sampled")
    groups, size = video.layout.groups, bilevel.select_chunk_groups
    pooled = _pooled(model, video, bilevel.pool)
    scores = None
    if units is not None:
        blocks = blocks_of_units(units, groups, size)
        dense = np.zeros(video.group_capacity, bool)
        dense[:groups] = np.repeat(blocks, size)[:groups]
        most = int(dense.sum())
    else:
        top = bilevel.top(video.layout) if relevance.scorer != "none" else 0
        group_scores = _scores(model, video, text, pooled, bilevel, relevance)
        scores, blocks, dense = compiled.choose(group_scores, video.table.groups, select_chunk_groups=size, top=top)
        most = (top + 2) * size
    context, _ = _mix(model, video, pooled, dense, most, bilevel)
    if relevance.scorer == "none":
        scores = None
    if scores is not None and not np.isfinite(scores).all():
        raise model.not_finite("the chunks' relevance")
    return context, _chunks(video, size, np.asarray(blocks), None if scores is None else np.asarray(scores))


def _pooled(model: Model, video: WatchedVideo, pool: int) -> PooledKV:
    with video.lock:
        if pool not in video.pooled:
            video.pooled.clear()
            llm, visual_tokens = model.config.llm, video.layout.visual_tokens
            if video.host is None:
                pooled = compiled.pool_cache(llm, video.cache, video.table, visual_tokens=visual_tokens, pool=pool)
            else:
                pooled = pool_host(llm, video.cache, video.host, video.table, visual_tokens=visual_tokens, pool=pool)
            video.pooled[pool] = pooled
        return video.pooled[pool]


def _mix(
    model: Model,
    video: WatchedVideo,
    pooled: PooledKV,
    dense: jax.Array | np.ndarray,
    most: int,
    bilevel: BilevelConfig,
) -> tuple[KVCache, MixedSource]:
    """The mixed cache with groups `dense` [Gcap], at most `most`, whole."""
    cache, visual_tokens = video.cache, video.layout.visual_tokens
    if video.host is not None:
        exists = np.arange(video.group_capacity) < video.layout.groups
        cache = fetch(cache, video.host, np.asarray(dense) & exists, visual_tokens=visual_tokens)
    return compiled.mix(
        model.config.llm, cache, pooled, video.table, jnp.asarray(dense), visual_tokens=visual_tokens,
        pool=bilevel.pool, slots=mixed_slots(video.layout, most, bilevel), compact=video.host is not None,
    )  # fmt: skip


def _scores(
    model: Model,
    video: WatchedVideo,
    text: Suffix,
    pooled: PooledKV,
    bilevel: BilevelConfig,
    relevance: RelevanceConfig,
) -> jax.Array:
    """Relevance of every group, float32 [Gcap]."""
    ids, first, last = padded(text.ids), np.int32(text.first), np.int32(text.last)
    if relevance.scorer == "similarity":
        return compiled.similarity_scores(
            model.config, model.params, video.features[: video.group_capacity], ids, first, last
        )
    if relevance.scorer == "none":
        return jnp.zeros(video.group_capacity)
    if relevance.scorer == "random":
        seed = int.from_bytes(hashlib.blake2b(repr(text.ids).encode(), digest_size=4).digest(), "little")
        return jax.random.uniform(jax.random.key(seed), (video.group_capacity,))
    keys = relevance.attention.keys
    if keys == "dense" and video.host is not None:
        raise UserError("the dense KV was offloaded: score chunks by the pooled KV (relevance keys auto or pooled)")
    if keys == "auto" and not video.told_keys:
        offloaded = "the dense KV was offloaded: chunks are scored by the pooled KV"
        logger.info("chunks are scored by the dense KV (auto)" if video.host is None else offloaded)
        video.told_keys = True
    if keys == "pooled" or video.host is not None:
        context, source = _mix(model, video, pooled, np.zeros(video.group_capacity, bool), 0, bilevel)
        group = jnp.where(source.valid, source.group, -1)
    else:
        context = video.cache
        group = compiled.slot_groups(video.table, context, visual_tokens=video.layout.visual_tokens)
    return compiled.attention_scores(
        model.config, model.params, context, group, text_cache(model, text, 0), ids, first, last,
        np.int32(len(text.ids)), scorer=relevance.attention, groups=video.group_capacity,
        implementation=model.implementation,
    )  # fmt: skip


def text_cache(model: Model, text: Suffix, room: int) -> KVCache:
    """An empty cache for a suffix and `room` new tokens. Raises UserError where there is no memory for it."""
    slots = max(text_size(len(text.ids) + room), _LEAST_TEXT_SLOTS)
    need, free = slots * memory.slot_bytes(model.config, model.dtype), memory.available_bytes()
    if need > free:
        raise UserError(
            f"the question and up to {room} new tokens need {need / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free: "
            "shorten the question or ask for fewer new tokens"
        )
    return compiled.new_cache(model.config.llm, slots, model.dtype)


def text_size(tokens: int) -> int:
    """`tokens` rounded up to one of few sizes, so that questions and answers of other lengths compile nothing."""
    return next((size for size in _TEXT_SIZES if size >= tokens), 1 << (tokens - 1).bit_length())


def padded(ids: list[int]) -> np.ndarray:
    """int32, with zeros up to one of few sizes."""
    out = np.zeros(text_size(len(ids)), np.int32)
    out[: len(ids)] = ids
    return out


def whole_cache(video: WatchedVideo) -> KVCache:
    """The whole dense cache. Raises UserError where it is not on the device."""
    if video.host is not None:
        raise UserError("the video's KV was offloaded: it is read with bi-level decoding and chosen chunks only")
    return video.cache


def _chunks(video: WatchedVideo, size: int, dense: np.ndarray, scores: np.ndarray | None) -> list[Chunk]:
    frames = size * FRAMES_PER_GROUP
    return [
        Chunk(
            number=b + 1,
            start=video.times[b * frames],
            end=video.times[min((b + 1) * frames, len(video.times)) - 1],
            score=None if scores is None else float(scores[b]),
            dense=bool(dense[b]),
        )
        for b in range(-(-video.layout.groups // size))
    ]
