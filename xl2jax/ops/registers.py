"""Numbers in the registers of a warpgroup: from codes of 8 and 4 bits, and as operands of mma.sync.

Arrays here are NumPy arrays of registers (MLIR values), one for each register of a thread. `numbers` [K / 16, P] are
vectors of 4: those that a thread has of 16 inputs, for each of P rows or columns. The first two belong to the lower half
of the inputs of mma.sync, the other two to the upper half. Which inputs they are is up to the loads, as long as both
operands agree.
"""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.mosaic.gpu.mma import MMALayouts
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm


def tiled(tiling: tuple[tuple[int, ...], ...], *, warps: Any, lanes: tuple[Any, Any]) -> Any:
    """A layout whose last axis, after tiling, are the elements of a register."""
    return plgpu.Layout.TILED(
        fa.Tiling(tiling), warp_dims=(warps,), lane_dims=lanes, vector_dim=-1, _check_canonical=False
    )


CODES = tiled(((64, 64), (16, 64), (8, 64), (16,)), warps=-7, lanes=(-3, -2))
"""int8 or uint8 [64, K]: registers [K / 64, 2 (rows g and g + 8 of a warp)] of 16 codes."""


def part(register: Any, first: int, count: int) -> Any:
    return utils.vector_slice(register, slice(first, first + count))


def permute(low: Any, high: Any, order: int) -> Any:
    """Four of the bytes of two words: byte i is the one whose number (0 to 7) is hexadecimal digit i of `order`."""
    return utils.prmt(low, high, utils.c(order, ir.IntegerType.get_signless(32)))


def from_numbers(eights: np.ndarray) -> np.ndarray:
    """Registers [K / 64, P, 2] of 8 numbers -> numbers."""
    out = np.empty((4 * eights.shape[0], eights.shape[1]), dtype=object)
    for step, p in np.ndindex(out.shape):
        at = step % 4 * 4
        out[step, p] = part(eights[step // 4, p, at // 8], at % 8, 4)
    return out


def from_int8(words: np.ndarray, dtype: ir.Type) -> np.ndarray:
    """Registers [K / 64, P] of 16 codes -> numbers of `dtype`."""
    fours = np.empty((4 * words.shape[0], words.shape[1]), dtype=object)
    for step, p in np.ndindex(fours.shape):
        fours[step, p] = part(words[step // 4, p], step % 4 * 4, 4)
    return converted(fours, dtype)


def converted(fours: np.ndarray, dtype: ir.Type) -> np.ndarray:
    """An even number of registers of 4 codes -> as many of 4 numbers."""
    # A layout that has as many registers, only so that the whole array can be converted.
    layout = fa.WGMMA_LAYOUT_8BIT
    registers = fours.reshape(layout.registers_shape((64, 8 * fours.size)))
    narrow = fa.FragmentedArray(_registers=registers, _layout=layout, _is_signed=True)
    return narrow.astype(dtype, is_signed=None).registers.reshape(fours.shape)


def from_int4(words: np.ndarray, dtype: ir.Type) -> tuple[np.ndarray, np.ndarray]:
    """Registers [K / 64, P] of 16 bytes -> numbers of the codes in the lower 4 bits, and of those in the upper ones.

    They are `offset_of_4_bits` above the codes.
    """
    i32, pair = ir.IntegerType.get_signless(32), ir.VectorType.get((2,), dtype)
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
        return utils.vector_concat([utils.bitcast(llvm.extractvalue(i32, pairs, [i]), pair) for i in range(2)])

    def numbers(shift: int) -> np.ndarray:
        out = np.empty((4 * words.shape[0], words.shape[1]), dtype=object)
        for step, p in np.ndindex(out.shape):
            out[step, p] = assembled(utils.bitcast(part(words[step // 4, p], step % 4 * 4, 4), i32), shift)
        return out

    return numbers(0), numbers(4)


def offset_of_4_bits(dtype: Any) -> int:
    """The bfloat16 (float16) number whose lowest mantissa bit is 1: a code in its lowest bits is added to it."""
    return 128 if np.dtype(dtype).name == "bfloat16" else 1024


def left_operand(numbers: np.ndarray, dtype: ir.Type) -> fa.FragmentedArray:
    """Numbers [K / 16, 2 (rows)] as the left operand [64, K]."""
    pairs = np.empty((len(numbers), 2, 2), dtype=object)  # [K / 16, half, row]
    for step, half, row in np.ndindex(pairs.shape):
        pairs[step, half, row] = part(numbers[step, row], 2 * half, 2)
    layout = MMALayouts(dtype).lhs
    registers = pairs.reshape(layout.registers_shape((64, 16 * len(numbers))))
    return fa.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def right_operand(numbers: np.ndarray, dtype: ir.Type) -> fa.FragmentedArray:
    """Numbers [K / 16, N / 8] as the right operand [K, N]."""
    pairs = np.empty((*numbers.shape, 2), dtype=object)  # [K / 16, N / 8, half]
    for step, column, half in np.ndindex(pairs.shape):
        pairs[step, column, half] = part(numbers[step, column], 2 * half, 2)
    return right_operand_of_pairs(pairs, dtype)


def right_operand_of_pairs(pairs: np.ndarray, dtype: ir.Type) -> fa.FragmentedArray:
    """Registers [K / 16, N / 8, 2 (halves)] of 2 numbers as the right operand [K, N]."""
    layout = MMALayouts(dtype).rhs
    registers = pairs.reshape(layout.registers_shape((16 * pairs.shape[0], 8 * pairs.shape[1])))
    return fa.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)
