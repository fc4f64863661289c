"""The HTTP interface. It never computes: questions go to the engine, and files are handled in threads."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xl2jax.errors import UserError
from xl2jax.inference.bilevel import BilevelConfig
from xl2jax.prompt import PromptTokenizer, suffix
from xl2jax.serving.addresses import too_large
from xl2jax.serving.engine import Begun, Ended, Engine, Event, Failed, Job, Piece, Watched, not_kept
from xl2jax.serving.errors import RequestError, internal_error
from xl2jax.serving.limits import Limits
from xl2jax.serving.media import Library, Media
from xl2jax.serving.metrics import Metrics
from xl2jax.serving.protocol import Asked, Reply, VideoUse, read_request
from xl2jax.serving.uploads import Uploads
from xl2jax.serving.videos import WatchedVideos
from xl2jax.video.frame_sampling import FrameSampling

logger = logging.getLogger(__name__)

_HEARTBEAT_SECONDS = 10.0
_FORM_BYTES = 1 << 20  # of an upload, beside the file


@dataclasses.dataclass
class Service:
    """What the HTTP interface works with.

    model: its name for clients. hosts: allowed values of the Host header, without a port; None allows any.
    draining: no new request is admitted.
    """

    model: str
    tokenizer: PromptTokenizer
    engine: Engine
    videos: WatchedVideos
    library: Library
    uploads: Uploads
    limits: Limits
    metrics: Metrics
    bilevel: BilevelConfig | None
    api_key: str | None = None
    hosts: tuple[str, ...] | None = None
    draining: bool = False
    in_flight: int = 0
    mean_seconds: float = 1.0
    """Of the latest requests, weighted towards the newest."""

    def __post_init__(self) -> None:
        self._named: dict[str, tuple[str, FrameSampling, float | None]] = {}

    def remember(self, uuid: str, content: str, frames: FrameSampling, folder_fps: float | None) -> None:
        """Gives a video a name for later requests. The oldest of very many names are forgotten."""
        self._named.pop(uuid, None)
        self._named[uuid] = (content, frames, folder_fps)
        if len(self._named) > 100_000:
            del self._named[next(iter(self._named))]

    def named(self, uuid: str) -> tuple[str, FrameSampling, float | None]:
        """The content, frames and folder rate of a named video. Raises RequestError with status 404."""
        if uuid not in self._named:
            raise not_kept()
        return self._named[uuid]


def make_app(service: Service) -> ASGIApp:
    """The ASGI application of a service."""
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", _counted(service, _chat), methods=["POST"]),
            Route("/v1/models", _models, methods=["GET"]),
            Route("/v1/models/{name}", _model, methods=["GET"]),
            Route("/v1/files", _counted(service, _upload), methods=["POST"]),
            Route("/v1/files", _files, methods=["GET"]),
            Route("/v1/files/{name}", _file, methods=["GET", "DELETE"]),
            Route("/v1/files/{name}/content", _file_content, methods=["GET"]),
            Route("/health", _health, methods=["GET"]),
            Route("/ready", _ready, methods=["GET"]),
            Route("/metrics", _metrics, methods=["GET"]),
        ],
        exception_handlers={
            RequestError: _answer_error,
            HTTPException: _answer_http_error,
            Exception: _answer_fault,
        },
        middleware=[Middleware(_Guard, service=service)],
    )
    app.state.service = service
    return app


# --- before every request ----------------------------------------------------------------------


class _Guard:
    """Checks the key and where a request comes from, and counts it."""

    def __init__(self, app: ASGIApp, service: Service):
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 499  # the client went away before the answer

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        request = Request(scope)
        try:
            refused = self._refused(request)
            if refused is not None:
                await _error_response(refused)(scope, receive, counted)
            else:
                await self._app(scope, receive, counted)
        finally:
            route = scope.get("route")
            self._service.metrics.requests.labels(getattr(route, "path", "other"), status).inc()

    def _refused(self, request: Request) -> RequestError | None:
        host = request.headers.get("host", "")
        if self._service.hosts is not None and _without_port(host) not in self._service.hosts:
            # A page of another site whose name leads to this machine would be of the same origin.
            return RequestError(403, "requests to this host name are refused", code="foreign_host")
        origin = request.headers.get("origin")
        if origin is not None and _network_location(origin) != host:
            return RequestError(403, "requests from pages of other sites are refused", code="foreign_origin")
        key = self._service.api_key
        if key is None or request.url.path in ("/health", "/ready"):
            return None
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), key.encode()):
            return None
        return RequestError(401, "the API key is missing or wrong (Authorization: Bearer ...)", code="invalid_api_key")


def _without_port(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _network_location(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


type _Handler = Callable[[Request, Service, "_Place"], Awaitable[Response]]


class _Place:
    """A request's place in the bounded queue, until `leave`."""

    def __init__(self, service: Service):
        limit = service.limits.queue
        if service.draining:
            raise RequestError(503, "the server is shutting down", code="shutting_down", retry_after=10)
        if service.in_flight >= limit:
            wait = math.ceil(service.mean_seconds * limit / max(service.limits.answers, 1))
            raise RequestError(
                429, f"{limit} requests are waiting: try again later", code="queue_full", retry_after=min(wait, 600)
            )
        self._service, self._left, self._started = service, False, time.monotonic()
        self._add(1)

    def leave(self) -> None:
        if not self._left:
            self._left = True
            self._add(-1)
            mean = self._service.mean_seconds
            self._service.mean_seconds = mean + 0.1 * (time.monotonic() - self._started - mean)

    def _add(self, number: int) -> None:
        self._service.in_flight += number
        self._service.metrics.in_flight.set(self._service.in_flight)


def _counted(service: Service, handler: _Handler) -> Callable[[Request], Awaitable[Response]]:
    """A handler whose requests take a place in the queue. It leaves the place itself if it returns a stream."""

    async def handle(request: Request) -> Response:
        place = _Place(service)
        try:
            response = await handler(request, service, place)
        except BaseException:
            place.leave()
            raise
        if not isinstance(response, _Stream):
            place.leave()
        return response

    return handle


# --- chat --------------------------------------------------------------------------------------


async def _chat(request: Request, service: Service, place: _Place) -> Response:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RequestError(415, "the body should be application/json", code="wrong_content_type")
    deadline = time.monotonic() + service.limits.request_seconds
    body = await _body(request, service.limits.body_bytes)
    conversation = await _Conversation.begin(request, service, body, deadline)
    if conversation is None:
        return Response(status_code=499)
    if conversation.asked.stream:
        return _Stream(conversation, place)
    async with conversation:
        pieces = [event.text async for event in conversation.events() if isinstance(event, Piece)]
        assert conversation.use is not None
        assert conversation.ended is not None
        return JSONResponse(
            conversation.reply.whole(
                "".join(pieces), conversation.ended.reason, conversation.use, conversation.ended.new_tokens
            )
        )


async def _body(request: Request, limit: int) -> bytes:
    parts, count = [], 0
    async for part in request.stream():
        count += len(part)
        if count > limit:
            raise RequestError(413, f"the body has more than the {limit:,} bytes that are read", code="body_too_large")
        parts.append(part)
    return b"".join(parts)


class _Conversation:
    """A chat request between the client and the engine. It ends when the client goes away.

    `use` and `ended` are set by the events that tell them.
    """

    def __init__(self, request: Request, service: Service, asked: Asked, job: Job, queue: asyncio.Queue[Event | None]):
        self._service, self._job, self._queue = service, job, queue
        self.asked, self.reply = asked, Reply(service.model, asked)
        self.use: VideoUse | None = None
        self.ended: Ended | None = None
        self.deadline = math.inf
        self._leaving = asyncio.create_task(self._watch_client(request))

    @classmethod
    async def begin(cls, request: Request, service: Service, body: bytes, deadline: float) -> _Conversation | None:
        """Reads the request, finds its video and hands the question to the engine. None if the client went away."""
        preparing = asyncio.create_task(_prepare(service, body))
        leaving = asyncio.create_task(_left(request))
        try:
            timeout = deadline - time.monotonic()
            await asyncio.wait({preparing, leaving}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if not preparing.done():
                preparing.cancel()
                with contextlib.suppress(asyncio.CancelledError, RequestError):
                    _, media, _ = await preparing
                    if media is not None:
                        media.release()
                if leaving.done():
                    return None
                raise _late(service)
            asked, media, (content, frames, folder_fps) = preparing.result()
        finally:
            leaving.cancel()
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Event | None] = asyncio.Queue()

        def emit(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(queue.put_nowait, event)

        key = service.videos.key(content, frames, folder_fps)
        job = Job(asked, key, media, frames, emit)
        conversation = cls(request, service, asked, job, queue)
        conversation.deadline = deadline
        service.engine.submit(job)
        return conversation

    async def events(self) -> AsyncIterator[Event | None]:
        """The events of the engine up to `Ended`, and None where nothing happens for a while. Raises RequestError."""
        while self.ended is None:
            left = self.deadline - time.monotonic()
            try:
                event = await asyncio.wait_for(self._queue.get(), min(left, _HEARTBEAT_SECONDS))
            except TimeoutError:
                if time.monotonic() >= self.deadline:
                    raise _late(self._service) from None
                yield None
                continue
            match event:
                case None:
                    raise ClientDisconnect
                case Failed():
                    raise event.error
                case Begun():
                    self.use = event.use
                case Ended():
                    self.ended = event
            yield event

    async def __aenter__(self) -> _Conversation:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._leaving.cancel()
        if self.ended is None:
            self._service.engine.cancel(self._job)
        if self._job.media is not None:
            self._job.media.release()

    async def _watch_client(self, request: Request) -> None:
        await _left(request)
        self._service.engine.cancel(self._job)
        self._queue.put_nowait(None)


async def _left(request: Request) -> None:
    """Waits until the client goes away. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _late(service: Service) -> RequestError:
    return RequestError(504, f"not answered within {service.limits.request_seconds:g} s", code="timeout")


type _Content = tuple[str, FrameSampling, float | None]


async def _prepare(service: Service, body: bytes) -> tuple[Asked, Media | None, _Content]:
    """The checked request, its video if it is here, and what tells it from others."""
    asked = await asyncio.to_thread(read_request, body, service.limits, service.model, service.bilevel)
    try:
        await asyncio.to_thread(suffix, service.tokenizer, asked.question, asked.history)
    except UserError as e:
        raise RequestError(400, str(e), param="messages") from None
    source = asked.source
    if source.is_name:
        content, frames, folder_fps = service.named(source.uuid or "")
        return asked, None, (content, asked.frames or frames, folder_fps)
    media = await service.library.find(source)
    folder_fps = asked.folder_fps if media.path.is_dir() else None
    default = FrameSampling(max_frames=min(FrameSampling.max_frames, service.limits.frames))
    if folder_fps is not None:  # all of the frames that the client chose
        default = FrameSampling(folder_fps, max_fps=None, max_frames=service.limits.frames)
    frames = asked.frames or default
    if source.uuid is not None:
        service.remember(source.uuid, media.content, frames, folder_fps)
    return asked, media, (media.content, frames, folder_fps)


class _Stream(StreamingResponse):
    """An answer as server-sent events. While the video is watched, comments tell how far that is.

    What fails before the first event is an ordinary error with its own status.
    """

    def __init__(self, conversation: _Conversation, place: _Place):
        super().__init__(iter(()), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._conversation, self._place = conversation, place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        conversation = self._conversation
        started = False

        async def write(text: str, *, more: bool = True) -> None:
            nonlocal started
            if not started:
                started = True
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": text.encode(), "more_body": more})

        try:
            async with conversation:
                try:
                    async for event in conversation.events():
                        await write(self._text(event))
                    if conversation.asked.include_usage and conversation.use and conversation.ended:
                        await write(_data(conversation.reply.usage(conversation.use, conversation.ended.new_tokens)))
                    await write("data: [DONE]\n\n", more=False)
                except RequestError as e:
                    if not started:
                        await _error_response(e)(scope, receive, send)
                    else:
                        await write(_data(e.body), more=False)
        except (ClientDisconnect, OSError):
            pass
        finally:
            self._place.leave()

    def _text(self, event: Event | None) -> str:
        reply, use = self._conversation.reply, self._conversation.use
        match event:
            case Watched(frames, total):
                return f": watched {frames} of {total} frames\n\n"
            case Begun():
                return _data(reply.piece("", first=True))
            case Piece(text):
                return _data(reply.piece(text))
            case Ended(reason):
                assert use is not None
                return _data(reply.last(reason, use))
        return ": waiting\n\n"


def _data(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


# --- files -------------------------------------------------------------------------------------


async def _upload(request: Request, service: Service, place: _Place) -> Response:
    limit = service.limits.video_bytes + _FORM_BYTES
    count = 0
    inner = request.receive

    async def bounded() -> Message:
        nonlocal count
        message = await inner()
        count += len(message.get("body", b""))
        if count > limit:
            raise too_large(service.limits.video_bytes)
        return message

    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise RequestError(415, "the body should be multipart/form-data", code="wrong_content_type")
    try:
        async with Request(request.scope, bounded).form(max_files=1, max_fields=16) as form:
            file, purpose = form.get("file"), form.get("purpose", "user_data")
            if not isinstance(file, UploadFile):
                raise RequestError(400, "the form has no file", param="file")
            about = await asyncio.to_thread(service.uploads.add, file.file, file.filename or "video", str(purpose))
    except (MultiPartException, HTTPException):
        raise RequestError(400, "the body is not a form with one file") from None
    return JSONResponse(about)


async def _files(request: Request) -> Response:
    found = await asyncio.to_thread(_service(request).uploads.list)
    return JSONResponse({"object": "list", "data": found, "has_more": False})


async def _file(request: Request) -> Response:
    uploads, name = _service(request).uploads, request.path_params["name"]
    if request.method == "DELETE":
        await asyncio.to_thread(uploads.remove, name)
        return JSONResponse({"id": name, "object": "file", "deleted": True})
    return JSONResponse(await asyncio.to_thread(uploads.describe, name))


async def _file_content(request: Request) -> Response:
    path = await asyncio.to_thread(_service(request).uploads.path, request.path_params["name"])
    return FileResponse(path, media_type="application/octet-stream", headers={"X-Content-Type-Options": "nosniff"})


# --- the rest ----------------------------------------------------------------------------------


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def _models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_about_model(_service(request))]})


async def _model(request: Request) -> Response:
    if request.path_params["name"] != _service(request).model:
        raise RequestError(404, "the model does not exist here: see /v1/models", code="model_not_found")
    return JSONResponse(_about_model(_service(request)))


def _about_model(service: Service) -> dict[str, Any]:
    return {"id": service.model, "object": "model", "created": 0, "owned_by": "xl2jax"}


async def _health(request: Request) -> Response:
    alive = _service(request).engine.alive
    return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)


async def _ready(request: Request) -> Response:
    service = _service(request)
    ready = service.engine.alive and not service.draining
    return JSONResponse({"status": "ready" if ready else "not ready"}, 200 if ready else 503)


async def _metrics(request: Request) -> Response:
    return Response(_service(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _error_response(error: RequestError) -> Response:
    return JSONResponse(error.body, error.status, headers=error.headers)


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return _error_response(error)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: "there is nothing at this address", 405: "this address has no such method"}
    response = _error_response(
        RequestError(error.status_code, words.get(error.status_code, "the request is not valid"))
    )
    response.headers.update(error.headers or {})
    return response


async def _answer_fault(request: Request, error: Exception) -> Response:
    logger.error("a request failed", exc_info=error)
    return _error_response(internal_error())
