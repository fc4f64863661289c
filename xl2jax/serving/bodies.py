"""Bodies of requests, of bounded size and time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.types import Message

from xl2jax.serving.addresses import too_large
from xl2jax.serving.errors import RequestError
from xl2jax.serving.limits import Limits

_FORM_BYTES = 1 << 20  # of an upload, beside the file


async def json_body(request: Request, limits: Limits) -> bytes:
    """The body of a request that should be JSON. Raises RequestError where it is too long or does not come."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RequestError(415, "the body should be application/json", code="wrong_content_type")
    try:
        async with asyncio.timeout(min(limits.fetch_seconds, limits.request_seconds)):
            return await _bounded(request, limits.body_bytes)
    except TimeoutError:
        raise _late() from None


def _late() -> RequestError:
    return RequestError(408, "the body did not arrive in time", code="timeout")


async def _bounded(request: Request, limit: int) -> bytes:
    parts, count = [], 0
    async for part in request.stream():
        count += len(part)
        if count > limit:
            raise RequestError(413, f"the body has more than the {limit:,} bytes that are read", code="body_too_large")
        parts.append(part)
    return b"".join(parts)


@contextlib.asynccontextmanager
async def form_with_file(
    request: Request, name: str, limit: int, idle_seconds: float
) -> AsyncIterator[tuple[UploadFile, FormData]]:
    """The file `name` of a form, which lies on disk unless it is small, and the whole form.

    Raises RequestError where the form has more than `limit` bytes beside its fields, or no such file, or where nothing of
    it comes for `idle_seconds`.
    """
    count = 0
    inner = request.receive

    async def bounded() -> Message:
        nonlocal count
        try:
            async with asyncio.timeout(idle_seconds):
                message = await inner()
        except TimeoutError:
            raise _late() from None
        count += len(message.get("body", b""))
        if count > limit + _FORM_BYTES:
            raise too_large(limit)
        return message

    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise RequestError(415, "the body should be multipart/form-data", code="wrong_content_type")
    try:
        async with Request(request.scope, bounded).form(max_files=1, max_fields=16) as form:
            file = form.get(name)
            if not isinstance(file, UploadFile):
                raise RequestError(400, f"the form has no file {name!r}", param=name)
            yield file, form
    except (MultiPartException, HTTPException):
        raise RequestError(400, "the body is not a form with one file") from None
