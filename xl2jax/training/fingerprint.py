"""Fingerprints of files and checkpoints: short hashes of their size and of samples of their bytes.

A fingerprint does not depend on the name, the folder or the modification time. A copy has the same fingerprint, and
another file of the same name has a different one. The sampled bytes are spread over the whole file, so that hashing a
video takes milliseconds and a checkpoint of 16 GB one second. A change between the sampled bytes is not noticed.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from xl2jax.checkpoint.orbax_folder import PARAMS, is_orbax, read_manifest
from xl2jax.checkpoint.safetensors_io import TensorFolder
from xl2jax.system.schema import require_regular

_PARTS = 8  # number of samples of a file, evenly spaced, including its first and last bytes
_PART_BYTES = 4096
_ROWS = 4  # number of rows of a tensor that are hashed


def digest(*values: Any) -> str:
    """A short hash of values: of the bytes themselves, and of the `repr` of anything else."""
    out = hashlib.blake2b(digest_size=16)
    for value in values:
        data = value if isinstance(value, bytes) else repr(value).encode("utf-8", "backslashreplace")
        out.update(len(data).to_bytes(8, "little"))
        out.update(data)
    return out.hexdigest()


def change_mark(path: Path) -> str:
    """A hash that changes whenever a file, or a file in a folder, is written or replaced. It reads no contents.

    Raises OSError or UserError if there is no such file.
    """
    return digest(*((name, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in _files(path)))


def media_fingerprint(path: Path) -> str:
    """Fingerprint of a video, an image or a folder of frames. Raises OSError or UserError if it cannot be read."""
    return digest(*(x for name, _ in _files(path) for x in (name, _file_fingerprint(path / name))))


def weights_fingerprint(folder: Path) -> str:
    """Fingerprint of the weights of a checkpoint folder.

    In the PyTorch layout it covers name, shape and a few rows of every tensor, and does not depend on the shards. A few
    rows suffice because training changes nearly every value of a tensor. In the Orbax layout it covers the stored
    checksums, or the files if there are no checksums. The same weights have different fingerprints in the two layouts.

    Raises:
      UserError: the weights cannot be read.
    """
    if is_orbax(folder):
        manifest = read_manifest(folder)
        if manifest.checksums is not None:
            return digest(manifest.dtype, *sorted(manifest.checksums.items()))
        files = sorted(p for p in (folder / PARAMS).rglob("*") if p.is_file())
        return digest(*(x for p in files for x in (str(p.relative_to(folder)), _file_fingerprint(p))))
    tensors = TensorFolder(folder)
    rows: dict[str, str] = {}
    for path in sorted(set(tensors.file_of.values())):
        with safe_open(path, framework="np") as f:
            for name in (n for n, place in tensors.file_of.items() if place == path):
                shape = tensors.shapes[name]
                part = f.get_slice(name) if len(shape) > 1 else None
                read = [f.get_tensor(name)] if part is None else [part[i : i + 1] for i in _spread(shape[0], _ROWS)]
                rows[name] = digest(shape, *(np.asarray(x).tobytes() for x in read))
    return digest(*sorted(rows.items()))


def _files(path: Path) -> list[tuple[str, os.stat_result]]:
    """(name, status) of the files in a folder, sorted by name; a single file has the name ""."""
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        return [(e.name, e.stat()) for e in sorted(os.scandir(path), key=lambda e: e.name) if e.is_file()]
    if not stat.S_ISREG(status.st_mode):
        require_regular(path)
    return [("", status)]


def _file_fingerprint(path: Path) -> bytes:
    with open(path, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        parts = []
        for start in _spread(max(size - _PART_BYTES, 0) + 1, _PARTS):
            f.seek(start)
            parts.append(f.read(_PART_BYTES))
    return bytes.fromhex(digest(size, *parts))


def _spread(count: int, parts: int) -> list[int]:
    """Up to `parts` of the numbers below `count`, evenly spaced, including the first and the last."""
    return sorted({round(i * (count - 1) / (parts - 1)) for i in range(parts)}) if count else []
