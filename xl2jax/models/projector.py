"""Vision width to LLM width, then 2x2 average pooling (upstream: multimodal_projector/builder.py)."""

from __future__ import annotations

import einops
import jax
from flax import nnx

from xl2jax.ops.precision import gelu


class Projector(nnx.Module):
    """Linear, exact GELU, Linear, on every position."""

    def __init__(self, width: int, llm_width: int, *, param_dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        self.fc1 = nnx.Linear(width, llm_width, param_dtype=param_dtype, rngs=rngs)
        self.fc2 = nnx.Linear(llm_width, llm_width, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., C] -> [..., D]."""
        return self.fc2(gelu(self.fc1(x), approximate=False))


def average_pool(x: jax.Array, stride: int) -> jax.Array:
    """[G, H, W, D] -> [G, V, D], V = (H // stride) (W // stride) row-major; a remainder is dropped."""
    h, w = x.shape[1] // stride * stride, x.shape[2] // stride * stride
    return einops.reduce(x[:, :h, :w], "g (h a) (w b) d -> g (h w) d", "mean", a=stride, b=stride)
