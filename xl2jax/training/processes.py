"""Coordination between processes: a lock on the output folder, and results of process 0 for all processes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from xl2jax.errors import UserError

logger = logging.getLogger(__name__)

LOCK = "run.lock"


def is_main() -> bool:
    """Whether this is process 0."""
    return jax.process_index() == 0


def from_main[T](work: Callable[[], T]) -> T:
    """Runs `work` in process 0 only, and returns its result, or raises its UserError, in every process."""
    if jax.process_count() == 1:
        return work()
    result: T | UserError | None = None
    if is_main():
        try:
            result = work()
        except UserError as e:
            result = e
    data = np.frombuffer(pickle.dumps(result), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    data = multihost_utils.broadcast_one_to_all(data if is_main() else np.zeros(size, np.uint8))
    received: T | UserError = pickle.loads(np.asarray(data).tobytes())
    if isinstance(received, UserError):
        raise received
    return received


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Creates `folder` and locks it against other runs. The lock ends with the process, even if it is killed.

    Raises:
      UserError: another run holds the lock, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666)
    except OSError as e:
        raise UserError(f"{folder}: cannot be written ({e.strerror})") from None
    with contextlib.closing(os.fdopen(number, "r+b", buffering=0)) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = file.read(200).decode("utf-8", "replace").strip()
            raise UserError(
                f"{folder}: another run uses this folder ({holder or 'just started'}); "
                "wait until it ends or choose another folder"
            ) from None
        except OSError as e:
            if e.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            logger.warning(
                "%s: this file system has no locks: a second run on this folder would not be refused", folder
            )
        try:
            file.truncate()
            file.write(f"process {os.getpid()} on {os.uname().nodename}\n".encode())
        except OSError as e:
            raise UserError(f"{folder}: cannot be written ({e.strerror})") from None
        yield
