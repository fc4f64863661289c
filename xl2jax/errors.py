"""The one exception that a user can cause."""

from __future__ import annotations


class UserError(Exception):
    """A wrong input: one line that says what is wrong, where, and what to do.

    Command lines print it without a traceback and exit with status 2.
    """
