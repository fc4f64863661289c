"""Process and thread pools: order, bounded work ahead, failures and Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from xl2jax.errors import UserError
from xl2jax.system.process_pool import in_processes, in_threads


def square(x: int) -> int:
    if x == 100:
        os.kill(os.getpid(), signal.SIGKILL)
    if x < 0:
        raise ValueError(f"{x} is negative")
    return x * x


def test_results_are_in_order_and_work_ahead_is_bounded() -> None:
    taken = []

    def arguments() -> Iterator[int]:
        for x in range(20):
            taken.append(x)
            yield x

    results = in_processes(2, square, arguments())
    assert next(results) == 0
    assert len(taken) == 5
    assert list(results) == [x * x for x in range(1, 20)]


def test_an_exception_of_a_call_is_raised() -> None:
    with pytest.raises(ValueError, match="-1 is negative"):
        list(in_processes(1, square, [3, -1, 4]))


def test_a_killed_process_gives_one_line() -> None:
    with pytest.raises(UserError, match="a worker process was killed"):
        list(in_processes(2, square, [1, 100, 2, 3]))


def interrupted(x: int) -> int:
    signal.raise_signal(signal.SIGINT)
    return x


def test_workers_ignore_ctrl_c() -> None:
    """A terminal sends Ctrl-C to every process; the workers finish their current call."""
    assert list(in_processes(1, interrupted, [1, 2])) == [1, 2]


def test_threads_give_results_in_order_and_cancel_pending_calls() -> None:
    assert list(in_threads(3, square, range(9))) == [x * x for x in range(9)]
    begun, go = [], threading.Event()

    def slow(x: int) -> int:
        begun.append(x)
        if x:
            go.wait()
        return x

    results = in_threads(1, slow, range(100))
    assert next(results) == 0
    threading.Timer(0.1, go.set).start()
    results.close()
    assert len(begun) <= 2
