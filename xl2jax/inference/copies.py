"""Work that is shared out among copies of a model, each on devices of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import jax

from xl2jax.inference.network import Network


class HasNetwork(Protocol):
    """A `Model`, or anything else with a network."""

    @property
    def network(self) -> Network: ...


def share[M: HasNetwork, T, R](copies: Sequence[M], work: Callable[[M, T], R], items: Iterable[T]) -> list[R]:
    """`work(copy, item)` for each item, in the order of the items. Each copy has a thread, which takes the next item.

    Items are made when a copy is free for them, so that they need not fit the memory together.
    Where one fails no further item is begun, and its exception is raised when all threads have ended. With one copy all
    happens in the calling thread.
    """
    if len(copies) == 1:
        return [work(copies[0], item) for item in items]
    waiting, lock = enumerate(items), threading.Lock()
    results: dict[int, R] = {}
    failures: list[BaseException] = []

    def run(copy: M) -> None:
        mesh = copy.network.mesh
        # Small arrays that a program makes by the way begin on the copy's own device.
        with jax.default_device(None if mesh is None else mesh.local_devices[0]):
            while not failures:
                try:
                    with lock:
                        following = next(waiting, None)
                    if following is None:
                        return
                    number, item = following
                    results[number] = work(copy, item)
                except BaseException as e:
                    failures.append(e)

    threads = [
        threading.Thread(target=run, args=(copy,), name=f"copy {i}", daemon=True) for i, copy in enumerate(copies)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(timeout=1.0)  # wakes up regularly so that Ctrl-C is noticed
    if failures:
        raise failures[0]
    return [results[number] for number in sorted(results)]
