"""Connections of clients that are slow: none is held for ever."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from serving import make_service, served, wait_for
from websockets.sync.client import connect

import xl2jax
from xl2jax.serving.limits import Limits, LiveLimits
from xl2jax.serving.service import Service

IDLE = 0.5


@pytest.fixture
def service(model: xl2jax.Model, tmp_path: Path) -> Service:
    live = LiveLimits(sessions=1, minutes=0.5, dense_minutes=0.1, host_gib=0.0)
    return make_service(model, tmp_path, limits=Limits(idle_seconds=IDLE, live=live))


@pytest.fixture
def place(service: Service) -> Iterator[tuple[str, int]]:
    with served(service) as address:
        host, port = address.removeprefix("http://").split(":")
        yield host, int(port)


def seconds_until_closed(connection: socket.socket) -> float:
    """How long the other side takes to end the connection, whatever it says before."""
    started = time.monotonic()
    with contextlib.suppress(ConnectionError):
        while connection.recv(1 << 16):
            pass
    return time.monotonic() - started


@pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"])
def test_a_head_that_trickles(place: tuple[str, int], before: bytes) -> None:
    """A byte now and then is no request, neither on a new connection nor behind a request."""
    with socket.create_connection(place, timeout=10) as slow:
        slow.sendall(before)

        def trickle() -> None:
            with contextlib.suppress(OSError):
                for byte in b"GET /health HTTP/1.1\r\n" * 10:
                    slow.sendall(bytes([byte]))
                    time.sleep(IDLE / 5)

        threading.Thread(target=trickle, daemon=True).start()
        assert IDLE / 2 < seconds_until_closed(slow) < 6 * IDLE


def test_an_answer_that_is_not_taken(place: tuple[str, int], service: Service) -> None:
    """A client that reads nothing does not keep a file of the server open."""
    stored = service.uploads.add(io.BytesIO(bytes(32 << 20)), "v.mp4", "user_data")
    data = service.uploads.path(stored["id"])

    def is_open() -> bool:
        return any(os.path.realpath(link) == str(data) for link in Path("/proc/self/fd").iterdir())

    with socket.create_connection(place, timeout=10) as slow:
        slow.sendall(f"GET /v1/files/{stored['id']}/content HTTP/1.1\r\nHost: {place[0]}\r\n\r\n".encode())
        wait_for(is_open, 5)
        wait_for(lambda: not is_open(), 10)


@pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"])
def test_a_websocket_without_frames_stays(place: tuple[str, int], before: bytes) -> None:
    """Heads of requests are not waited for on it, neither on a new connection nor behind a request."""
    host = f"{place[0]}:{place[1]}"
    about = httpx2.post(f"http://{host}/v1/live", json={}, timeout=60).json()
    connection = socket.create_connection(place, timeout=10)
    if before:
        connection.sendall(before)
        answer = b""
        while not answer.endswith(b"}"):  # its head may come before its body
            part = connection.recv(1 << 16)
            assert part, answer
            answer += part
        assert answer.startswith(b"HTTP/1.1 200")
    with connect(f"ws://{host}{about['socket']}", sock=connection) as live:
        assert json.loads(live.recv(10))["received"] == 0
        time.sleep(2.5 * IDLE)
        live.send(b"no image")
        assert json.loads(live.recv(10))["damaged"] == 1
