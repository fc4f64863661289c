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

from xl2jax.arithmetic import round_up
from xl2jax.ops import registers
from xl2jax.ops.weights import GROUP, QuantizedMatrix

TILE = 64
"""Outputs of a program: 16 for each of its four warps."""
CHUNK = 128
"""Bytes of a row of codes that a program reads at a time. The next chunk is in flight meanwhile."""
MAX_ROWS = 16
PROGRAMS = 600
"""Inputs are split among programs until there are about so many: four or five for each multiprocessor of a large card."""

_PER_LOAD = 64  # codes of a row that one load of a warp covers
_X = registers.tiled(((8, 64), (16,), (8,)), warps=fa.Replicated(4), lanes=(-4, -3))
"""[N, K]: registers [N / 8, K / 64, 2] of 8 numbers; all warps have the same."""


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
    return fits and 1 <= rows <= MAX_ROWS and np.dtype(dtype) in (jnp.bfloat16, jnp.float16)


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
            arg_types=(self.accumulator, registers.CODES, *[_X] * len(x)),
            return_type=plgpu.ShapeDtypeStruct(acc.shape, acc.dtype, layout=self.accumulator),
        )
        def multiply(context: Any, acc: Any, codes: Any, *x: Any) -> Any:
            dtype = x[0].mlir_dtype
            words = codes.registers.reshape(-1, 2)
            each = (registers.from_int8(words, dtype),) if len(x) == 1 else registers.from_int4(words, dtype)
            for numbers, of_numbers in zip(each, x, strict=True):
                eights = of_numbers.registers.reshape(self.rows // 8, -1, 2).swapaxes(0, 1)
                right = registers.right_operand(registers.from_numbers(eights), dtype)
                acc = mgpu.mma(acc, registers.left_operand(numbers, dtype), right)
            return acc

        return multiply(acc, codes, *x)

    @property
    def offset(self) -> int:
        return registers.offset_of_4_bits(self.dtype)

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
        return ((self.load(matrix.codes.at[outputs, inputs], registers.CODES), self.load(refs.x.at[:, inputs], _X)),)

    def fetch_int4(self, refs: _Refs, matrix: Any, outputs: Any, i: Any) -> tuple[Any, ...]:
        """For each group of a chunk its codes, scale, zero point and sum, and both halves of x."""

        def of_group(group: Any) -> tuple[Any, ...]:
            return (
                self.load(matrix.codes.at[outputs, pl.ds(group * _PER_LOAD, _PER_LOAD)], registers.CODES),
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
