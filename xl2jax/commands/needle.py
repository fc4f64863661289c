"""`xl2jax needle`: accuracy of needle retrieval by length, depth and way of reading.

xl2jax needle --checkpoint checkpoints/demo --frames 64,256,1024 --depths 0,0.25,0.5,0.75,1 --plot needle.png
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

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
from xl2jax.errors import UserError
from xl2jax.evaluation.needle import KINDS, NeedleConfig, Result, needle, parse_modes, summary
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
    others: str = "5"
    """How many other shapes a video shows: a number, or a range such as 0-8 whose numbers the cases take in turn.
    A short video shows as many as find room, and none shows more than there are pairs of colour and shape unlike the
    needle's."""
    kinds: str = ",".join(NEEDLE_KINDS)
    """Kinds of question: by content (colour_of, shape_of), by time (colour, shape), for a time (time), and about the
    whole video (exists, count, first)."""
    frame_seconds: float = 1.0
    """Seconds from one frame to the next."""
    seed: int = 0
    """Seed of the videos."""
    prefill: tyro.conf.OmitArgPrefixes[PrefillFlags] = dataclasses.field(default_factory=PrefillFlags)
    select_chunk_groups: int = 4
    """Groups (of 4 frames) in a selection chunk."""
    pool: int = 4
    """How many visual tokens are averaged into one where KV is pooled."""
    relevance_layers: tuple[float, float] = (AttentionScorer.first_layer, AttentionScorer.last_layer)
    """First and last layer whose attention counts, as shares of the depth."""
    relevance_exponent: float = AttentionScorer.exponent
    """Exponent of the power mean of attention over tokens, heads and layers, from 1 to 8."""
    relevance_question_weight: float = AttentionScorer.question_weight
    """Weight of the question's tokens in that mean, from 0 to 1; the tokens between question and answer have the rest."""
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
    processes: int = 0
    """Processes that draw the frames ahead of the model; 0 draws them when they are read. Up to two videos for each
    process wait in memory."""
    quick: bool = False
    """Asks 60 questions about 64 and 256 frames, in place of the lengths, depths, cases and modes above, and ends with a
    verdict. It takes about a minute on two CPU cores."""
    devices: tyro.conf.OmitArgPrefixes[DeviceFlags] = dataclasses.field(default_factory=DeviceFlags)
    json: bool = False
    """Prints one JSON object instead of a table."""
    plot: Path | None = None
    """PNG of accuracy by length and depth."""

    def config(self) -> NeedleConfig:
        """Raises UserError for flags out of range."""
        self.devices.devices()
        if self.quick:
            replaced = [
                f.name for f in dataclasses.fields(self) if f.name in _QUICK and getattr(self, f.name) != f.default
            ]
            if replaced:
                raise UserError(f"--quick chooses --{', --'.join(replaced)} itself")
            return dataclasses.replace(self, quick=False, **_QUICK).config()
        if self.processes < 0:
            raise UserError(f"--processes must be 0 or more, not {self.processes}")
        return NeedleConfig(
            frames=tuple(whole_numbers("--frames", self.frames, FRAMES_PER_GROUP)),
            depths=tuple(shares("--depths", self.depths)),
            cases=self.cases,
            modes=parse_modes(self.modes),
            others=_range(self.others),
            kinds=cast(tuple[Kind, ...], tuple(choices("--kinds", self.kinds, KINDS))),
            frame_seconds=self.frame_seconds,
            seed=self.seed,
            held_out_template=self.held_out_template,
            prefill=self.prefill.config(),
            bilevel=BilevelConfig(self.select_chunk_groups, self.pool),
            cache=CacheConfig(self.cache_dtype),
            scorer=AttentionScorer(
                *self.relevance_layers, self.relevance_exponent, self.relevance_keys, self.relevance_question_weight
            ),
        )


_QUICK: dict[str, Any] = {"frames": "64,256", "depths": "0.2,0.8", "cases": 3, "modes": "chunked,top2"}


def verdict(results: Sequence[Result]) -> str:
    """How many needles were found after chunked prefill, with all chunks dense and with the best two."""
    found = [sum(r.correct for r in results if r.mode == mode) for mode in ("chunked", "top2")]
    asked = len(results) // 2
    share = min(found) / asked
    grade = "finds" if share >= 0.95 else "mostly finds" if share >= 0.8 else "does not reliably find"
    return (
        f"This checkpoint {grade} needles: {found[0]} of {asked} questions are right after chunked prefill, and "
        f"{found[1]} of {asked} with the best two chunks dense."
    )


def _range(text: str) -> tuple[int, int]:
    """The ends of a range such as 0-8, or of a single number. Raises UserError."""
    first, _, last = text.partition("-")
    if not first.isdecimal() or not (last or first).isdecimal() or text.endswith("-"):
        raise UserError(f"--others: a number, or a range such as 0-8, not {text!r}")
    return int(first), int(last or first)


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
    results = needle(config, models, args.processes)
    rows = summary(results)
    if args.plot is not None:
        from xl2jax.evaluation.figures import plot_needle

        plot_needle(args.plot, results)
    if args.json:
        print(json.dumps({"rows": rows, "cases": [dataclasses.asdict(r) for r in results]}))
    else:
        print_table(rows, decimals=3)
        if args.quick:
            print(verdict(results))
