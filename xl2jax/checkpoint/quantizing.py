"""Quantises matrices of a checkpoint while it is read: a tensor at a time, in threads over blocks of its rows."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from xl2jax.checkpoint.param_names import Tensor, tensors
from xl2jax.checkpoint.safetensors_io import cast
from xl2jax.config import VideoXL2Config, Weights
from xl2jax.models.linear import PART_PREFIX
from xl2jax.ops.weights import QuantizedMatrix, dequantize, quantize

_BLOCK = 1 << 20  # elements that a thread quantises at a time
_PARTS = {"codes": PART_PREFIX, "scale": f"{PART_PREFIX}_scale", "zero": f"{PART_PREFIX}_zero"}
"""The last part of a parameter's name, by the field of `QuantizedMatrix`."""


def base_name(name: str) -> str:
    """The dotted name of a matrix, without `kernel`, `embedding` or the name of a quantised part."""
    return name.rpartition(".")[0]


@functools.cache
def _kinds(config: VideoXL2Config) -> dict[str, Weights]:
    """8 or 4 bits, by the dotted name of a layer's matrix without its last part."""
    codes = {base_name(t.name): t.dtype for t in tensors(config) if t.name.endswith(f".{PART_PREFIX}")}
    return {base: "int8" if dtype == np.int8 else "int4" for base, dtype in codes.items()}


def weights_of(tensor: Tensor, config: VideoXL2Config) -> Weights | None:
    """How the model with `config` stores a tensor of the unquantised model. None: as it is."""
    base, _, last = tensor.name.rpartition(".")
    return _kinds(config).get(base) if last in ("kernel", "embedding") else None


def _turned(name: str, array: np.ndarray) -> np.ndarray:
    """A kernel [n, m] as [m, n], or the reverse; an embedding as it is."""
    return array if name.endswith(".embedding") else array.T


def named_parts(base: str, matrix: QuantizedMatrix) -> dict[str, np.ndarray]:
    """The parts of a matrix by their names, which begin with `base`."""
    return {f"{base}.{_PARTS[f]}": np.asarray(x) for f, x in matrix._asdict().items() if x is not None}


def check_scale(scale: np.ndarray, dtype: str, where: str) -> None:
    """Raises UserError unless a matrix with this scale is finite once it is unpacked to `dtype`.

    A NaN or an infinity in a matrix becomes one in its scale. `where` begins the message.
    """
    codes = 127 if scale.dtype == np.float32 else 15  # float32 is the scale of 8 bits, bfloat16 that of 4
    with np.errstate(over="ignore"):
        cast(scale.astype(np.float32) * codes, dtype, where)


def quantized(tensor: Tensor, array: np.ndarray, weights: Weights, dtype: str, where: str) -> dict[str, np.ndarray]:
    """The parts of a tensor of the unquantised model, by their names. They will be unpacked to `dtype`.

    Raises:
      UserError: it holds NaN, infinity or a number that is too large for `dtype`. `where` begins the message.
    """
    matrix, base = _turned(tensor.name, array), base_name(tensor.name)
    rows = max(_BLOCK // matrix.shape[1], 1)
    blocks = [matrix[i : i + rows] for i in range(0, len(matrix), rows)]

    def one(block: np.ndarray) -> QuantizedMatrix:
        with np.errstate(invalid="ignore", over="ignore"):
            return quantize(block, weights)

    with ThreadPoolExecutor(min(os.cpu_count() or 1, len(blocks))) as pool:
        done = list(pool.map(one, blocks))
    fields = [
        None if first is None else np.concatenate(f) for first, f in zip(done[0], zip(*done, strict=True), strict=True)
    ]
    parts = named_parts(base, QuantizedMatrix(*fields))  # type: ignore[arg-type]
    check_scale(parts[f"{base}.{_PARTS['scale']}"], dtype, where)
    return parts


def dequantized(name: str, parts: Mapping[str, np.ndarray]) -> np.ndarray:
    """The inverse of `quantized`: the tensor called `name` in the unquantised model, float32."""
    fields = [parts.get(f"{base_name(name)}.{_PARTS[field]}") for field in QuantizedMatrix._fields]
    return _turned(name, dequantize(QuantizedMatrix(*fields)))  # type: ignore[arg-type]
