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

CLIENTS = 32
SECONDS = float(os.environ.get("XL2JAX_SOAK_SECONDS", "30"))
"""How long the clients ask; 600 for the long run, which also checks that the memory stays flat."""


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 600)
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
        warm_up_frames=40,
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
                answer = await http.post("/v1/chat/completions", json=body, timeout=0.05 if leaves else 120)
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

    memory: dict[float, float] = {}

    async def measure(start: float) -> None:
        """The memory after a tenth, half and all of the time: minutes 1, 5 and 10 of the long run."""
        for share in (0.1, 0.5, 1.0):
            await asyncio.sleep(max(start + share * SECONDS - time.monotonic(), 0))
            memory[share * SECONDS] = resident_mib()

    async def all_clients(address: str) -> None:
        async with httpx2.AsyncClient(base_url=address) as http:
            start = time.monotonic()
            clients = (client(http, number, start + SECONDS) for number in range(CLIENTS))
            await asyncio.gather(measure(start), *clients)

    threads, files = threading.active_count(), descriptors()
    with served(service) as address:
        wait_for(lambda: service.engine.ready, 300)
        asyncio.run(all_clients(address))
        wait_for(lambda: service.in_flight == 0)
        wait_for(lambda: metric(service, "xl2jax_answers_running") == 0)
        assert metric(service, "xl2jax_kv_bytes", place="device") <= 3.2 * size
        assert not list((tmp_path / "spool").iterdir())
    print(f"{counts}, MiB by second: { {round(t): round(m) for t, m in memory.items()} }")
    if SECONDS >= 300:
        _, half, end = memory.values()
        assert end < 1.1 * half
    assert counts["right"] > 50
    assert counts["left"] > 0
    wait_for(lambda: threading.active_count() <= threads and descriptors() <= files, 10)
