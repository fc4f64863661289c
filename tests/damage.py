"""Damage to files for the fuzz tests. The same seed gives the same damage."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from xl2jax.errors import UserError

_ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 0.5, 1e308, "", "x", "../x", "/dev/zero", "\x00", "n" * 5000, [], {},
    [None], {"x": None}, float("nan"), float("inf"), "\ud800", "[" * 5000,
)  # fmt: skip


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Cuts the bytes, flips one bit, or overwrites, removes or doubles a run of bytes."""
    at, size = rng.randrange(len(data)), rng.randrange(1, 64)
    match rng.randrange(5):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        case 2:
            return data[:at] + rng.randbytes(size) + data[at + size :]
        case 3:
            return data[:at] + data[at + size :]
        case _:
            return data[:at] + data[at : at + size] + data[at:]


def damaged_json(text: bytes, rng: random.Random) -> bytes:
    """Replaces or removes values in a JSON text, or damages its bytes."""
    if rng.random() < 0.3:
        return damaged(text, rng)
    raw = json.loads(text)
    for _ in range(rng.choice((1, 1, 2))):
        holder, key = rng.choice(_places(raw))
        if rng.random() < 0.15 and isinstance(holder, dict):
            del holder[key]
        else:
            holder[key] = rng.choice(_ODD)
        if not raw:
            break
    return json.dumps(raw).encode()


def outcome[T](call: Callable[[], T]) -> tuple[T | None, str]:
    """The result of a call, or the line of its UserError. Other exceptions are not caught."""
    try:
        value, line = call(), ""
    except UserError as e:
        value, line = None, str(e)
    assert len(line) < 1000, line
    return value, line


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of all nested values."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    return [(value, key) for key, _ in items] + [place for _, below in items for place in _places(below)]
