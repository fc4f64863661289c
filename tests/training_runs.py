"""Shared by the tests of training runs: their data, and readers of a run's output."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from tensorboardX.proto import event_pb2

from xl2jax.testing import write_clip

ANSWERS = ("Red.", "Blue.", "Four.", "A ring.")
QUESTION = "<image>\nWhat is it?"


def turns(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": v} for i, v in enumerate(values)]


def rows(answers: tuple[str, ...] = ANSWERS) -> list[dict[str, Any]]:
    return [
        {"id": f"s{i}", "video": f"{i % 4}.mp4", "conversations": [
            {"from": "human", "value": QUESTION}, {"from": "gpt", "value": answer}]}
        for i, answer in enumerate(answers)
    ]  # fmt: skip


def metrics(output: Path) -> list[dict[str, float]]:
    path = output / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def last_line(out: str) -> str:
    return out.strip().splitlines()[-1]


def whole_checkpoints(output: Path) -> list[int]:
    return sorted(int(p.name) for p in (output / "checkpoints").iterdir() if p.name.isdigit())


def board(folder: Path) -> dict[tuple[str, int], float]:
    """The last value of each (name, step), as TensorBoard loads it: a new start discards later steps."""
    values: dict[tuple[str, int], float] = {}
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            if event.session_log.status == event_pb2.SessionLog.START:
                values = {k: v for k, v in values.items() if k[1] < event.step}
            values |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
    return values


def write_data(folder: Path) -> Path:
    """Writes four files that look different, each with its own answer.

    The lists contain the first and the last file, all files, and eight samples for batches of 8.
    """
    for i in range(4):
        write_clip(folder / f"{i}.mp4", 20, fps=1 + i, width=32 + 32 * i, height=64)
    (folder / "two.json").write_text(json.dumps(rows()[::3]))
    (folder / "four.json").write_text(json.dumps(rows()))
    (folder / "eight.json").write_text(json.dumps(rows(ANSWERS * 2)))
    return folder
