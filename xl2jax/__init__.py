"""Video-XL-2 in JAX.

Axis letters, in every docstring and einsum:

    B batch     F frames    G groups of 4 frames    P patches of a frame    C vision width
    V visual tokens of a group    T queries, or frames in DTS    S cache slots    L layers
    D LLM width    N heads    K KV heads    H head width
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xl2jax.api import Answer, Model, load
    from xl2jax.bilevel import BilevelConfig
    from xl2jax.config import PRESETS, VideoXL2Config
    from xl2jax.errors import UserError
    from xl2jax.generate import SamplingConfig
    from xl2jax.layout import PrefillConfig
    from xl2jax.relevance import AttentionScorer
    from xl2jax.selection import Chunk, RelevanceConfig
    from xl2jax.video import SampleConfig
    from xl2jax.watched import CacheConfig, WatchedVideo

# Public names are imported when they are first used: `infer.py --help` needs no JAX.
_PUBLIC = {
    "api": ("Answer", "Model", "load"),
    "bilevel": ("BilevelConfig",),
    "config": ("PRESETS", "VideoXL2Config"),
    "errors": ("UserError",),
    "generate": ("SamplingConfig",),
    "layout": ("PrefillConfig",),
    "relevance": ("AttentionScorer",),
    "selection": ("Chunk", "RelevanceConfig"),
    "video": ("SampleConfig",),
    "watched": ("CacheConfig", "WatchedVideo"),
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = [  # noqa: RUF022 (in the order of use)
    "load", "Model", "Answer", "WatchedVideo", "Chunk",
    "SampleConfig", "PrefillConfig", "BilevelConfig", "CacheConfig", "RelevanceConfig", "AttentionScorer", "SamplingConfig",
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
