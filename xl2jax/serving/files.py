"""The requests to /v1/files."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from xl2jax.serving.bodies import form_with_file
from xl2jax.serving.service import Place, Service, service_of


async def upload(request: Request, service: Service, place: Place) -> Response:
    async with form_with_file(request, "file", service.limits.video_bytes) as (file, form):
        purpose = str(form.get("purpose", "user_data"))
        about = await asyncio.to_thread(service.uploads.add, file.file, file.filename or "video", purpose)
    return JSONResponse(about)


async def list_files(request: Request) -> Response:
    found = await asyncio.to_thread(service_of(request).uploads.list)
    return JSONResponse({"object": "list", "data": found, "has_more": False})


async def one_file(request: Request) -> Response:
    uploads, name = service_of(request).uploads, request.path_params["name"]
    if request.method == "DELETE":
        await asyncio.to_thread(uploads.remove, name)
        return JSONResponse({"id": name, "object": "file", "deleted": True})
    return JSONResponse(await asyncio.to_thread(uploads.describe, name))


async def read_content(request: Request) -> Response:
    path = await asyncio.to_thread(service_of(request).uploads.path, request.path_params["name"])
    return FileResponse(path, media_type="application/octet-stream", headers={"X-Content-Type-Options": "nosniff"})
