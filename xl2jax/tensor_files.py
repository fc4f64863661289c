"""Folders of safetensors files: an index over many shards, reading and writing a tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from xl2jax.errors import UserError

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
_PICKLED = ("*.bin", "*.pt", "*.pth")


type Stored = tuple[str, tuple[int, ...], str]
"""Name, shape and dtype (`F32`, `BF16`, `F16`) of a stored tensor."""


class TensorFolder:
    """The tensors of a checkpoint folder by name: shapes and dtypes first, data on demand.

    Raises:
      UserError: no safetensors file, pickled weights only, a missing shard, a truncated file or one
        whose header lies, a tensor in two files or not where the index says.
    """

    def __init__(self, folder: str | Path, files: list[Path] | None = None):
        """`files` overrides the choice of files: the index's, or else every *.safetensors."""
        self.folder = Path(folder)
        self.file_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        duplicates = []
        for path in self._files() if files is None else files:
            try:
                with safe_open(path, framework="np") as f:
                    for name in f.keys():  # noqa: SIM118 (not a mapping)
                        if name in self.file_of:
                            duplicates.append(name)
                        self.file_of[name] = path
                        part = f.get_slice(name)
                        self.shapes[name], self.dtypes[name] = tuple(part.get_shape()), str(part.get_dtype())
            except (SafetensorError, OSError) as e:
                raise UserError(f"{path}: not a whole safetensors file ({e}); fetch it again") from None
        if duplicates:
            raise UserError(f"{self.folder}: stored twice: {listing(duplicates)}")
        if files is None:
            self._check_index()

    def _files(self) -> list[Path]:
        folder = self.folder
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
        index = folder / INDEX
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError):
                raise UserError(f"{index}: not a safetensors index (no weight_map)") from None
            missing = [n for n in names if not (folder / n).is_file()]
            if missing:
                raise UserError(f"{folder}: incomplete checkpoint, missing {listing(missing)}")
            return [folder / n for n in names]
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            pickled = sorted(p.name for pattern in _PICKLED for p in folder.glob(pattern))
            if pickled:
                raise UserError(f"{folder}: {refuse_pickles(pickled)}")
            raise UserError(f"{folder}: no safetensors file")
        return files

    def _check_index(self) -> None:
        index = self.folder / INDEX
        if index.is_file():
            weight_map = json.loads(index.read_text())["weight_map"]
            wrong = [n for n, f in weight_map.items() if self.file_of.get(n) != self.folder / f]
            if wrong:
                raise UserError(f"{index}: the file it names does not hold {listing(wrong)}")

    def nbytes(self, name: str) -> int:
        size = DTYPES[self.dtypes[name]].itemsize if self.dtypes[name] in DTYPES else 8
        return int(np.prod(self.shapes[name], dtype=np.int64)) * size

    def read(self, name: str) -> np.ndarray:
        """One tensor. The file is opened for it alone, so no mapped page outlives the call."""
        try:
            with safe_open(self.file_of[name], framework="np") as f:
                return f.get_tensor(name)
        except (SafetensorError, OSError) as e:
            raise UserError(f"{self.file_of[name]}: cannot read {name} ({e})") from None


def refuse_pickles(names: list[str]) -> str:
    """Why pickled weights are not read, and what to do."""
    return (
        f"{listing(names)} is a pickle, which can run code when it is read; "
        "save the model as safetensors (model.save_pretrained(dir, safe_serialization=True)) and try again"
    )


def listing(names: Iterable[str], most: int = 6) -> str:
    """`a, b, c (+4 more)`."""
    names = list(names)
    more = f" (+{len(names) - most} more)" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class ShardWriter:
    """Writes one safetensors file a tensor at a time, in the order given."""

    def __init__(self, path: Path, tensors: list[Stored], metadata: dict[str, str] | None = None):
        """`tensors`: everything that the file will hold, in order."""
        header: dict[str, object] = {"__metadata__": metadata or {"format": "pt"}}
        offset = 0
        for name, shape, dtype in tensors:
            end = offset + int(np.prod(shape, dtype=np.int64)) * DTYPES[dtype].itemsize
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
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
