"""The oracle of arena attention: float32 (float64 for float64) over one dense mask."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from xl2jax.ops.kv import Source, unpack
from xl2jax.ops.precision import accumulator
from xl2jax.ops.ranges import NEGATIVE


def attend_reference(q: jax.Array, source: Source) -> tuple[jax.Array, jax.Array]:
    """The op for tests and short inputs. See `xl2jax.ops.attention` for shapes."""
    dtype = accumulator(q.dtype)
    k, v = (unpack(x)[source.rows].astype(dtype) for x in (source.k, source.v))
    groups = q.shape[2] // k.shape[1]
    mask = source.ranges.mask(np.arange(k.shape[2]))[:, None, None]
    v = jnp.where(jnp.any(mask, axis=(1, 2, 3))[:, None, :, None], v, 0.0)
    queries = q.astype(dtype).reshape(*q.shape[:2], k.shape[1], groups, q.shape[3])
    scores = jnp.einsum("btkgh,bksh->bkgts", queries, k, precision="highest") * q.shape[-1] ** -0.5
    scores = jnp.where(mask, scores, NEGATIVE)
    top = jnp.max(scores, axis=-1, keepdims=True)
    p = jnp.where(mask, jnp.exp(scores - top), 0.0)
    total = jnp.sum(p, axis=-1, keepdims=True)
    seen = total > 0
    p = p / jnp.where(seen, total, 1.0)
    out = jnp.einsum("bkgts,bksh->btkgh", p, v, precision="highest").reshape(q.shape)
    lse = jnp.where(seen, top + jnp.log(jnp.where(seen, total, 1.0)), NEGATIVE)[..., 0]
    return out.astype(q.dtype), lse.transpose(0, 3, 1, 2).reshape(q.shape[:3])
