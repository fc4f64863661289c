"""`bench kernels`: the Mosaic kernel on this GPU, checked and then timed.

The kernel is first compared with float32 on random inputs. Then it is timed: medians of many runs in one dispatch, beside
cuDNN's dense causal attention and the matrix and copy rates of the card, all in the same process.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xl2jax.arithmetic import ceil_div, round_up
from xl2jax.commands.flags import whole_numbers
from xl2jax.config import PRESETS
from xl2jax.inference.layout import PrefillConfig, Tokens, VideoLayout, natural_ranges
from xl2jax.ops import mosaic
from xl2jax.ops.blockwise import attend_blockwise
from xl2jax.ops.dense import dense_attention
from xl2jax.ops.ranges import Ranges
from xl2jax.ops.reference import attend_reference

_PREFIX, _TIMES, _SUFFIX, _CHUNK = 14, 9, 64, 4
_LLM = PRESETS["video-xl-2"].llm


@dataclasses.dataclass(frozen=True)
class KernelArgs:
    """Checks and times the GPU kernels at the released model's shapes."""

    groups: str = "8,120,400,1000,2500"
    """Comma-separated lengths of the video, in groups of 4 frames."""
    windows: str = "3,11"
    """Comma-separated numbers of chunks that a visual token sees before its own."""
    dense_up_to: int = 1000
    """cuDNN's dense attention is timed up to this many groups."""
    sweep: bool = False
    """Also times other block sizes and numbers of stages at the last of --groups."""
    json: bool = False
    """Prints the rows as JSON."""


def video_queries(groups: int, window: int | None, multiple: int = 128) -> tuple[Tokens, int]:
    """Ranges of all tokens of a video, visual tokens first, and the number of slots of its arena."""
    layout = VideoLayout(_PREFIX, (_TIMES,) * groups, PRESETS["video-xl-2"].visual_tokens)

    start = round_up(layout.global_tokens + _SUFFIX, multiple)
    tokens = natural_ranges(layout, _SUFFIX, start, PrefillConfig(_CHUNK, window))
    order = np.argsort(tokens.slot < start, kind="stable")
    return jax.tree.map(lambda x: x[order], tokens), round_up(start + groups * layout.visual_tokens, multiple)


def seconds(run: Callable[..., jax.Array], first: jax.Array, *rest: jax.Array, repeats: int = 5) -> float:
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


def check() -> list[dict[str, Any]]:
    """Compares the kernel with float32 by relative L2: on a small video, then with few queries and split blocks."""
    rows = []
    for name, groups, window, config in (
        ("prefill", 8, 3, mosaic.KernelConfig()),
        ("prefill, window 0", 6, 0, mosaic.KernelConfig(64, 4)),
        ("split", 8, 3, mosaic.KernelConfig(splits=5)),
        ("decode", 8, 3, mosaic.KernelConfig(splits=9)),
    ):
        tokens, slots = video_queries(groups, window)
        q, k, v = arrays(len(tokens.slot), slots, groups)
        ranges = jax.tree.map(jnp.asarray, tokens.ranges.batched())
        if name == "decode":
            q, ranges = q[:, -1:], ranges.select(slice(-1, None))
        row = jnp.zeros(1, jnp.int32)
        with jax.default_matmul_precision("highest"):
            wide = [x.astype(jnp.float32) for x in (q, k, v)]
            expected, expected_lse = jax.jit(attend_reference)(*wide, row, ranges)
        out, lse = jax.jit(lambda *a, c=config: mosaic.attend_mosaic(*a, config=c))(q, k, v, row, ranges)
        error = jnp.linalg.norm(out.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)
        rows.append(
            {"check": name, "relative_l2": float(error), "lse_max_abs": float(jnp.abs(lse - expected_lse).max())}
        )
    return rows


def prefill_row(groups: int, window: int, config: mosaic.KernelConfig | None, ceiling: float) -> dict[str, Any]:
    """Times all tokens of a video in one call."""
    tokens, slots = video_queries(groups, window)
    count = len(tokens.slot)
    q, k, v = arrays(count, slots, groups)
    ranges = jax.tree.map(jnp.asarray, tokens.ranges.batched())
    row = jnp.zeros(1, jnp.int32)
    fold = _LLM.heads // _LLM.kv_heads
    tiles = _LLM.kv_heads * ceil_div(count * fold, mosaic.TILE)
    config = config or mosaic.choose_config(tiles, slots)
    folded = Ranges(*(jnp.pad(jnp.repeat(x, fold, axis=1), ((0, 0), (0, -count * fold % mosaic.TILE))) for x in ranges))
    live = int(mosaic.live_block_count(mosaic.tile_blocks(folded, config.block)).sum())
    taken = seconds(lambda q, *a: mosaic.attend_mosaic(q, *a, config=config)[0], q, k, v, row, ranges)
    rate = 4.0 * live * mosaic.TILE * config.block * _LLM.head_width * _LLM.kv_heads / taken / 1e12
    return {
        "op": "prefill",
        "groups": groups,
        "tokens": count,
        "window": window,
        "block": config.block,
        "stages": config.stages,
        "splits": config.splits,
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


def decode_row(groups: int, copy_gb_s: float, splits: int | None = None) -> dict[str, Any]:
    """Times one token over the whole dense cache of a video, with the kernel and with XLA."""
    tokens, slots = video_queries(groups, 3)
    q, k, v = arrays(1, slots, groups)
    ranges = jax.tree.map(jnp.asarray, tokens.ranges.select(slice(-1, None)).batched())
    row = jnp.zeros(1, jnp.int32)
    config = mosaic.choose_config(_LLM.kv_heads, slots)
    if splits is not None:
        config = dataclasses.replace(config, splits=splits)
    taken = seconds(lambda q, *a: mosaic.attend_mosaic(q, *a, config=config)[0], q, k, v, row, ranges)
    plain = seconds(lambda q, *a: attend_blockwise(q, *a)[0], q, k, v, row, ranges)
    rate = (k.nbytes + v.nbytes) / taken / 1e9
    return {
        "op": "decode",
        "groups": groups,
        "tokens": slots,
        "block": config.block,
        "stages": config.stages,
        "splits": config.splits,
        "ms": 1e3 * taken,
        "gb_s": rate,
        "of_ceiling": rate / copy_gb_s,
        "blockwise_ms": 1e3 * plain,
    }


def kernel_rows(args: KernelArgs) -> list[dict[str, Any]]:
    rows = check()
    rows.append({"op": "ceilings", **ceilings()})
    matrix, copy = rows[-1]["matrix_tflops"], rows[-1]["copy_gb_s"]
    sizes = whole_numbers("--groups", args.groups)
    for groups in sizes:
        rows += [prefill_row(groups, w, None, matrix) for w in whole_numbers("--windows", args.windows, low=0)]
        if groups <= args.dense_up_to:
            rows.append(dense_row(groups, matrix))
        rows.append(decode_row(groups, copy))
    if args.sweep:
        configs = [mosaic.KernelConfig(*c) for c in ((128, 2), (64, 2), (64, 3), (64, 4), (64, 5))]
        rows += [prefill_row(sizes[-1], 3, c, matrix) for c in configs]
        rows += [decode_row(sizes[-1], copy, s) for s in (16, 33, 64, 99)]
    return rows
