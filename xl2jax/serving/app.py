"""The HTTP interface. It never computes: questions go to the engine, and files are handled in threads."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp

from xl2jax.serving import live_http, parts
from xl2jax.serving.chat import ChatStream, chat
from xl2jax.serving.errors import RequestError, internal_error
from xl2jax.serving.files import list_files, one_file, read_content, upload
from xl2jax.serving.guard import Guard, error_response
from xl2jax.serving.service import Place, Service, service_of
from xl2jax.serving.web_page import page

logger = logging.getLogger(__name__)

type _Handler = Callable[[Request, Service, Place], Awaitable[Response]]


def make_app(service: Service) -> ASGIApp:
    """The ASGI application of a service."""
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", _counted(service, chat), methods=["POST"]),
            Route("/v1/models", _models, methods=["GET"]),
            Route("/v1/models/{name}", _model, methods=["GET"]),
            Route("/v1/files", _counted(service, upload), methods=["POST"]),
            Route("/v1/files", list_files, methods=["GET"]),
            Route("/v1/files/{name}", one_file, methods=["GET", "DELETE"]),
            Route("/v1/files/{name}/content", read_content, methods=["GET"]),
            Route("/v1/uploads", _counted(service, parts.start), methods=["POST"]),
            Route("/v1/uploads/{name}/parts", _counted(service, parts.add_part), methods=["POST"]),
            Route("/v1/uploads/{name}/complete", _counted(service, parts.complete), methods=["POST"]),
            Route("/v1/uploads/{name}/cancel", parts.cancel, methods=["POST"]),
            Route("/v1/live", _counted(service, live_http.start), methods=["POST"]),
            Route("/v1/live", live_http.list_sessions, methods=["GET"]),
            Route("/v1/live/{name}", live_http.one_session, methods=["GET", "DELETE"]),
            WebSocketRoute("/v1/live/{name}/frames", live_http.frames),
            Route("/", page, methods=["GET"]),
            Route("/page/{name}", page, methods=["GET"]),
            Route("/health", _health, methods=["GET"]),
            Route("/ready", _ready, methods=["GET"]),
            Route("/metrics", _metrics, methods=["GET"]),
        ],
        exception_handlers={
            RequestError: _answer_error,
            HTTPException: _answer_http_error,
            ClientDisconnect: _answer_nobody,
            Exception: _answer_fault,
        },
        middleware=[Middleware(Guard, service=service)],
    )
    app.state.service = service
    return app


def _counted(service: Service, handler: _Handler) -> Callable[[Request], Awaitable[Response]]:
    """A handler whose requests take a place in the queue. It leaves the place itself if it returns a stream."""

    async def handle(request: Request) -> Response:
        place = Place(service)
        try:
            response = await handler(request, service, place)
        except BaseException:
            place.leave()
            raise
        if not isinstance(response, ChatStream):
            place.leave()
        return response

    return handle


async def _models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_about_model(service_of(request))]})


async def _model(request: Request) -> Response:
    if request.path_params["name"] != service_of(request).model:
        raise RequestError(404, "the model does not exist here: see /v1/models", code="model_not_found")
    return JSONResponse(_about_model(service_of(request)))


def _about_model(service: Service) -> dict[str, Any]:
    return {"id": service.model, "object": "model", "created": 0, "owned_by": "xl2jax"}


async def _health(request: Request) -> Response:
    alive = service_of(request).engine.alive
    return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)


async def _ready(request: Request) -> Response:
    service = service_of(request)
    ready = service.engine.ready and not service.draining
    return JSONResponse({"status": "ready" if ready else "not ready"}, 200 if ready else 503)


async def _metrics(request: Request) -> Response:
    return Response(service_of(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return error_response(error)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: "there is nothing at this address", 405: "this address has no such method"}
    response = error_response(RequestError(error.status_code, words.get(error.status_code, "the request is not valid")))
    response.headers.update(error.headers or {})
    return response


async def _answer_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # the client went away


async def _answer_fault(request: Request, error: Exception) -> Response:
    logger.error("a request failed", exc_info=error)
    return error_response(internal_error())
