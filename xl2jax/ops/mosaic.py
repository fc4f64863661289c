"""Arena attention on Hopper GPUs: one Pallas Mosaic kernel for prefill and decoding.

The query heads of a KV head are folded into rows, so that a tile of 128 rows spans few tokens and even a single decoded
token reads every key once. The rows of a tile see at most two runs of key blocks. Six integers a tile say where the
runs start and end, and which of their blocks need no mask:

    blocks      0 ... a_full ... a        b ... b_full ... c_full ... c
    needed      [0, a)                    [b, c)
    unmasked    [0, a_full)               [b_full, c_full)

Unmasked blocks are visited first. Where there are few tiles, each tile's blocks are split over several programs, whose
results are merged by their log-sum-exp. A program has three warpgroups. Two of them compute 64 rows each, one in its
softmax while the other uses the tensor cores. The third one keeps TMA loads of keys and values in flight, which are read
from the cache in place.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from xl2jax.arithmetic import ceil_div, round_up
from xl2jax.errors import UserError
from xl2jax.ops.ranges import NEGATIVE, Ranges

ROWS = 64
"""Rows of a compute warpgroup (the height of a wgmma)."""
TILE = 2 * ROWS
HEAD_WIDTHS = (64, 128)
_LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    """Slots of a key block, blocks in flight, and the number of programs that share the blocks of a tile."""

    block: int = 128
    stages: int = 2
    splits: int = 1


def choose_config(tiles: int, slots: int, multiprocessors: int = 132) -> KernelConfig:
    """`tiles` counts programs before splitting. Few tiles are split until all multiprocessors have work."""
    block = 128 if slots % 128 == 0 else 64
    splits = min(max(multiprocessors // tiles, 1), max(slots // (4 * block), 1))
    return KernelConfig(block=block, stages=2 if block == 128 else 4, splits=splits)


def tile_blocks(ranges: Ranges, block: int, tile: int = TILE) -> jax.Array:
    """Ranges of rows [..., R] -> int32 [..., R / tile, 6]: a_full, a, b, b_full, c_full, c (in blocks).

    Rows that see nothing have no influence on a tile's blocks. The kernel sets their results to zero.
    """
    g_end, v_lo, v_hi = (x.reshape(*x.shape[:-1], -1, tile) for x in ranges)
    big = jnp.iinfo(jnp.int32).max // 2
    seen = v_hi > v_lo
    alive = seen | (g_end > 0)
    any_alive = alive.any(-1)

    def lowest(x: jax.Array, where: jax.Array) -> jax.Array:
        return jnp.min(jnp.where(where, x, big), axis=-1)

    def highest(x: jax.Array, where: jax.Array) -> jax.Array:
        return jnp.max(jnp.where(where, x, 0), axis=-1)

    a = ceil_div(highest(g_end, alive), block)
    a_full = jnp.where(any_alive, lowest(g_end, alive) // block, 0)
    any_seen = seen.any(-1)
    b = jnp.where(any_seen, jnp.maximum(lowest(v_lo, seen) // block, a), a)
    c = jnp.where(any_seen, jnp.maximum(ceil_div(highest(v_hi, seen), block), b), b)
    # An unmasked block lies inside the interval of every row that sees something.
    all_seen = (seen | ~alive).all(-1) & any_seen
    b_full = jnp.clip(ceil_div(highest(v_lo, seen), block), b, c)
    c_full = jnp.where(all_seen, jnp.clip(lowest(v_hi, seen) // block, b_full, c), b_full)
    return jnp.stack([jnp.minimum(a_full, a), a, b, b_full, c_full, c], axis=-1).astype(jnp.int32)


def live_block_count(blocks: jax.Array) -> jax.Array:
    """The number of blocks that each tile visits, [...], from `tile_blocks`."""
    return blocks[..., 1] + blocks[..., 5] - blocks[..., 2]


def attend_mosaic(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rows: jax.Array,
    ranges: Ranges,
    *,
    config: KernelConfig | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """The arena op (xl2jax.ops.attention) for bfloat16 (or float16), head widths 64 and 128.

    Raises UserError for shapes and dtypes that the kernel does not support.
    """
    batch, tokens, heads, h = q.shape
    kv_heads, slots = k.shape[1], k.shape[2]
    reason = unsupported(h, q.dtype, k.dtype, slots)
    if reason:
        raise UserError(f"attention 'mosaic': {reason}")
    group = heads // kv_heads
    folded = tokens * group
    padded = round_up(folded, TILE)
    config = config or choose_config(batch * kv_heads * padded // TILE, slots)

    def fold(x: jax.Array) -> jax.Array:  # [B, T] -> [B, padded]
        return jnp.pad(jnp.repeat(x, group, axis=1), ((0, 0), (0, padded - folded)))

    row_ranges = Ranges(*map(fold, ranges))
    # All rows of a single token have the same ranges, so that one row stands for the tile.
    blocks = tile_blocks(ranges, config.block, 1) if tokens == 1 else tile_blocks(row_ranges, config.block)
    queries = q.reshape(batch, tokens, kv_heads, group, h).transpose(0, 2, 1, 3, 4)
    queries = queries.reshape(batch, kv_heads, folded, h)
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, padded - folded), (0, 0)))
    out, lse = _call(queries, k, v, rows, row_ranges, blocks, config=config, interpret=interpret)
    if config.splits > 1:
        total = jax.nn.logsumexp(lse, axis=0)
        share = jnp.where(lse > NEGATIVE / 2, jnp.exp(lse - total), 0.0)
        out = jnp.sum(out.astype(jnp.float32) * share[..., None], axis=0)
        lse = jnp.maximum(total, NEGATIVE)
    else:
        out, lse = out[0], lse[0]
    out = out[:, :, :folded].reshape(batch, kv_heads, tokens, group, h).transpose(0, 2, 1, 3, 4)
    lse = lse[:, :, :folded].reshape(batch, kv_heads, tokens, group).transpose(0, 2, 1, 3)
    return out.reshape(q.shape).astype(q.dtype), lse.reshape(batch, tokens, heads)


def unsupported(
    head_width: int, queries: jax.typing.DTypeLike, keys: jax.typing.DTypeLike, slots: int = 64
) -> str | None:
    """Why the kernel does not support such arrays, or None."""
    if head_width not in HEAD_WIDTHS:
        return f"head width {head_width} is not supported (only {' and '.join(map(str, HEAD_WIDTHS))})"
    if queries not in (jnp.bfloat16, jnp.float16) or keys != queries:
        return f"{jnp.dtype(queries)} queries and {jnp.dtype(keys)} keys are not supported (only 16 bit)"
    if slots % 64:
        return f"{slots} cache slots are not a multiple of 64"
    return None


def _call(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rows: jax.Array,
    ranges: Ranges,
    blocks: jax.Array,
    *,
    config: KernelConfig,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """q [B, K, R, H] folded, ranges [B, R], blocks [B, R / TILE, 6] -> out [splits, B, K, R, H], lse [splits, B, K, R]."""
    batch, kv_heads, padded, h = q.shape
    dtype, block, stages, splits = q.dtype, config.block, config.stages, config.splits
    scale = h**-0.5 * _LOG2E
    compiled = interpret is None

    def kernel(q_ref, k_ref, v_ref, rows_ref, g_end_ref, v_lo_ref, v_hi_ref, blocks_ref, out_ref, lse_ref, scratch):
        (q_smem2, k_smem, v_smem, lse_smem2, range_smem2, *p_smem2), barriers = scratch
        q_ready, k_ready, v_ready, k_free, v_free, turn = barriers
        wg = lax.axis_index("wg")
        kv_head, tile = lax.axis_index("kv_head"), lax.axis_index("tile")
        b, split = lax.div(lax.axis_index("part"), splits), lax.rem(lax.axis_index("part"), splits)
        a_full, a, b_lo, b_full, c_full, c = (blocks_ref[b, tile, i] for i in range(6))
        full = a_full + c_full - b_full
        total = a + c - b_lo
        first, last = lax.div(total * split, splits), lax.div(total * (split + 1), splits)
        count = last - first
        turn_point = jnp.clip(full, first, last)  # unmasked blocks end here

        def block_at(i):
            """The i-th block of the tile: unmasked ones, then the three masked runs."""
            masked = i - full
            left, middle = a - a_full, b_full - b_lo
            unmasked_id = jnp.where(i < a_full, i, b_full + i - a_full)
            masked_id = jnp.where(
                masked < left,
                a_full + masked,
                jnp.where(masked < left + middle, b_lo + masked - left, c_full + masked - left - middle),
            )
            return jnp.where(i < full, unmasked_id, masked_id)

        @pl.when(wg < 2)
        def _compute():
            plgpu.set_max_registers(232, action="increase")
            q_smem, lse_smem, ranges = (x.at[wg] for x in (q_smem2, lse_smem2, range_smem2))
            here = pl.ds(tile * TILE + wg * ROWS, ROWS)
            plgpu.copy_gmem_to_smem(q_ref.at[b, kv_head, here], q_smem, q_ready.at[wg])
            for i, ref in enumerate((g_end_ref, v_lo_ref, v_hi_ref)):
                plgpu.copy_gmem_to_smem(ref.at[b, here], ranges.at[i], q_ready.at[wg])
            plgpu.barrier_wait(q_ready.at[wg])
            row_g_end, row_v_lo, row_v_hi = ranges[0], ranges[1], ranges[2]

            def spread(x):  # [rows] -> [rows, block]
                return lax.broadcast_in_dim(x, (ROWS, block), [0])

            def take_turn():
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

            def step(i, carry, *, masked):
                acc, top, norm = carry
                slot = lax.rem(i - first, jnp.array(stages, i.dtype))
                plgpu.barrier_wait(k_ready.at[slot])

                def scores_of(ref):
                    plgpu.wgmma(ref, q_smem, plgpu.transpose_ref(k_smem.at[slot], (1, 0)))
                    take_turn()
                    return ref[...]

                scores = pl.run_scoped(scores_of, plgpu.ACC((ROWS, block), jnp.float32))
                plgpu.barrier_arrive(k_free.at[slot])
                if masked:
                    column = lax.broadcasted_iota(jnp.int32, (ROWS, block), 1) + block_at(i) * block
                    seen = (column < spread(row_g_end)) | ((column >= spread(row_v_lo)) & (column < spread(row_v_hi)))
                    scores = jnp.where(seen, scores, NEGATIVE)
                new_top = jnp.maximum(top, scores.max(axis=1) * scale)
                p = jnp.exp2(scores * scale - spread(new_top))
                if masked:
                    p = jnp.where(seen, p, 0.0)
                decay = jnp.exp2(top - new_top)
                norm = norm * decay + p.sum(axis=1)
                p16 = p.astype(dtype)
                acc = acc * lax.broadcast_in_dim(decay, acc.shape, [0])
                if compiled:
                    acc, norm, new_top, p16 = lax.optimization_barrier((acc, norm, new_top, p16))
                plgpu.barrier_arrive(turn)  # softmax done
                plgpu.barrier_wait(v_ready.at[slot])
                plgpu.barrier_wait(turn)  # tensor cores free
                if compiled:

                    def weigh(ref):
                        plgpu.wgmma(ref, p16, v_smem.at[slot])

                    acc = pl.run_state(weigh)(plgpu.ACC.init(acc))
                else:  # the interpreter lacks register operands and initialised accumulators
                    p_smem = p_smem2[0].at[wg]
                    p_smem[...] = p16
                    plgpu.commit_smem()

                    def weigh_smem(ref):
                        plgpu.wgmma(ref, p_smem, v_smem.at[slot])
                        return ref[...]

                    acc = acc + pl.run_scoped(weigh_smem, plgpu.ACC((ROWS, h), jnp.float32))
                plgpu.barrier_arrive(v_free.at[slot])
                return acc, new_top, norm

            carry = (
                jnp.zeros((ROWS, h), jnp.float32),
                jnp.full((ROWS,), NEGATIVE, jnp.float32),
                jnp.zeros((ROWS,), jnp.float32),
            )
            # The second warpgroup runs half a step behind the first.
            pl.when(wg == 1)(take_turn)
            carry = lax.fori_loop(first, turn_point, functools.partial(step, masked=False), carry)
            acc, top, norm = lax.fori_loop(turn_point, last, functools.partial(step, masked=True), carry)
            pl.when(wg == 0)(take_turn)
            # Rows that see nothing went through the unmasked blocks of the others.
            norm = jnp.where((row_g_end > 0) | (row_v_hi > row_v_lo), norm, 0.0)
            wide = lax.broadcast_in_dim(norm, acc.shape, [0])
            q_smem[...] = jnp.where(wide > 0.0, acc / wide, 0.0).astype(dtype)
            lse_smem[...] = jnp.where(norm > 0.0, top / _LOG2E + jnp.log(norm), NEGATIVE)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem, out_ref.at[split, b, kv_head, here])
            plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[split, b, kv_head, here])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 2)
        def _load():
            plgpu.set_max_registers(40, action="decrease")
            row = rows_ref[b]

            def issue(i, slot):
                here = pl.ds(block_at(first + i) * block, block)
                plgpu.copy_gmem_to_smem(k_ref.at[row, kv_head, here], k_smem.at[slot], k_ready.at[slot])
                plgpu.copy_gmem_to_smem(v_ref.at[row, kv_head, here], v_smem.at[slot], v_ready.at[slot])

            for s in range(stages):
                pl.when(s < count)(functools.partial(issue, jnp.int32(s), s))

            @pl.loop(stages, jnp.maximum(count, stages))
            def _(i):
                slot = lax.rem(i, jnp.array(stages, i.dtype))
                plgpu.barrier_wait(k_free.at[slot])
                plgpu.barrier_wait(v_free.at[slot])
                issue(i, slot)

            # Every arrival is waited for once.
            @pl.loop(jnp.maximum(count, stages), count + stages)
            def _(i):
                slot = lax.rem(i, jnp.array(stages, i.dtype))
                plgpu.barrier_wait(k_free.at[slot])
                plgpu.barrier_wait(v_free.at[slot])

    def entry(*refs):
        tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        smem = [
            plgpu.SMEM((2, ROWS, h), dtype, transforms=tiled),
            plgpu.SMEM((stages, block, h), dtype, transforms=tiled),
            plgpu.SMEM((stages, block, h), dtype, transforms=tiled),
            plgpu.SMEM((2, ROWS), jnp.float32),
            plgpu.SMEM((2, 3, ROWS), jnp.int32),
        ]
        if not compiled:
            smem.append(plgpu.SMEM((2, ROWS, block), dtype, transforms=tiled))
        barriers = (
            plgpu.Barrier(num_arrivals=4, num_barriers=2),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2),
        )
        pl.run_scoped(lambda *s: kernel(*refs, s), tuple(smem), barriers, collective_axes="wg")

    shape = (splits, batch, kv_heads, padded)
    options = {} if compiled else {"interpret": interpret}
    return plgpu.kernel(
        entry,
        out_type=(jax.ShapeDtypeStruct((*shape, h), dtype), jax.ShapeDtypeStruct(shape, jnp.float32)),
        grid=(kv_heads, padded // TILE, batch * splits),
        grid_names=("kv_head", "tile", "part"),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **options,
    )(q, k, v, rows, *ranges, blocks)
