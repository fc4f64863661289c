"""Errors as OpenAI's JSON. Their messages are for clients: they hold no path, host name or trace."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from xl2jax.errors import NotEnoughMemory, UserError, shorten
from xl2jax.serving.limits import Limits
from xl2jax.system.terminal import explain

logger = logging.getLogger(__name__)

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "server_error",
}


class RequestError(Exception):
    """A request that is refused or that failed.

    status: of HTTP. code: a word for programs. param: the field of the request. retry_after: seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_after = status, message, code, param, retry_after

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | {"Connection": "close"} if self.status == 408 else headers  # the rest of the body never came


def late(limits: Limits) -> RequestError:
    """For a request that took too long."""
    return RequestError(504, f"not answered within {limits.request_seconds:g} s", code="timeout")


def shutting_down() -> RequestError:
    """For a request that the end of the server leaves unanswered."""
    return RequestError(503, "the server is shutting down", code="shutting_down", retry_after=10)


def internal_error() -> RequestError:
    """For a fault of the server, whose trace is logged."""
    return RequestError(500, "the server failed on this request; its log has the reason", code="internal_error")


def request_error(error: Exception, paths: Iterable[Path] = (), *, too_large: str | None = None) -> RequestError:
    """Any error as one of a request. What is a fault of the server is logged.

    `paths`: see `public_error`. `too_large`: the code where the memory does not suffice.
    """
    if isinstance(error, RequestError):
        return error
    if isinstance(error, UserError):
        return public_error(error, paths, code=too_large if isinstance(error, NotEnoughMemory) else None)
    if explain(error) is not None:
        logger.error("the machine ran short: %s", explain(error))
        return RequestError(503, "the server is short of memory", code="out_of_memory", retry_after=10)
    logger.error("a request failed", exc_info=error)
    return internal_error()


def public_error(error: UserError, paths: Iterable[Path | str] = (), *, code: str | None = None) -> RequestError:
    """A wrong input as status 400. `paths` are replaced in its message."""
    text = str(error)
    for path in sorted(map(str, paths), key=len, reverse=True):
        text = text.replace(path, "the video")
    return RequestError(400, shorten(text, 400), code=code)


def not_kept() -> RequestError:
    """The error for a video that is only named and is not kept any more."""
    return RequestError(
        404, "no video of this uuid is kept with these frames: send the video", code="video_not_found", param="messages"
    )
