"""Integer arithmetic that Python has no name for. Both functions also take arrays of integers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax


def ceil_div[T: (int, jax.Array)](n: T, divisor: int) -> T:
    """n / divisor, rounded up."""
    return -(-n // divisor)


def round_up[T: (int, jax.Array)](n: T, multiple: int) -> T:
    """The smallest multiple of `multiple` that is not below n."""
    return ceil_div(n, multiple) * multiple
