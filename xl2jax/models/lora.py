"""Low-rank adapters on linear layers (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from xl2jax.config import Weights
from xl2jax.models.linear import QuantizedLinear


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """The rank of the adapters, and `alpha`: their output is scaled by `alpha / rank`."""

    rank: int = 64
    alpha: float = 16.0


class _Adapter(nnx.Module):
    """Adds `alpha / rank * (x A) B` to a linear layer, with A [n, rank] and B [rank, m]. B starts at zero."""

    def _add(self, n: int, m: int, lora: LoRAConfig, param_dtype: Any, rngs: nnx.Rngs) -> None:
        # Uniform within 1 / sqrt(n), as in peft.
        init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        self.lora_a = nnx.Param(init(rngs.params(), (n, lora.rank), param_dtype))
        self.lora_b = nnx.Param(jnp.zeros((lora.rank, m), param_dtype))
        self.lora_scale = lora.alpha / lora.rank

    def _low(self, inputs: jax.Array) -> jax.Array:
        return (inputs @ self.lora_a[...]) * self.lora_scale @ self.lora_b[...]


class LoRALinear(nnx.Linear, _Adapter):
    """A linear layer with an adapter."""

    def __init__(self, n: int, m: int, lora: LoRAConfig, *, use_bias: bool, param_dtype: Any, rngs: nnx.Rngs):
        super().__init__(n, m, use_bias=use_bias, param_dtype=param_dtype, rngs=rngs)
        self._add(n, m, lora, param_dtype, rngs)

    def __call__(self, inputs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        return super().__call__(inputs, *args, **kwargs) + self._low(inputs)


class LoRAQuantizedLinear(QuantizedLinear, _Adapter):
    """A linear layer in 8 or 4 bits with an adapter in `param_dtype`."""

    def __init__(
        self, n: int, m: int, weights: Weights, lora: LoRAConfig, *, use_bias: bool, param_dtype: Any, rngs: nnx.Rngs
    ):
        super().__init__(n, m, weights, use_bias=use_bias, param_dtype=param_dtype, rngs=rngs)
        self._add(n, m, lora, param_dtype, rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        return super().__call__(inputs) + self._low(inputs)
