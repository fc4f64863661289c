"""The wording helpers of error messages."""

from __future__ import annotations

import errno
import os

import pytest

from xl2jax.errors import first_line, listing, shorten


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("first\nsecond"), "first"),
        (ValueError(" \n"), "ValueError"),
        (OSError(errno.ENOENT, os.strerror(errno.ENOENT), "some/file"), "No such file or directory"),
        (OSError("no number"), "no number"),
        (ValueError("x" * 500), "x" * 197 + "..."),
    ],
)
def test_first_line(error: Exception, line: str) -> None:
    assert first_line(error) == line


def test_first_line_of_an_empty_message() -> None:
    assert first_line(RuntimeError(), "it has no device here") == "it has no device here"


def test_values_are_short_and_printable() -> None:
    assert shorten("two\nlines") == "two lines"
    assert shorten("\x1b[31m") == r"'\x1b[31m'"
    assert shorten(None) == "None"
    assert shorten("abcdef", 5) == "ab..."


def test_listing() -> None:
    assert listing("abc") == "a, b, c"
    assert listing("abcdefgh", 2) == "a, b (+6 more)"
