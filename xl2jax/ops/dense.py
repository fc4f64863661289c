"""Dense attention within a batch row: the vision tower, DTS, training."""

from __future__ import annotations

import jax


def dense_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool = False) -> jax.Array:
    """Scaled dot-product attention. q [B, T, N, H], k and v [B, S, K, H] -> [B, T, N, H].

    N is a multiple of K (GQA). Softmax in float32.
    """
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal)
