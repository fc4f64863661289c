"""Which groups of frames matter to a question, scored by the model's own attention."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from xl2jax.arithmetic import ceil_div
from xl2jax.errors import UserError
from xl2jax.inference.cache import KVCache, attend_text
from xl2jax.inference.generate import SuffixIds
from xl2jax.models.qwen2 import Qwen2
from xl2jax.ops.attention import Attention
from xl2jax.ops.kv import unpack
from xl2jax.ops.precision import product


@dataclasses.dataclass(frozen=True)
class AttentionScorer:
    """How the question's attention scores groups. Layers from `first_layer` to `last_layer`, shares of the depth, count.

    A group's score is the power mean of the attention that it gets, over tokens, heads and layers. The question's tokens
    have the share `question_weight` of the weight, and the few tokens between the question and the answer the rest. The
    defaults gave the best needle retrieval with two checkpoints.
    """

    first_layer: float = 0.0
    last_layer: float = 1.0
    exponent: float = 6.0
    """Of the power mean. 1 is the ordinary mean. Large exponents favour tokens and heads that attend to one group over
    those that attend to many alike."""
    keys: Literal["auto", "dense", "pooled"] = "auto"
    """The KV that the question attends to. auto is the dense KV, or the pooled KV where the dense KV was offloaded.
    For a live video auto and dense bring back what has left the device, a piece at a time; pooled takes less time."""
    question_weight: float = 0.1
    """From 0 to 1. The tokens of a question attend to all that it could mean; at the tokens behind it the model looks for
    what it says next."""

    def __post_init__(self) -> None:
        if not 0 <= self.first_layer < self.last_layer <= 1:
            raise UserError(
                "relevance layers are two rising shares of the depth from 0 to 1, "
                f"not {self.first_layer} {self.last_layer}"
            )
        if not 1 <= self.exponent <= 8:
            raise UserError(f"the exponent of relevance must be from 1 to 8, not {self.exponent}")
        if not 0 <= self.question_weight <= 1:
            raise UserError(f"the question's weight in relevance must be from 0 to 1, not {self.question_weight}")

    def layers(self, depth: int) -> tuple[int, int]:
        first = min(int(self.first_layer * depth), depth - 1)
        return first, max(round(self.last_layer * depth), first + 1)


_SLOTS, _TOKENS = 4096, 32
"""How many key slots and tokens of the question are scored at a time."""


def attention_scores(
    llm: Qwen2,
    context: KVCache,
    group: jax.Array,
    text: KVCache,
    suffix: SuffixIds,
    scorer: AttentionScorer,
    groups: int,
    *,
    attention: Attention,
) -> jax.Array:
    """The question's attention to each group, float32 [groups] from 0 to 1: see `AttentionScorer`."""
    sums = head_scores(llm, context, group, text, suffix, scorer, groups, attention=attention)
    return sums.mean(-1) ** (1 / scorer.exponent)


def head_scores(
    llm: Qwen2,
    context: KVCache,
    group: jax.Array,
    text: KVCache,
    suffix: SuffixIds,
    scorer: AttentionScorer,
    groups: int,
    *,
    attention: Attention,
) -> jax.Array:
    """The question's attention to each group by each head, to the power of `scorer.exponent`: float32 [groups, N].

    It is a mean over tokens and layers. Runs the suffix `ids` [T] behind `context`, whose slots belong to groups `group`
    [S] (-1: to no group), and sums the attention of each token and head to the time and visual tokens of each group. It
    takes a block of tokens and slots at a time, so that nothing of size T x S is kept. The question's tokens are
    `first <= t < last`, and those between the question and the answer `last <= t < end`.
    """
    ids, first, last, end = suffix
    at = jnp.arange(ids.shape[0], dtype=jnp.int32)
    depth, kv_heads, slots, h = context.shape
    block, rows = min(_SLOTS, slots), min(_TOKENS, ids.shape[0])
    first_layer, last_layer = scorer.layers(depth)
    group = jnp.where(group >= 0, group, groups)
    asked = scorer.question_weight
    share = jnp.where(at < last, asked / jnp.maximum(last - first, 1), (1 - asked) / jnp.maximum(end - last, 1))

    def mass(q: jax.Array, lse: jax.Array, layer: jax.Array) -> jax.Array:
        """The attention of the counted tokens to each group, to the power, reduced over tokens: [K, groups, N / K]."""
        queries = q.reshape(q.shape[0], kv_heads, -1, h)
        each = queries.shape[2]
        norm = jnp.moveaxis(lse.reshape(queries.shape[:3]), 1, 0)

        def of_rows(number: jax.Array, total: jax.Array) -> jax.Array:
            top = jnp.minimum(number * rows, at.shape[0] - rows)
            row = top + jnp.arange(rows)
            counted = (row >= number * rows) & (row >= first) & (row < end)
            block_queries = jax.lax.dynamic_slice_in_dim(queries, top, rows)
            block_norm = jax.lax.dynamic_slice_in_dim(norm, top, rows, axis=1)

            def to_block(i: jax.Array, attended: jax.Array) -> jax.Array:
                start = jnp.minimum(i * block, slots - block)
                k = unpack(
                    jax.tree.map(
                        lambda a: jax.lax.dynamic_slice(
                            a, (layer, 0, start, *(0,) * (a.ndim - 3)), (1, kv_heads, block, *a.shape[3:])
                        )[0],
                        context.k,
                    )
                )
                scores = product("tkgh,ksh->kstg", block_queries, k)
                to = jax.lax.dynamic_slice_in_dim(group, start, block)
                seen = (start + jnp.arange(block) >= i * block) & (to < groups)
                use = seen[:, None, None] & counted[:, None]
                p = jnp.where(use, jnp.exp(jnp.where(use, scores * h**-0.5 - block_norm[:, None], 0.0)), 0.0)
                to_groups = functools.partial(jax.ops.segment_sum, segment_ids=to, num_segments=groups + 1)
                return attended + jax.vmap(to_groups)(p.reshape(kv_heads, block, -1))

            none = jnp.zeros((kv_heads, groups + 1, rows * each))
            attended = jax.lax.fori_loop(0, ceil_div(slots, block), to_block, none)
            attended = attended.reshape(kv_heads, groups + 1, rows, each)
            return total + jnp.sum(attended**scorer.exponent * share[row][:, None], axis=2)

        none = jnp.zeros((kv_heads, groups + 1, each))
        return jax.lax.fori_loop(first // rows, ceil_div(end, rows), of_rows, none)[:, :groups]

    def attend(state: Any, layer: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[Any, jax.Array]:
        kv, sums = state
        kv, out, lse = attend_text(q, k, v, context, kv, text.global_length, end, layer, attention)
        counts = (layer >= first_layer) & (layer < last_layer)
        add = jax.lax.cond(counts, lambda: mass(q, lse, layer), lambda: jnp.zeros_like(sums))
        return (kv, sums + add), out

    positions = context.length + text.global_length + at
    init = ((text.k, text.v), jnp.zeros((kv_heads, groups, llm.heads // kv_heads), jnp.float32))
    _, (_, sums) = llm.forward(llm.embed_tokens(ids), positions, attend, init)
    return jnp.moveaxis(sums, 0, 1).reshape(groups, -1) / (last_layer - first_layer)


def block_scores(group_scores: jax.Array, groups: jax.Array, select_chunk_groups: int) -> jax.Array:
    """The score of each selection block [Bcap], from the scores of groups [Gcap]: that of its best real group.

    A mean would prefer what lasts several groups to what is seen once.
    """
    capacity = group_scores.shape[0]
    index = jnp.arange(capacity)
    real = jnp.where(index < groups, group_scores, 0.0)
    return jax.ops.segment_max(real, index // select_chunk_groups, num_segments=ceil_div(capacity, select_chunk_groups))
