"""Runs a function over many arguments in several processes or threads."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from xl2jax.errors import UserError

KILLED = "a worker process was killed; if memory ran out, use fewer workers or processes"


def in_threads[A, R](threads: int, function: Callable[[A], R], arguments: Iterable[A]) -> Generator[R]:
    """Yields function(argument) for each argument, in order. Closing the generator cancels pending calls."""
    with ThreadPoolExecutor(threads) as pool:
        try:
            yield from pool.map(function, arguments)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def in_processes[A, R](processes: int, function: Callable[[A], R], arguments: Iterable[A]) -> Generator[R]:
    """Yields function(argument) for each argument, in order, from spawned processes that work a few arguments ahead.

    `function` is pickled once per process, and each argument once. An exception of a call is raised here.

    Raises:
      UserError: a process was killed. (multiprocessing.Pool would wait for it for ever.)
    """
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _begin, (function,))
    ahead: deque[Future[R]] = deque()
    try:
        for argument in arguments:
            ahead.append(pool.submit(_call, argument))
            if len(ahead) > 2 * processes:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    except BrokenProcessPool:
        raise UserError(KILLED) from None
    finally:
        pool.shutdown(cancel_futures=True)


def ignore_interrupts(*_: object) -> None:
    """Makes a worker process ignore Ctrl-C, which a terminal also sends to workers. Their parent process handles it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


_function: Callable[[Any], Any]
"""The function that this worker process runs."""


def _begin(function: Callable[[Any], Any]) -> None:
    global _function
    ignore_interrupts()
    _function = function


def _call(argument: Any) -> Any:
    return _function(argument)
