"""Questions and answers behind a video cache: suffix prefill, sampling, the decode loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from xl2jax.errors import UserError, require_number, require_whole
from xl2jax.inference.cache import KV, KVCache, RowArray, RowCache, attend_text, row_source, write_row_tokens
from xl2jax.models.qwen2 import Qwen2, pad_tokens
from xl2jax.ops.attention import Attention, arena_attention
from xl2jax.ops.ranges import Ranges, first_slots
from xl2jax.ops.split import TENSOR, on_parts, part_of, splits, whole

MAX_TEMPERATURE = 1_000_000

GREEDY_BELOW = 1e-4
"""Lower temperatures are treated as greedy, since logits divided by them would leave float32's range."""


@dataclasses.dataclass(frozen=True)
class TokenSampling:
    """Temperature 0 (or below `GREEDY_BELOW`) is greedy. `top_p` keeps the smallest set of tokens with that probability."""

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        require_number("temperature", self.temperature)
        require_number("top-p", self.top_p)
        if not (0 <= self.temperature <= MAX_TEMPERATURE and 0 < self.top_p <= 1):  # and not nan
            raise UserError(f"temperature must be from 0 to {MAX_TEMPERATURE:,}, and top-p above 0 and at most 1")

    def traced(self) -> Sampling:
        """The settings as arguments of a compiled program, so that another temperature compiles nothing."""
        return Sampling(np.float32(self.temperature), np.float32(self.top_p))


def check_answer_options(max_new_tokens: int, seed: int) -> None:
    """Raises UserError for values out of range."""
    require_whole("max new tokens", max_new_tokens, 1)
    require_whole("seed", seed, 0, 2**32 - 1)


class Sampling(NamedTuple):
    """`TokenSampling` inside a program, float32 [] or [B]."""

    temperature: jax.Array | np.float32
    top_p: jax.Array | np.float32


class SuffixIds(NamedTuple):
    """The suffix as arguments of a compiled program. The question's own tokens are `ids[first:last]`."""

    ids: Any
    """int32 [T], padded behind `end`."""
    first: Any
    last: Any
    end: Any


class DecodeState(NamedTuple):
    """What an answer continues from."""

    token: jax.Array
    """int32 []: the token sampled last. Its keys and values are not cached yet."""
    text: KVCache
    """Keys and values of the suffix and of the answer so far."""
    key: jax.Array
    done: jax.Array
    finite: jax.Array
    """Whether all logits so far were finite. Decoding ends where they are not."""


class RowState(NamedTuple):
    """The `DecodeState` of B answers: everything that changes from token to token, with a leading axis B."""

    token: jax.Array
    text: RowCache
    key: jax.Array
    done: jax.Array
    finite: jax.Array


def extend(
    llm: Qwen2,
    context: KVCache,
    text: KVCache,
    ids: jax.Array,
    length: jax.Array,
    *,
    attention: Attention,
    rows: int | None = None,
    unroll: bool = False,
) -> tuple[KVCache, jax.Array]:
    """Runs ids [T], of which the first `length` are real, behind `context` and `text`.

    Neither cache is changed in place unless it is donated.

    Args:
      rows, unroll: see `Qwen2.forward`.

    Returns the text cache with the new tokens, and their hidden states [T, D].
    """
    start, tokens = text.global_length, ids.shape[0]
    positions = context.length + start + jnp.arange(tokens, dtype=jnp.int32)

    def attend(kv: KV, layer: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[KV, jax.Array]:
        kv, out, _ = attend_text(q, k, v, context, kv, start, length, layer, attention)
        return kv, out

    x = llm.embed_tokens(ids)
    hidden, (k, v) = llm.forward(x, positions, attend, (text.k, text.v), rows=rows, unroll=unroll)
    return text._replace(k=k, v=v, global_length=start + length), hidden


def best(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 logits [B, vocab] -> (ids of the largest ones, the first of equals, [B]; whether all are finite, [B]).

    Devices that have parts of the vocabulary exchange one small sum.
    """
    count = splits()
    if count == 1 or logits.shape[-1] % count:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), jnp.all(jnp.isfinite(logits), axis=-1)

    def of_part(own: jax.Array) -> tuple[jax.Array, jax.Array]:
        part = jax.lax.axis_index(TENSOR)
        ids = jnp.argmax(own, axis=-1) + part * own.shape[-1]
        found = jnp.stack([jnp.max(own, axis=-1), ids.astype(own.dtype), jnp.any(~jnp.isfinite(own), axis=-1)])
        # Each device adds what it found to zeros at its own place. float32 holds integers up to 2**24.
        found = jax.lax.psum(jnp.zeros((count, *found.shape), own.dtype).at[part].set(found), TENSOR)
        first = jnp.argmax(found[:, 0], axis=0)
        return found[first, 1, jnp.arange(len(ids))].astype(jnp.int32), jnp.all(found[:, 2] == 0, axis=0)

    return on_parts(of_part, part_of(1), PartitionSpec())(logits)


def sample(logits: jax.Array, greedy: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """float32 logits [B, vocab] and the ids of the largest ones -> token ids [B]."""

    def drawn(logits: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
        scaled = logits / sampling.temperature
        order = jnp.argsort(-scaled)
        p = jax.nn.softmax(scaled[order])
        # Rounding must not drop a token where top_p is 1, nor the first token where top_p rounds to 0.
        kept = (jnp.cumsum(p) - p < sampling.top_p) | (sampling.top_p >= 1)
        kept = kept.at[0].set(True)
        allowed = jnp.zeros_like(kept).at[order].set(kept)
        return jax.random.categorical(key, jnp.where(allowed, scaled, -jnp.inf)).astype(jnp.int32)

    cold = sampling.temperature < GREEDY_BELOW
    # Rows of their own, so that a token does not depend on what else is decoded. Sorting, and gathering logits that are
    # split over devices, are left out where none is drawn.
    return jax.lax.cond(
        jnp.all(cold),
        lambda: greedy,
        lambda: jnp.where(cold, greedy, jax.vmap(drawn)(whole(logits, -1), keys, sampling)),
    )


class _Sampled(NamedTuple):
    token: jax.Array
    done: jax.Array
    finite: jax.Array


def _sampled(logits: jax.Array, keys: jax.Array, stop: jax.Array, sampling: Sampling) -> tuple[jax.Array, _Sampled]:
    """The next keys [B], and the tokens that were sampled from logits [B, vocab]."""
    following = jax.vmap(jax.random.split)(keys)
    greedy, finite = best(logits)
    tokens = sample(logits, greedy, following[:, 1], sampling)
    return following[:, 0], _Sampled(tokens, jnp.any(tokens[:, None] == stop, axis=-1) | ~finite, finite)


def first_token(
    llm: Qwen2, text: KVCache, hidden: jax.Array, length: jax.Array, key: jax.Array, stop: jax.Array, sampling: Sampling
) -> DecodeState:
    """Samples the first token of an answer from the suffix's hidden states [T, D], of which `length` are real."""
    logits = llm.logits(hidden[length - 1])
    keys, new = _sampled(logits[None], key[None], stop, jax.tree.map(lambda x: jnp.asarray(x)[None], sampling))
    return DecodeState(new.token[0], text, keys[0], new.done[0], new.finite[0])


def decode(
    llm: Qwen2,
    contexts: RowCache,
    state: RowState,
    limits: jax.Array,
    stop: jax.Array,
    sampling: Sampling,
    *,
    size: int,
    attention: Attention,
    platform: str,
    layers: Sequence[Any] | None = None,
) -> tuple[RowState, jax.Array, jax.Array]:
    """Decodes up to min(limit, size) further tokens of each of B answers, until one of `stop` [n] is sampled.

    The weights are read once for all of them, and each attends to its own context.

    Args:
      contexts: what the answers read of their videos.
      limits: int32 [B]. An answer whose limit is 0, or that is done, stays as it is.
      sampling: float32 [B] each.
      layers: see `Network.layers`.

    Returns (state, ids [B, size], numbers of new ids [B]).
    """
    on_gpu, count = platform == "gpu", limits.shape[0]
    rows = 8 if on_gpu and not llm.quantized else None
    visual_ends = contexts.visual_start + contexts.visual_length

    def running(state: RowState, n: jax.Array) -> jax.Array:
        return ~state.done & (n < jnp.minimum(limits, size))

    def next_tokens(carry: tuple[RowState, jax.Array, jax.Array]) -> tuple[RowState, jax.Array, jax.Array]:
        state, ids, n = carry
        runs, length = running(state, n), state.text.global_length
        video = Ranges(contexts.global_length, contexts.visual_start, visual_ends).only(runs)
        written = first_slots(length + 1).only(runs)

        def attend(
            kv: tuple[RowArray, RowArray], layer: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array
        ) -> tuple[tuple[RowArray, RowArray], jax.Array]:
            # An answer that has ended writes behind its last token, where nothing is read.
            kv = write_row_tokens(kv[0], layer, k, length), write_row_tokens(kv[1], layer, v, length)
            sources = row_source(contexts.k, contexts.v, layer, video), row_source(*kv, layer, written)
            out, _ = arena_attention(q[:, None], *sources, attention=attention)
            return kv, out[:, 0]

        hidden, (k, v) = llm.forward(
            llm.embed_tokens(state.token),
            contexts.length + length,
            attend,
            (state.text.k, state.text.v),
            rows=rows,
            unroll=on_gpu,
            separate=layers,
        )
        # XLA on GPUs would first write all of lm_head as float32 for fewer than eight rows.
        padded = hidden if rows is None else jax.lax.optimization_barrier(pad_tokens(hidden, rows))
        key, new = _sampled(llm.logits(padded)[:count], state.key, stop, sampling)
        kept = (state.text.global_length, state.token, state.key, state.done, state.finite)
        following = (length + 1, new.token, key, new.done, new.finite)
        length, *rest = (jnp.where(runs, a, b) for a, b in zip(following, kept, strict=True))
        token, key, done, finite = rest
        state = RowState(token, state.text._replace(k=k, v=v, global_length=length), key, done, finite)
        at = jnp.arange(count)
        return state, ids.at[at, n].set(jnp.where(runs, token, ids[at, n])), n + runs

    return jax.lax.while_loop(
        lambda carry: jnp.any(running(carry[0], carry[2])),
        next_tokens,
        (state, jnp.zeros((count, size), jnp.int32), jnp.zeros(count, jnp.int32)),
    )
