"""The requests to /v1/files."""

from __future__ import annotations

import asyncio

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.types import Message

from xl2jax.serving.addresses import too_large
from xl2jax.serving.errors import RequestError
from xl2jax.serving.service import Place, Service, service_of

_FORM_BYTES = 1 << 20  # of an upload, beside the file


async def upload(request: Request, service: Service, place: Place) -> Response:
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
