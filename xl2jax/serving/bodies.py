"""Bodies of requests, of bounded size and time."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.types import Message

from xl2jax.serving.addresses import too_large
from xl2jax.serving.errors import RequestError
from xl2jax.serving.limits import Limits
from xl2jax.serving.uploads import no_room

_FORM_BYTES = 1 << 20  # of an upload, beside the file

SLOWEST = 1 << 13
"""Bytes a second that an upload must have on average, from `idle_seconds` behind its beginning on."""


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
    it comes for `idle_seconds`, or less than `SLOWEST` on average, or there is no room for it.
    """
    count, started = 0, time.monotonic()
    inner = request.receive

    async def bounded() -> Message:
        nonlocal count
        try:
            async with asyncio.timeout(
                min(idle_seconds, idle_seconds + count / SLOWEST - (time.monotonic() - started))
            ):
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
        form = await Request(request.scope, bounded).form(max_files=1, max_fields=16)
    except OSError:
        raise no_room() from None
    except (MultiPartException, HTTPException, LookupError, ValueError):  # the last two: of the charset that it names
        raise RequestError(400, "the body is not a form with one file") from None
    try:
        file = form.get(name)
        if not isinstance(file, UploadFile):
            raise RequestError(400, f"the form has no file {name!r}", param=name)
        yield file, form
    finally:
        await form.close()
