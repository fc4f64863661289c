"""Operations whose heads or matrices are split over the devices of the current mesh.

Inside a program of a `Network` with several devices the current mesh has the one axis `tensor`. What XLA cannot split by
itself, such as a kernel, is then run on each device's part by `jax.shard_map`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

TENSOR = "tensor"
"""The axis of a mesh over which heads, MLP columns and the vocabulary are split."""


def splits() -> int:
    """Number of devices over which heads are split: 1 outside the programs of inference on several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.size if mesh.axis_names == (TENSOR,) and not mesh.are_all_axes_manual else 1


def on_parts(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`function` on each device's part of its arguments. Only for `splits()` above 1."""
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def part_of(axis: int) -> PartitionSpec:
    """An array that is split along `axis`."""
    return PartitionSpec(*[None] * axis, TENSOR)


def whole(x: jax.Array, axis: int = 0) -> jax.Array:
    """Has every device hold all of x, whose parts along `axis` the devices compute."""
    count = splits()
    if count == 1:
        return x
    if x.shape[axis] % count == 0:  # otherwise XLA may gather what x is computed from instead
        x = jax.lax.with_sharding_constraint(x, part_of(axis % x.ndim))
    return jax.lax.with_sharding_constraint(x, PartitionSpec())


def look_up[T](rows: Callable[[T, jax.Array], jax.Array], table: T, ids: jax.Array) -> jax.Array:
    """`rows(table, ids)`, the rows of a table at ids [...] within it, where the devices may hold parts of the table.

    Each device looks up the ids of its own part, and the devices sum. For a single id XLA on GPUs would gather the whole
    table instead, in every step of decoding.

    `table` is a tree of arrays with as many rows each.
    """
    count, size = splits(), jax.tree.leaves(table)[0].shape[0]
    if count == 1 or size % count:
        return rows(table, ids)

    def own(table: T, ids: jax.Array) -> jax.Array:
        at = ids - jax.lax.axis_index(TENSOR) * (size // count)
        mine = (at >= 0) & (at < size // count)
        found = rows(table, jnp.where(mine, at, 0))
        return jax.lax.psum(jnp.where(mine[..., None], found, 0), TENSOR)

    return on_parts(own, (part_of(0), PartitionSpec()), PartitionSpec())(table, ids)
