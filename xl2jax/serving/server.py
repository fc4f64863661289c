"""Runs the HTTP interface until a signal ends it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Iterator

import uvicorn

from xl2jax.errors import UserError
from xl2jax.serving.connections import server_config
from xl2jax.serving.service import Service

logger = logging.getLogger(__name__)

# uvicorn says so of each WebSocket that is refused with a status.
logging.getLogger("uvicorn.error").addFilter(
    lambda record: record.msg != "ASGI callable returned without completing handshake."
)


class _Server(uvicorn.Server):
    """Its signals are handled here: the first one ends it gracefully, the second one at once."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Port 0 takes a free one. Raises UserError where that is not possible."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as e:
        raise UserError(f"cannot listen on {host}, port {port} ({getattr(e, 'strerror', None) or e})") from None
    listening.set_inheritable(False)
    return listening


def run(service: Service, listening: socket.socket, *, grace_seconds: float) -> None:
    """Serves until SIGTERM or SIGINT.

    What runs then is finished within `grace_seconds`, new requests are refused, and cache files that are being written
    are completed. A second signal ends what runs at once.
    """
    server = _Server(server_config(service, max(int(grace_seconds), 1)))

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()

        def on_signal() -> None:
            if service.draining:
                server.force_exit = True
            service.draining = True
            ended.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        stopping = asyncio.create_task(ended.wait())
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if ended.is_set():
            logger.info("shutting down: %d requests are finished first", service.in_flight)
            server.should_exit = True
        stopping.cancel()
        await serving

    service.engine.start()
    try:
        asyncio.run(serve())
    finally:
        service.engine.stop()
