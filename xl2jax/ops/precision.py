"""The dtype of statistics, softmax, rotary positions and sums."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def accumulator(dtype: jax.typing.DTypeLike) -> np.dtype:
    """float32 for arrays of `dtype`; float64 for float64 (as in `verify --dtype float64`)."""
    return np.dtype(jnp.promote_types(dtype, jnp.float32))
