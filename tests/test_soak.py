"""Many videos and questions in one process leak nothing."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import jax
import numpy as np
import psutil
import pytest

import xl2jax
from xl2jax import FrameSampling, TokenSampling
from xl2jax.inference import compiled


def compiled_programs() -> int:
    return sum(f._cache_size() for f in vars(compiled).values() if hasattr(f, "_cache_size"))


def held() -> dict[str, int]:
    """Counts of what a process could leak."""
    gc.collect()
    return {
        "threads": threading.active_count(),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "array bytes": sum(x.nbytes for x in jax.live_arrays()),
        "programs": compiled_programs(),
        "resident": psutil.Process().memory_info().rss,
    }


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_sixty_videos_and_two_hundred_questions(model: xl2jax.Model, clip: Path) -> None:
    """60 videos of 20 lengths are asked, then one is asked 200 questions. The first round of lengths may compile."""
    lengths = [4 + 7 * n for n in range(20)]
    rng = np.random.default_rng(0)

    def one_round() -> dict[str, int]:
        for frames in rng.permutation(lengths):
            with model.watch(clip, FrameSampling(fps=10, max_frames=int(frames))) as video:
                model.ask(video, "What happens?", max_new_tokens=6)
        return held()

    one_round()
    first, second = one_round(), one_round()
    for name in ("threads", "descriptors", "array bytes", "programs"):
        assert second[name] == first[name], name
    assert second["resident"] < first["resident"] + (64 << 20)

    with model.watch(clip) as video:
        for words, tokens in ((1, 6), (60, 40)):  # what is longer has programs of its own
            model.ask(video, " ".join(["what"] * words), max_new_tokens=tokens)
        before = held()
        for number in range(200):
            words = " ".join(["what"] * int(rng.integers(1, 60)))
            sampling = TokenSampling(float(rng.uniform(0, 1.5)), float(rng.uniform(0.1, 1)))
            model.ask(video, words, max_new_tokens=int(rng.integers(1, 40)), sampling=sampling, seed=number)
        after = held()
    for name in ("threads", "descriptors", "array bytes", "programs"):
        assert after[name] == before[name], name
    assert after["resident"] < before["resident"] + (64 << 20)
