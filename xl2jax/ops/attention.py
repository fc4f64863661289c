"""Attention over the arena: `[globals | visual tokens]`, three integers a query (see xl2jax.ops.ranges).

Shapes of the op, whatever the implementation:

    q             [B, T, N, H]   rotated queries
    sources       each has k, v [R, K, S, H] (N = K * groups), the row that each batch row reads, and its ranges [B, T]
    -> out        [B, T, N, H]   q's dtype, float32 accumulation (float64 for float64); zeros where nothing is seen
    -> lse        [B, T, N]      float32 (float64) log-sum-exp of the scaled scores, NEGATIVE where nothing is seen

A query sees the slots of all sources together. Slots that no query sees may hold any finite value. The XLA
implementations also tolerate NaN there, unless they read single tokens in rows of their own. Where a query sees NaN or
infinity, its result is not finite.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from xl2jax.errors import UserError
from xl2jax.ops.blockwise import attend_blockwise, backward_blockwise
from xl2jax.ops.kv import QuantizedKV, Source, kv_dtype, kv_shape, unpack_row
from xl2jax.ops.ranges import merge
from xl2jax.ops.reference import attend_reference
from xl2jax.ops.split import on_parts, part_of, splits

logger = logging.getLogger(__name__)

WGMMA_CARDS = ("9.0",)
"""Compute capabilities with the instructions of the wgmma kernel: Hopper."""
MMA_CARDS = ("8.0", "8.6", "8.9", "9.0", "12.0")
"""Compute capabilities that the mma kernel is compiled for: Ampere, Ada, Hopper, and Blackwell without tcgen05."""


@dataclasses.dataclass(frozen=True)
class Attention:
    """An implementation of arena attention, and the GPU that it runs on. Hashable, and static under `jax.jit`."""

    name: str
    """One of `IMPLEMENTATIONS`."""
    capability: str = "9.0"
    """The GPU's compute capability. The kernels' sizes depend on it; the XLA implementations ignore it."""
    multiprocessors: int = 132
    """The GPU's number of multiprocessors. Work is split until all of them have some."""

    def __post_init__(self) -> None:
        if self.name == "auto":
            raise UserError("attention 'auto' is not an implementation: choose_attention chooses one")
        check_name(self.name)


def check_name(name: str) -> None:
    """Raises UserError unless `name` is "auto" or one of `IMPLEMENTATIONS`."""
    if name not in ("auto", *IMPLEMENTATIONS):
        raise UserError(f"attention {name!r}: choose auto, {', '.join(IMPLEMENTATIONS)}")


type Results = tuple[jax.Array, jax.Array]


def _merged(attend: Callable[[jax.Array, Source], Results]) -> Callable[..., Results]:
    """An implementation of one source as one of all sources."""

    def attend_all(attention: Attention, q: jax.Array, sources: tuple[Source, ...]) -> Results:
        parts = [attend(q, source) for source in sources]
        return merge(parts) if len(parts) > 1 else parts[0]

    return attend_all


def _attend_wgmma(attention: Attention, q: jax.Array, sources: tuple[Source, ...]) -> Results:
    from xl2jax.ops import wgmma  # Pallas is slow to import

    if _read_in_place(q, sources):
        return _attend_decode(attention, q, sources)
    return wgmma.attend_wgmma(q, tuple(map(unpack_row, sources)), attention.multiprocessors)


def _attend_mma(attention: Attention, q: jax.Array, sources: tuple[Source, ...]) -> Results:
    from xl2jax.ops import mma

    if _read_in_place(q, sources):
        return _attend_decode(attention, q, sources)
    return mma.attend_mma(q, sources, attention.capability, attention.multiprocessors)


def _read_in_place(q: jax.Array, sources: tuple[Source, ...]) -> bool:
    """Whether sources of 8 bits are read in place. Otherwise they are unpacked first.

    Many rows read every block many times, so that unpacking it once costs less. In float16, softmax weights times a
    scale would be too small for the second product.
    """
    from xl2jax.ops import mma_decode

    rows = q.shape[1] * q.shape[2] // sources[0].shape[1]
    return any(s.quantized for s in sources) and rows <= mma_decode.ROWS and q.dtype == jnp.bfloat16


def _attend_decode(attention: Attention, q: jax.Array, sources: tuple[Source, ...]) -> Results:
    from xl2jax.ops import mma_decode

    return mma_decode.attend_decode(q, sources, attention.multiprocessors)


IMPLEMENTATIONS: dict[str, Callable[[Attention, jax.Array, tuple[Source, ...]], Results]] = {
    "reference": _merged(attend_reference),
    "blockwise": _merged(attend_blockwise),
    "wgmma": _attend_wgmma,
    "mma": _attend_mma,
}

BLOCKWISE = Attention("blockwise")


@functools.partial(jax.jit, static_argnums=0)
def _attend(attention: Attention, q: jax.Array, sources: tuple[Source, ...]) -> Results:
    """The op of its own, so that unrolled layers trace and lower it once."""
    if attention.name != "blockwise":
        order = jnp.arange(q.shape[0], dtype=jnp.int32)
        sources = tuple(s._replace(rows=order) if s.rows is None else s for s in sources)
    return IMPLEMENTATIONS[attention.name](attention, q, sources)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(attention: Attention, q: jax.Array, sources: tuple[Source, ...]) -> Results:
    return _attend(attention, q, sources)


def _forward(attention: Attention, q: jax.Array, sources: tuple[Source, ...]) -> tuple[Results, tuple[Any, ...]]:
    if any(s.quantized for s in sources):
        raise UserError("attention to keys and values of 8 bits has no gradient")
    result = _differentiable(attention, q, sources)
    return result, (q, sources, *result)


def _vjp(attention: Attention, residuals: tuple[Any, ...], cotangents: Results) -> tuple[Any, ...]:
    q, sources, *result = residuals
    # With out and lse over all sources, the gradients of each source are those of its own slots.
    grads = [backward_blockwise((q, source, *result), cotangents) for source in sources]
    d_q = functools.reduce(jnp.add, (d_q for d_q, _, _ in grads))
    return d_q.astype(q.dtype), tuple(Source(d_k, d_v, None, None) for _, d_k, d_v in grads)  # type: ignore[arg-type]


_differentiable.defvjp(_forward, _vjp)


@functools.cache
def _log_choice(name: str, reason: str) -> None:
    logger.info("arena attention: %s (auto on %s)", name, reason)


def choose_attention(name: str, device: jax.Device, head_width: int, dtype: jax.typing.DTypeLike) -> Attention:
    """The implementation for a device. "auto" takes the fastest one that serves, and logs the choice once.

    Raises UserError where no implementation has the name, or where the one that is named does not serve.
    """
    on_gpu = device.platform == "gpu"
    capability = str(getattr(device, "compute_capability", "0.0")) if on_gpu else ""
    card: dict[str, Any] = (
        {"capability": capability, "multiprocessors": int(getattr(device, "core_count", 132))} if on_gpu else {}
    )
    if name != "auto":
        chosen = Attention(name, **card)
        reason = _unsupported(name, device, capability, head_width, dtype)
        if reason:
            raise UserError(f"attention {name!r}: {reason}")
        return chosen
    if not on_gpu:
        _log_choice("blockwise", device.platform)
        return BLOCKWISE
    reasons = {n: _unsupported(n, device, capability, head_width, dtype) for n in ("wgmma", "mma")}
    name = next((n for n, reason in reasons.items() if reason is None), "blockwise")
    _log_choice(name, device.device_kind + (f": {reasons['mma']}" if name == "blockwise" else ""))
    return Attention(name, **card)


def _unsupported(
    name: str, device: jax.Device, capability: str, head_width: int, dtype: jax.typing.DTypeLike
) -> str | None:
    """Why an implementation does not serve a model on a device, or None."""
    if name not in ("wgmma", "mma"):
        return None
    if device.platform != "gpu":
        return f"the kernel needs an NVIDIA GPU, not {device.platform}"
    cards = WGMMA_CARDS if name == "wgmma" else MMA_CARDS
    if capability not in cards:
        return f"the kernel needs compute capability {' or '.join(cards)}, this card has {capability}"
    from xl2jax.ops import tiles

    return tiles.unsupported(head_width, dtype, dtype)


def arena_attention(q: jax.Array, *sources: Source, attention: Attention = BLOCKWISE) -> Results:
    """Attention of the queries to all slots that they see in the sources. Shapes as in the module's docstring.

    Differentiable in q, k and v (out and lse), unless k and v have 8 bits. The backward pass is blockwise XLA whatever
    the implementation. Where heads are split over devices (`xl2jax.ops.split`), each computes its own.

    Raises:
      UserError: the implementation does not support these shapes or dtypes. There is no fallback.
      AssertionError: the shapes do not match.
    """
    batch, tokens, heads, head_width = q.shape
    for source in sources:
        kv_rows, kv_heads, slots, _ = source.shape
        for x in (source.k, source.v):
            if isinstance(x, QuantizedKV):
                chex.assert_shape(x.values, (kv_rows, kv_heads, slots, head_width))
                chex.assert_shape(x.scale, (kv_rows, kv_heads, slots))
                if x.exact is not None:
                    chex.assert_shape(x.exact, (kv_rows, kv_heads, slots, None))
            else:
                assert kv_shape(x) == (kv_rows, kv_heads, slots, head_width)
        chex.assert_equal(kv_dtype(source.k), kv_dtype(source.v))
        if source.rows is None:
            assert kv_rows == batch, f"{kv_rows} rows of keys for {batch} batch rows"
        else:
            chex.assert_shape(source.rows, (batch,))
        chex.assert_shape(list(source.ranges), (batch, tokens))
        chex.assert_is_divisible(heads, kv_heads)
    if splits() == 1:
        return _differentiable(attention, q, sources)
    of_source = Source(part_of(1), part_of(1), PartitionSpec(), PartitionSpec())  # type: ignore[arg-type]
    specs = (part_of(2), (of_source,) * len(sources))
    run = on_parts(functools.partial(_differentiable, attention), specs, (part_of(2), part_of(2)))
    return run(q, sources)
