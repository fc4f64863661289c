"""Reads and writes folders of safetensors files, one tensor at a time."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from xl2jax.checkpoint.array_checks import is_finite
from xl2jax.errors import UserError, first_line, listing, shorten
from xl2jax.system.schema import NameBelow, Schema, is_file, read_json, require_readable, unreadable

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = ("F32", "BF16", "F16")
DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I8": np.dtype(np.int8),
}
type DtypeName = Literal["float32", "bfloat16", "float16"]
DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""The dtypes of parameters, and their names in safetensors files."""
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


type Stored = tuple[str, tuple[int, ...], str]
"""Name, shape and dtype (a key of `DTYPES`) of a stored tensor."""


class _Index(Schema):
    weight_map: dict[str, NameBelow]


class TensorFolder:
    """The tensors of a checkpoint folder by name. Opening it reads shapes and dtypes, and `read` reads a tensor.

    Raises:
      UserError: there is no safetensors file, or only pickles; a shard is missing, outside the folder, truncated, or a
        pipe or a device; its header is wrong; a tensor is in two files, or not in the file that the index names.
    """

    def __init__(self, folder: str | Path, files: list[Path] | None = None):
        """Opens `files`; by default the files in the index, or every *.safetensors file if there is no index."""
        self.folder = Path(folder)
        self.file_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        index = self._index() if files is None else None
        duplicates = []
        for path in self._files(index) if files is None else files:
            try:
                require_readable(path)
                with safe_open(path, framework="np") as f:
                    for name in f.keys():  # noqa: SIM118 (not a mapping)
                        if name in self.file_of:
                            duplicates.append(name)
                        self.file_of[name] = path
                        part = f.get_slice(name)
                        self.shapes[name], self.dtypes[name] = tuple(part.get_shape()), str(part.get_dtype())
            except SafetensorError as e:
                raise UserError(f"{path}: not a whole safetensors file ({first_line(e)}); download it again") from None
            except OSError as e:
                raise unreadable(path, e) from None
        if duplicates:
            raise UserError(f"{self.folder}: stored twice: {listing(duplicates)}")
        wrong = [n for n, f in (index or {}).items() if self.file_of.get(n) != self.folder / f]
        if wrong:
            raise UserError(f"{self.folder / INDEX}: the file it names does not hold {listing(wrong)}")

    def _index(self) -> dict[str, str] | None:
        path = self.folder / INDEX
        return read_json(path, _Index).weight_map if is_file(path) else None

    def _files(self, index: dict[str, str] | None) -> list[Path]:
        folder = self.folder
        try:
            names = sorted(os.listdir(folder))
        except OSError as e:
            raise unreadable(folder, e) from None
        if index is not None:
            shards = sorted(set(index.values()))
            missing = [n for n in shards if not is_file(folder / n)]
            if missing:
                raise UserError(f"{folder}: incomplete checkpoint, missing {listing(missing)}")
            return [folder / n for n in shards]
        files = [folder / n for n in names if n.endswith(".safetensors") and not n.startswith(".")]
        if not files:
            pickled = [n for n in names if f"*{Path(n).suffix}" in PICKLED]
            if pickled:
                raise UserError(f"{folder}: {refuse_pickles(pickled)}")
            raise UserError(f"{folder}: no safetensors file")
        return files

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor as it is stored."""
        size = DTYPES[self.dtypes[name]].itemsize if self.dtypes[name] in DTYPES else 8
        return math.prod(self.shapes[name]) * size

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor. The file is closed afterwards, so that its mapped pages do not stay in memory."""
        try:
            with safe_open(self.file_of[name], framework="np") as f:
                return f.get_tensor(name)
        except (SafetensorError, OSError) as e:
            raise UserError(f"{self.file_of[name]}: cannot read {shorten(name)} ({first_line(e)})") from None


def cast(array: np.ndarray, dtype: str, where: str) -> np.ndarray:
    """Converts a floating-point array to a contiguous one in `float32`, `bfloat16` or `float16`.

    Raises:
      UserError: the array holds NaN, infinity or a number that is too large for `dtype`. `where` begins the message.
    """
    target = DTYPES[DTYPE_NAMES[dtype]]
    with np.errstate(over="ignore", invalid="ignore"):
        out = np.ascontiguousarray(array).astype(target, copy=False)
    if not is_finite(out):
        if is_finite(array):
            largest = float(ml_dtypes.finfo(target).max)
            raise UserError(
                f"{where}: has numbers beyond {largest:.5g}, which {dtype} cannot hold: choose bfloat16 or float32"
            )
        raise UserError(f"{where}: has NaN or infinite numbers: the weights are damaged, or their training diverged")
    return out


def refuse_pickles(names: list[str]) -> str:
    """The message that pickled weights are not read, and what to do."""
    return (
        f"{listing(names)} is a pickle, which can run code when it is read; "
        "save the model as safetensors (model.save_pretrained(dir, safe_serialization=True)) and try again"
    )


class ShardWriter:
    """Writes one safetensors file, a tensor at a time. Peak memory is one tensor."""

    def __init__(self, path: Path, tensors: list[Stored], metadata: dict[str, str] | None = None):
        """`tensors` are all tensors of the file, in the order in which they will be written."""
        header: dict[str, object] = {"__metadata__": metadata or {"format": "pt"}}
        offset = 0
        for name, shape, dtype in tensors:
            end = offset + math.prod(shape) * DTYPES[dtype].itemsize
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.header = text
        self._order: Iterator[Stored] = iter(tensors)
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115 (closed by __exit__)
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, array: np.ndarray) -> None:
        wanted, shape, dtype = next(self._order)
        if (name, array.shape, array.dtype) != (wanted, shape, DTYPES[dtype]):
            raise AssertionError(f"expected {wanted} {shape} {dtype}, got {name} {array.shape} {array.dtype}")
        self._file.write(np.ascontiguousarray(array).view(np.uint8).data)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        if kind is None and next(self._order, None) is not None:
            raise AssertionError("the shard is not complete")
