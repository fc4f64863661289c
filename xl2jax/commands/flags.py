"""Flags that several commands share, and the parsing of their values."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from xl2jax.errors import UserError
from xl2jax.inference.bilevel import BilevelConfig
from xl2jax.inference.devices import Devices
from xl2jax.inference.layout import PrefillConfig

DEFAULT_CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "demo"
"""The bundled checkpoint of a source checkout. An installed wheel has none."""


OFFLOAD_IS_DENSE = "--offload has no use with --top-chunks all, which reads all of the KV: leave one out"


def require_checkpoint(checkpoint: str) -> None:
    """Raises UserError where `checkpoint` is the default one and does not exist."""
    if checkpoint == str(DEFAULT_CHECKPOINT) and not DEFAULT_CHECKPOINT.is_dir():
        raise UserError(
            "no checkpoint is installed: give --checkpoint with a folder or a hub id (BAAI/Video-XL-2), "
            "or run from a source checkout, which has checkpoints/demo"
        )


@dataclasses.dataclass(frozen=True)
class TensorFlags:
    """Over how many devices of this host the model is split."""

    tensor: int = 1
    """Splits the LLM, its KV and the frames of the vision tower over so many devices."""

    def devices(self) -> Devices:
        return Devices(self.tensor)


@dataclasses.dataclass(frozen=True)
class DeviceFlags(TensorFlags):
    """How many devices of this host are used."""

    copies: int = 1
    """Copies of the model, which take the videos in turn; each has as many devices as --tensor says."""

    def devices(self) -> Devices:
        return Devices(self.tensor, self.copies)


@dataclasses.dataclass(frozen=True)
class PrefillFlags:
    """Which visual tokens see which during prefill."""

    chunk_groups: int = 4
    """Groups (of 4 frames) in a prefill chunk."""
    window_chunks: int | Literal["all"] = 3
    """How many chunks before its own a visual token sees; all is dense prefill."""

    def config(self) -> PrefillConfig:
        return PrefillConfig(self.chunk_groups, None if self.window_chunks == "all" else self.window_chunks)


@dataclasses.dataclass(frozen=True)
class BilevelFlags:
    """Which chunks of the video an answer reads in full."""

    top_chunks: int | Literal["all"] = 2
    """How many chunks relevance keeps dense; all is dense decoding."""
    select_chunk_groups: int = 4
    """Groups (of 4 frames) in a selection chunk."""
    pool: int = 4
    """How many visual tokens are averaged into one where KV is pooled."""

    def config(self) -> BilevelConfig | None:
        if self.top_chunks == "all":
            return None
        return BilevelConfig(self.select_chunk_groups, self.pool, self.top_chunks)

    def bilevel(self) -> BilevelConfig:
        """For what measures bi-level decoding itself. Raises UserError for dense decoding."""
        config = self.config()
        if config is None:
            raise UserError("--top-chunks all: this measures bi-level decoding; give a number of chunks")
        return config


def whole_numbers(flag: str, text: str, low: int = 1, high: int = 1 << 20) -> list[int]:
    """Parses comma-separated whole numbers within [low, high]. Raises UserError."""
    numbers = _parsed(text, int)
    if not numbers or not all(low <= x <= high for x in numbers):
        raise UserError(f"{flag}: whole numbers from {low} to {high:,} separated by commas, not {text!r}")
    return [int(x) for x in numbers]


def shares(flag: str, text: str) -> list[float]:
    """Parses comma-separated numbers within [0, 1]. Raises UserError."""
    numbers = _parsed(text, float)
    if not numbers or not all(0 <= x <= 1 for x in numbers):
        raise UserError(f"{flag}: numbers from 0 to 1 separated by commas, not {text!r}")
    return numbers


def choices(flag: str, text: str, known: Sequence[str]) -> list[str]:
    """Parses comma-separated words and returns them in the order of `known`. Raises UserError for any other word."""
    words = text.split(",")
    chosen = [word for word in known if word in words]
    if not chosen or len(chosen) != len(words):
        raise UserError(f"{flag}: choose from {','.join(known)}, not {text!r}")
    return chosen


def parse_shard(text: str, *, first: int) -> tuple[int, int]:
    """(number from 0, count) of a shard i/n. The number of the first shard is `first`. Raises UserError."""
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if not match or not first <= int(match[1]) < int(match[2]) + first:
        last = "n" if first else "n - 1"
        raise UserError(f"--shard: should be i/n with i from {first} to {last}, not {text!r}")
    return int(match[1]) - first, int(match[2])


def _parsed(text: str, kind: type[int] | type[float]) -> list[float]:
    try:
        return [kind(x) for x in text.split(",")]
    except ValueError:
        return []
