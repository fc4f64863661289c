"""Writes scalars for TensorBoard in the caller's thread.

tensorboardX's SummaryWriter writes in another thread, which dies silently when the disk is full; its queue then fills
up and the caller waits for ever. Also, two writers that start in the same second share a file. This module therefore
uses only the message formats and the checksum of tensorboardX.
"""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path
from typing import Any

from tensorboardX.proto import event_pb2, summary_pb2
from tensorboardX.record_writer import masked_crc32c


class Board:
    """An event file in `folder`. Raises OSError if it cannot be written."""

    def __init__(self, folder: Path, first: int):
        """TensorBoard discards the values of steps from `first` on that earlier files in the folder contain."""
        folder.mkdir(exist_ok=True)
        now = time.time_ns()  # TensorBoard reads files in the order of their names
        name = f"events.out.tfevents.{now // 10**9}.{now % 10**9:09}.{os.uname().nodename}"
        self._file = open(folder / name, "xb")  # noqa: SIM115 (closed by `close`)
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(file_version="brain.Event:2")
        self._write(step=first, session_log=start)

    def add(self, step: int, values: dict[str, float]) -> None:
        """Writes the scalars of a step."""
        scalars = [summary_pb2.Summary.Value(tag=f"train/{name}", simple_value=x) for name, x in values.items()]
        self._write(step=step, summary=summary_pb2.Summary(value=scalars))

    def _write(self, **fields: Any) -> None:
        data = event_pb2.Event(wall_time=time.time(), **fields).SerializeToString()
        size = struct.pack("<Q", len(data))
        checks = [struct.pack("<I", masked_crc32c(x)) for x in (size, data)]
        self._file.write(size + checks[0] + data + checks[1])
        self._file.flush()

    def close(self) -> None:
        self._file.close()
