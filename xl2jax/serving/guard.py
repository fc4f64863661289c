"""What comes before every request: the key, where it comes from, and counting."""

from __future__ import annotations

import base64
import contextlib
import hmac
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from xl2jax.serving.errors import RequestError
from xl2jax.serving.service import Service

_OPEN = ("/health", "/ready", "/")
"""Paths that need no key, with the files of the page below /page/. The page asks for the key."""


class Guard:
    """Checks the key and where a request comes from, and counts it."""

    def __init__(self, app: ASGIApp, service: Service):
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        status = 499  # the client went away before the answer

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                status = message["status"]
            elif message["type"] == "websocket.accept":
                status = 101
            await send(message)

        try:
            refused = refusal(HTTPConnection(scope), self._service.api_key, self._service.hosts)
            if refused is not None and scope["type"] == "websocket":
                await WebSocket(scope, receive, counted).send_denial_response(error_response(refused))
            elif refused is not None:
                await error_response(refused)(scope, receive, counted)
            else:
                await self._app(scope, receive, counted)
        finally:
            route = scope.get("route")
            self._service.metrics.requests.labels(getattr(route, "path", "other"), status).inc()


def refusal(request: HTTPConnection, key: str | None, hosts: Sequence[str] | None) -> RequestError | None:
    """Why a request is refused before anything of its body is read, if it is. `key` and `hosts`: see `Service`."""
    host = request.headers.get("host", "")
    if hosts is not None and _without_port(host) not in hosts:
        # A page of another site whose name leads to this machine would be of the same origin.
        return RequestError(403, "requests to this host name are refused", code="foreign_host")
    origin = request.headers.get("origin")
    if origin is not None and _network_location(origin) != host:
        return RequestError(403, "requests from pages of other sites are refused", code="foreign_origin")
    path = request.scope["path"]  # the path of `request.url` may depend on the Host header
    if key is None or path in _OPEN or path.startswith("/page/"):
        return None
    if any(hmac.compare_digest(given, key.encode()) for given in _given_keys(request)):
        return None
    return RequestError(401, "the API key is missing or wrong (Authorization: Bearer ...)", code="invalid_api_key")


SUBPROTOCOL = "xl2jax"
"""Of WebSockets."""

_KEY_PROTOCOL = f"{SUBPROTOCOL}.key."


def _given_keys(request: HTTPConnection) -> Iterator[bytes]:
    """The key of a request: that of its header, or of a WebSocket's subprotocol: browsers cannot set a header there."""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        yield given.strip().encode()
    for protocol in request.scope.get("subprotocols", ()):
        if protocol.startswith(_KEY_PROTOCOL):
            encoded = protocol.removeprefix(_KEY_PROTOCOL)
            with contextlib.suppress(ValueError):
                yield base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))


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


def error_response(error: RequestError) -> Response:
    """The response to a request that is refused or that failed."""
    return JSONResponse(error.body, error.status, headers=error.headers)
