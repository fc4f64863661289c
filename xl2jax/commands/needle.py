"""`xl2jax needle`: accuracy of needle retrieval by length, depth and way of reading.

xl2jax needle --checkpoint checkpoints/demo --frames 64,256,1024 --depths 0,0.25,0.5,0.75,1 --plot needle.png
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Literal, cast

import tyro

from xl2jax.checkpoint.params import stored_config
from xl2jax.checkpoint.sources import find_checkpoint
from xl2jax.commands.flags import (
    DEFAULT_CHECKPOINT,
    DeviceFlags,
    PrefillFlags,
    choices,
    require_checkpoint,
    shares,
    whole_numbers,
)
from xl2jax.config import FRAMES_PER_GROUP, Weights
from xl2jax.evaluation.needle import KINDS, NeedleConfig, needle, parse_modes, summary
from xl2jax.evaluation.questions import NEEDLE_KINDS, Kind
from xl2jax.inference.api import load_copies
from xl2jax.inference.bilevel import BilevelConfig
from xl2jax.inference.relevance import AttentionScorer
from xl2jax.inference.video_cache import CacheConfig
from xl2jax.system.atomic import check_file_target
from xl2jax.system.backend import start_backend
from xl2jax.system.tables import print_table
from xl2jax.system.terminal import flag_errors


@dataclasses.dataclass(frozen=True)
class Args:
    """Measures needle retrieval by length and depth, for dense, chunked and bi-level reading."""

    checkpoint: str = str(DEFAULT_CHECKPOINT)
    """Checkpoint folder or hub id."""
    frames: str = "64,256,1024"
    """Lengths of the videos in frames."""
    depths: str = "0,0.25,0.5,0.75,1"
    """Positions of the needle, as shares of the video."""
    cases: int = 6
    """Videos of each length and depth; each is asked one question of every kind."""
    modes: str = "dense,chunked,top1,top2,top4,random2"
    """Ways of reading: dense, chunked, topN and randomN (N chunks stay dense besides the first and the last)."""
    others: int = 5
    """How many other shapes the video shows."""
    kinds: str = ",".join(NEEDLE_KINDS)
    """Kinds of question: by content (colour_of, shape_of), by time (colour, shape), for a time (time), and about the
    whole video (exists, count, first)."""
    seed: int = 0
    """Seed of the videos."""
    prefill: tyro.conf.OmitArgPrefixes[PrefillFlags] = dataclasses.field(default_factory=PrefillFlags)
    select_chunk_groups: int = 4
    """Groups (of 4 frames) in a selection chunk."""
    pool: int = 4
    """How many visual tokens are averaged into one where KV is pooled."""
    relevance_layers: tuple[float, float] = (AttentionScorer.first_layer, AttentionScorer.last_layer)
    """First and last layer whose attention counts, as shares of the depth."""
    relevance_heads: Literal["squared", "mean", "max"] = AttentionScorer.heads
    """How attention is reduced over heads."""
    relevance_keys: Literal["auto", "dense", "pooled"] = AttentionScorer.keys
    """The KV that the question attends to when chunks are scored."""
    cache_dtype: Literal["int8"] | None = None
    """dtype of the video's KV; by default that of the model."""
    held_out_template: bool = False
    """Asks in a wording that was not used in training."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """dtype of parameters and activations; by default that of the checkpoint."""
    weights: Weights | None = None
    """Quantises the LLM's matrices to 8 or 4 bits on loading."""
    devices: tyro.conf.OmitArgPrefixes[DeviceFlags] = dataclasses.field(default_factory=DeviceFlags)
    json: bool = False
    """Prints one JSON object instead of a table."""
    plot: Path | None = None
    """PNG of accuracy by length and depth."""

    def config(self) -> NeedleConfig:
        """Raises UserError for flags out of range."""
        self.devices.devices()
        return NeedleConfig(
            frames=tuple(whole_numbers("--frames", self.frames, FRAMES_PER_GROUP)),
            depths=tuple(shares("--depths", self.depths)),
            cases=self.cases,
            modes=parse_modes(self.modes),
            others=self.others,
            kinds=cast(tuple[Kind, ...], tuple(choices("--kinds", self.kinds, KINDS))),
            seed=self.seed,
            held_out_template=self.held_out_template,
            prefill=self.prefill.config(),
            bilevel=BilevelConfig(self.select_chunk_groups, self.pool),
            cache=CacheConfig(self.cache_dtype),
            scorer=AttentionScorer(*self.relevance_layers, self.relevance_heads, self.relevance_keys),
        )


def main() -> None:
    with flag_errors():
        args = tyro.cli(Args, prog="xl2jax needle")
    config = args.config()
    require_checkpoint(args.checkpoint)
    if args.plot is not None:
        check_file_target(args.plot)
    devices = args.devices.devices()
    devices.check(stored_config(find_checkpoint(args.checkpoint), args.weights))
    start_backend()
    models = load_copies(args.checkpoint, devices, dtype=args.dtype, weights=args.weights)
    results = needle(config, models)
    rows = summary(results)
    if args.plot is not None:
        from xl2jax.evaluation.figures import plot_needle

        plot_needle(args.plot, results)
    if args.json:
        print(json.dumps({"rows": rows, "cases": [dataclasses.asdict(r) for r in results]}))
    else:
        print_table(rows, decimals=3)
