"""SIGTERM and Ctrl-C during a run: noticed between steps, so that the step that is computed is saved first."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils

_INTERRUPTED, _TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM


class Signals:
    """While steps are computed, Ctrl-C is a flag and no exception: one that is raised inside a callback of a library,
    as JAX has for the garbage collector, is lost. A second Ctrl-C ends the process at once. Before and after the steps
    Ctrl-C raises KeyboardInterrupt.

    With several processes JAX's preemption service handles SIGTERM and tells all of them after which step they stop;
    Ctrl-C in one of them is handed to it.
    """

    def __init__(self) -> None:
        self._interrupted = self._terminated = self._stepping = False

    def __enter__(self) -> Signals:
        self._before = signal.getsignal(signal.SIGINT)
        if self._before is not signal.SIG_IGN:  # as in a shell's background
            signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._interrupted = True
        if not self._stepping:
            raise KeyboardInterrupt
        print("stops after this step, which is saved; Ctrl-C again ends at once", file=sys.stderr)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if jax.process_count() > 1:
            signal.raise_signal(signal.SIGTERM)

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        self._terminated = True

    def check(self) -> None:
        """Raises KeyboardInterrupt if Ctrl-C was pressed: for what is done before there is a step to save."""
        if self._interrupted:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        """While steps are computed Ctrl-C and SIGTERM are flags."""
        before = None if jax.process_count() > 1 else signal.signal(signal.SIGTERM, self._terminate)
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False
            if before is not None:
                signal.signal(signal.SIGTERM, before)

    def stop_after(self, step: int) -> bool:
        """Whether the run stops after this step, the same in all processes. To be asked once a step, of every step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._interrupted or self._terminated

    @property
    def status(self) -> int:
        """Exit status of a run that stopped."""
        return _INTERRUPTED if self._interrupted else _TERMINATED

    @property
    def name(self) -> str:
        return "Ctrl-C" if self._interrupted else "SIGTERM"
