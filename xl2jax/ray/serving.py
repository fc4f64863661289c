"""The HTTP server on Ray Serve: replicas with a loaded model behind one that knows which video a request is about.

`Replica` holds the whole server of `xl2jax serve`, and answers requests that come as ASGI's messages. `Front` gets the
requests of clients. It finds the video in the body of a chat request and makes it the request's session: Ray's router
brings requests of one session to the same replica, which has watched the video.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import logging
import re
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from xl2jax.commands.service import ServiceArgs, build_service, limits_of
from xl2jax.ray.cluster import check_share
from xl2jax.serving.addresses import too_large
from xl2jax.serving.app import make_app
from xl2jax.serving.bodies import json_body
from xl2jax.serving.errors import RequestError
from xl2jax.serving.guard import error_response, refusal
from xl2jax.serving.limits import Limits
from xl2jax.serving.protocol import read_source
from xl2jax.system.terminal import setup_logging

logger = logging.getLogger(__name__)

NAME = "xl2jax"
"""Of the application in Ray Serve."""

ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"

_BLOCK = 4 << 20
"""Bytes of a body that are one object of Ray's store, which moves what has no room in memory to the disk."""
_FORM_BYTES = 1 << 20
_FORWARDED = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers")
_UPLOAD = re.compile(r"/v1/uploads/(upload_[0-9a-f]{32})(?:/|$)")
_END_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Access:
    """Who is answered: see `Service`."""

    api_key: str | None = None
    hosts: tuple[str, ...] | None = None


class Replica:
    """A server with a loaded model. Ray restarts it where its health check fails."""

    def __init__(self, args: ServiceArgs, access: Access, warm_up: int):
        setup_logging()
        from ray import serve

        self._name = serve.get_replica_context().replica_tag.encode()
        self._spool = tempfile.TemporaryDirectory(prefix="xl2jax-ray-")
        self._service = build_service(args, Path(self._spool.name), warm_up)
        self._service.api_key, self._service.hosts = access.api_key, access.hosts
        self._app = make_app(self._service)
        self._service.engine.start()

    def check_health(self) -> None:
        if not self._service.engine.alive:
            raise RuntimeError("the engine's thread has ended")

    async def answer(self, scope: dict[str, Any], body: Sequence[Any]) -> AsyncIterator[Message]:
        """ASGI's messages of the response. `body` holds bytes, or references to bytes in Ray's store."""
        gone, sent = asyncio.Event(), asyncio.Queue[Message | None]()
        blocks = iter([*body, b""])

        async def receive() -> Message:
            block = next(blocks, None)
            if block is None:
                await gone.wait()
                return {"type": "http.disconnect"}
            data = block if isinstance(block, bytes) else await block
            return {"type": "http.request", "body": data, "more_body": block != b""}

        async def run() -> None:
            try:
                await self._app(scope, receive, sent.put)
            finally:
                sent.put_nowait(None)

        running = asyncio.create_task(run())
        try:
            while (message := await sent.get()) is not None:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], (b"x-replica", self._name)]
                yield message
        finally:
            gone.set()  # ends the answer where the client went away
            done, _ = await asyncio.wait({running}, timeout=_END_SECONDS)
            if not done:
                running.cancel()
            elif (error := running.exception()) is not None:
                logger.error("a request failed", exc_info=error)

    def __del__(self) -> None:
        """Ray calls it when the requests of the replica have ended: files that are being written are completed."""
        with contextlib.suppress(AttributeError):  # the model could not be loaded
            self._service.draining = True
            self._service.engine.stop()
        self._spool.cleanup()


class Front:
    """Brings each request to the replica of its video."""

    def __init__(self, replicas: Any, limits: Limits, access: Access):
        self._replicas, self._limits, self._access = replicas, limits, access

    async def __call__(self, request: Request) -> Response:
        try:
            refused = refusal(request, self._access.api_key, self._access.hosts)
            if refused is not None:
                raise refused
            path = request.scope["path"]
            if path == "/metrics":
                raise RequestError(404, "replicas count for themselves: Ray's own metrics tell of all of them")
            if path == "/v1/chat/completions" and request.method == "POST":
                data = await json_body(request, self._limits)
                session = await asyncio.to_thread(session_of, data, self._limits)
                body: list[Any] = [data]
            else:
                body = await self._stored(request)
                # Replicas count the bytes of an upload's parts for themselves.
                session = found[1] if (found := _UPLOAD.match(path)) else None
        except RequestError as e:
            return error_response(e)
        scope = {name: request.scope[name] for name in _FORWARDED if name in request.scope}
        handle = self._replicas.options(stream=True, **({} if session is None else {"session_id": session}))
        return _Forwarded(handle.answer.remote(scope, body))

    async def _stored(self, request: Request) -> list[Any]:
        """The body in Ray's store, but for a short one. Raises RequestError where it is longer than a video can be."""
        import ray

        blocks: list[Any] = []
        block, count = bytearray(), 0
        async for data in request.stream():
            block += data
            count += len(data)
            if count > self._limits.video_bytes + _FORM_BYTES:
                raise too_large(self._limits.video_bytes)
            if len(block) >= _BLOCK:
                blocks.append(await asyncio.to_thread(ray.put, bytes(block)))
                block.clear()
        return [*blocks, bytes(block)]


def session_of(body: bytes, limits: Limits) -> str | None:
    """A name for the video of a chat request: the client's own one, or the hash of where it comes from.

    None where the request names no video, which the replica says.
    """
    try:
        source = read_source(body, limits)
    except RequestError:
        return None
    # A later request may have the client's name only.
    text = f"uuid {source.uuid}" if source.uuid is not None else repr(source)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


class _Forwarded(Response):
    """The response of a replica, message by message."""

    def __init__(self, messages: Any):
        super().__init__()
        self._messages = messages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from ray.exceptions import RayError

        started = False
        try:
            async for message in self._messages:
                await send(message)
                started = True
        except RayError as e:
            logger.warning("warning: a replica ended before it had answered: %s", type(e).__name__)
            if started:
                raise  # the connection breaks off, so that the client sees that the answer is not complete
            error = RequestError(
                503, "the replica of this video ended: try again", code="replica_ended", retry_after=10
            )
            await error_response(error)(scope, receive, send)
        finally:
            self._messages.cancel()


def application(
    args: ServiceArgs,
    *,
    access: Access = Access(),
    warm_up: int = 0,
    replicas: int = 1,
    num_gpus: float | None = None,
    num_cpus: float = 1.0,
    grace_seconds: float = 60.0,
) -> Any:
    """The application for `ray.serve.run`.

    A replica has as many GPUs as `args.split` splits its model over, unless `num_gpus` says otherwise.
    `args.keep.cache_dir` must be a folder that all replicas share: it has the uploads, and the KV of watched videos.
    Other arguments are those of `xl2jax ray-serve`.
    """
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    limits = limits_of(args.limits)
    tensor = args.split.devices().tensor
    num_gpus = float(tensor) if num_gpus is None else num_gpus
    check_share(num_gpus, num_cpus, replicas, "--replicas", tensor)
    behind: Any = serve.deployment(Replica).options(
        name="replicas",
        num_replicas=replicas,
        ray_actor_options={"num_gpus": num_gpus, "num_cpus": num_cpus},
        # What is more than the server's own queue gets its status 429 at once.
        max_ongoing_requests=2 * limits.queue + 16,
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),
        graceful_shutdown_timeout_s=grace_seconds,
    )
    front: Any = serve.deployment(Front).options(
        name="front",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=10_000,
        graceful_shutdown_timeout_s=grace_seconds,
    )
    return front.bind(behind.bind(args, access, warm_up), limits, access)
