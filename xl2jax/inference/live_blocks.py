"""The dense KV of old parts of a live video: in host memory, then on the disk, then nowhere.

A block is what leaves the device together. All blocks of a video have the same shapes. The oldest blocks of the host move
to the disk, and the oldest of the disk are dropped, each within a budget of bytes. What comes back has the bits that left.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import threading
from pathlib import Path

import jax
import numpy as np

from xl2jax.errors import UserError, first_line
from xl2jax.inference.offload import HostKV
from xl2jax.system.atomic import replacing_file, scratch_folder

logger = logging.getLogger(__name__)

_DIGEST = 16  # bytes


class BlockStore:
    """Blocks by ascending number. Several threads may use it.

    Attributes:
      damaged: how many files were not what had been written, so that their blocks were dropped.
    """

    def __init__(self, host_bytes: int, disk_bytes: int = 0, folder: Path | None = None):
        """`folder`: files are written to a new folder in it, which `close` removes. Raises UserError where it cannot be
        made."""
        self._host_limit, self._disk_limit = host_bytes, disk_bytes if folder is not None else 0
        self._host: dict[int, HostKV] = {}
        self._disk: set[int] = set()
        self._opened = contextlib.ExitStack()
        self._folder = (
            self._opened.enter_context(scratch_folder(folder, "live")) if self._disk_limit and folder else None
        )
        self._lock, self._settling = threading.Lock(), threading.Lock()
        self._size, self._like = 0, jax.tree.structure(0)
        self._leaves: list[tuple[tuple[int, ...], np.dtype]] = []
        self.damaged = 0

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory."""
        with self._lock:
            return len(self._host) * self._size

    @property
    def disk_bytes(self) -> int:
        """Bytes on the disk."""
        with self._lock:
            return len(self._disk) * self._size

    def put(self, number: int, kv: HostKV) -> None:
        """Adds the newest block to host memory. `settle` then keeps the budgets."""
        with self._lock:
            if not self._size:
                self._size = kv.nbytes
                leaves, self._like = jax.tree.flatten(kv)
                self._leaves = [(x.shape, x.dtype) for x in leaves]
            self._host[number] = kv

    def get(self, number: int) -> HostKV | None:
        """A block, or None where it was dropped or its file is damaged."""
        with self._lock:
            if number in self._host:
                return self._host[number]
            if number not in self._disk:
                return None
        kv = self._read(number)
        if kv is None:
            with self._lock:
                dropped = number in self._disk
                self._disk.discard(number)
            if dropped:  # and not forgotten meanwhile
                self.damaged += 1
                logger.warning("%s: is damaged or gone: this part of the video stays pooled", self._path(number))
        return kv

    def forget(self, before: int) -> None:
        """Drops all blocks with numbers below `before`."""
        with self._lock:
            for number in [n for n in self._host if n < before]:
                del self._host[number]
            gone = {n for n in self._disk if n < before}
            self._disk -= gone
        for number in gone:
            self._remove(number)

    def settle(self) -> None:
        """Moves the oldest blocks to the disk, and drops the oldest of the disk, until both budgets are kept."""
        if not self._settling.acquire(blocking=False):
            return  # another thread does it
        try:
            while True:
                with self._lock:
                    if len(self._host) * self._size <= self._host_limit:
                        return
                    number = min(self._host)
                    kv = self._host[number]
                written = self._write(number, kv)
                with self._lock:
                    known = self._host.pop(number, None) is not None
                    if written and known:
                        self._disk.add(number)
                if written and not known:  # it was forgotten while it was written
                    self._remove(number)
        finally:
            self._settling.release()

    def close(self) -> None:
        """Drops everything and removes the files."""
        with self._settling:
            with self._lock:
                self._host.clear()
                self._disk.clear()
                self._disk_limit = 0
            self._opened.close()

    def _path(self, number: int) -> Path:
        assert self._folder is not None
        return self._folder / f"block-{number:08}.kv"

    def _remove(self, number: int) -> None:
        """Removes a block's file. Where that fails, nothing more is written to the disk: it would grow."""
        try:
            self._path(number).unlink(missing_ok=True)
        except OSError as e:
            if self._disk_limit:
                self._disk_limit = 0
                logger.warning("old parts of the video are no longer written to the disk: %s", first_line(e))

    def _write(self, number: int, kv: HostKV) -> bool:
        """Whether the block is on the disk now."""
        if self._size > self._disk_limit:
            return False
        with self._lock:
            gone = sorted(self._disk)[: max(len(self._disk) + 1 - self._disk_limit // self._size, 0)]
            self._disk.difference_update(gone)
        for old in gone:
            self._remove(old)
        parts = [np.ascontiguousarray(x).view(np.uint8).data for x in jax.tree.leaves(kv)]
        digest = hashlib.blake2b(digest_size=_DIGEST)
        try:
            with replacing_file(self._path(number), need_bytes=self._size) as temporary, open(temporary, "wb") as f:
                for part in parts:
                    digest.update(part)
                    f.write(part)
                f.write(digest.digest())
        except UserError as e:
            self._disk_limit = 0
            logger.warning("old parts of the video are no longer written to the disk: %s", first_line(e))
            return False
        return True

    def _read(self, number: int) -> HostKV | None:
        try:
            data = self._path(number).read_bytes()
        except OSError:
            return None
        body = data[:-_DIGEST]
        if len(body) != self._size or hashlib.blake2b(body, digest_size=_DIGEST).digest() != data[-_DIGEST:]:
            return None
        read, at = list[np.ndarray](), 0
        for shape, dtype in self._leaves:
            read.append(np.frombuffer(body, dtype, math.prod(shape), at).reshape(shape))
            at += read[-1].nbytes
        return jax.tree.unflatten(self._like, read)
