"""Products of a few rows with a matrix in 8 or 4 bits on NVIDIA GPUs from Ampere on: a Pallas Mosaic kernel.

Decoding is bound by reading weights. A program is one warpgroup, which reads 64 rows of codes, or a part of them, once
from global memory, 16 bytes a thread at a time: the next chunk while it computes with this one. It turns codes into 16-bit numbers in
registers and multiplies with mma.sync, so that 1 to 16 rows of x cost about the same.

A product sums over inputs in any order, as long as both operands have the same one. The 64 codes of a row that a load
covers are inputs `16 t + j` of thread t of four. A mma wants 4 of them from each thread, which are taken from the same
j for codes and x, so that nothing is exchanged between threads.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

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
from jaxlib.mlir.dialects import llvm

from xl2jax.arithmetic import round_up
from xl2jax.ops.weights import GROUP, QuantizedMatrix

TILE = 64
"""Outputs of a program: 16 for each of its four warps."""
CHUNK = 128
"""Bytes of a row of codes that a program reads at a time. The next chunk is in flight meanwhile."""
MAX_ROWS = 16
PROGRAMS = 600
"""Inputs are split among programs until there are about so many: four or five for each multiprocessor of a large card."""

_PER_LOAD = 64  # codes of a row that one load of a warp covers
_CODES = plgpu.Layout.TILED(
    fa.Tiling(((64, 64), (16, 64), (8, 64), (16,))), warp_dims=(-7,), lane_dims=(-3, -2), vector_dim=-1
)
_X = plgpu.Layout.TILED(
    fa.Tiling(((8, 64), (16,), (8,))),
    warp_dims=(fa.Replicated(4),),
    lane_dims=(-4, -3),
    vector_dim=-1,
    _check_canonical=False,
)


class _Refs(NamedTuple):
    """Arguments and the result in global memory. m outputs, n inputs, N rows of x (8 or 16)."""

    x: Any
    """[N, n]"""
    sums: Any
    """float32 [n / GROUP, N]: sums of x over each group of inputs; None in 8 bits."""
    matrices: tuple[Any, ...]
    """`QuantizedMatrix` each."""
    outs: tuple[Any, ...]
    """float32 [splits, m, N] each: sums over a part of the inputs, in 8 bits without the scale."""


def supports(rows: int, matrix: QuantizedMatrix, dtype: jax.typing.DTypeLike) -> bool:
    """Whether the kernel multiplies so many rows of `dtype` with a matrix."""
    m, width = matrix.codes.shape[-2:]
    grouped = matrix.scale.shape[-1] * GROUP == 2 * width if matrix.zero is not None else True
    fits = matrix.codes.ndim == 2 and m % TILE == 0 and width % CHUNK == 0 and grouped
    return fits and rows <= MAX_ROWS and np.dtype(dtype) in (jnp.bfloat16, jnp.float16)


def multiply_rows(
    x: jax.Array, matrices: tuple[QuantizedMatrix, ...], *, interpret: Any = None
) -> tuple[jax.Array, ...]:
    """x [R, n] times each of the transposed matrices [m, n], all of one kind: float32 [R, m] each. See `supports`."""
    rows, n = x.shape
    padded = jnp.pad(x, ((0, round_up(rows, 8) - rows), (0, 0)))
    width, in_4_bits = matrices[0].codes.shape[1], matrices[0].zero is not None
    sums = None
    if in_4_bits:
        sums = jnp.sum(padded.astype(jnp.float32).reshape(len(padded), n // GROUP, GROUP), axis=-1).T
    tiles = tuple(len(matrix.codes) // TILE for matrix in matrices)
    splits = min(max(PROGRAMS // sum(tiles), 1), width // CHUNK)
    flat, tree = jax.tree.flatten((padded, sums, matrices))
    program = _Program(len(padded), x.dtype, tiles, splits, width // CHUNK, in_4_bits, compiled=interpret is None)

    def kernel(*refs: Any) -> None:
        x, sums, matrices = jax.tree.unflatten(tree, refs[: len(flat)])
        program.run(_Refs(x, sums, matrices, refs[len(flat) :]))

    outs = plgpu.kernel(
        kernel,
        out_type=tuple(jax.ShapeDtypeStruct((splits, TILE * t, len(padded)), jnp.float32) for t in tiles),
        grid=(sum(tiles), splits),
        grid_names=("tile", "split"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        **({} if interpret is None else {"interpret": interpret}),
    )(*flat)
    products = (jnp.sum(out, axis=0)[:, :rows].T for out in outs)
    return tuple(out if in_4_bits else out * matrix.scale for out, matrix in zip(products, matrices, strict=True))


@dataclasses.dataclass(frozen=True)
class _Program:
    """A program's static sizes, and the operations that differ between compiling and interpreting."""

    rows: int
    """N"""
    dtype: Any
    tiles: tuple[int, ...]
    """Tiles of each matrix."""
    splits: int
    chunks: int
    """Chunks of a whole row of codes."""
    in_4_bits: bool
    compiled: bool

    @property
    def accumulator(self) -> Any:
        return plgpu.Layout.MMA_ACC(self.dtype)

    def load(self, ref: Any, layout: Any) -> Any:
        return plgpu.load(ref, layout=layout, optimized=False) if self.compiled else ref[...]

    def zeros(self) -> Any:
        x = jnp.zeros((TILE, self.rows), jnp.float32)
        return plgpu.layout_cast(x, self.accumulator) if self.compiled else x

    def add_product(self, acc: Any, codes: Any, *x: Any) -> Any:
        """acc [TILE, N] + numbers [TILE, K] x x [N, K]^T.

        With one x the numbers are the codes, K of them. With two, of K each, the first belongs to the lower 4 bits of
        the codes and the second to the upper ones, and every number is `offset` above its code.
        """
        if not self.compiled:
            parts = (codes,) if len(x) == 1 else (codes & 15, codes >> 4)
            first = 0 if len(x) == 1 else self.offset
            for part, of_part in zip(parts, x, strict=True):
                acc = acc + jnp.dot(part.astype(jnp.float32) + first, of_part.astype(jnp.float32).T)
            return acc

        @plgpu.inline_mgpu(
            arg_types=(self.accumulator, _CODES, *[_X] * len(x)),
            return_type=plgpu.ShapeDtypeStruct(acc.shape, acc.dtype, layout=self.accumulator),
        )
        def multiply(context: Any, acc: Any, codes: Any, *x: Any) -> Any:
            numbers = (_from_int8(codes, x[0].mlir_dtype),) if len(x) == 1 else _from_int4(codes, x[0].mlir_dtype)
            for left, right in zip(numbers, x, strict=True):
                acc = mgpu.mma(acc, _left_operand(left, right.mlir_dtype), _right_operand(right))
            return acc

        return multiply(acc, codes, *x)

    @property
    def offset(self) -> int:
        """The number whose lowest mantissa bit is 1, so that a code in its lowest bits is added to it."""
        return 128 if self.dtype == jnp.bfloat16 else 1024

    def run(self, refs: _Refs) -> None:
        tile, before = lax.axis_index("tile"), 0
        for number, tiles in enumerate(self.tiles):
            here = (tile >= before) & (tile < before + tiles)
            work = functools.partial(self.multiply, refs, number, tile - before)
            work() if len(self.tiles) == 1 else pl.when(here)(work)
            before += tiles

    def multiply(self, refs: _Refs, number: int, tile: Any) -> None:
        """The program's work: a tile of the matrix with that number."""
        split = lax.axis_index("split")
        first, last = (lax.div(self.chunks * i, self.splits) for i in (split, split + 1))
        outputs = pl.ds(tile * TILE, TILE)
        add = self.add_group if self.in_4_bits else self.add_product

        def fetch(i: Any) -> tuple[Any, ...]:
            """Starts to load the i-th chunk."""
            of_kind = self.fetch_int4 if self.in_4_bits else self.fetch_int8
            return of_kind(refs, refs.matrices[number], outputs, i)

        def step(i: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            acc, now = carry
            following = fetch(jnp.minimum(i + 1, last - 1))
            for part in now:
                acc = add(acc, *part)
            return acc, following

        acc, _ = lax.fori_loop(first, last, step, (self.zeros(), fetch(first)))
        self.store(refs.outs[number].at[split, outputs], acc)

    def fetch_int8(self, refs: _Refs, matrix: Any, outputs: Any, i: Any) -> tuple[Any, ...]:
        """A chunk's codes and their x."""
        inputs = pl.ds(i * CHUNK, CHUNK)
        return ((self.load(matrix.codes.at[outputs, inputs], _CODES), self.load(refs.x.at[:, inputs], _X)),)

    def fetch_int4(self, refs: _Refs, matrix: Any, outputs: Any, i: Any) -> tuple[Any, ...]:
        """For each group of a chunk its codes, scale, zero point and sum, and both halves of x."""

        def of_group(group: Any) -> tuple[Any, ...]:
            return (
                self.load(matrix.codes.at[outputs, pl.ds(group * _PER_LOAD, _PER_LOAD)], _CODES),
                self.load(matrix.scale.at[outputs, group], self.accumulator.reduce(1)),
                self.load(matrix.zero.at[outputs, group], self.accumulator.reduce(1)),
                self.load(refs.sums.at[group], self.accumulator.reduce(0)),
                *(self.load(refs.x.at[:, pl.ds((2 * group + half) * _PER_LOAD, _PER_LOAD)], _X) for half in (0, 1)),
            )

        groups = CHUNK // _PER_LOAD
        return tuple(of_group(i * groups + number) for number in range(groups))

    def add_group(self, acc: Any, codes: Any, scale: Any, zero: Any, sums: Any, *x: Any) -> Any:
        """acc plus the product of a group, whose codes are summed before they are scaled."""
        products = self.add_product(self.zeros(), codes, *x)
        scale, zero = (lax.broadcast_in_dim(part.astype(jnp.float32), acc.shape, [0]) for part in (scale, zero))
        return acc + scale * (products - (zero + float(self.offset)) * lax.broadcast_in_dim(sums, acc.shape, [1]))

    def store(self, ref: Any, x: Any) -> None:
        if not self.compiled:
            ref[...] = x
            return

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), self.accumulator))
        def write(context: Any, ref: Any, x: Any) -> None:
            x.store_untiled(ref, optimized=False)

        write(ref, x)


# Registers of operands. A codes array [TILE, K] has registers [K / 64, 2 (rows g and g + 8)] of 16 codes. Numbers are
# [K / 16, 2] of 4. The left operand has [K / 16, 2 (halves of the 16 inputs), 2 (rows)] of 2 numbers, x [N / 8, K / 64,
# 2] of 8, and the right operand [K / 16, N / 8, 2] of 2.


def _slice(register: Any, first: int, count: int) -> Any:
    return utils.vector_slice(register, slice(first, first + count))


def _from_int8(codes: fa.FragmentedArray, dtype: ir.Type) -> np.ndarray:
    """Numbers of int8 codes."""
    k = codes.shape[1]
    words = codes.registers.reshape(k // 64, 2)
    fours = np.empty((k // 16, 2), dtype=object)
    for step in range(k // 16):
        for row in range(2):
            fours[step, row] = _slice(words[step // 4, row], step % 4 * 4, 4)
    # A layout whose registers are these, only so that the whole array can be converted.
    layout = fa.WGMMA_LAYOUT_8BIT
    registers = fours.reshape(layout.registers_shape(codes.shape))
    narrow = fa.FragmentedArray(_registers=registers, _layout=layout, _is_signed=True)
    return narrow.astype(dtype, is_signed=None).registers.reshape(k // 16, 2)


def _from_int4(codes: fa.FragmentedArray, dtype: ir.Type) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the codes in the lower and in the upper 4 bits, with the offset."""
    k = codes.shape[1]
    i32 = ir.IntegerType.get_signless(32)
    words = codes.registers.reshape(k // 64, 2)
    high_byte = 0x43 if isinstance(dtype, ir.BF16Type) else 0x64

    def assembled(word: Any, shift: int) -> Any:
        """The 4 numbers of the bytes of a word, whose lowest mantissa bits are the code."""
        pairs = llvm.inline_asm(
            llvm.StructType.get_literal([i32, i32]),
            [word],
            "{ .reg .b32 c; "
            f"shr.b32 c, $2, {shift}; and.b32 c, c, 0x0F0F0F0F; "
            f"prmt.b32 $0, c, {high_byte:#x}, 0x4140; prmt.b32 $1, c, {high_byte:#x}, 0x4342; }}",
            "=r,=r,r",
            has_side_effects=False,
        )
        both = [utils.bitcast(llvm.extractvalue(i32, pairs, [i]), ir.VectorType.get((2,), dtype)) for i in range(2)]
        return utils.vector_concat(both)

    def numbers(shift: int) -> np.ndarray:
        out = np.empty((k // 16, 2), dtype=object)
        for step in range(k // 16):
            for row in range(2):
                out[step, row] = assembled(utils.bitcast(_slice(words[step // 4, row], step % 4 * 4, 4), i32), shift)
        return out

    return numbers(0), numbers(4)


def _left_operand(numbers: np.ndarray, dtype: ir.Type) -> fa.FragmentedArray:
    steps = len(numbers)
    registers = np.empty((steps, 2, 2), dtype=object)
    for step, half, row in np.ndindex(steps, 2, 2):
        registers[step, half, row] = _slice(numbers[step, row], 2 * half, 2)
    layout = MMALayouts(dtype).lhs
    shape = layout.registers_shape((TILE, 16 * steps))
    return fa.FragmentedArray(_registers=registers.reshape(shape), _layout=layout, _is_signed=None)


def _right_operand(x: fa.FragmentedArray) -> fa.FragmentedArray:
    rows, k = x.shape
    eights = x.registers.reshape(rows // 8, k // 64, 2)
    registers = np.empty((k // 16, rows // 8, 2), dtype=object)
    for step, part, half in np.ndindex(k // 16, rows // 8, 2):
        at = step % 4 * 4 + 2 * half
        registers[step, part, half] = _slice(eights[part, step // 4, at // 8], at % 8, 2)
    layout = MMALayouts(x.mlir_dtype).rhs
    shape = layout.registers_shape((k, rows))
    return fa.FragmentedArray(_registers=registers.reshape(shape), _layout=layout, _is_signed=None)
