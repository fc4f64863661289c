"""What several networks share: stacked layers and rotary positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xl2jax.models.sharding import gathered, splits_parameters
from xl2jax.ops.precision import accumulator


def stack_layers[M: nnx.Module](make: Callable[[nnx.Rngs], M], layers: int, rngs: nnx.Rngs) -> M:
    """One module whose every parameter has a leading axis L."""

    @nnx.split_rngs(splits=layers)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def build(rngs: nnx.Rngs) -> M:
        return make(rngs)

    return build(rngs)


def scan_layers[C, Y](
    stacked: nnx.Module,
    body: Callable[[Any, C, jax.Array], tuple[C, Y]],
    carry: C,
    *,
    remat: bool = False,
    unroll: bool = False,
    separate: Sequence[Any] | None = None,
) -> tuple[C, Y]:
    """Runs `carry, y = body(layer, carry, index)` for each layer of `stacked`, whose parameters have a leading axis L.

    The body is compiled once, whatever the depth, unless `unroll` is True.

    Args:
      remat: the backward pass recomputes each layer and keeps only `carry` between them.
      unroll: compiles every layer for itself. What is the same in all layers is then computed once, and weights are read
        in place; compiling takes longer.
      separate: the parameters of each layer, which are used instead of the stacked ones. The loop is then unrolled in
        Python, and `index` is an integer. XLA on CPUs copies a layer out of stacked parameters whenever it is used.

    Returns the last carry, and every layer's `y` stacked along a leading axis L.
    """
    graphdef, params = nnx.split(stacked)
    layers = jax.tree.leaves(params)[0].shape[0]

    def step(carry: C, xs: tuple[Any, jax.Array]) -> tuple[C, Y]:
        layer_params, index = xs
        return body(nnx.merge(graphdef, gathered(layer_params, "stack.layers.")), carry, index)

    if separate is not None:
        each = []
        for index, layer_params in enumerate(separate):
            carry, y = body(nnx.merge(graphdef, layer_params), carry, index)  # type: ignore[arg-type]
            each.append(y)
        return carry, jax.tree.map(lambda *ys: jnp.stack(ys), *each)

    if remat:
        step = jax.checkpoint(step, prevent_cse=False)
    elif splits_parameters():  # the backward pass gathers parameters again, rather than keep those of all layers
        step = jax.checkpoint(step, prevent_cse=False, policy=lambda p, *_, **__: p.name != "sharding_constraint")
    carry, outputs = jax.lax.scan(step, carry, (params, jnp.arange(layers, dtype=jnp.int32)), unroll=unroll)
    return carry, outputs


def rope_tables(
    positions: jax.Array, head_width: int, theta: float, dtype: jax.typing.DTypeLike = jnp.float32
) -> tuple[jax.Array, jax.Array]:
    """cos and sin, [..., H/2] in `dtype` (float32 or float64), of integer positions [...]."""
    kind = np.dtype(dtype).type
    exponents = np.arange(0, head_width, 2, dtype=kind) / kind(head_width)
    inv_freq = (kind(1) / kind(theta) ** exponents).astype(kind)
    angles = positions[..., None].astype(kind) * inv_freq
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Half-split rotary embedding of x [..., H]; cos and sin broadcast against [..., H/2].

    Computed in float32 (float64 for float64), returned in x's dtype. With `-sin` it is its own inverse.
    """
    first, second = jnp.split(x.astype(accumulator(x.dtype)), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
