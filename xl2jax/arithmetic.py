"""Integer arithmetic that Python has no name for. Both functions also take arrays."""

from __future__ import annotations


def ceil_div(n: int, divisor: int) -> int:
    """n / divisor, rounded up."""
    return -(-n // divisor)


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below n."""
    return ceil_div(n, multiple) * multiple
