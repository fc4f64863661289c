"""Attention over the arena: `[globals | visual tokens]`, three integers a query (see xl2jax.ops.ranges).

Shapes of the op, whatever the implementation:

    q             [B, T, N, H]   rotated queries
    k, v          [R, K, S, H]   rows of key and value slots: cache layers, or batch rows; N = K * groups
    rows          [B]   int32    the row of k and v that each batch row reads (nothing is copied)
    ranges        Ranges of int32 [B, T]: the slots that each query sees
    -> out        [B, T, N, H]   q's dtype, float32 accumulation (float64 for float64); zeros where nothing is seen
    -> lse        [B, T, N]      float32 (float64) log-sum-exp of the scaled scores, NEGATIVE where nothing is seen

Slots that no query sees may hold any finite value. The XLA implementations also tolerate NaN there.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import chex
import jax

from xl2jax.errors import UserError
from xl2jax.ops.blockwise import attend_blockwise, backward_blockwise
from xl2jax.ops.ranges import Ranges
from xl2jax.ops.reference import attend_reference

logger = logging.getLogger(__name__)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(implementation: str, *args: Any) -> tuple[jax.Array, jax.Array]:
    return IMPLEMENTATIONS[implementation](*args)


def _forward(implementation: str, *args: Any) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
    result = IMPLEMENTATIONS[implementation](*args)
    return result, (*args, *result)


def _vjp(implementation: str, residuals: tuple[Any, ...], cotangents: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    return (*backward_blockwise(residuals, cotangents), None, None)


_differentiable.defvjp(_forward, _vjp)


def _attend_mosaic(*args: Any) -> tuple[jax.Array, jax.Array]:
    from xl2jax.ops import mosaic  # Pallas is slow to import

    return mosaic.attend_mosaic(*args)


IMPLEMENTATIONS: dict[str, Callable[..., tuple[jax.Array, jax.Array]]] = {
    "reference": attend_reference,
    "blockwise": attend_blockwise,
    "mosaic": _attend_mosaic,
}


@functools.cache
def _log_choice(name: str, reason: str) -> None:
    logger.info("arena attention: %s (auto on %s)", name, reason)


def choose_implementation(name: str, device: jax.Device, head_width: int, dtype: jax.typing.DTypeLike) -> str:
    """The implementation for a device. "auto" chooses one and logs the choice once; any other name is kept.

    Raises UserError where no implementation has that name.
    """
    if name != "auto":
        _require(name)
        return name
    if device.platform != "gpu":
        _log_choice("blockwise", device.platform)
        return "blockwise"
    from xl2jax.ops import mosaic

    capability = str(getattr(device, "compute_capability", "0.0"))
    # Only Hopper has the wgmma instructions of the kernel.
    reason = (
        mosaic.unsupported(head_width, dtype, dtype)
        if capability == "9.0"
        else "the kernel needs compute capability 9.0"
    )
    name = "blockwise" if reason else "mosaic"
    _log_choice(name, f"{device.device_kind}" + (f": {reason}" if reason else ""))
    return name


def _require(name: str) -> None:
    if name not in IMPLEMENTATIONS:
        raise UserError(f"attention {name!r}: choose auto, {', '.join(IMPLEMENTATIONS)}")


def arena_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, rows: jax.Array, ranges: Ranges, *, implementation: str = "blockwise"
) -> tuple[jax.Array, jax.Array]:
    """Arena attention by the implementation that is named. The shapes are those of the module's docstring.

    Differentiable in q, k and v (out and lse). The backward pass is blockwise XLA whatever the implementation.

    Raises:
      UserError: no implementation has that name, or it does not support these shapes or dtypes. There is no fallback.
      AssertionError: the shapes do not match.
    """
    _require(implementation)
    batch, tokens, heads, head_width = q.shape
    kv_rows, kv_heads, slots, _ = k.shape
    chex.assert_shape((k, v), (kv_rows, kv_heads, slots, head_width))
    chex.assert_shape(rows, (batch,))
    chex.assert_shape(list(ranges), (batch, tokens))
    chex.assert_is_divisible(heads, kv_heads)
    return _differentiable(implementation, q, k, v, rows, ranges)
