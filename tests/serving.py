"""A server in this process, for tests of its HTTP interface."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn

import xl2jax
from xl2jax.inference.video_cache import CacheConfig
from xl2jax.serving.connections import server_config
from xl2jax.serving.engine import Engine
from xl2jax.serving.limits import Limits
from xl2jax.serving.live import LiveSessions
from xl2jax.serving.media import Library, MediaRules
from xl2jax.serving.metrics import Metrics
from xl2jax.serving.partial import PartialUploads
from xl2jax.serving.server import listen
from xl2jax.serving.service import Service
from xl2jax.serving.uploads import Uploads
from xl2jax.serving.videos import Budgets, WatchedVideos
from xl2jax.serving.warm_up import warm_up

GIB = 1 << 30


def make_service(
    model: xl2jax.Model,
    folder: Path,
    *,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
    rules: MediaRules = MediaRules(),  # noqa: B008 (frozen)
    budgets: Budgets = Budgets(GIB, 0, GIB),  # noqa: B008 (frozen)
    keep: bool = True,
    finish_abandoned: bool = False,
    warm_up_frames: int = 0,
    **options: Any,
) -> Service:
    """A service whose files lie in `folder`. The engine is not started."""
    metrics = Metrics()
    videos = WatchedVideos(
        model,
        budgets,
        folder / "videos" if keep else None,
        metrics,
        prefill=xl2jax.PrefillConfig(),
        cache=CacheConfig(),
    )
    settings: Any = {"prefill": videos.prefill, "cache": videos.cache, "bilevel": xl2jax.BilevelConfig()}
    uploads = Uploads(folder / "uploads", limits.video_bytes, 2 * limits.video_bytes)
    spool = folder / "spool"
    spool.mkdir(exist_ok=True)
    live = LiveSessions(model, videos, limits, metrics, bilevel=options.get("bilevel", xl2jax.BilevelConfig()))
    return Service(
        model="tiny",
        tokenizer=model.tokenizer,
        engine=Engine(
            model,
            videos,
            limits,
            metrics,
            live,
            finish_abandoned=finish_abandoned,
            warm_up=(lambda: warm_up(model, warm_up_frames, limits.answers, **settings)) if warm_up_frames else None,
        ),
        videos=videos,
        library=Library(rules, limits, uploads, spool),
        uploads=uploads,
        partial=PartialUploads(folder / "parts", uploads),
        live=live,
        limits=limits,
        metrics=metrics,
        **{"bilevel": xl2jax.BilevelConfig(), "hosts": ("127.0.0.1",)} | options,
    )


@contextlib.contextmanager
def served(service: Service) -> Iterator[str]:
    """Serves in a thread: the address."""
    server = uvicorn.Server(server_config(service, 5))
    with listen("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])))
        service.engine.start()
        thread.start()
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join(30)
            service.engine.stop()


def metric(service: Service, name: str, **labels: str) -> float:
    """The value of a metric; 0 where nothing was counted."""
    return service.metrics.value(name, **labels)


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Waits until a condition holds. Fails after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition never held"
        time.sleep(0.01)
