"""Questions and answers behind a video cache: suffix prefill, sampling, the decode loop."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xl2jax.errors import UserError, require_number, require_whole
from xl2jax.inference.cache import KV, KVCache, attend_text
from xl2jax.models.qwen2 import Qwen2
from xl2jax.ops.attention import Attention

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
    """`TokenSampling` inside a program, float32 []."""

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
    """Everything that changes from token to token."""

    token: jax.Array
    """int32 []: the token sampled last. Its keys and values are not cached yet."""
    text: KVCache
    """Keys and values of the suffix and of the answer so far."""
    key: jax.Array
    done: jax.Array
    finite: jax.Array
    """Whether all logits so far were finite. Decoding ends where they are not."""


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


def sample(logits: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """float32 logits [vocab] -> token id."""

    def greedy() -> jax.Array:
        return jnp.argmax(logits).astype(jnp.int32)

    def drawn() -> jax.Array:
        scaled = logits / sampling.temperature
        order = jnp.argsort(-scaled)
        p = jax.nn.softmax(scaled[order])
        # Rounding must not drop a token where top_p is 1, nor the first token where top_p rounds to 0.
        kept = (jnp.cumsum(p) - p < sampling.top_p) | (sampling.top_p >= 1)
        kept = kept.at[0].set(True)
        allowed = jnp.zeros_like(kept).at[order].set(kept)
        return jax.random.categorical(key, jnp.where(allowed, scaled, -jnp.inf)).astype(jnp.int32)

    return jax.lax.cond(sampling.temperature < GREEDY_BELOW, greedy, drawn)


def _next(
    llm: Qwen2, hidden: jax.Array, text: KVCache, key: jax.Array, stop: jax.Array, sampling: Sampling
) -> DecodeState:
    """The state behind one more token, sampled from a hidden state [D]."""
    key, sample_key = jax.random.split(key)
    logits = llm.logits(hidden)
    token, finite = sample(logits, sample_key, sampling), jnp.all(jnp.isfinite(logits))
    return DecodeState(token, text, key, jnp.any(token == stop) | ~finite, finite)


def first_token(
    llm: Qwen2, text: KVCache, hidden: jax.Array, length: jax.Array, key: jax.Array, stop: jax.Array, sampling: Sampling
) -> DecodeState:
    """Samples the first token of an answer from the suffix's hidden states [T, D], of which `length` are real."""
    return _next(llm, hidden[length - 1], text, key, stop, sampling)


def decode(
    llm: Qwen2,
    context: KVCache,
    state: DecodeState,
    limit: jax.Array,
    stop: jax.Array,
    sampling: Sampling,
    *,
    size: int,
    attention: Attention,
    platform: str,
) -> tuple[DecodeState, jax.Array, jax.Array]:
    """Decodes up to min(limit, size) further tokens, until one of `stop` [n] is sampled.

    Returns (state, ids [size], number of new ids).
    """
    on_gpu = platform == "gpu"

    def unfinished(carry: tuple[DecodeState, jax.Array, jax.Array]) -> jax.Array:
        state, _, n = carry
        return ~state.done & (n < jnp.minimum(limit, size))

    def next_token(carry: tuple[DecodeState, jax.Array, jax.Array]) -> tuple[DecodeState, jax.Array, jax.Array]:
        state, ids, n = carry
        text, hidden = extend(
            llm,
            context,
            state.text,
            state.token[None],
            jnp.int32(1),
            attention=attention,
            rows=8 if on_gpu and not llm.quantized else None,
            unroll=on_gpu,
        )
        state = _next(llm, hidden[0], text, state.key, stop, sampling)
        return state, ids.at[n].set(state.token), n + 1

    return jax.lax.while_loop(unfinished, next_token, (state, jnp.zeros(size, jnp.int32), jnp.int32(0)))
