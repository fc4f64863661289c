"""Which chunks of a video a question reads, and how that is reported."""

from __future__ import annotations

import dataclasses
import functools
import logging
from pathlib import Path
from typing import Literal

import numpy as np

from xl2jax.arithmetic import ceil_div
from xl2jax.config import FRAMES_PER_GROUP
from xl2jax.errors import UserError
from xl2jax.inference import session
from xl2jax.inference.bilevel import UNIT_GROUPS, BilevelConfig
from xl2jax.inference.cache import KVCache
from xl2jax.inference.generate import SuffixIds
from xl2jax.inference.layout import VideoLayout
from xl2jax.inference.network import Network
from xl2jax.inference.relevance import AttentionScorer
from xl2jax.inference.selection_files import Selection, read_selection
from xl2jax.inference.video_cache import WatchedVideo

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RelevanceConfig:
    """How the chunks that stay dense are chosen.

    attention: by the question's attention to the video (`AttentionScorer`). file: by upstream's selection file, or by
    `selection`, an entry of such a file. none: only the first and the last chunk stay dense. random: at random, as a
    control for experiments; the same question always gets the same chunks.
    """

    scorer: Literal["attention", "file", "none", "random"] = "attention"
    attention: AttentionScorer = AttentionScorer()  # noqa: RUF009 (frozen)
    file: Path | None = None
    category: str | None = None
    """The category of the selection file; by default all categories are searched."""
    missing: Literal["error", "dense"] = "error"
    """What happens to a question that the file lacks: it is refused, or it reads the whole dense cache."""
    selection: Selection | None = None
    """The question's entry, in place of `file`."""

    def __post_init__(self) -> None:
        if (self.file is not None) + (self.selection is not None) != (self.scorer == "file"):
            raise UserError("relevance: the file scorer and a selection file (or one of its entries) go together")
        if self.file is None and (self.category is not None or self.missing != "error"):
            raise UserError("relevance: category and missing have no effect without a selection file")


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A selection block of the video, as an answer reports it."""

    number: int
    start: float
    end: float
    """Times of its first frame and of its last frame in seconds."""
    score: float | None
    dense: bool


def check_pool(bilevel: BilevelConfig, visual_tokens: int) -> None:
    """Raises UserError for a pool that no group of the model's visual tokens fills."""
    if bilevel.pool > visual_tokens:
        raise UserError(f"pool must be from 1 to {visual_tokens} (visual tokens a group), not {bilevel.pool}")


def check_bilevel(bilevel: BilevelConfig, layout: VideoLayout) -> None:
    """Raises UserError for settings that do not fit a video."""
    check_pool(bilevel, layout.visual_tokens)
    blocks, top = bilevel.blocks(layout), bilevel.top(layout)
    if top > blocks:
        raise UserError(f"top chunks must be from 0 to {blocks} (the video has {blocks} chunks), not {top}")


def selection_for(relevance: RelevanceConfig, video: Path, question: str) -> Selection | None:
    """A question's entry in the selection file; None where it has none and `missing` is `dense`."""
    assert relevance.file is not None
    selection = read_selection(relevance.file, video.name, question, relevance.category)
    if selection is None and relevance.missing == "error":
        raise UserError(f"{relevance.file}: no entry for {video.name} and {question!r}")
    return selection


def choose_context(
    network: Network,
    video: WatchedVideo,
    question: str,
    suffix: SuffixIds,
    bilevel: BilevelConfig | None,
    relevance: RelevanceConfig,
) -> tuple[KVCache, list[Chunk]]:
    """The cache that an answer reads, and its selection blocks. The list is empty where the whole cache is dense.

    Pictures without a video are always dense.
    """
    kv = video.kv
    if not kv.layout.groups:
        return kv.cache, []
    if relevance.scorer == "file":
        selection = relevance.selection or selection_for(relevance, Path(video.path), question)
        if selection is None:
            logger.info("%s has no entry for this question: reading the whole dense cache", relevance.file)
            return session.whole_cache(kv), []
        bilevel = BilevelConfig(selection.select_chunk_groups, selection.pool, 0)
        check_bilevel(bilevel, kv.layout)
        units = ceil_div(kv.layout.groups, UNIT_GROUPS)
        if any(not 0 <= u < units for u in selection.units):
            raise UserError(
                f"{relevance.file or video.path}: selects unit {max(selection.units)}, the video has {units} as it was "
                "sampled"
            )
        chosen = session.context_of_units(network, kv, selection.units, bilevel)
    elif bilevel is None:
        return session.whole_cache(kv), []
    else:
        if kv.grows:
            top = min(bilevel.top(kv.layout), bilevel.blocks(kv.layout))
            bilevel = dataclasses.replace(bilevel, top_chunks=top)
        check_bilevel(bilevel, kv.layout)
        scorer = relevance.attention if relevance.scorer == "attention" else relevance.scorer
        if isinstance(scorer, AttentionScorer) and scorer.keys == "auto":
            _announce(
                "chunks are scored by the dense KV (auto)"
                if kv.on_device
                else "the dense KV was offloaded: chunks are scored by the pooled KV"
                if kv.piece_groups is None
                else "the dense KV of older chunks has left the device: chunks are scored piece by piece"
            )
        chosen = session.choose_context(network, kv, suffix, bilevel, scorer)
    return chosen.context, _chunks(video, bilevel.select_chunk_groups, chosen.dense_blocks, chosen.scores)


@functools.cache
def _announce(choice: str) -> None:
    """Logs an automatic choice once in a process."""
    logger.info(choice)


def _chunks(video: WatchedVideo, size: int, dense: np.ndarray, scores: np.ndarray | None) -> list[Chunk]:
    frames = size * FRAMES_PER_GROUP
    return [
        Chunk(
            number=video.first_chunk + b + 1,
            start=video.times[b * frames],
            end=video.times[min((b + 1) * frames, len(video.times)) - 1],
            score=None if scores is None else float(scores[b]),
            dense=bool(dense[b]),
        )
        for b in range(ceil_div(video.kv.layout.groups, size))
    ]
