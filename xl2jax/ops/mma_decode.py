"""Arena attention of few queries to KV in 8 bits, on NVIDIA GPUs from Ampere on: a Pallas Mosaic kernel for decoding.

Decoding is bound by reading KV, so nothing goes through shared memory: codes become 16-bit numbers in the registers
that they were loaded into, and each thread loads just the codes that mma.sync wants from it. A program is one
warpgroup. Each of its warps attends to a quarter of every block with the same 16 rows, and has its own running
maximum and sums: the arrays of a program have 64 rows, of which row `16 w + r` is row r of warp w.

A product sums over head dimensions, or slots, in any order, as long as both operands have the same one:

    q and k   thread t of four has the head dimensions `64 a + 16 t + i`, i < 16
    v         thread g of eight has the head dimensions `g H / 8 + j`, which are column `8 j + g` of the result
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.mosaic.gpu.mma import MMALayouts
from jaxlib.mlir import ir

from xl2jax.arithmetic import ceil_div
from xl2jax.errors import UserError
from xl2jax.ops import registers
from xl2jax.ops.kv import QuantizedKV, Source, kept_channels
from xl2jax.ops.ranges import NEGATIVE
from xl2jax.ops.tiles import KernelConfig, Refs, Tiles, Work, attend_tiles, launch_kernel, split_counts

_LOG2E = math.log2(math.e)

ROWS = 16
"""Rows of a tile: a token of the released model has 7 rows a KV head."""
BLOCK = 64
"""Slots of a key block, a quarter for each warp. The next block is in flight while this one is used."""
WARPS = 4
CHANNELS = 16
"""Channels of each key that may be kept in 16 bits: the inputs of one mma.sync."""
PROGRAMS = 2
"""Programs for each multiprocessor. More take longer on an H100: there are more results to merge."""


def attend_decode(
    q: jax.Array,
    sources: tuple[Source, ...],
    multiprocessors: int = 132,
    *,
    config: KernelConfig | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """The arena op (xl2jax.ops.attention) for bfloat16 queries of up to `ROWS` rows a KV head, head widths 64 and 128.

    Raises UserError for shapes and dtypes that the kernel does not support.
    """

    for source in sources:
        if kept_channels(source.k) not in (0, CHANNELS):
            raise UserError(f"attention 'mma': {kept_channels(source.k)} channels in 16 bits are not supported")

    def choose(rows: int, batch_heads: int, slots: tuple[int, ...]) -> KernelConfig:
        wanted = PROGRAMS * multiprocessors
        splits = split_counts(batch_heads * ceil_div(rows, ROWS), slots, BLOCK, wanted)
        return config or KernelConfig(ROWS, BLOCK, 1, splits)

    return attend_tiles("mma", q, sources, choose, functools.partial(_launch, interpret=interpret))


def _launch(tiles: Tiles, config: KernelConfig, *, interpret: Any) -> tuple[jax.Array, jax.Array]:
    """See `tiles.Launch`."""
    h = tiles.q.shape[-1]
    program = _Program(h, tiles.q.dtype, config.splits, compiled=interpret is None)
    params = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)
    out, lse = launch_kernel(tiles, config, program.run, interpret, results=WARPS, compiler_params=params)

    def parts_of_warps(x: jax.Array) -> jax.Array:  # [parts, B, K, R * warps, ...] -> [parts * warps, B, K, R, ...]
        x = x.reshape(*x.shape[:3], -1, WARPS, ROWS, *x.shape[4:])
        x = jnp.moveaxis(x, 4, 1)
        return x.reshape(-1, *x.shape[2:4], x.shape[4] * ROWS, *x.shape[6:])

    out = out.reshape(*out.shape[:-1], h // 8, 8).swapaxes(-1, -2).reshape(out.shape)
    return parts_of_warps(out), parts_of_warps(lse)


_SHARE = BLOCK // WARPS  # slots of a block that a warp attends to


@dataclasses.dataclass(frozen=True)
class _Program:
    """A program's static sizes, and the operations that differ between compiling and interpreting."""

    head_width: int
    dtype: Any
    splits: tuple[int, ...]
    compiled: bool

    @property
    def accumulator(self) -> Any:
        return plgpu.Layout.MMA_ACC(self.dtype)

    @property
    def q_layout(self) -> Any:
        """[ROWS, H], registers [H / 64, 2 (rows), 2] of 8 numbers; all warps have the same."""
        return registers.tiled(((16, 64), (8, 64), (16,), (8,)), warps=fa.Replicated(WARPS), lanes=(-4, -3))

    def k_layout(self, quantized: bool) -> Any:
        """[BLOCK, H], registers [H / 64, 2 (slots)] of 16 codes, or [H / 64, 2, 2] of 8 numbers."""
        if quantized:
            return registers.CODES
        return registers.tiled(((64, 64), (16, 64), (8, 64), (16,), (8,)), warps=-8, lanes=(-4, -3))

    def v_layout(self, quantized: bool) -> Any:
        """[BLOCK, H], registers [2, 2 (slots)] of H / 8 codes, or [2, 2, H / 64] of 8 numbers."""
        h = self.head_width
        slots = ((64, h), (16, h), (8, h), (2, h), (h // 8,))
        if quantized:
            return registers.tiled(slots, warps=-9, lanes=(-2, -5))
        return registers.tiled((*slots, (8,)), warps=-10, lanes=(-3, -6))

    @property
    def exact_q_layout(self) -> Any:
        """[ROWS, CHANNELS], registers [2 (rows)] of 4 numbers: thread t of four has channels `4 t + i`."""
        return registers.tiled(((16, 16), (8, 16), (4,)), warps=fa.Replicated(WARPS), lanes=(-3, -2))

    @property
    def exact_k_layout(self) -> Any:
        """[BLOCK, CHANNELS], registers [2 (slots)] of 4 numbers."""
        return registers.tiled(((64, 16), (16, 16), (8, 16), (4,)), warps=-7, lanes=(-3, -2))

    @property
    def scale_layout(self) -> Any:
        """[BLOCK], registers [2] of 2: those of the columns of an accumulator [64, _SHARE]."""
        return registers.tiled(((64,), (16,), (8,), (2,)), warps=-4, lanes=(fa.Replicated(8), -2))

    def load(self, ref: Any, layout: Any) -> Any:
        return plgpu.load(ref, layout=layout, optimized=False) if self.compiled else ref[...]

    def full(self, shape: tuple[int, ...], value: float) -> Any:
        """A float32 array in the layout of accumulators, or of their rows."""
        x = jnp.full(shape, value, jnp.float32)
        layout = self.accumulator if len(shape) == 2 else self.accumulator.reduce(1)
        return plgpu.layout_cast(x, layout) if self.compiled else x

    def scores(self, q: Any, k: Any) -> Any:
        """float32 [64, _SHARE]: every warp's rows times its slots."""
        if not self.compiled:
            own = k.astype(jnp.float32).reshape(WARPS, _SHARE, -1)
            return jnp.einsum("rh,wsh->wrs", q.astype(jnp.float32), own).reshape(WARPS * ROWS, _SHARE)
        quantized = k.dtype == jnp.int8
        arg_types = (self.accumulator, self.q_layout, self.k_layout(quantized))

        @plgpu.inline_mgpu(arg_types=arg_types, return_type=self._result((WARPS * ROWS, _SHARE)))
        def multiply(context: Any, zero: Any, q: Any, k: Any) -> Any:
            dtype = q.mlir_dtype
            if quantized:
                numbers = registers.from_int8(k.registers.reshape(-1, 2), dtype)
            else:
                numbers = registers.from_numbers(k.registers.reshape(-1, 2, 2))
            left = registers.left_operand(registers.from_numbers(q.registers.reshape(-1, 2, 2)), dtype)
            return mgpu.mma(zero, left, registers.right_operand(numbers, dtype))

        return multiply(self.full((WARPS * ROWS, _SHARE), 0.0), q, k)

    def add_exact(self, scores: Any, q: Any, k: Any) -> Any:
        """scores [64, _SHARE] + every warp's rows of the exact channels [ROWS, CHANNELS] times its slots'."""
        if not self.compiled:
            own = k.astype(jnp.float32).reshape(WARPS, _SHARE, -1)
            return scores + jnp.einsum("rc,wsc->wrs", q.astype(jnp.float32), own).reshape(scores.shape)
        arg_types = (self.accumulator, self.exact_q_layout, self.exact_k_layout)

        @plgpu.inline_mgpu(arg_types=arg_types, return_type=self._result(scores.shape))
        def multiply(context: Any, scores: Any, q: Any, k: Any) -> Any:
            dtype = q.mlir_dtype
            left = registers.left_operand(q.registers.reshape(1, 2), dtype)
            return mgpu.mma(scores, left, registers.right_operand(k.registers.reshape(1, 2), dtype))

        return multiply(scores, q, k)

    def add_values(self, acc: Any, weights: Any, v: Any) -> Any:
        """acc [64, H] + every warp's weights [64, _SHARE] times its values, with the columns of the module's docstring."""
        h = self.head_width
        if not self.compiled:
            own = v.astype(jnp.float32).reshape(WARPS, _SHARE, 8, h // 8).swapaxes(2, 3).reshape(WARPS, _SHARE, h)
            each = weights.astype(jnp.float32).reshape(WARPS, ROWS, _SHARE)
            return acc + jnp.einsum("wrs,wsh->wrh", each, own).reshape(WARPS * ROWS, h)
        quantized = v.dtype == jnp.int8
        arg_types = (self.accumulator, self.accumulator, self.v_layout(quantized))

        @plgpu.inline_mgpu(arg_types=arg_types, return_type=self._result(acc.shape))
        def multiply(context: Any, acc: Any, weights: Any, v: Any) -> Any:
            dtype = weights.mlir_dtype
            layout = MMALayouts(dtype).lhs
            shape = layout.registers_shape(weights.shape)
            # The registers of an accumulator are those of a left operand, in the same order.
            left = fa.FragmentedArray(_registers=weights.registers.reshape(shape), _layout=layout, _is_signed=None)
            return mgpu.mma(acc, left, _values_operand(v, dtype, quantized))

        return multiply(acc, weights, v)

    def _result(self, shape: tuple[int, ...]) -> Any:
        return plgpu.ShapeDtypeStruct(shape, jnp.dtype(jnp.float32), layout=self.accumulator)

    def scaled(self, x: Any, scale: Any) -> Any:
        """x [64, _SHARE] times the scale [BLOCK] of each warp's slots."""
        if scale is None:
            return x
        if not self.compiled:
            own = scale.astype(jnp.float32).reshape(WARPS, 1, _SHARE)
            return (x.reshape(WARPS, ROWS, _SHARE) * own).reshape(x.shape)

        @plgpu.inline_mgpu(arg_types=(self.accumulator, self.scale_layout), return_type=self._result(x.shape))
        def multiply(context: Any, x: Any, scale: Any) -> Any:
            each = x.registers.reshape(2, 2)  # [columns, rows]
            spread = np.broadcast_to(scale.registers.reshape(2, 1), each.shape).reshape(x.registers.shape)
            same = fa.FragmentedArray(_registers=spread, _layout=x.layout, _is_signed=None)
            return x * same

        return multiply(x, scale.astype(jnp.float32))

    def slots(self, first: Any) -> Any:
        """The slot of each score of a block that begins at `first`: int32 [64, _SHARE]."""
        shape = (WARPS * ROWS, _SHARE)
        if self.compiled:
            row, column = (plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=self.accumulator) for axis in (0, 1))
        else:
            row, column = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        return first + lax.div(row, ROWS) * _SHARE + column

    def run(self, refs: Refs) -> None:
        work = Work.of_program(refs.tiles.blocks, self.splits)
        work.of_source(lambda number: self.attend(number, work, refs), len(refs.tiles.k))

    def attend(self, number: int, work: Work, refs: Refs) -> None:
        """The program's work, which is in source `number`."""
        rows = WARPS * ROWS
        k, v = refs.tiles.k[number], refs.tiles.v[number]
        quantized = isinstance(k, QuantizedKV)
        row = refs.tiles.rows[number, work.batch_row]
        q_rows = (work.batch_row, work.kv_head, pl.ds(work.tile * ROWS, ROWS))
        exact = refs.tiles.exact_q[number]
        q = self.load((refs.tiles.q if exact is None else exact.rest).at[q_rows], self.q_layout)
        q_exact = None if exact is None else self.load(exact.exact.at[q_rows], self.exact_q_layout)

        def fetch(i: Any) -> tuple[Any, ...]:
            """Starts to load the i-th block: keys, values, in 8 bits their scales, and exact channels of the keys."""
            at = (row, work.kv_head, pl.ds(work.block_at(i) * BLOCK, BLOCK))
            layouts = self.k_layout(quantized), self.v_layout(quantized)
            values = [self.load((x.values if quantized else x).at[at], y) for x, y in zip((k, v), layouts, strict=True)]
            scales = [self.load(x.scale.at[at], self.scale_layout) if quantized else None for x in (k, v)]
            exact_k = None if exact is None else self.load(k.exact.at[at], self.exact_k_layout)
            return (*values, *scales, exact_k)

        place = (number, work.batch_row, pl.ds(work.tile * ROWS, ROWS))
        g_end, v_lo, v_hi = (self.rows_of_warps(x.at[place]) for x in refs.tiles.ranges)
        scale = self.head_width**-0.5 * _LOG2E

        def spread(x: Any, width: int = _SHARE) -> Any:  # [64] -> [64, width]
            return lax.broadcast_in_dim(x, (rows, width), [0])

        def step(i: Any, carry: tuple[Any, ...], *, masked: bool) -> tuple[Any, ...]:
            acc, top, norm, now = carry
            following = fetch(jnp.minimum(i + 1, work.last - 1)) if quantized else ()
            keys, values, k_scale, v_scale, k_exact = now if quantized else fetch(i)
            scores = self.scaled(self.scores(q, keys), k_scale)
            if k_exact is not None:
                scores = self.add_exact(scores, q_exact, k_exact)
            if masked:
                slot = self.slots(work.block_at(i) * BLOCK)
                seen = (slot < spread(g_end)) | ((slot >= spread(v_lo)) & (slot < spread(v_hi)))
                scores = jnp.where(seen, scores, self.full((rows, _SHARE), NEGATIVE))
            new_top = jnp.maximum(top, scores.max(axis=1) * scale)
            p = jnp.exp2(scores * scale - spread(new_top))
            if masked:
                p = jnp.where(seen, p, self.full((rows, _SHARE), 0.0))
            decay = jnp.exp2(top - new_top)
            norm = norm * decay + p.sum(axis=1)
            acc = acc * spread(decay, self.head_width)
            acc = self.add_values(acc, self.scaled(p, v_scale).astype(self.dtype), values)
            return acc, new_top, norm, following

        def last_of(first: Any, last: Any, carry: tuple[Any, ...], *, masked: bool) -> tuple[Any, ...]:
            out: tuple[Any, ...] = lax.fori_loop(first, last, functools.partial(step, masked=masked), carry)
            return out

        start = (self.full((rows, self.head_width), 0.0), self.full((rows,), NEGATIVE), self.full((rows,), 0.0))
        # A program without work loads a block that exists and does not use it.
        ahead = fetch(jnp.minimum(work.first, jnp.maximum(work.last - 1, 0))) if quantized else ()
        carry = last_of(work.first, work.first_masked, (*start, ahead), masked=False)
        acc, top, norm, _ = last_of(work.first_masked, work.last, carry, masked=True)
        # Rows that see nothing went through the unmasked blocks of the others. Their NaN ends here; that of others stays.
        norm = jnp.where((g_end > 0) | (v_hi > v_lo), norm, self.full((rows,), 0.0))
        empty = norm == 0.0
        safe = jnp.where(empty, self.full((rows,), 1.0), norm)
        wide = spread(norm, self.head_width)
        out = jnp.where(wide == 0.0, self.full(acc.shape, 0.0), acc * spread(1.0 / safe, self.head_width))
        result = (work.part, work.batch_row, work.kv_head, pl.ds(work.tile * rows, rows))
        self.store(refs.out.at[result], out)
        refs.lse[result] = jnp.where(empty, self.full((rows,), NEGATIVE), top / _LOG2E + jnp.log(safe))

    def rows_of_warps(self, ref: Any) -> Any:
        """A number for each of ROWS rows, as that of each row of each warp: [64]."""
        if not self.compiled:
            return jnp.tile(ref[...], WARPS)
        layout = registers.tiled(((16,), (8,), (1,)), warps=fa.Replicated(WARPS), lanes=(-2, fa.Replicated(4)))
        target = self.accumulator.reduce(1)

        @plgpu.inline_mgpu(
            arg_types=(layout,),
            return_type=plgpu.ShapeDtypeStruct((WARPS * ROWS,), jnp.dtype(jnp.int32), layout=target),
        )
        def relabel(context: Any, x: Any) -> Any:
            to = target.to_mgpu()
            shape = to.registers_shape((WARPS * ROWS,))
            return fa.FragmentedArray(_registers=x.registers.reshape(shape), _layout=to, _is_signed=True)

        return relabel(self.load(ref, layout))

    def store(self, ref: Any, x: Any) -> None:
        """Stores an accumulator, rounded to the dtype of `ref`."""
        x = x.astype(ref.dtype)
        if not self.compiled:
            ref[...] = x
            return

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), self.accumulator))
        def write(context: Any, ref: Any, x: Any) -> None:
            x.store_untiled(ref, optimized=False)

        write(ref, x)


def _values_operand(v: fa.FragmentedArray, dtype: ir.Type, quantized: bool) -> fa.FragmentedArray:
    """The right operand [_SHARE, H] of values: pairs of slots of one head dimension."""
    i32, pair = ir.IntegerType.get_signless(32), ir.VectorType.get((2,), dtype)
    each = 4 if quantized else 2  # head dimensions in 32 bits
    orders = (0x5140, 0x7362) if quantized else (0x5410, 0x7632)
    parts = v.registers.reshape(2, 2, -1)  # [half, slot, ...]
    per_register = v.shape[1] // 8 // parts.shape[2]

    def word(half: int, slot: int, at: int) -> Any:
        return utils.bitcast(registers.part(parts[half, slot, at // per_register], at % per_register, each), i32)

    mixed: Any = np.empty((2, v.shape[1] // 8 // each, 2), dtype=object)  # [half, word, order]
    for half, number, order in np.ndindex(mixed.shape):
        low, high = (word(half, slot, number * each) for slot in range(2))
        mixed[half, number, order] = registers.permute(low, high, orders[order])
    if quantized:
        four = ir.VectorType.get((4,), ir.IntegerType.get_signless(8))
        fours = np.empty_like(mixed)
        for i, codes in enumerate(mixed.flat):
            fours.flat[i] = utils.bitcast(codes, four)
        mixed = registers.converted(fours, dtype)
    pairs: Any = np.empty((1, v.shape[1] // 8, 2), dtype=object)  # [inputs / 16, columns / 8, half]
    for half, number, order in np.ndindex(mixed.shape):
        for i in range(each // 2):
            register = mixed[half, number, order]
            value = registers.part(register, 2 * i, 2) if quantized else utils.bitcast(register, pair)
            pairs[0, number * each + order * each // 2 + i, half] = value
    return registers.right_operand_of_pairs(pairs, dtype)
