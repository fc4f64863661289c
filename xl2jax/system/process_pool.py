"""Work in several processes or threads."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from xl2jax.errors import UserError

KILLED = "a worker process was killed; where memory ran out, fewer workers or processes need less of it"


def in_threads[A, R](threads: int, function: Callable[[A], R], arguments: Iterable[A]) -> Generator[R]:
    """function(argument) for each argument, in order. What was not begun when the caller closes this is dropped."""
    with ThreadPoolExecutor(threads) as pool:
        try:
            yield from pool.map(function, arguments)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def in_processes[A, R](processes: int, function: Callable[[A], R], arguments: Iterable[A]) -> Generator[R]:
    """function(argument) for each argument, in order, from spawned processes that work a few arguments ahead.

    `function` is pickled once a process, each argument once. What a call raises is raised here.

    Raises:
      UserError: a process was killed (multiprocessing.Pool would wait for it for ever).
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
    """For worker processes: a terminal sends Ctrl-C to them too, and it is their parent who decides what follows."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


_function: Callable[[Any], Any]
"""What this worker process was started for."""


def _begin(function: Callable[[Any], Any]) -> None:
    global _function
    ignore_interrupts()
    _function = function


def _call(argument: Any) -> Any:
    return _function(argument)
