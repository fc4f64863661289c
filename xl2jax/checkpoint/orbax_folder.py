"""Reads and writes the Orbax model folder, which stores a checksum for every tensor.

config.json, vision_tower/config.json    copies of upstream's files
tokenizer.json, ...                      copies of upstream's files
params/                                  the Orbax checkpoint; each layer has its own arrays
unused.safetensors                       tensors that upstream stores but never uses
xl2jax.json                              {"format": 2, "dtype": "bfloat16", "checksums": {name: digits}}

With the LLM's matrices in 8 or 4 bits, xl2jax.json has format 3 and "weights": "int8". Each matrix then is several arrays:
`codes`, `codes_scale` and, in 4 bits, `codes_zero` (`xl2jax.ops.weights`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from flax import traverse_util

from xl2jax.checkpoint.array_checks import checksum
from xl2jax.checkpoint.param_names import Tensor, tensors
from xl2jax.checkpoint.safetensors_io import DTYPE_NAMES, DTYPES, ShardWriter, TensorFolder
from xl2jax.config import VideoXL2Config, Weights
from xl2jax.errors import UserError, first_line, listing
from xl2jax.system.schema import Schema, is_file, read_json, require_readable, unreadable
from xl2jax.system.terminal import machine_fault

logger = logging.getLogger(__name__)

PARAMS, UNUSED, MANIFEST = "params", "unused.safetensors", "xl2jax.json"
_BATCH_BYTES = 64 << 20  # Orbax reads and writes arrays of about this size together


class Manifest(Schema):
    """The contents of xl2jax.json. Format 1 had no checksums, and formats before 3 no quantised matrices."""

    format: Literal[1, 2, 3]
    dtype: Literal["float32", "bfloat16", "float16"]
    weights: Weights | None = None
    checksums: dict[str, str] | None = None


def is_orbax(folder: Path) -> bool:
    """Whether a checkpoint folder is an Orbax model folder."""
    return is_file(folder / MANIFEST)


def read_manifest(folder: Path) -> Manifest:
    """Reads xl2jax.json. Raises UserError if it is damaged or has an unknown format."""
    manifest = read_json(folder / MANIFEST, Manifest)
    if manifest.format != 1 and manifest.checksums is None:
        raise UserError(f"{folder / MANIFEST}: checksums: is missing; convert the checkpoint again")
    if (manifest.format == 3) != (manifest.weights is not None):
        raise UserError(f"{folder / MANIFEST}: format and weights contradict each other; convert the checkpoint again")
    return manifest


def unused_tensors(folder: Path) -> TensorFolder:
    """The tensors that upstream stores but never uses."""
    return TensorFolder(folder, [folder / UNUSED] if is_file(folder / UNUSED) else [])


class OrbaxFolder:
    """Reads tensors of an Orbax model folder, after checking all names and shapes.

    Raises:
      UserError: the folder is incomplete; with `verify`, also if the checksum of a tensor differs.
    """

    def __init__(self, folder: Path, config: VideoXL2Config, *, verify: bool = True):
        self.folder, self._path = folder, (folder / PARAMS).absolute()
        ignore_closed_loops()
        manifest = read_manifest(folder)
        self.config = config.with_weights(manifest.weights)
        self.tensors = tensors(self.config)
        self._places = {t.name: i for i, t in enumerate(self.tensors)}
        self.dtype: str = manifest.dtype
        self._stored = self._dtypes()
        self._ahead: dict[str, np.ndarray] = {}
        self._checksums = manifest.checksums if verify else None
        if verify and manifest.checksums is None:
            logger.info(
                "%s: has no checksums because an earlier version converted it, so damage is not noticed: "
                "convert it again to add them",
                folder,
            )

    def _require_readable(self) -> None:
        def refuse(error: OSError) -> None:
            raise error

        try:
            for folder, _, files in os.walk(self._path, onerror=refuse):
                for name in files:
                    require_readable(Path(folder, name))  # Orbax would wait for ever on a pipe
        except FileNotFoundError as e:
            raise self._damaged(e) from e
        except OSError as e:
            raise unreadable(e.filename or self._path, e) from None

    def _dtypes(self) -> dict[str, np.dtype]:
        self._require_readable()
        try:
            metadata = ocp.pytree_metadata(self._path).metadata
            if not isinstance(metadata, dict):
                raise ValueError("it has no list of arrays")
            stored = traverse_util.flatten_dict(metadata, sep=".")
            shapes = {name: tuple(leaf.shape) for name, leaf in stored.items()}
            dtypes = {name: np.dtype(leaf.dtype) for name, leaf in stored.items()}
        except Exception as e:  # Orbax raises many types, depending on its storage
            raise machine_fault(e) or self._damaged(e) from e
        wanted = {t.name: t for t in self.tensors}
        problems = [n for n in shapes if n not in wanted]
        problems += [n for n, t in wanted.items() if shapes.get(n) != t.shape]
        kinds = {n: _FLOATS if t.dtype is None else [t.dtype] for n, t in wanted.items()}
        problems += [n for n, dtype in dtypes.items() if n not in problems and dtype not in kinds[n]]
        if problems:
            raise UserError(f"{self._path}: the arrays do not fit config.json: {listing(problems)}")
        return dtypes

    def read(self, parts: Sequence[Tensor]) -> list[np.ndarray]:
        """Reads tensors in their stored dtype. Reading in the order of `tensors` is fastest.

        A call of Orbax takes 50 to 200 ms, so the tensors that follow are read together with those asked for.
        """
        if any(e.name not in self._ahead for e in parts):
            self._ahead = self._load(self._with_next(parts))
        return [self._ahead.pop(e.name) for e in parts]

    def _with_next(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """`parts` and the tensors after them, as long as they have at most `_BATCH_BYTES` together."""
        together = list(parts)
        size = sum(map(self._nbytes, together))
        for tensor in self.tensors[self._places[together[-1].name] + 1 :]:
            size += self._nbytes(tensor)
            if size > _BATCH_BYTES:
                break
            together.append(tensor)
        return together

    def _nbytes(self, tensor: Tensor) -> int:
        return math.prod(tensor.shape) * self._stored[tensor.name].itemsize

    def _load(self, parts: list[Tensor]) -> dict[str, np.ndarray]:
        abstract: dict[str, Any] = dict.fromkeys(self._stored, ocp.PLACEHOLDER)
        for e in parts:
            abstract[e.name] = np.empty(e.shape, self._stored[e.name])
        try:
            tree = ocp.load_pytree(self._path, traverse_util.unflatten_dict(abstract, sep="."))
            flat = traverse_util.flatten_dict(tree, sep=".")
            arrays = {e.name: np.asarray(flat[e.name]) for e in parts}
        except Exception as e:
            raise machine_fault(e) or self._damaged(e) from e
        for name, array in arrays.items():
            self._verify(name, array)
        return arrays

    def verify_unused(self) -> None:
        """Raises UserError if a tensor that upstream never uses is damaged."""
        files = unused_tensors(self.folder)
        for name in files.shapes:
            self._verify(name, files.read(name))

    def _verify(self, name: str, array: np.ndarray) -> None:
        if self._checksums is not None and self._checksums.get(name) != checksum(array):
            raise UserError(f"{self.folder}: {name} is damaged (its checksum differs); convert the checkpoint again")

    def _damaged(self, error: Exception) -> UserError:
        return UserError(f"{self._path}: not a whole Orbax checkpoint ({first_line(error)}); convert it again")


_CLOSED = "Event loop is closed"


def ignore_closed_loops() -> None:
    """Hides the errors that follow the first error of a damaged checkpoint or a full disk, in this process.

    Orbax reads and writes many tensors at once. When one fails, Orbax closes its event loop, and everything that ends
    later prints a traceback from its own thread, where no caller can catch it.
    """
    if getattr(sys.unraisablehook, "ignores_closed_loops", False):
        return
    unraisable, uncaught = sys.unraisablehook, sys.excepthook

    def hide_unraisable(late: Any) -> None:
        if str(late.exc_value) != _CLOSED:
            unraisable(late)

    def hide_uncaught(kind: Any, error: BaseException, traceback: Any) -> None:
        if str(error) != _CLOSED:
            uncaught(kind, error, traceback)

    hide_unraisable.ignores_closed_loops = True  # type: ignore[attr-defined]
    sys.unraisablehook, sys.excepthook = hide_unraisable, hide_uncaught


_FLOATS = [DTYPES[code] for code in DTYPE_NAMES.values()]


@contextlib.contextmanager
def _system_errors() -> Iterator[None]:
    """Turns an error that Orbax raises, for example on a full disk, into the OSError of the system."""
    try:
        yield
    except OSError:
        raise
    except Exception as e:
        code = re.search(r"os_error_code='(\d+)'", str(e))
        if code is not None:
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from e
        raise OSError(0, first_line(e)) from e


class OrbaxWriter:
    """Writes the tensors of an Orbax model folder. Config and tokenizer files are copied elsewhere."""

    def __init__(self, folder: Path, dtype: str, weights: Weights | None = None):
        self._folder, self._path = folder, (folder / PARAMS).absolute()
        self._dtype, self._weights = dtype, weights
        self._checksums: dict[str, str] = {}
        self._batch: dict[str, np.ndarray] = {}
        ignore_closed_loops()

    def write(self, name: str, array: np.ndarray) -> None:
        """Adds a tensor."""
        self._checksums[name] = checksum(array)
        self._batch[name] = array
        if sum(a.nbytes for a in self._batch.values()) >= _BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        with _system_errors():
            ocp.partial.save(self._path, traverse_util.unflatten_dict(self._batch, sep="."))
        self._batch = {}

    def write_unused(self, files: TensorFolder, names: list[str]) -> None:
        """Copies the named tensors, which upstream never uses."""
        if not names:
            return
        with ShardWriter(self._folder / UNUSED, [(n, files.shapes[n], files.dtypes[n]) for n in names]) as out:
            for name in names:
                array = files.read(name)
                self._checksums[name] = checksum(array)
                out.write(name, array)

    def finish(self) -> None:
        """Completes the Orbax checkpoint and writes xl2jax.json."""
        if self._batch:
            self._flush()
        with _system_errors():
            ocp.partial.finalize(self._path)
        manifest: dict[str, Any] = {"format": 2, "dtype": self._dtype}
        if self._weights is not None:
            manifest |= {"format": 3, "weights": self._weights}
        manifest["checksums"] = self._checksums
        (self._folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
