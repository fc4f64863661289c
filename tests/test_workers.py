"""Work in several processes: order, a bounded number ahead, and failures that end it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from xl2jax.errors import UserError
from xl2jax.workers import in_processes


def square(x: int) -> int:
    if x == 100:
        os.kill(os.getpid(), signal.SIGKILL)
    if x < 0:
        raise ValueError(f"{x} is negative")
    return x * x


def test_results_are_in_order_and_few_are_worked_ahead() -> None:
    taken = []

    def arguments() -> Iterator[int]:
        for x in range(20):
            taken.append(x)
            yield x

    results = in_processes(2, square, arguments())
    assert next(results) == 0
    assert len(taken) == 5
    assert list(results) == [x * x for x in range(1, 20)]


def test_what_a_call_raises_is_raised_here() -> None:
    with pytest.raises(ValueError, match="-1 is negative"):
        list(in_processes(1, square, [3, -1, 4]))


def test_a_killed_process_is_an_error_and_no_endless_wait() -> None:
    with pytest.raises(UserError, match="a worker process was killed"):
        list(in_processes(2, square, [1, 100, 2, 3]))
