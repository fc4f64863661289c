"""Arena attention on NVIDIA GPUs from Ampere on: a Pallas Mosaic kernel with mma.sync, for prefill and decoding.

`xl2jax.ops.tiles` divides the work. A program is one warpgroup. Its softmax weights go from one product to the next in
registers. Loads are cp.async up to Ada and TMA from Hopper on. Keys of the next block are loaded during the softmax and
the second product, values during the first product; further programs on the same multiprocessor hide what is left.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu.mma import MMALayouts

from xl2jax.arithmetic import ceil_div
from xl2jax.ops.kv import Source, unpack_row
from xl2jax.ops.ranges import NEGATIVE
from xl2jax.ops.tiles import KernelConfig, Refs, Tiles, Work, attend_tiles, launch_kernel, split_counts

_LOG2E = math.log2(math.e)

SIZES = {"8.0": (128, 64), "8.6": (128, 32), "8.9": (128, 32), "9.0": (128, 64), "12.0": (128, 32)}
"""(rows of a tile, slots of a key block) of many queries, by compute capability. With 64 slots a program takes 64 kB of
shared memory. A multiprocessor of 8.0 or 9.0 (163 and 227 kB) has room for two such programs; one of 8.6, 8.9 or 12.0
(99 kB) has room for one, so that blocks of 32 slots (48 kB) are used there, of which two programs fit."""
FEW_ROWS = 64
"""Rows of a tile when decoding, where only the loads matter: a token of the released model has 7 rows a KV head."""
PROGRAMS = 2
"""Programs that a multiprocessor runs at a time."""


def choose_config(
    rows: int,
    batch_heads: int,
    slots: tuple[int, ...],
    capability: str = "9.0",
    multiprocessors: int = 132,
) -> KernelConfig:
    """Sizes for `rows` folded rows of each of `batch_heads` KV heads, and the slots of each source."""
    tile, block = SIZES[capability] if rows > FEW_ROWS else (FEW_ROWS, 64)
    splits = split_counts(batch_heads * ceil_div(rows, tile), slots, block, PROGRAMS * multiprocessors)
    return KernelConfig(tile, block, 1, splits)


def attend_mma(
    q: jax.Array,
    sources: tuple[Source, ...],
    capability: str = "9.0",
    multiprocessors: int = 132,
    *,
    config: KernelConfig | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """The arena op (xl2jax.ops.attention) for bfloat16 (or float16), head widths 64 and 128.

    Sources of 8 bits are unpacked first. `capability` is the compute capability that the program is compiled for, a key of `SIZES`.

    Raises UserError for shapes and dtypes that the kernel does not support.
    """

    def choose(rows: int, batch_heads: int, slots: tuple[int, ...]) -> KernelConfig:
        return config or choose_config(rows, batch_heads, slots, capability, multiprocessors)

    sources = tuple(map(unpack_row, sources))
    tma = interpret is not None or int(capability.split(".")[0]) >= 9
    return attend_tiles("mma", q, sources, choose, functools.partial(_launch, tma=tma, interpret=interpret))


class _Shared(NamedTuple):
    """Shared memory of a program."""

    q: Any
    """[tile, H]"""
    k: Any
    """[block, H]"""
    v: Any


class _Barriers(NamedTuple):
    """What TMA loads arrive at. cp.async has none: a thread waits for its own loads."""

    q: Any
    k: Any
    v: Any


@dataclasses.dataclass(frozen=True)
class _Program:
    """A program's static sizes, and the operations that differ between compiling and interpreting."""

    config: KernelConfig
    head_width: int
    dtype: Any
    tma: bool
    compiled: bool

    @property
    def shared_memory(self) -> _Shared:
        width = min(self.head_width, 64)
        tiled = plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(2 * width)  # type: ignore[abstract]

        def slots(count: int) -> Any:
            return plgpu.SMEM((count, self.head_width), self.dtype, transforms=tiled)

        return _Shared(slots(self.config.tile), slots(self.config.block), slots(self.config.block))

    @property
    def barriers(self) -> _Barriers:
        return _Barriers(*(plgpu.Barrier() if self.tma else None for _ in range(3)))

    # --- loads ---

    def copy(self, source: Any, target: Any, barrier: Any) -> None:
        """Starts a load. The whole warpgroup has read what `target` held before."""
        if self.tma:
            plgpu.commit_smem()
        plgpu.copy_gmem_to_smem(source, target, barrier, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)

    def wait(self, barrier: Any) -> None:
        """Waits for a load; with cp.async, for all that were started."""
        if self.tma:
            plgpu.barrier_wait(barrier)
        else:
            plgpu.wait_gmem_to_smem(0)

    # --- registers ---

    def load(self, ref: Any, layout: Any, *, shared: bool = True) -> Any:
        return plgpu.load(ref, layout=layout, optimized=shared) if self.compiled else ref[...]

    def full(self, shape: tuple[int, ...], value: float) -> Any:
        """A float32 array in the layout of accumulators, or of their rows."""
        x = jnp.full(shape, value, jnp.float32)
        layout = self.accumulator if len(shape) == 2 else self.accumulator_rows
        return plgpu.layout_cast(x, layout) if self.compiled else x

    @property
    def accumulator(self) -> Any:
        return plgpu.Layout.MMA_ACC(self.dtype)

    @property
    def accumulator_rows(self) -> Any:
        return self.accumulator.reduce(1)

    def columns(self, first: Any) -> Any:
        """The slots of a key block that begins at `first`, [tile, block]."""
        shape = (self.config.tile, self.config.block)
        if self.compiled:
            return first + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=self.accumulator)
        return first + lax.broadcasted_iota(jnp.int32, shape, 1)

    def add_product(self, acc: Any, left: Any, right: Any) -> Any:
        """acc [M, N] + left [M, K] x right [K, N]."""
        if self.compiled:
            return plgpu.mma(acc, left, right)
        return acc + jnp.dot(left.astype(jnp.float32), right.astype(jnp.float32))  # the interpreter has no mma

    def as_left(self, weights: Any) -> Any:
        """An accumulator, rounded to 16 bits, as the left operand of a product: the same registers in the same order."""
        if not self.compiled:
            return weights
        left = plgpu.Layout.MMA_LHS(self.dtype)

        @plgpu.inline_mgpu(
            arg_types=(self.accumulator,),
            return_type=plgpu.ShapeDtypeStruct(weights.shape, weights.dtype, layout=left),
        )
        def relabel(context: Any, x: Any) -> Any:
            layout = MMALayouts(x.mlir_dtype).lhs
            registers = x.registers.reshape(layout.registers_shape(x.shape))
            return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

        return relabel(weights)

    def store(self, ref: Any, x: Any) -> None:
        """Stores an accumulator, rounded to the dtype of `ref`, to global memory."""
        x = x.astype(ref.dtype)
        if not self.compiled:
            ref[...] = x
            return

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), self.accumulator))
        def write(context: Any, ref: Any, x: Any) -> None:
            x.store_untiled(ref, optimized=False)

        write(ref, x)

    # --- the program ---

    def run(self, refs: Refs, shared: _Shared, barriers: _Barriers) -> None:
        work = Work.of_program(refs.tiles.blocks, self.config.splits)
        work.of_source(lambda number: self.attend(number, work, refs, shared, barriers), len(refs.tiles.k))

    def attend(self, number: int, work: Work, refs: Refs, shared: _Shared, barriers: _Barriers) -> None:
        """The program's work, which is in source `number`."""
        tile, block = self.config.tile, self.config.block
        rows = pl.ds(work.tile * tile, tile)
        place = (number, work.batch_row, rows)
        sources = {"k": refs.tiles.k[number], "v": refs.tiles.v[number]}
        row = refs.tiles.rows[number, work.batch_row]

        def slots(i: Any) -> tuple[Any, ...]:
            return row, work.kv_head, pl.ds(work.block_at(i) * block, block)

        def fetch(name: str, i: Any) -> None:
            """Starts to load the keys (values) of the i-th block."""
            self.copy(sources[name].at[slots(i)], getattr(shared, name), getattr(barriers, name))

        def fetch_if_any(name: str, i: Any) -> None:
            pl.when(i < work.last)(lambda: fetch(name, i))

        def ranges() -> tuple[Any, ...]:
            """g_end, v_lo, v_hi of the tile's rows. They are loaded where they are used, to save registers."""
            layout = self.accumulator_rows
            return tuple(self.load(x.at[place], layout, shared=False) for x in refs.tiles.ranges)

        self.copy(refs.tiles.q.at[work.batch_row, work.kv_head, rows], shared.q, barriers.q)
        fetch_if_any("k", work.first)
        self.wait(barriers.q)
        scale = self.head_width**-0.5 * _LOG2E

        def spread(x: Any, width: int = block) -> Any:  # [tile] -> [tile, width]
            return lax.broadcast_in_dim(x, (tile, width), [0])

        def step(i: Any, carry: tuple[Any, Any, Any], *, masked: bool) -> tuple[Any, Any, Any]:
            acc, top, norm = carry
            self.wait(barriers.k)
            fetch("v", i)
            scores = self.full((tile, block), 0.0)
            for part in _parts(self.head_width, 64):
                left = self.load(shared.q.at[:, part], plgpu.Layout.MMA_LHS(self.dtype))
                right = self.load(shared.k.at[:, part].transpose((1, 0)), plgpu.Layout.MMA_RHS(self.dtype))
                scores = self.add_product(scores, left, right)
            self.wait(barriers.v)
            fetch_if_any("k", i + 1)
            if masked:
                g_end, v_lo, v_hi = ranges()
                column = self.columns(work.block_at(i) * block)
                seen = (column < spread(g_end)) | ((column >= spread(v_lo)) & (column < spread(v_hi)))
                scores = jnp.where(seen, scores, self.full((tile, block), NEGATIVE))
            new_top = jnp.maximum(top, scores.max(axis=1) * scale)
            p = jnp.exp2(scores * scale - spread(new_top))
            if masked:
                p = jnp.where(seen, p, self.full((tile, block), 0.0))
            decay = jnp.exp2(top - new_top)
            norm = norm * decay + p.sum(axis=1)
            acc = acc * spread(decay, self.head_width)
            weights = p.astype(self.dtype)
            for part in _parts(block, 16):
                right = self.load(shared.v.at[part], plgpu.Layout.MMA_RHS(self.dtype))
                acc = self.add_product(acc, self.as_left(weights[:, part.start : part.start + 16]), right)
            return acc, new_top, norm

        carry = (self.full((tile, self.head_width), 0.0), self.full((tile,), NEGATIVE), self.full((tile,), 0.0))
        carry = lax.fori_loop(work.first, work.first_masked, functools.partial(step, masked=False), carry)
        acc, top, norm = lax.fori_loop(work.first_masked, work.last, functools.partial(step, masked=True), carry)
        # Rows that see nothing went through the unmasked blocks of the others. Their NaN ends here; that of others stays.
        g_end, v_lo, v_hi = ranges()
        norm = jnp.where((g_end > 0) | (v_hi > v_lo), norm, self.full((tile,), 0.0))
        empty = norm == 0.0
        safe = jnp.where(empty, self.full((tile,), 1.0), norm)
        wide = spread(norm, self.head_width)
        out = jnp.where(wide == 0.0, self.full(acc.shape, 0.0), acc * spread(1.0 / safe, self.head_width))
        result = (work.part, work.batch_row, work.kv_head, rows)
        self.store(refs.out.at[result], out)
        refs.lse[result] = jnp.where(empty, self.full((tile,), NEGATIVE), top / _LOG2E + jnp.log(safe))


def _parts(size: int, part: int) -> list[Any]:
    return [pl.ds(i, part) for i in range(0, size, part)]


def _launch(tiles: Tiles, config: KernelConfig, *, tma: bool, interpret: Any) -> tuple[jax.Array, jax.Array]:
    """See `tiles.Launch`."""
    kernel = _Program(config, tiles.q.shape[-1], tiles.q.dtype, tma, compiled=interpret is None)

    def program(refs: Refs) -> None:
        pl.run_scoped(functools.partial(kernel.run, refs), kernel.shared_memory, kernel.barriers)

    params = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)
    return launch_kernel(tiles, config, program, interpret, compiler_params=params)
