"""The requests to /v1/uploads."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from xl2jax.errors import UserError
from xl2jax.serving.bodies import form_with_file, json_body
from xl2jax.serving.errors import RequestError
from xl2jax.serving.partial import Completion, Start
from xl2jax.serving.service import Place, Service, service_of
from xl2jax.system.schema import parse_json


async def start(request: Request, service: Service, place: Place) -> Response:
    asked = await _read(request, service, Start)
    return JSONResponse(await asyncio.to_thread(service.partial.start, asked))


async def add_part(request: Request, service: Service, place: Place) -> Response:
    name = request.path_params["name"]
    limit = await asyncio.to_thread(service.partial.part_limit, name)
    async with form_with_file(request, "data", limit, service.limits.idle_seconds) as (file, _):
        return JSONResponse(await asyncio.to_thread(service.partial.add, name, file.file))


async def complete(request: Request, service: Service, place: Place) -> Response:
    asked = await _read(request, service, Completion)
    return JSONResponse(await asyncio.to_thread(service.partial.complete, request.path_params["name"], asked))


async def cancel(request: Request) -> Response:
    partial = service_of(request).partial
    return JSONResponse(await asyncio.to_thread(partial.cancel, request.path_params["name"]))


async def _read[T](request: Request, service: Service, schema: type[T]) -> T:
    try:
        return parse_json(await json_body(request, service.limits), schema, "request")
    except UserError as e:
        raise RequestError(400, str(e)) from None
