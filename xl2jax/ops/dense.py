"""Dense attention within a batch row: the vision tower, DTS, training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import einops
import jax
import jax.numpy as jnp


def dense_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool = False, mask: jax.Array | None = None
) -> jax.Array:
    """Scaled dot-product attention. q [B, T, N, H], k and v [B, S, K, H] -> [B, T, N, H].

    `mask` [B, 1, T, S]: True where a key is seen, besides what `causal` says.
    N is a multiple of K (GQA). Softmax in float32 (float64 for float64). On NVIDIA GPUs 16-bit arrays whose head width cuDNN
    serves (a multiple of 8 up to 128) go to cuDNN, everything else to XLA.
    """
    served = q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    cudnn = jax.default_backend() == "gpu" and served
    if cudnn and mask is None and not causal and (q.shape[1] % 2 or k.shape[1] % 2):
        return _odd(q, k, v)
    if q.dtype == jnp.float64:
        return _float64(q, k, v, causal=causal, mask=mask)
    if q.dtype == jnp.float16 and not cudnn:  # XLA multiplies no float16 into float32 on CPUs
        wide_q, wide_k, wide_v = (x.astype(jnp.float32) for x in (q, k, v))
        return jax.nn.dot_product_attention(wide_q, wide_k, wide_v, mask=mask, is_causal=causal).astype(q.dtype)
    implementation: Literal["cudnn", "xla"] = "cudnn" if cudnn else "xla"
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal, implementation=implementation)


def _float64(q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool, mask: jax.Array | None) -> jax.Array:
    """jax.nn.dot_product_attention takes its softmax in float32 whatever it is given."""
    kv_heads = k.shape[2]
    queries = einops.rearrange(q, "b t (k g) h -> b t k g h", k=kv_heads)
    scores = jnp.einsum("btkgh,bskh->bkgts", queries, k) * q.shape[-1] ** -0.5
    seen = jnp.tri(q.shape[1], k.shape[1], dtype=bool) if causal else jnp.ones((1, 1), bool)
    if mask is not None:
        seen = seen & mask[:, :, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    return einops.rearrange(jnp.einsum("bkgts,bskh->btkgh", weights, v), "b t k g h -> b t (k g) h")


@jax.custom_vjp
def _odd(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """cuDNN takes odd lengths (729 patches) as long as no gradient is asked for."""
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def padded_attention(q: jax.Array, k: jax.Array, v: jax.Array, implementation: Literal["cudnn", "xla"]) -> jax.Array:
    """Attention with lengths padded to even numbers; the padding is neither seen nor returned."""

    def even(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))

    lengths = [jnp.full(q.shape[0], x.shape[1], jnp.int32) for x in (q, k)]
    out = jax.nn.dot_product_attention(
        even(q), even(k), even(v), query_seq_lengths=lengths[0], key_value_seq_lengths=lengths[1],
        implementation=implementation,
    )  # fmt: skip
    return out[:, : q.shape[1]]


type _Pullback = Callable[[jax.Array], tuple[jax.Array, jax.Array, jax.Array]]


def _odd_forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, _Pullback]:
    return jax.vjp(lambda q, k, v: padded_attention(q, k, v, "cudnn"), q, k, v)


def _odd_backward(pullback: _Pullback, gradient: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    return pullback(gradient)


_odd.defvjp(_odd_forward, _odd_backward)
