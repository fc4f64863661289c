"""Compiles what the first questions need before they come."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from xl2jax.config import FRAMES_PER_GROUP
from xl2jax.inference import session
from xl2jax.inference.api import Model
from xl2jax.inference.bilevel import BilevelConfig
from xl2jax.inference.cache import KVCache
from xl2jax.inference.decoding import MOST_TOGETHER, STREAM_TOKENS, Decoding, decode_together, row_count
from xl2jax.inference.generate import SuffixIds, TokenSampling
from xl2jax.inference.layout import PrefillConfig
from xl2jax.inference.relevance import AttentionScorer
from xl2jax.inference.video_cache import CacheConfig
from xl2jax.video.clip import Clip
from xl2jax.video.readers import Reader

_QUESTION_TOKENS = (100, 24)
"""A question behind a few turns of a conversation, and a question."""


def warm_up(
    model: Model, frames: int, answers: int, *, prefill: PrefillConfig, cache: CacheConfig, bilevel: BilevelConfig
) -> Iterator[None]:
    """Watches a black video of `frames` frames and decodes 1, 2, 4 ... up to `answers` answers about it together.

    The programs depend on sizes that are rounded up, so that they serve videos of about this length. It yields between
    its steps, so that it can be left early. Raises UserError where there is no memory for it.
    """
    indices = np.arange(frames - frames % FRAMES_PER_GROUP)
    clip = Clip(Path("warm-up"), _Blank(len(indices)), indices, [float(i) for i in indices])
    watching = model.start_watch(clip, prefill, cache=cache, bilevel=bilevel)
    for segment in watching.batches():
        for _ in watching.parts(segment):
            yield
        yield
    with model.adopt(watching.finish()) as video:
        for tokens in _QUESTION_TOKENS:
            suffix = session.suffix_ids([0] * tokens, 0, tokens // 2)
            context = session.choose_context(model.network, video.kv, suffix, bilevel, AttentionScorer()).context
            yield
            _answer(model, context, suffix, 1)
        for power in range(1, row_count(min(answers, MOST_TOGETHER)).bit_length()):
            yield
            _answer(model, context, suffix, 1 << power)


class _Blank(Reader):
    """Black frames, one a second."""

    def __init__(self, total: int):
        self.total, self.fps = total, 1.0

    def spans(self, indices: np.ndarray) -> list[np.ndarray]:
        return [indices]

    def frames(self, indices: np.ndarray) -> Iterator[np.ndarray]:
        for _ in indices:
            yield np.zeros((64, 64, 3), np.uint8)


def _answer(model: Model, context: KVCache, suffix: SuffixIds, count: int) -> None:
    """Decodes `count` answers together, of which none ends early."""
    network, greedy, limit = model.network, TokenSampling(), 1 + STREAM_TOKENS
    stop = np.full(len(model.tokenizer.stop_ids), -1, np.int32)
    with contextlib.ExitStack() as opened:
        together = []
        for _ in range(count):
            state, _ = session.start_answer(network, context, suffix, new_tokens=limit, stop=stop, sampling=greedy)
            answer = Decoding(network, context, state, new_tokens=limit, stop=stop, sampling=greedy)
            together.append(opened.enter_context(contextlib.closing(answer)))
        decode_together(network, together)
