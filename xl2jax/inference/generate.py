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
    return _sampled(llm.logits(hidden), text, key, stop, sampling)


def _sampled(logits: jax.Array, text: KVCache, key: jax.Array, stop: jax.Array, sampling: Sampling) -> DecodeState:
    """The state behind one more token, sampled from its logits [vocab]."""
    key, sample_key = jax.random.split(key)
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


def _chosen(runs: jax.Array, new: DecodeState, kept: DecodeState) -> DecodeState:
    """`new` where the answer runs, else `kept`. Both have the same keys and values, which are not copied."""
    return DecodeState(
        jnp.where(runs, new.token, kept.token),
        new.text._replace(global_length=jnp.where(runs, new.text.global_length, kept.text.global_length)),
        jnp.where(runs, new.key, kept.key),
        jnp.where(runs, new.done, kept.done),
        jnp.where(runs, new.finite, kept.finite),
    )


def decode_batch(
    llm: Qwen2,
    contexts: tuple[KVCache, ...],
    states: tuple[DecodeState, ...],
    limits: jax.Array,
    stop: jax.Array,
    samplings: tuple[Sampling, ...],
    *,
    size: int,
    attention: Attention,
    platform: str,
) -> tuple[tuple[DecodeState, ...], jax.Array, jax.Array]:
    """`decode` of B answers at once: the weights are read once for all of them.

    Each answer attends to its own context. `limits` is int32 [B].
    Returns (states, ids [B, size], numbers of new ids [B]).
    """
    on_gpu, count = platform == "gpu", len(states)

    def running(states: tuple[DecodeState, ...], n: jax.Array) -> jax.Array:
        done = jnp.stack([state.done for state in states])
        return ~done & (n < jnp.minimum(limits, size))

    def next_tokens(
        carry: tuple[tuple[DecodeState, ...], jax.Array, jax.Array],
    ) -> tuple[tuple[DecodeState, ...], jax.Array, jax.Array]:
        states, ids, n = carry
        runs = running(states, n)
        texts = [state.text for state in states]

        def attend(
            kv: tuple[KV, ...], layer: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array
        ) -> tuple[tuple[KV, ...], jax.Array]:
            # An answer that has ended writes behind its last token, where nothing is read.
            rows = [
                attend_text(
                    q[i : i + 1],
                    k[i : i + 1],
                    v[i : i + 1],
                    contexts[i],
                    kv[i],
                    texts[i].global_length,
                    runs[i].astype(jnp.int32),
                    layer,
                    attention,
                )
                for i in range(count)
            ]
            return tuple(row[0] for row in rows), jnp.concatenate([row[1] for row in rows])

        x = llm.embed_tokens(jnp.stack([state.token for state in states]))
        positions = jnp.stack([c.length + t.global_length for c, t in zip(contexts, texts, strict=True)])
        hidden, kv = llm.forward(
            x,
            positions,
            attend,
            tuple((t.k, t.v) for t in texts),
            rows=8 if on_gpu and not llm.quantized else None,
            unroll=on_gpu,
        )
        logits = llm.logits(hidden)
        following = []
        for i, state in enumerate(states):
            text = state.text._replace(k=kv[i][0], v=kv[i][1], global_length=state.text.global_length + 1)
            new = _sampled(logits[i], text, state.key, stop, samplings[i])
            kept = state._replace(text=text._replace(global_length=state.text.global_length))
            following.append(_chosen(runs[i], new, kept))
        tokens = jnp.stack([state.token for state in following])
        at = jnp.arange(count)
        ids = ids.at[at, n].set(jnp.where(runs, tokens, ids[at, n]))
        return tuple(following), ids, n + runs

    return jax.lax.while_loop(
        lambda carry: jnp.any(running(carry[0], carry[2])),
        next_tokens,
        (states, jnp.zeros((count, size), jnp.int32), jnp.zeros(count, jnp.int32)),
    )
