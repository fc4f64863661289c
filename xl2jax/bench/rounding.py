"""`bench check`: what weights and KV in 8 and 4 bits change in a checkpoint's logits, and its KV's error by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, cast

import xl2jax
from xl2jax.checkpoint.params import stored_config
from xl2jax.checkpoint.sources import find_checkpoint
from xl2jax.commands.flags import DEFAULT_CHECKPOINT, choices
from xl2jax.config import Weights
from xl2jax.errors import UserError
from xl2jax.evaluation.rounding import Reading, Videos, compared, read
from xl2jax.inference.video_cache import CacheConfig


@dataclasses.dataclass(frozen=True)
class CheckArgs:
    """Compares a checkpoint's logits in 8 and 4 bits with its own."""

    checkpoint: str = str(DEFAULT_CHECKPOINT)
    """Checkpoint folder or hub id."""
    weights: str = "int8,int4"
    """Bits of the LLM's matrices that are compared."""
    stored: str | None = None
    """A quantised folder that was made from --checkpoint, which is compared too."""
    frames: int = 64
    """Frames of each video."""
    videos: int = 4
    """Synthetic videos, each with a few questions."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """dtype of parameters and activations; by default that of the checkpoint."""
    json: bool = False
    """Prints one JSON object instead of tables."""

    def kinds(self) -> list[Weights]:
        """Raises UserError for other words, or for a number of frames or videos out of range."""
        Videos(self.frames, self.videos)
        return cast(list[Weights], choices("--weights", self.weights, ("int8", "int4")))


def rounding_tables(args: CheckArgs) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A row for each combination of weights and KV, and a row for each layer."""
    kinds, folder = args.kinds(), find_checkpoint(args.checkpoint)
    if (stored := stored_config(folder).llm.weights) is not None:
        raise UserError(f"{folder}: its weights are {stored}: give the checkpoint that they were made from")
    other = None if args.stored is None else find_checkpoint(args.stored)
    if other is not None and stored_config(other).llm.weights is None:
        raise UserError(f"{other}: is not quantised: give a folder that convert --weights made")
    videos = Videos(args.frames, args.videos)
    plain = xl2jax.load(folder, dtype=args.dtype)
    expected = read(plain, videos, CacheConfig())

    def rows(model: xl2jax.Model, weights: str | None) -> Iterator[dict[str, Any]]:
        for kv in (None, "int8") if weights is not None else ("int8",):
            actual: Reading = read(model, videos, CacheConfig(kv), expected.texts)
            yield {"weights": weights or model.dtype, "KV": kv or model.dtype} | compared(expected, actual)

    table = list(rows(plain, None))
    del plain  # the device holds one model at a time
    for weights in kinds:
        table += rows(xl2jax.load(folder, dtype=args.dtype, weights=weights), weights)
    if other is not None:
        table += rows(xl2jax.load(other, dtype=args.dtype), f"{stored_config(other).llm.weights}, stored")
    return table, expected.layers
