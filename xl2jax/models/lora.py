"""Low-rank adapters on linear layers (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """The rank of the adapters, and `alpha`: their output is scaled by `alpha / rank`."""

    rank: int = 64
    alpha: float = 16.0


class LoRALinear(nnx.Linear):
    """A linear layer plus `alpha / rank * (x A) B`, with A [n, rank] and B [rank, m]. B starts at zero."""

    def __init__(self, n: int, m: int, lora: LoRAConfig, *, use_bias: bool, param_dtype: Any, rngs: nnx.Rngs):
        super().__init__(n, m, use_bias=use_bias, param_dtype=param_dtype, rngs=rngs)
        # Uniform within 1 / sqrt(n), as in peft.
        init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        self.lora_a = nnx.Param(init(rngs.params(), (n, lora.rank), param_dtype))
        self.lora_b = nnx.Param(jnp.zeros((lora.rank, m), param_dtype))
        self.lora_scale = lora.alpha / lora.rank

    def __call__(self, inputs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        low = (inputs @ self.lora_a[...]) * self.lora_scale
        return super().__call__(inputs, *args, **kwargs) + low @ self.lora_b[...]
