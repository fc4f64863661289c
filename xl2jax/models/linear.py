"""Linear maps and embeddings of the LLM: in the parameters' dtype, or in 8 or 4 bits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from xl2jax.config import Weights
from xl2jax.ops.quantized_product import multiply
from xl2jax.ops.weights import QuantizedMatrix, lookup, part_shapes

PART_PREFIX = "codes"
"""Names of the parameters of a quantised matrix begin so: `codes`, `codes_scale`, `codes_zero`."""


class Quantized(nnx.Module):
    """A matrix [m, n] in 8 or 4 bits, as parameters. It is initialised with random codes, for benchmarks."""

    def __init__(self, m: int, n: int, weights: Weights, *, rngs: nnx.Rngs):
        shapes = part_shapes(m, n, weights)
        codes, scale = shapes["codes"], shapes["scale"]
        bits = jax.random.bits(rngs.params(), codes.shape, jnp.uint8)
        self.codes = nnx.Param(jax.lax.bitcast_convert_type(bits, codes.dtype))
        # Codes are spread evenly, with a standard deviation of 0.29 of their number. Values get one of n**-0.5.
        spread = 0.29 * (256 if weights == "int8" else 16)
        self.codes_scale = nnx.Param(jnp.full(scale.shape, 1 / (spread * n**0.5), scale.dtype))
        if "zero" in shapes:
            self.codes_zero = nnx.Param(jnp.full(shapes["zero"].shape, 8, jnp.uint8))

    @property
    def matrix(self) -> QuantizedMatrix:
        zero = self.codes_zero[...] if hasattr(self, "codes_zero") else None
        return QuantizedMatrix(self.codes[...], self.codes_scale[...], zero)


class QuantizedLinear(Quantized):
    """A linear map from n to m. The bias has `param_dtype`, the result the dtype of the input."""

    def __init__(
        self,
        n: int,
        m: int,
        weights: Weights,
        *,
        use_bias: bool,
        param_dtype: jax.typing.DTypeLike,
        rngs: nnx.Rngs,
        sums_parts: bool = False,
    ):
        """`sums_parts`: several devices hold parts of the inputs, and not of the outputs."""
        super().__init__(m, n, weights, rngs=rngs)
        self.sums_parts = sums_parts
        self.bias = nnx.Param(jnp.zeros(m, param_dtype)) if use_bias else None

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """[..., n] -> [..., m]."""
        return self.add_bias(multiply(inputs, (self.matrix,), sums_parts=self.sums_parts)[0])

    def add_bias(self, out: jax.Array) -> jax.Array:
        return out if self.bias is None else out + self.bias[...]


def apply_all(inputs: jax.Array, *layers: nnx.Linear | QuantizedLinear) -> tuple[jax.Array, ...]:
    """The result of every layer. Quantised matrices are multiplied together, which saves launches of the kernel."""
    quantized = [layer for layer in layers if type(layer) is QuantizedLinear]  # without an adapter
    if len(quantized) < len(layers):
        return tuple(layer(inputs) for layer in layers)
    outs = multiply(inputs, tuple(layer.matrix for layer in quantized))
    return tuple(layer.add_bias(out) for layer, out in zip(quantized, outs, strict=True))


class QuantizedEmbed(Quantized):
    """An embedding [vocab, D]."""

    def lookup(self, ids: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Token ids [...] -> embeddings [..., D] in `dtype`."""
        return lookup(self.matrix, ids, dtype)
