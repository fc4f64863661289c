"""Ends the connections of clients that are too slow, whatever they are slow at."""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from xl2jax.serving.app import make_app
from xl2jax.serving.service import Service


class Connection(H11Protocol):
    """A connection that ends where the head of a request, or the space for an answer, does not come in `idle_seconds`.

    Bodies have limits of their own (`xl2jax.serving.bodies`).
    """

    idle_seconds = 60.0

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._head: asyncio.TimerHandle | None = None
        self._space: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing():
            self._wait_for_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._space = self.loop.call_later(self.idle_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        _cancel(self._space)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._head, self._space):
            _cancel(timer)

    def _wait_for_head(self) -> None:
        _cancel(self._head)
        self._head = self.loop.call_later(self.idle_seconds, self._end_without_request)

    def _end_without_request(self) -> None:
        if self in self.connections and (self.cycle is None or self.cycle.response_complete):
            self.transport.abort()


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def server_config(service: Service, grace_seconds: int) -> uvicorn.Config:
    """How uvicorn serves a service. `grace_seconds`: what runs is finished within this time when it ends."""
    return uvicorn.Config(
        make_app(service),
        http=type("Connection", (Connection,), {"idle_seconds": service.limits.idle_seconds}),
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_graceful_shutdown=grace_seconds,
        timeout_keep_alive=30,
        ws_max_size=2 * service.limits.live.frame_bytes,  # beyond it the connection is cut; below, there is an error
        ws_per_message_deflate=False,  # images are compressed already
    )
