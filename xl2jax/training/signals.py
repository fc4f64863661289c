"""Handles SIGTERM and Ctrl-C during training: the run saves the current step, then stops."""

from __future__ import annotations

import signal
from types import FrameType

import jax
from jax.experimental import multihost_utils

_INTERRUPTED, _TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM


class Signals:
    """A context in which both signals only set flags. A second Ctrl-C ends the process at once.

    An exception would be lost if it were raised in a callback of a library, such as JAX's in the garbage collector.

    With several processes, JAX's preemption service handles SIGTERM and decides for all processes after which step they
    stop. Ctrl-C in one of them is passed on to the service.
    """

    def __init__(self) -> None:
        self._interrupted = self._terminated = False

    def __enter__(self) -> Signals:
        self._several = jax.process_count() > 1
        self._before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        if self._before[signal.SIGINT] is not signal.SIG_IGN:  # a shell ignores SIGINT for background jobs
            signal.signal(signal.SIGINT, self._interrupt)
        if not self._several:
            signal.signal(signal.SIGTERM, self._terminate)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before[signal.SIGINT])
        if not self._several:
            signal.signal(signal.SIGTERM, self._before[signal.SIGTERM])

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._interrupted = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self._several:
            signal.raise_signal(signal.SIGTERM)

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        self._terminated = True

    def stop_after(self, step: int) -> bool:
        """Whether the run stops after this step; all processes agree. Must be called once for every step."""
        if self._several:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._interrupted or self._terminated

    @property
    def status(self) -> int:
        """Exit status of a run that a signal stopped."""
        return _INTERRUPTED if self._interrupted else _TERMINATED

    @property
    def name(self) -> str:
        """The signal, for messages."""
        return "Ctrl-C" if self._interrupted else "SIGTERM"
