"""Chat requests: from the body to the engine, and from its events to the answer."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from xl2jax.errors import UserError
from xl2jax.prompt import suffix
from xl2jax.serving.bodies import json_body
from xl2jax.serving.errors import RequestError, late
from xl2jax.serving.guard import error_response
from xl2jax.serving.jobs import Begun, Ended, Event, Failed, Job, Piece, Watched
from xl2jax.serving.live import LIVE_ID, LiveSession
from xl2jax.serving.media import Media
from xl2jax.serving.protocol import Asked, read_request
from xl2jax.serving.reply import Reply, VideoUse
from xl2jax.serving.service import Place, Service
from xl2jax.serving.videos import VideoKey
from xl2jax.video.frame_sampling import FrameSampling

_HEARTBEAT_SECONDS = 10.0


async def chat(request: Request, service: Service, place: Place) -> Response:
    """POST /v1/chat/completions."""
    deadline = time.monotonic() + service.limits.request_seconds
    body = await json_body(request, service.limits)
    conversation = await _Conversation.begin(request, service, body, deadline)
    if conversation is None:
        return Response(status_code=499)
    if conversation.asked.stream:
        return ChatStream(conversation, place)
    async with conversation:
        pieces = [event.text async for event in conversation.events() if isinstance(event, Piece)]
        assert conversation.use is not None
        assert conversation.ended is not None
        return JSONResponse(
            conversation.reply.whole(
                "".join(pieces), conversation.ended.reason, conversation.use, conversation.ended.new_tokens
            )
        )


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
                    if (media := (await preparing).media) is not None:
                        media.release()
                if leaving.done():
                    return None
                raise late(service.limits)
            prepared = preparing.result()
        finally:
            leaving.cancel()
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Event | None] = asyncio.Queue()

        def emit(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(queue.put_nowait, event)

        asked, live = prepared.asked, prepared.live
        job = Job(asked, prepared.key, prepared.media, prepared.frames, emit, live=live)
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
                    raise late(self._service.limits) from None
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


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """A checked request, its video if it is here, and what tells it from others.

    live: the live video that it asks about.
    """

    asked: Asked
    media: Media | None
    key: VideoKey
    frames: FrameSampling
    live: LiveSession | None = None


async def _prepare(service: Service, body: bytes) -> _Prepared:
    asked = await asyncio.to_thread(read_request, body, service.limits, service.model, service.bilevel)
    try:
        await asyncio.to_thread(suffix, service.tokenizer, asked.question, asked.history)
    except UserError as e:
        raise RequestError(400, str(e), param="messages") from None
    if asked.source.is_name and LIVE_ID.fullmatch(name := asked.source.uuid or ""):
        return _about_live(asked, service.live.get(name))
    media, (content, frames, folder_fps) = await _video(service, asked)
    return _Prepared(asked, media, service.videos.key(content, frames, folder_fps), frames)


def _about_live(asked: Asked, live: LiveSession) -> _Prepared:
    if asked.frames is not None:
        raise RequestError(
            400, "a live video's frames were chosen when it was opened: leave out fps and max_frames", param="xl2jax"
        )
    live.touch()
    return _Prepared(asked, None, VideoKey({"live": live.id}), FrameSampling(), live)


type _Content = tuple[str, FrameSampling, float | None]


async def _video(service: Service, asked: Asked) -> tuple[Media | None, _Content]:
    """The video of a request, None where only its name is given."""
    source = asked.source
    if source.is_name:
        content, frames, folder_fps = service.named(source.uuid or "")
        return None, (content, asked.frames or frames, folder_fps)
    media = await service.library.find(source)
    if source.pictures:  # other text around them makes another context
        content = hashlib.blake2b(f"{media.content} {asked.text!r}".encode(), digest_size=16).hexdigest()
        return media, (f"pictures {content}", FrameSampling(), None)
    folder_fps = asked.folder_fps if media.path.is_dir() else None
    default = FrameSampling(max_frames=min(FrameSampling.max_frames, service.limits.frames))
    if folder_fps is not None:  # all of the frames that the client chose
        default = FrameSampling(folder_fps, max_fps=None, max_frames=service.limits.frames)
    frames = asked.frames or default
    if source.uuid is not None:
        service.remember(source.uuid, media.content, frames, folder_fps)
    return media, (media.content, frames, folder_fps)


class ChatStream(StreamingResponse):
    """An answer as server-sent events. While the video is watched, comments tell how far that is.

    What fails before the first event is an ordinary error with its own status.
    """

    def __init__(self, conversation: _Conversation, place: Place):
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
                        await error_response(e)(scope, receive, send)
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
