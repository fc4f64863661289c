"""What 8 and 4 bits change in a model's logits and greedy tokens.

A model watches scenes of `xl2jax.evaluation.scenes` and answers questions greedily. Another one, in fewer bits, then reads
the same videos, questions and answers, and the logits of both are compared token by token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from xl2jax.config import FRAMES_PER_GROUP
from xl2jax.errors import UserError
from xl2jax.evaluation.case import token_logits
from xl2jax.evaluation.kv_rounding import layer_rows
from xl2jax.evaluation.questions import NEEDLE_KINDS, ask
from xl2jax.evaluation.scenes import Scene, make_scene, scene_clip
from xl2jax.inference import session
from xl2jax.inference.api import Model
from xl2jax.inference.decoding import answer_tokens
from xl2jax.inference.generate import TokenSampling
from xl2jax.inference.video_cache import CacheConfig
from xl2jax.models.param_tree import flatten
from xl2jax.prompt import suffix

_NEW_TOKENS = 16


@dataclasses.dataclass(frozen=True)
class Videos:
    """Which scenes are watched."""

    frames: int = 64
    """Frames of each."""
    count: int = 4

    def __post_init__(self) -> None:
        if self.frames < FRAMES_PER_GROUP or self.frames % FRAMES_PER_GROUP:
            raise UserError(f"--frames: a multiple of {FRAMES_PER_GROUP}, not {self.frames}")
        if self.count < 1:
            raise UserError(f"--videos must be 1 or more, not {self.count}")

    def scenes(self) -> list[Scene]:
        """Scenes that no training scene equals: their seeds are odd."""
        groups = self.frames // FRAMES_PER_GROUP
        return [make_scene(2 * n + 1, groups, events=4, needle_at=groups // 2) for n in range(self.count)]


@dataclasses.dataclass
class Reading:
    """What a model made of the videos."""

    texts: list[list[int]]
    """Token ids of each question with its answer."""
    logits: list[np.ndarray]
    """float32 [tokens, vocab] of each."""
    layers: list[dict[str, Any]]
    """The error of the first video's KV in 8 bits, by layer (`xl2jax.evaluation.kv_rounding`)."""


def read(model: Model, videos: Videos, cache: CacheConfig, texts: Sequence[list[int]] | None = None) -> Reading:
    """Runs the questions of all videos with their answers: the model's own greedy ones, or `texts` of another reading."""
    out = Reading([], [], [])
    given = None if texts is None else iter(texts)
    stop = np.asarray(model.tokenizer.stop_ids, np.int32)
    network, greedy = model.network, TokenSampling()
    for scene in videos.scenes():
        with model.watch(scene_clip(scene), bilevel=None, cache=cache) as video:
            context = session.whole_cache(video.kv)
            if not cache.quantized and not out.layers:
                bias = flatten(model.params)["llm.layers.k.bias"]
                channels = network.exact_key_channels()
                out.layers = layer_rows(model.config.llm, context, video.kv.layout, bias, channels)
            rng = np.random.default_rng(scene.seed)
            for kind in NEEDLE_KINDS:
                question = ask(scene, kind, scene.times(), rng, event=scene.events[0])
                if question is None:
                    continue
                ids = list(suffix(model.tokenizer, question.text).ids)
                if given is None:
                    state, _ = session.start_answer(
                        network, context, session.suffix_ids(ids, 0, len(ids)), new_tokens=_NEW_TOKENS, stop=stop,
                        sampling=greedy,
                    )  # fmt: skip
                    *_, answer = answer_tokens(
                        network, context, state, new_tokens=_NEW_TOKENS, stop=stop, sampling=greedy
                    )
                    ids += answer
                else:
                    ids = next(given)
                _, hidden = session.start_answer(
                    network, context, session.suffix_ids(ids, 0, len(ids)), new_tokens=1, stop=stop, sampling=greedy
                )
                out.texts.append(ids)
                out.logits.append(np.asarray(token_logits(network, hidden))[: len(ids)])
    return out


def compared(expected: Reading, actual: Reading) -> dict[str, Any]:
    """Relative L2 of all logits, the share of tokens whose most likely successor is the same, and the mean KL."""
    a, e = (np.concatenate(x.logits).astype(np.float64) for x in (actual, expected))

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x - x.max(axis=1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=1, keepdims=True))

    p, q = log_softmax(e), log_softmax(a)
    return {
        "tokens": len(e),
        "logits, relative L2": float(np.linalg.norm(a - e) / np.linalg.norm(e)),
        "greedy tokens equal": float((a.argmax(1) == e.argmax(1)).mean()),
        "KL": float((np.exp(p) * (p - q)).sum(axis=1).mean()),
    }
