"""The requests to /v1/live, and the WebSocket over which a client sends the frames of a live video.

A binary message is one image, JPEG, PNG or WebP. It is dated by the text message before it, {"seconds": 12.5}, or by the
moment at which it comes. The server sends what it has seen about once a second, as JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.websockets import WebSocket, WebSocketDisconnect

from xl2jax.errors import UserError
from xl2jax.serving.bodies import json_body
from xl2jax.serving.errors import RequestError, late
from xl2jax.serving.guard import SUBPROTOCOL, error_response
from xl2jax.serving.limits import LiveLimits
from xl2jax.serving.live import LiveSession, LiveSettings
from xl2jax.serving.live_urls import OpenAddress
from xl2jax.serving.service import Place, Service, service_of
from xl2jax.system.schema import Schema, parse_json

_TELL_SECONDS = 1.0
_TEXT_CHARACTERS = 256
_REASON_BYTES = 100  # the protocol has room for 123

BAD_MESSAGE, ENDED, REPLACED = 4400, 4404, 4409
"""Codes with which the server closes a WebSocket: a message that is not understood, a live video that has ended or failed,
and another connection that feeds it now."""


class _Start(Schema):
    """The body of POST /v1/live."""

    model_config = Schema.model_config | {"extra": "forbid"}

    url: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    fps: Annotated[float, Field(gt=0)] | None = None
    clock: Literal["stream", "wall"] = "stream"
    minutes: Annotated[float, Field(gt=0)] | None = None
    dense_minutes: Annotated[float, Field(gt=0)] | None = None
    host_gib: Annotated[float, Field(ge=0)] | None = None


class _Dated(Schema):
    """The text message before an image."""

    model_config = Schema.model_config | {"extra": "forbid"}

    seconds: float


async def start(request: Request, service: Service, place: Place) -> Response:
    """POST /v1/live."""
    if not service.limits.live.sessions:
        raise RequestError(403, "this server watches no live videos (--live-sessions)", code="no_live_videos")
    try:
        asked = parse_json(await json_body(request, service.limits), _Start, "request")
    except UserError as e:
        raise RequestError(400, str(e)) from None
    settings = _settings(asked, service.limits.live)
    connect = None
    if settings.url is not None:
        downloads = service.library.downloads
        await downloads.check_host(settings.url)

        def connect(url: str, closed: threading.Event) -> OpenAddress:
            return OpenAddress(downloads, url, closed)

    session = service.live.open(settings, connect)
    try:
        async with asyncio.timeout(service.limits.request_seconds):
            await asyncio.shield(asyncio.wrap_future(session.opened))  # the engine sets it even if it is late
    except TimeoutError:
        service.live.end(session, "it was not opened in time")
        raise late(service.limits) from None
    return JSONResponse(session.describe())


def _settings(asked: _Start, limits: LiveLimits) -> LiveSettings:
    """What a client asks for, within the limits. Raises RequestError."""
    for name in ("fps", "minutes", "dense_minutes", "host_gib"):
        value, most = getattr(asked, name), getattr(limits, name)
        if value is not None and value > most:
            raise RequestError(400, f"{name}: should be at most {most:g} here, not {value:g}", param=name)
    minutes = limits.minutes if asked.minutes is None else asked.minutes
    return LiveSettings(
        url=asked.url,
        fps=min(1.0, limits.fps) if asked.fps is None else asked.fps,
        clock=asked.clock,
        dense_minutes=min(limits.dense_minutes, minutes) if asked.dense_minutes is None else asked.dense_minutes,
        minutes=minutes,
        host_gib=limits.host_gib if asked.host_gib is None else asked.host_gib,
    )


async def list_sessions(request: Request) -> Response:
    """GET /v1/live."""
    found = [session.describe() for session in service_of(request).live.list()]
    return JSONResponse({"object": "list", "data": found, "has_more": False})


async def one_session(request: Request) -> Response:
    """GET and DELETE /v1/live/{name}."""
    live = service_of(request).live
    session = live.get(request.path_params["name"])
    if request.method == "DELETE":
        live.end(session, "it was ended by a client")
        return JSONResponse({"id": session.id, "object": "live", "deleted": True})
    return JSONResponse(session.describe())


async def frames(socket: WebSocket) -> None:
    """The WebSocket of /v1/live/{name}/frames."""
    try:
        session = service_of(socket).live.get(socket.path_params["name"])
        if session.settings.url is not None:
            raise RequestError(409, "this live video is read from its address", code="live_has_url")
    except RequestError as e:
        await socket.send_denial_response(error_response(e))
        return
    await socket.accept(SUBPROTOCOL if SUBPROTOCOL in socket.scope["subprotocols"] else None)
    async with session.turn:
        mine = await asyncio.to_thread(session.connect)
    work = [asyncio.create_task(_receive(socket, session, mine)), asyncio.create_task(_tell(socket, session, mine))]
    done, running = await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
    for task in running:
        task.cancel()
    await asyncio.wait(work)
    with contextlib.suppress(WebSocketDisconnect, RuntimeError, OSError):  # the client has gone
        for task in done:
            try:
                task.result()
            except _End as end:
                await socket.send_json({"type": "error", **end.error.body})
                reason = end.error.message.encode()[:_REASON_BYTES].decode(errors="ignore")
                await socket.close(end.code, reason)


class _End(Exception):
    """Why the server closes a WebSocket."""

    def __init__(self, code: int, error: RequestError):
        super().__init__(error.message)
        self.code, self.error = code, error


async def _receive(socket: WebSocket, session: LiveSession, mine: object) -> None:
    """Takes images until the client goes away. Raises _End."""
    limit = service_of(socket).limits.live.frame_bytes
    seconds: float | None = None
    while True:
        message = await socket.receive()
        if message["type"] == "websocket.disconnect":
            return
        if session.feeder is not mine:
            raise _replaced()
        data = message.get("bytes")
        if data is None:
            seconds = _dated(message.get("text") or "")
        elif len(data) > limit:
            raise _End(
                BAD_MESSAGE,
                RequestError(413, f"an image has more than the {limit:,} bytes that are read", code="frame_too_large"),
            )
        else:
            try:
                async with session.turn:
                    if session.feeder is not mine:
                        raise _replaced()
                    await asyncio.to_thread(session.feed, data, seconds)
            except UserError:
                raise _ended(session) from None
            seconds = None


def _dated(text: str) -> float:
    """The seconds that a text message gives to the next image. Raises _End."""
    try:
        if len(text) > _TEXT_CHARACTERS:
            raise UserError(f"message: has more than the {_TEXT_CHARACTERS} characters that are read")
        return parse_json(text.encode(), _Dated, "message").seconds
    except UserError as e:
        raise _End(BAD_MESSAGE, RequestError(400, str(e), code="bad_message")) from None


async def _tell(socket: WebSocket, session: LiveSession, mine: object) -> None:
    """Says what was seen, when that has changed. Raises _End where the live video has ended, or is fed by another client."""
    told: dict[str, Any] | None = None
    while True:
        if session.feeder is not mine:
            raise _replaced()
        progress = session.progress
        if progress != told:
            await socket.send_json({"type": "progress", **progress})
            told = progress
        if session.over is not None or progress["state"] != "watching":
            raise _ended(session)
        await asyncio.sleep(_TELL_SECONDS)


def _replaced() -> _End:
    return _End(REPLACED, RequestError(409, "another connection feeds this live video now", code="replaced"))


def _ended(session: LiveSession) -> _End:
    why = session.over or session.reason or "its frames have ended"
    return _End(ENDED, RequestError(404, f"this live video has ended: {why}", code="live_ended"))
