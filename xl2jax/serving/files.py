"""The requests to /v1/files."""

from __future__ import annotations

import asyncio

from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from xl2jax.serving.bodies import form_with_file
from xl2jax.serving.errors import RequestError
from xl2jax.serving.service import Place, Service, service_of
from xl2jax.serving.uploads import ExpiresAfter


async def upload(request: Request, service: Service, place: Place) -> Response:
    limits = service.limits
    async with form_with_file(request, "file", limits.video_bytes, limits.idle_seconds) as (file, form):
        purpose, expires = str(form.get("purpose", "user_data")), _expires_after(form)
        about = await asyncio.to_thread(service.uploads.add, file.file, file.filename or "video", purpose, expires)
    return JSONResponse(about)


def _expires_after(form: FormData) -> ExpiresAfter | None:
    """The fields `expires_after[anchor]` and `expires_after[seconds]`, as OpenAI's client sends them, or one of JSON."""
    whole = form.get("expires_after")
    given = {key: form.get(f"expires_after[{key}]") for key in ("anchor", "seconds")}
    if whole is None and not any(given.values()):
        return None
    seconds = str(given["seconds"])
    try:
        if whole is not None:
            return ExpiresAfter.model_validate_json(str(whole))
        number = int(seconds) if seconds.isascii() and seconds.isdecimal() else seconds
        return ExpiresAfter.model_validate(given | {"seconds": number})
    except ValueError:
        raise RequestError(
            400,
            "expires_after: should have the anchor created_at, and from 3600 to 2592000 seconds",
            param="expires_after",
        ) from None


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
