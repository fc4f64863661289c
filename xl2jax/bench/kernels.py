"""`bench kernels`: every implementation of arena attention that this GPU runs, checked and then timed.

Each one is first compared with float32 on random inputs. Then it is timed: medians of many runs in one dispatch, beside
cuDNN's dense causal attention and the matrix and copy rates of the card, all in the same process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xl2jax.arithmetic import round_up
from xl2jax.commands.flags import whole_numbers
from xl2jax.config import PRESETS
from xl2jax.errors import UserError
from xl2jax.inference.layout import PrefillConfig, Tokens, VideoLayout, natural_ranges
from xl2jax.inference.network import exact_pairs
from xl2jax.ops.attention import BLOCKWISE, Attention, arena_attention, choose_attention
from xl2jax.ops.dense import dense_attention
from xl2jax.ops.kv import KVArray, Source, channel_mask, quantize
from xl2jax.ops.ranges import Ranges
from xl2jax.ops.reference import attend_reference

_PREFIX, _TIMES, _SUFFIX, _CHUNK = 14, 9, 64, 4
_LLM = PRESETS["video-xl-2"].llm

MAX_ERROR = 1e-2
"""Limit on the relative L2 of bfloat16 results against float32. Rounding alone makes 2e-3 to 3e-3."""


@dataclasses.dataclass(frozen=True)
class KernelArgs:
    """Checks and times attention, and products with weights in fewer bits, at the released model's shapes."""

    groups: str = "8,120,400,1000,2500"
    """Comma-separated lengths of the video, in groups of 4 frames."""
    windows: str = "3,11"
    """Comma-separated numbers of chunks that a visual token sees before its own."""
    dense_up_to: int = 1000
    """cuDNN's dense attention and XLA's blockwise attention are timed up to this many groups."""
    json: bool = False
    """Prints the rows as JSON."""


def video_queries(groups: int, window: int | None, multiple: int = 128) -> tuple[Tokens, int]:
    """Ranges of all tokens of a video, visual tokens first, and the number of slots of its arena."""
    layout = VideoLayout(_PREFIX, (_TIMES,) * groups, PRESETS["video-xl-2"].visual_tokens)

    start = round_up(layout.global_tokens + _SUFFIX, multiple)
    tokens = natural_ranges(layout, _SUFFIX, start, PrefillConfig(_CHUNK, window))
    order = np.argsort(tokens.slot < start, kind="stable")
    return jax.tree.map(lambda x: x[order], tokens), round_up(start + groups * layout.visual_tokens, multiple)


def seconds(run: Callable[..., jax.Array], first: jax.Array, *rest: Any, repeats: int = 5) -> float:
    """Median seconds of `run(first, *rest)`. Its result has the shape of `first` and is fed back as `first`."""

    def many(n: int) -> Callable[..., jax.Array]:
        return jax.jit(lambda x, *rest: jax.lax.fori_loop(0, n, lambda _, x: run(x, *rest).astype(x.dtype), x))

    def timed(f: Callable[..., jax.Array]) -> float:
        started = time.perf_counter()
        jax.block_until_ready(f(first, *rest))
        return time.perf_counter() - started

    once = many(1)
    timed(once)
    n = int(np.clip(0.05 / timed(once), 2, 200))
    several = many(n)
    timed(several)
    return float(np.median([timed(several) for _ in range(repeats)])) / n


def ceilings() -> dict[str, float]:
    """The bfloat16 matrix rate of the card (TFLOP/s) and its copy rate (GB/s, read plus written)."""
    side, length = (8192, 1 << 30) if jax.default_backend() == "gpu" else (512, 1 << 24)
    a, b = (jax.random.normal(jax.random.key(i), (side, side), jnp.bfloat16) for i in range(2))
    matrix = seconds(lambda x, y: (x @ y) * jnp.bfloat16(0.01), a, b)
    big = jax.random.normal(jax.random.key(2), (length,), jnp.bfloat16)
    copy = seconds(lambda x: x + jnp.bfloat16(1), big)
    return {"matrix_tflops": 2 * side**3 / matrix / 1e12, "copy_gb_s": 2 * big.nbytes / copy / 1e9}


def arrays(tokens: int, slots: int, seed: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(seed), 3)
    q = jax.random.normal(keys[0], (1, tokens, _LLM.heads, _LLM.head_width), jnp.bfloat16)
    k, v = (jax.random.normal(key, (1, _LLM.kv_heads, slots, _LLM.head_width), jnp.bfloat16) for key in keys[1:])
    return q, k, v


_DECODE = ("decode", "decode, int8", "decode, int8, channels kept")


def _stored(k: jax.Array, v: jax.Array, name: str) -> tuple[KVArray, KVArray]:
    """Keys and values in the way that a name of `_DECODE` says. The kept channels of the keys are 20 times larger."""
    if name == "decode":
        return k, v
    if name == "decode, int8":
        return quantize(k), quantize(v)
    width = k.shape[-1]
    kept = np.arange(2 * exact_pairs(width)) * 3
    scaled = k * jnp.where(channel_mask(jnp.asarray(kept), width), 20, 1).astype(k.dtype)
    return quantize(scaled, np.broadcast_to(kept, (*k.shape[:2], len(kept)))), quantize(v)


def implementations() -> list[Attention]:
    """The kernels that this card runs, and XLA's blockwise attention."""
    device, served = jax.devices()[0], []
    for name in ("wgmma", "mma"):
        with contextlib.suppress(UserError):
            served.append(choose_attention(name, device, _LLM.head_width, jnp.bfloat16))
    return [*served, BLOCKWISE]


def attend(attention: Attention, q: jax.Array, *source: Any) -> jax.Array:
    return arena_attention(q, Source(*source), attention=attention)[0]


def check(attention: Attention) -> list[dict[str, Any]]:
    """Compares an implementation with float32 by relative L2: on a small video, then with one query.

    Raises UserError where it is above `MAX_ERROR`.
    """
    rows = []
    for name, groups, window in (
        ("prefill", 8, 3), ("prefill, window 0", 6, 0), *((name, 32, 3) for name in _DECODE)
    ):  # fmt: skip
        tokens, slots = video_queries(groups, window)
        q, k, v = arrays(len(tokens.slot), slots, groups)
        ranges = jax.tree.map(jnp.asarray, tokens.ranges.batched())
        if name.startswith("decode"):
            q, ranges = q[:, -1:], ranges.select(slice(-1, None))
        source = Source(k, v, jnp.zeros(1, jnp.int32), ranges)
        if name in _DECODE:
            stored_k, stored_v = _stored(k, v, name)
            source = source._replace(k=stored_k, v=stored_v)
        # Numbers of 8 bits are unpacked to float32, so that rounding them to 8 bits is not counted.
        wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, (q, source))
        with jax.default_matmul_precision("highest"):
            expected, expected_lse = jax.jit(attend_reference)(*wide)
        out, lse = jax.jit(functools.partial(arena_attention, attention=attention))(q, source)
        error = jnp.linalg.norm(out.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)
        if not error < MAX_ERROR:
            raise UserError(f"attention {attention.name!r} is wrong on this card ({name}): relative L2 {error:.2g}")
        off = float(jnp.abs(lse - expected_lse).max())
        rows.append({"check": name, "kernel": attention.name, "relative_l2": float(error), "lse_max_abs": off})
    return rows


def visible_pairs(ranges: Ranges) -> float:
    """How many slots the queries see, summed over queries."""
    g_end, v_lo, v_hi = (np.asarray(x, np.float64) for x in ranges)
    return float((g_end + np.maximum(v_hi - np.maximum(v_lo, g_end), 0)).sum())


def prefill_row(attention: Attention, groups: int, window: int, ceiling: float) -> dict[str, Any]:
    """Times all tokens of a video in one call. The rate counts only what the queries see."""
    tokens, slots = video_queries(groups, window)
    q, k, v = arrays(len(tokens.slot), slots, groups)
    ranges = jax.tree.map(jnp.asarray, tokens.ranges.batched())
    row = jnp.zeros(1, jnp.int32)
    taken = seconds(functools.partial(attend, attention), q, k, v, row, ranges)
    rate = 4.0 * visible_pairs(tokens.ranges) * _LLM.heads * _LLM.head_width / taken / 1e12
    return {
        "op": "prefill",
        "kernel": attention.name,
        "groups": groups,
        "tokens": len(tokens.slot),
        "window": window,
        "ms": 1e3 * taken,
        "tflops": rate,
        "of_ceiling": rate / ceiling,
    }


def dense_row(groups: int, ceiling: float) -> dict[str, Any]:
    """Times cuDNN's dense causal attention over as many tokens."""
    tokens = len(video_queries(groups, 3)[0].slot)
    padded = round_up(tokens, 128)
    q, k, v = arrays(padded, padded, 0)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    taken = seconds(lambda q, k, v: dense_attention(q, k, v, causal=True), q, k, v)
    rate = 2.0 * tokens**2 * _LLM.heads * _LLM.head_width / taken / 1e12
    return {
        "op": "cuDNN dense",
        "groups": groups,
        "tokens": tokens,
        "ms": 1e3 * taken,
        "tflops": rate,
        "of_ceiling": rate / ceiling,
    }


def decode_row(attention: Attention, groups: int, copy_gb_s: float, name: str) -> dict[str, Any]:
    """Times one token over the whole dense cache of a video, stored as `name` says."""
    tokens, slots = video_queries(groups, 3)
    q, k, v = arrays(1, slots, groups)
    ranges = jax.tree.map(jnp.asarray, tokens.ranges.select(slice(-1, None)).batched())
    row = jnp.zeros(1, jnp.int32)
    stored = _stored(k, v, name)
    taken = seconds(functools.partial(attend, attention), q, *stored, row, ranges)
    rate = sum(x.nbytes for x in jax.tree.leaves(stored)) / taken / 1e9
    return {
        "op": name,
        "kernel": attention.name,
        "groups": groups,
        "tokens": slots,
        "ms": 1e3 * taken,
        "gb_s": rate,
        "of_ceiling": rate / copy_gb_s,
    }


def kernel_rows(args: KernelArgs) -> Iterator[dict[str, Any]]:
    """Yields rows of checks, a row of the card's rates, and rows for each length."""
    served = implementations()
    for attention in served:
        yield from check(attention)
    rates = ceilings()
    yield {"op": "ceilings", **rates}
    matrix, copy = rates["matrix_tflops"], rates["copy_gb_s"]
    for groups in whole_numbers("--groups", args.groups):
        timed = served if groups <= args.dense_up_to else served[:-1]
        for window in whole_numbers("--windows", args.windows, low=0):
            yield from (prefill_row(a, groups, window, matrix) for a in timed)
        if groups <= args.dense_up_to:
            yield dense_row(groups, matrix)
        yield from (decode_row(a, groups, copy, name) for name in _DECODE for a in timed)
