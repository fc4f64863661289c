"""Work in several processes."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor


def in_processes[A, R](processes: int, function: Callable[[A], R], arguments: Iterable[A]) -> Iterator[R]:
    """function(argument) for each argument, in order, from spawned processes that work a few arguments ahead.

    `function` and arguments are pickled. What a call raises is raised here; a process that is killed raises
    BrokenProcessPool (multiprocessing.Pool would wait for ever).
    """
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))
    ahead: deque[Future[R]] = deque()
    try:
        for argument in arguments:
            ahead.append(pool.submit(function, argument))
            if len(ahead) > 2 * processes:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
