"""Many clients at once over more videos than the budget holds: right answers, no error but 429, nothing left behind."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
from serving import GIB, make_service, metric, served, wait_for

import xl2jax
from xl2jax.serving.limits import Limits
from xl2jax.serving.media import MediaRules
from xl2jax.serving.videos import Budgets
from xl2jax.testing import write_clip

CLIENTS, SECONDS = 32, 30.0


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.slow
def test_many_clients_over_six_videos(model: xl2jax.Model, tmp_path: Path) -> None:
    media = tmp_path / "media"
    media.mkdir()
    expected: dict[tuple[int, int], str] = {}
    for number in range(6):
        clip = media / f"{number}.mp4"
        write_clip(clip, 5, fps=8, width=64, height=64 + 2 * number)
        with model.watch(clip) as video:
            for question in range(4):
                answer = model.ask(video, f"What is {question}?", max_new_tokens=10 + 4 * question)
                expected[number, question] = answer.text
            size = video.device_bytes
    service = make_service(
        model,
        tmp_path,
        limits=Limits(queue=24, answers=6),
        rules=MediaRules((media,)),
        budgets=Budgets(int(3.2 * size), size, 4 * GIB),
    )
    counts = {"right": 0, "busy": 0, "left": 0}

    async def client(http: httpx2.AsyncClient, number: int, end: float) -> None:
        rng = random.Random(number)
        while time.monotonic() < end:
            video, question = rng.randrange(6), rng.randrange(4)
            content: list[dict[str, Any]] = [
                {"type": "video_url", "video_url": {"url": (media / f"{video}.mp4").as_uri()}},
                {"type": "text", "text": f"What is {question}?"},
            ]
            body = {"messages": [{"role": "user", "content": content}], "max_tokens": 10 + 4 * question}
            leaves = rng.random() < 0.1
            try:
                answer = await http.post("/v1/chat/completions", json=body, timeout=0.05 if leaves else 60)
            except httpx2.TimeoutException:
                assert leaves
                counts["left"] += 1
                continue
            if answer.status_code == 429:
                assert int(answer.headers["Retry-After"]) >= 1
                counts["busy"] += 1
                await asyncio.sleep(0.2)
                continue
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["message"]["content"] == expected[video, question]
            counts["right"] += 1

    async def all_clients(address: str) -> None:
        async with httpx2.AsyncClient(base_url=address) as http:
            end = time.monotonic() + SECONDS
            await asyncio.gather(*(client(http, number, end) for number in range(CLIENTS)))

    threads, files = threading.active_count(), descriptors()
    with served(service) as address:
        asyncio.run(all_clients(address))
        wait_for(lambda: service.in_flight == 0)
        wait_for(lambda: metric(service, "xl2jax_answers_running") == 0)
        assert metric(service, "xl2jax_kv_bytes", place="device") <= 3.2 * size
        assert not list((tmp_path / "spool").iterdir())
    assert counts["right"] > 50
    assert counts["left"] > 0
    wait_for(lambda: threading.active_count() <= threads and descriptors() <= files, 10)
