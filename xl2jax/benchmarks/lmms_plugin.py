"""The model for lmms-eval's own command, without PyTorch: `lmms-eval --model xl2jax --model_args pretrained=FOLDER`.

lmms-eval finds `manifests` by the entry point `lmms_eval.models`, and loads the class of `lmms_model`, which is a shell
around `VideoAnswers`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from xl2jax.benchmarks.engine import Ask, Engine, ReadAhead, Reply
from xl2jax.benchmarks.extraction import rewrite_times
from xl2jax.benchmarks.released import DEFAULTS
from xl2jax.benchmarks.settings import View, view_of
from xl2jax.errors import UserError

MODEL = "xl2jax"
_MAX_NEW_TOKENS = 1024
"""Limit on an answer where a task has none."""


def manifests() -> Any:
    """What the entry point gives to lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL, simple_class_path="xl2jax.benchmarks.lmms_model.XL2JAX")


@dataclasses.dataclass(frozen=True)
class Request:
    """A question about one video."""

    prompt: str
    video: Path
    max_new_tokens: int

    @classmethod
    def parse(cls, prompt: str, options: dict[str, Any], visuals: Sequence[Any]) -> Request:
        """A request of lmms-eval. Raises UserError where it is not greedy, or not about exactly one video file."""
        videos = [visual for visual in visuals if isinstance(visual, str)]
        if len(videos) != 1:
            raise UserError(f"{MODEL} answers questions about one video file, not about {len(videos)}")
        if options.get("do_sample") or options.get("temperature"):
            raise UserError(f"{MODEL} decodes greedily in lmms-eval: leave out do_sample and temperature")
        return cls(prompt, Path(videos[0]), int(options.get("max_new_tokens", _MAX_NEW_TOKENS)))


@dataclasses.dataclass(frozen=True)
class PluginSettings:
    """Model arguments. `rewrite_times` rewrites `mm:ss` in prompts as upstream's model wrapper does."""

    setting: Literal["pure", "chunked", "bilevel"] = "chunked"
    max_frames: int | None = None
    chunk_groups: int | None = None
    window_chunks: int | None = None
    rewrite_times: bool = False

    def view(self) -> View:
        """Raises UserError for values out of range."""
        if self.setting not in DEFAULTS:
            raise UserError(f"setting: choose from {', '.join(DEFAULTS)}, not {self.setting!r}")
        given = {
            name: int(value)
            for name in ("max_frames", "chunk_groups", "window_chunks")
            if (value := getattr(self, name)) is not None
        }
        return view_of(dataclasses.replace(DEFAULTS[self.setting], **given), self.setting)


class VideoAnswers:
    """Answers requests, watching each video once."""

    def __init__(self, engine: Engine, settings: PluginSettings):
        self._engine, self._settings, self._view = engine, settings, settings.view()

    def answer(self, requests: Sequence[Request], on_answer: Callable[[], object] = lambda: None) -> list[Reply]:
        """Replies in the order of the requests. `on_answer` is called after each.

        Raises UserError where a video cannot be watched: lmms-eval has no way to leave a question out.
        """
        groups: dict[Path, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(request.video, []).append(number)
        replies: dict[int, Reply] = {}
        with ReadAhead(list(groups), lambda path: self._engine.open(path, self._view)) as ahead:
            for numbers in groups.values():
                video = ahead.next().watch(ahead.batches())
                try:
                    for number in numbers:
                        request = requests[number]
                        prompt = rewrite_times(request.prompt) if self._settings.rewrite_times else request.prompt
                        replies[number] = video.ask(Ask(prompt, request.max_new_tokens))
                        on_answer()
                finally:
                    video.close()
        return [replies[number] for number in range(len(requests))]
