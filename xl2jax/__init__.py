"""Video-XL-2 in JAX.

Axis letters have one meaning in every docstring and einsum:

    B batch     F frames    G groups of 4 frames    P patches of a frame    C vision width
    V visual tokens of a group    T queries, or frames in DTS    S cache slots    L layers
    D LLM width    N heads    K KV heads    H head width

Words for the parts of a video have one meaning too:

    frame            one image of the video
    group            4 consecutive chosen frames, which DTS merges: V visual tokens and a few time tokens
    chunk            prefill chunk: `chunk_groups` consecutive groups; visual tokens see whole chunks
    window           how many chunks before its own a visual token sees: `window_chunks`
    step             groups that go through the networks together in one iteration of `lax.scan`; need not be a chunk
    segment          the steps of one `lax.scan`; one compiled program runs once for each segment
    selection block  `select_chunk_groups` consecutive groups that are dense or pooled together; users know it as a
                     chunk of the answer (`Chunk`, `top_chunks`)
    unit             2 groups; upstream's selection files count in units
    key block        key slots that the attention kernel reads together
    tile             square part of a picture, which is encoded like a group of 4 equal frames; in attention kernels, the
                     queries that one instance works on, key block by key block
    span             frames that one reading thread decodes in one go, from a key frame on

Tokens are of four kinds. The prefix is the prompt left of the video, with the pictures there, and the suffix is the prompt
right of it, with the question. Pictures and text between the video and the question are the tail. Time tokens stand before
the visual tokens of their group. Prefix, time tokens and tail together are the globals.
docs/architecture.md has the same words with the sizes of the released model.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xl2jax.config import PRESETS, VideoXL2Config
    from xl2jax.errors import UserError
    from xl2jax.inference.answering import Answer
    from xl2jax.inference.api import Model, load, load_copies
    from xl2jax.inference.bilevel import BilevelConfig
    from xl2jax.inference.copies import share
    from xl2jax.inference.devices import Devices
    from xl2jax.inference.generate import TokenSampling
    from xl2jax.inference.layout import PrefillConfig
    from xl2jax.inference.live import LiveVideo
    from xl2jax.inference.live_sizes import LiveMemory
    from xl2jax.inference.relevance import AttentionScorer
    from xl2jax.inference.selection import Chunk, RelevanceConfig
    from xl2jax.inference.video_cache import CacheConfig, WatchedVideo
    from xl2jax.video.clip import FrameSampling, pictures_as_frames

# Public names are imported when they are first used, so that `infer.py --help` needs no JAX.
_PUBLIC = {
    "config": ("PRESETS", "VideoXL2Config"),
    "errors": ("UserError",),
    "inference.answering": ("Answer",),
    "inference.api": ("Model", "load", "load_copies"),
    "inference.copies": ("share",),
    "inference.devices": ("Devices",),
    "inference.bilevel": ("BilevelConfig",),
    "inference.generate": ("TokenSampling",),
    "inference.layout": ("PrefillConfig",),
    "inference.live": ("LiveVideo",),
    "inference.live_sizes": ("LiveMemory",),
    "inference.relevance": ("AttentionScorer",),
    "inference.selection": ("Chunk", "RelevanceConfig"),
    "inference.video_cache": ("CacheConfig", "WatchedVideo"),
    "video.clip": ("FrameSampling", "pictures_as_frames"),
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = [  # noqa: RUF022 (in the order of use)
    "load", "load_copies", "share", "Devices", "Model", "Answer", "WatchedVideo", "LiveVideo", "LiveMemory", "Chunk",
    "FrameSampling", "PrefillConfig", "BilevelConfig", "CacheConfig", "RelevanceConfig", "AttentionScorer", "TokenSampling",
    "pictures_as_frames",
    "VideoXL2Config", "PRESETS", "UserError",
]  # fmt: skip

try:
    __version__ = version("xl2jax")
except PackageNotFoundError:  # a checkout that was not installed
    __version__ = "unknown"


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"xl2jax.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'xl2jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
