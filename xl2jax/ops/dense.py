"""Dense attention within a batch row: the vision tower, DTS, training."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp


def dense_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool = False, mask: jax.Array | None = None
) -> jax.Array:
    """Scaled dot-product attention. q [B, T, N, H], k and v [B, S, K, H] -> [B, T, N, H].

    `mask` [B, 1, T, S]: True where a key is seen, besides what `causal` says.

    N is a multiple of K (GQA). Softmax in float32. On NVIDIA GPUs 16-bit arrays whose head width cuDNN
    serves (a multiple of 8 up to 128) go to cuDNN, everything else to XLA.
    """
    served = q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    cudnn = jax.default_backend() == "gpu" and served
    implementation: Literal["cudnn", "xla"] = "cudnn" if cudnn else "xla"
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal, implementation=implementation)
