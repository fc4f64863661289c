"""Arena attention on Hopper GPUs: a Pallas Mosaic kernel with wgmma, for prefill and decoding.

`xl2jax.ops.tiles` divides the work. A program has three warpgroups. Two of them compute 64 rows each, one in its softmax
while the other uses the tensor cores. The third one keeps TMA loads of keys and values in flight, which are read from the
cache in place.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from xl2jax.arithmetic import ceil_div
from xl2jax.ops.kv import Source
from xl2jax.ops.ranges import NEGATIVE
from xl2jax.ops.tiles import KernelConfig, Refs, Tiles, Work, attend_tiles, launch_kernel, split_counts

ROWS = 64
"""Rows of a compute warpgroup (the height of a wgmma)."""
TILE = 2 * ROWS
_LOG2E = math.log2(math.e)


def choose_config(rows: int, batch_heads: int, slots: tuple[int, ...], multiprocessors: int = 132) -> KernelConfig:
    """Sizes for `rows` folded rows of each of `batch_heads` KV heads, and the slots of each source."""
    block = 64 if any(n % 128 for n in slots) else 128
    splits = split_counts(batch_heads * ceil_div(rows, TILE), slots, block, multiprocessors)
    return KernelConfig(TILE, block, 2 if block == 128 else 4, splits)


def attend_wgmma(
    q: jax.Array,
    sources: tuple[Source, ...],
    multiprocessors: int = 132,
    *,
    config: KernelConfig | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """The arena op (xl2jax.ops.attention) for bfloat16 (or float16), head widths 64 and 128.

    Raises UserError for shapes and dtypes that the kernel does not support.
    """

    def choose(rows: int, batch_heads: int, slots: tuple[int, ...]) -> KernelConfig:
        return config or choose_config(rows, batch_heads, slots, multiprocessors)

    return attend_tiles("wgmma", q, sources, choose, functools.partial(_launch, interpret=interpret))


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Static sizes of a program, and whether it is compiled or interpreted."""

    block: int
    stages: int
    head_width: int
    dtype: Any
    compiled: bool

    @property
    def shared_memory(self) -> _Shared:
        tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]
        keys = plgpu.SMEM((self.stages, self.block, self.head_width), self.dtype, transforms=tiled)
        weights = plgpu.SMEM((2, ROWS, self.block), self.dtype, transforms=tiled)
        return _Shared(
            q=plgpu.SMEM((2, ROWS, self.head_width), self.dtype, transforms=tiled),
            k=keys,
            v=keys,
            lse=plgpu.SMEM((2, ROWS), jnp.float32),
            ranges=plgpu.SMEM((2, 3, ROWS), jnp.int32),
            weights=None if self.compiled else weights,
        )

    @property
    def barriers(self) -> _Barriers:
        return _Barriers(
            q_ready=plgpu.Barrier(num_arrivals=4, num_barriers=2),
            k_ready=plgpu.Barrier(num_barriers=self.stages),
            v_ready=plgpu.Barrier(num_barriers=self.stages),
            k_free=plgpu.Barrier(num_arrivals=2, num_barriers=self.stages),
            v_free=plgpu.Barrier(num_arrivals=2, num_barriers=self.stages),
            turn=plgpu.Barrier(num_arrivals=2),
        )


class _Shared(NamedTuple):
    """Shared memory of a program. `q`, `lse`, `ranges` and `weights` have a part for each compute warpgroup."""

    q: Any
    """Queries, and at the end the output."""
    k: Any
    v: Any
    lse: Any
    ranges: Any
    weights: Any
    """Softmax weights of the interpreter, which has no register operands. None where the kernel is compiled."""


class _Barriers(NamedTuple):
    """Barriers of a program: for each compute warpgroup (`q_ready`), for each stage, and for the tensor cores."""

    q_ready: Any
    k_ready: Any
    v_ready: Any
    k_free: Any
    v_free: Any
    turn: Any


def _compute(shape: _Shape, refs: Refs, shared: _Shared, barriers: _Barriers, work: Work, wg: Any) -> None:
    """A compute warpgroup: 64 rows of the tile over all blocks of the program."""
    plgpu.set_max_registers(232, action="increase")
    q_smem, lse_smem, ranges = (x.at[wg] for x in (shared.q, shared.lse, shared.ranges))
    rows = pl.ds(work.tile * TILE + wg * ROWS, ROWS)
    plgpu.copy_gmem_to_smem(refs.tiles.q.at[work.batch_row, work.kv_head, rows], q_smem, barriers.q_ready.at[wg])
    for i, ref in enumerate(refs.tiles.ranges):
        plgpu.copy_gmem_to_smem(ref.at[work.source, work.batch_row, rows], ranges.at[i], barriers.q_ready.at[wg])
    plgpu.barrier_wait(barriers.q_ready.at[wg])
    g_end, v_lo, v_hi = ranges[0], ranges[1], ranges[2]
    scale = shape.head_width**-0.5 * _LOG2E

    def spread(x: Any) -> Any:  # [rows] -> [rows, block]
        return lax.broadcast_in_dim(x, (ROWS, shape.block), [0])

    def take_turn() -> None:
        plgpu.barrier_arrive(barriers.turn)
        plgpu.barrier_wait(barriers.turn)

    def step(i: Any, carry: tuple[Any, Any, Any], *, masked: bool) -> tuple[Any, Any, Any]:
        acc, top, norm = carry
        stage = lax.rem(i - work.first, jnp.array(shape.stages, i.dtype))
        plgpu.barrier_wait(barriers.k_ready.at[stage])

        def scores_of(ref: Any) -> Any:
            plgpu.wgmma(ref, q_smem, plgpu.transpose_ref(shared.k.at[stage], (1, 0)))
            take_turn()
            return ref[...]

        scores = pl.run_scoped(scores_of, plgpu.ACC((ROWS, shape.block), jnp.float32))
        plgpu.barrier_arrive(barriers.k_free.at[stage])
        if masked:
            column = lax.broadcasted_iota(jnp.int32, (ROWS, shape.block), 1) + work.block_at(i) * shape.block
            seen = (column < spread(g_end)) | ((column >= spread(v_lo)) & (column < spread(v_hi)))
            scores = jnp.where(seen, scores, NEGATIVE)
        new_top = jnp.maximum(top, scores.max(axis=1) * scale)
        p = jnp.exp2(scores * scale - spread(new_top))
        if masked:
            p = jnp.where(seen, p, 0.0)
        decay = jnp.exp2(top - new_top)
        norm = norm * decay + p.sum(axis=1)
        weights = p.astype(shape.dtype)
        acc = acc * lax.broadcast_in_dim(decay, acc.shape, [0])
        if shape.compiled:
            acc, norm, new_top, weights = lax.optimization_barrier((acc, norm, new_top, weights))
        plgpu.barrier_arrive(barriers.turn)  # the softmax is done
        plgpu.barrier_wait(barriers.v_ready.at[stage])
        plgpu.barrier_wait(barriers.turn)  # the tensor cores are free
        acc = _add_weighted(shape, acc, weights, shared.v.at[stage], shared.weights, wg)
        plgpu.barrier_arrive(barriers.v_free.at[stage])
        return acc, new_top, norm

    carry = (
        jnp.zeros((ROWS, shape.head_width), jnp.float32),
        jnp.full((ROWS,), NEGATIVE, jnp.float32),
        jnp.zeros((ROWS,), jnp.float32),
    )
    # The second warpgroup runs half a step behind the first.
    pl.when(wg == 1)(take_turn)
    carry = lax.fori_loop(work.first, work.first_masked, functools.partial(step, masked=False), carry)
    acc, top, norm = lax.fori_loop(work.first_masked, work.last, functools.partial(step, masked=True), carry)
    pl.when(wg == 0)(take_turn)
    # Rows that see nothing went through the unmasked blocks of the others. Their NaN ends here; that of others stays.
    norm = jnp.where((g_end > 0) | (v_hi > v_lo), norm, 0.0)
    wide = lax.broadcast_in_dim(norm, acc.shape, [0])
    q_smem[...] = jnp.where(wide == 0.0, 0.0, acc / wide).astype(shape.dtype)
    lse_smem[...] = jnp.where(norm == 0.0, NEGATIVE, top / _LOG2E + jnp.log(norm))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_smem, refs.out.at[work.part, work.batch_row, work.kv_head, rows])
    plgpu.copy_smem_to_gmem(lse_smem, refs.lse.at[work.part, work.batch_row, work.kv_head, rows])
    plgpu.wait_smem_to_gmem(0)


def _add_weighted(shape: _Shape, acc: Any, weights: Any, values: Any, weights_smem: Any, wg: Any) -> Any:
    """acc [rows, H] + weights [rows, block] x values [block, H]."""
    if shape.compiled:

        def weigh(ref: Any) -> None:
            plgpu.wgmma(ref, weights, values)

        return pl.run_state(weigh)(plgpu.ACC.init(acc))
    # The interpreter lacks register operands and initialised accumulators.
    warpgroup_weights = weights_smem.at[wg]
    warpgroup_weights[...] = weights
    plgpu.commit_smem()

    def weigh_smem(ref: Any) -> Any:
        plgpu.wgmma(ref, warpgroup_weights, values)
        return ref[...]

    return acc + pl.run_scoped(weigh_smem, plgpu.ACC((ROWS, shape.head_width), jnp.float32))


def _load(shape: _Shape, refs: Refs, shared: _Shared, barriers: _Barriers, work: Work) -> None:
    """The loading warpgroup: keeps keys and values of the next blocks in flight."""
    plgpu.set_max_registers(40, action="decrease")
    row = refs.tiles.rows[work.source, work.batch_row]
    stages, count = shape.stages, work.last - work.first

    def issue(i: Any, stage: Any) -> None:
        slots = pl.ds(work.block_at(work.first + i) * shape.block, shape.block)

        def copy(number: int) -> None:
            k, v = (x[number].at[row, work.kv_head, slots] for x in (refs.tiles.k, refs.tiles.v))
            plgpu.copy_gmem_to_smem(k, shared.k.at[stage], barriers.k_ready.at[stage])
            plgpu.copy_gmem_to_smem(v, shared.v.at[stage], barriers.v_ready.at[stage])

        work.of_source(copy, len(refs.tiles.k))

    def wait_for_free(i: Any) -> Any:
        stage = lax.rem(i, jnp.array(stages, i.dtype))
        plgpu.barrier_wait(barriers.k_free.at[stage])
        plgpu.barrier_wait(barriers.v_free.at[stage])
        return stage

    for s in range(stages):
        pl.when(s < count)(functools.partial(issue, jnp.int32(s), s))

    @pl.loop(stages, jnp.maximum(count, stages))
    def _(i: Any) -> None:
        issue(i, wait_for_free(i))

    # Every arrival at a barrier must be waited for once.
    @pl.loop(jnp.maximum(count, stages), count + stages)
    def _(i: Any) -> None:
        wait_for_free(i)


def _launch(tiles: Tiles, config: KernelConfig, *, interpret: Any) -> tuple[jax.Array, jax.Array]:
    """See `tiles.Launch`."""
    assert config.tile == TILE
    shape = _Shape(config.block, config.stages, tiles.q.shape[-1], tiles.q.dtype, compiled=interpret is None)

    def run(refs: Refs, shared: _Shared, barriers: _Barriers) -> None:
        wg = lax.axis_index("wg")
        work = Work.of_program(refs.tiles.blocks, config.splits)
        pl.when(wg < 2)(lambda: _compute(shape, refs, shared, barriers, work, wg))
        pl.when(wg == 2)(lambda: _load(shape, refs, shared, barriers, work))

    def program(refs: Refs) -> None:
        pl.run_scoped(functools.partial(run, refs), shape.shared_memory, shape.barriers, collective_axes="wg")

    params = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup)
    return launch_kernel(tiles, config, program, interpret, num_threads=3, thread_name="wg", compiler_params=params)
