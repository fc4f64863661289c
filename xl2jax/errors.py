"""The one exception that a user can cause, and the wording that error messages share."""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Iterable


class UserError(Exception):
    """A wrong input: one line that says what is wrong, where, and what to do.

    Command lines print it without a traceback and exit with status 2.
    """


class NotEnoughMemory(UserError):
    """A video or a question that needs more memory than is free."""


def first_line(error: Exception, otherwise: str | None = None) -> str:
    """The first line of an exception's message; for a system error, the system's own words without the file name.

    `otherwise` stands for an empty message; by default it is the type of the exception.
    """
    text = str(getattr(error, "strerror", None) or error).strip()
    return shorten(text.splitlines()[0] if text else otherwise or type(error).__name__, 200)


def shorten(value: object, limit: int = 120) -> str:
    """A value from a file or a library on one printable line of at most `limit` characters."""
    text = " ".join(str(value).split())
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def listing(names: Iterable[str], limit: int = 6) -> str:
    """`a, b, c (+4 more)`."""
    names = list(names)
    more = f" (+{len(names) - limit} more)" if len(names) > limit else ""
    return ", ".join(map(shorten, names[:limit])) + more


def require_whole(name: str, value: object, low: int, high: int = 1 << 20) -> None:
    """Raises UserError unless `value` is a whole number from `low` to `high`."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or not low <= int(value) <= high:  # type: ignore[call-overload]
        raise UserError(f"{name} must be a whole number from {low} to {high:,}, not {shorten(value)}")


def require_number(name: str, value: object) -> None:
    """Raises UserError unless `value` is a real number that a float can hold."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            float(value)
            return
    raise UserError(f"{name} must be a number, not {shorten(repr(value))}")
