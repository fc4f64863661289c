"""Which chunks matter to a question: scored by the model itself, or read from upstream's files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from xl2jax.bilevel import MixedSource
from xl2jax.cache import KVCache, attend_text, unpack
from xl2jax.errors import UserError
from xl2jax.qwen2 import Qwen2


@dataclasses.dataclass(frozen=True)
class AttentionScorer:
    """Which layers and heads count. `first_layer <= l < last_layer` as shares of the depth.

    Defaults: the middle half of the depth, where a decoder gathers evidence (early layers attend to
    neighbours and to sinks, late ones to what is about to be written), and all heads alike.
    """

    first_layer: float = 0.25
    last_layer: float = 0.75
    heads: Literal["mean", "max"] = "mean"

    def layers(self, depth: int) -> tuple[int, int]:
        first = min(int(self.first_layer * depth), depth - 1)
        return first, max(round(self.last_layer * depth), first + 1)


def attention_scores(
    llm: Qwen2, context: KVCache, source: MixedSource, text: KVCache, ids: jax.Array, first: jax.Array,
    last: jax.Array, scorer: AttentionScorer, groups: int, *, implementation: str = "auto",
) -> jax.Array:  # fmt: skip
    """Attention mass of each group, float32 [groups]: what the question looks at in the pooled cache.

    Runs the suffix `ids` [T] behind `context`, a mixed cache (`source`) of pooled groups, and gathers
    the attention that tokens `first <= t < last` (the question's own) pay to the time and visual
    tokens of each group. Nothing of size T x M is kept.
    """
    at = jnp.arange(ids.shape[0], dtype=jnp.int32)
    counted = (at >= first) & (at < last)
    depth, kv_heads, slots, h = context.shape
    keys = unpack(context.k)
    block = min(1024, slots)
    first_layer, last_layer = scorer.layers(depth)
    group = jnp.where(source.valid & (source.group >= 0), source.group, groups)

    def mass(q: jax.Array, lse: jax.Array, layer: jax.Array) -> jax.Array:
        """[groups]: attention of the counted tokens, averaged over them, reduced over heads."""
        heads = q.shape[1]
        queries = q.reshape(q.shape[0], kv_heads, -1, h)
        norm = lse.reshape(queries.shape[:3])

        def one(i: jax.Array, total: jax.Array) -> jax.Array:
            start = i * block
            read_at = jnp.minimum(start, slots - block)
            k = jax.lax.dynamic_slice(keys, (layer, 0, read_at, 0), (1, kv_heads, block, h))[0]
            scores = jnp.einsum("tkgh,ksh->tkgs", queries, k, preferred_element_type=jnp.float32)
            use = counted[:, None, None, None] & (read_at + jnp.arange(block) >= start)
            p = jnp.where(use, jnp.exp(jnp.where(use, scores * h**-0.5 - norm[..., None], 0.0)), 0.0)
            to = jax.lax.dynamic_slice_in_dim(group, read_at, block)
            return total + jax.ops.segment_sum(p.sum(0).reshape(heads, block).T, to, num_segments=groups + 1)

        total = jax.lax.fori_loop(0, -(-slots // block), one, jnp.zeros((groups + 1, heads)))
        total = total[:groups] / jnp.maximum(last - first, 1)
        return total.max(-1) if scorer.heads == "max" else total.mean(-1)

    def attend(state: Any, layer: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[Any, jax.Array]:
        kv, sums = state
        kv, out, lse = attend_text(q, k, v, context, kv, text.global_length, layer, implementation)
        counts = (layer >= first_layer) & (layer < last_layer)
        add = jax.lax.cond(counts, lambda: mass(q, lse, layer), lambda: jnp.zeros_like(sums))
        return (kv, sums + add), out

    positions = context.length + text.global_length + at
    init = ((text.k, text.v), jnp.zeros(groups, jnp.float32))
    _, (_, sums) = llm.forward(llm.embed_tokens(ids), positions, attend, init)
    return sums / (last_layer - first_layer)


def unit_features(visual: jax.Array) -> jax.Array:
    """Visual tokens [G, V, D] -> one float32 vector a group, the mean of its unit vectors [G, D]."""
    x = visual.astype(jnp.float32)
    return jnp.mean(x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6), axis=1)


def similarity_scores(llm: Qwen2, features: jax.Array, ids: jax.Array, first: jax.Array, last: jax.Array) -> jax.Array:
    """Cosine between the question's mean token embedding and each group's `unit_features`: [G]."""
    at = jnp.arange(ids.shape[0])
    x = llm.embed_tokens(ids).astype(jnp.float32)
    x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6)
    question = jnp.sum(jnp.where(((at >= first) & (at < last))[:, None], x, 0.0), axis=0)
    question = question / jnp.maximum(jnp.linalg.norm(question), 1e-6)
    return features @ question


def block_scores(group_scores: jax.Array, groups: jax.Array, select_chunk_groups: int) -> jax.Array:
    """Scores of groups [Gcap] -> mean score of each selection block [Bcap]."""
    capacity = group_scores.shape[0]
    blocks = -(-capacity // select_chunk_groups)
    index = jnp.arange(capacity)
    real = index < groups
    block = index // select_chunk_groups
    total = jax.ops.segment_sum(jnp.where(real, group_scores, 0.0), block, num_segments=blocks)
    return total / jnp.maximum(jax.ops.segment_sum(real.astype(jnp.float32), block, num_segments=blocks), 1)


def read_selection(path: Path, video: str, question: str, category: str | None) -> dict[str, Any] | None:
    """One question's entry of an upstream selection file.

    Returns {"units": [...], "select_chunk_groups": int, "pool": int}, or None where the file has no
    entry for the question. The key is `<video file name>_<question>`, also tried without the suffix
    of the file name (as LVBench's files have it). Without `category` all categories are searched.
    """
    try:
        raw = json.loads(path.read_text())
        categories = {k: v for k, v in raw.items() if v is not None}
    except (OSError, ValueError, AttributeError) as e:
        raise UserError(f"{path}: not a selection file ({e})") from None
    if category is not None:
        if category not in raw:
            raise UserError(f"{path}: no category {category!r} (it has {', '.join(raw) or 'none'})")
        categories = {k: v for k, v in categories.items() if k == category}
    for entry in categories.values():
        try:
            config, selected = entry["config"], entry["selected_unit_indices"]
            for name in (video, Path(video).stem):
                units = selected.get(f"{name}_{question}")
                if units is not None:
                    return {
                        "units": [int(u) for u in units][: int(config["selected_topk"])],
                        "select_chunk_groups": int(config["selected_chunk_size"]),
                        "pool": int(config["compression"]),
                    }
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(f"{path}: not a selection file (an entry lacks config or selected_unit_indices)") from None
    return None
