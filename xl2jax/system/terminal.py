"""Shared by all commands: safe standard streams, logging, one-line errors and Ctrl-C.

This module imports nothing heavy. A command imports its own modules inside the function that `run_command` calls, so
that Ctrl-C during the imports also ends it with one line.
"""

from __future__ import annotations

import _thread
import atexit
import contextlib
import errno
import io
import logging
import os
import re
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from xl2jax.errors import UserError, first_line

if TYPE_CHECKING:
    from tqdm import tqdm

INTERRUPTED = 128 + signal.SIGINT
BROKEN_PIPE = 128 + signal.SIGPIPE


def byte_bar(label: str, total: int, show: bool) -> tqdm:
    """A progress bar of bytes on stderr."""
    from tqdm import tqdm

    return tqdm(
        total=total, desc=label, unit="B", unit_scale=True, unit_divisor=1024, disable=not show, file=sys.stderr
    )


def setup_logging() -> None:
    """Sends the messages of xl2jax to stderr, and only warnings and errors of other libraries."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s", force=True)
    logging.getLogger("xl2jax").setLevel(logging.INFO)
    # Through absl, Orbax logs its own deprecations, and the tracebacks of errors that it raises anyway.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    # When a checkpoint is damaged, Orbax's other pending reads fail too, and asyncio logs their errors.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="orbax")


@contextlib.contextmanager
def flag_errors() -> Iterator[None]:
    """Around `tyro.cli`, whose boxes of several lines it turns into UserErrors of one line."""
    written, columns = io.StringIO(), os.environ.get("COLUMNS")
    # An error is not wrapped. Help is, but tyro does not end on terminals of a few columns.
    help_width = max(shutil.get_terminal_size().columns, 20)
    os.environ["COLUMNS"] = str(help_width if {"-h", "--help"} & set(sys.argv) else 100_000)
    try:
        with contextlib.redirect_stderr(written):
            yield
    except SystemExit as e:
        if not e.code:  # --help
            raise
        raise UserError(_flag_error(written.getvalue())) from None
    finally:
        if columns is None:
            os.environ.pop("COLUMNS", None)
        else:
            os.environ["COLUMNS"] = columns


def _flag_error(box: str) -> str:
    """The sections of tyro's box in one line.

    Rules part the sections. The lines that are indented further repeat the help text.
    """
    lines = [line.strip("│").rstrip() for line in box.splitlines() if line.startswith("│")]
    sections: list[list[str]] = [[]]
    help_command = ""
    for line in lines:
        if line.strip().startswith("─"):
            sections.append([])
        elif not line.startswith(" " * 9):
            sections[-1].append(line.strip())
    texts = [" ".join(dict.fromkeys(section)).rstrip(".") for section in sections]
    if texts[-1].endswith("--help"):
        help_command = f" (see {re.sub('^For full helptext, (run|see):? ', '', texts.pop())})"
    texts = [re.sub(r"^Error parsing ", "", t) for t in texts if not t.startswith("Argument helptext")]
    return "; ".join(texts) + help_command if any(texts) else " ".join(box.split())


def run_command(main: Callable[[], int | None]) -> None:
    """Runs a command's main function and exits. Errors that a user or the machine causes are printed as one line.

    The exit status is what `main` returns, 2 after an error, 130 after Ctrl-C, and 141 if the reader of stdout is gone.
    """
    with _standard_streams(), _Interrupts() as interrupts:
        try:
            status = _run(main, interrupts)
        except KeyboardInterrupt:  # it came while another end was being reported
            interrupts.ignore()
            status = INTERRUPTED
    if interrupts.received:
        # Threads may still compute, for which Python would wait, or from under which JAX would take what they use.
        os._exit(status)
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)  # while Python ends, Ctrl-C would change the status
    sys.exit(status)


def _run(main: Callable[[], int | None], interrupts: _Interrupts) -> int:
    """The exit status of a main function, whose error is reported. Once a report begins, Ctrl-C changes nothing."""
    try:
        setup_logging()
        status = main() or 0
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        interrupts.received = True
        interrupts.ignore()
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        interrupts.ignore()
        return BROKEN_PIPE
    except Exception as e:
        interrupts.ignore()
        line = explain(e)
        if interrupts.received:
            print("interrupted", file=sys.stderr)
            return INTERRUPTED
        if line is None:
            raise
        print(f"error: {' '.join(line.split())}", file=sys.stderr)
        return 2


def explain(error: Exception) -> str | None:
    """One line for an error that a user or the machine causes, or None for a fault of the program."""
    text, reason = str(error), first_line(error)
    if isinstance(error, UserError):
        return text
    if type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError"):
        if "RESOURCE_EXHAUSTED" in text:
            return f"out of memory on the device ({reason}); use fewer frames"
        return None
    if isinstance(error, RuntimeError) and text.startswith("Unable to initialize backend"):
        return f"JAX cannot start ({reason}): JAX_PLATFORMS or XLA_FLAGS may be wrong"
    number = getattr(error, "errno", None)
    if isinstance(error, MemoryError) or number == errno.ENOMEM or "Cannot allocate memory" in text:
        return f"out of host memory ({reason}): free some, or raise the limit of this process (ulimit -v)"
    if "can't start new thread" in text or number == errno.EAGAIN:
        return f"the system lets this process start no more threads ({reason}): raise its limit (ulimit -u)"
    if number in (errno.EMFILE, errno.ENFILE):
        return f"too many files are open ({reason}): raise the limit of this process (ulimit -n)"
    return None


def machine_fault(error: BaseException) -> UserError | None:
    """The error to raise instead of "this file is damaged" if the machine ran out of memory, threads or files.

    Libraries wrap system errors, so the causes of an error are examined too.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, Exception) and not isinstance(cause, UserError):
            line = explain(cause)
            if line is not None:
                return UserError(line)
        cause = cause.__cause__ or cause.__context__
    return None


# --- standard streams --------------------------------------------------------------------------


class OutputError(UserError):
    """stdout cannot be written, so the result of a command would be lost."""


_CLOSED = "standard output is closed: the answer could not be written anywhere"


class _Output(io.RawIOBase):
    """Writes to a file descriptor. If that fails, `on_error` is called, which may raise."""

    def __init__(self, descriptor: int, on_error: Callable[[OSError], None], *, refuses: bool = False):
        self._descriptor, self._on_error, self._refuses = descriptor, on_error, refuses

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any) -> int:
        if self._refuses:
            raise OutputError(_CLOSED)
        try:
            return os.write(self._descriptor, data)
        except OSError as e:
            self._on_error(e)
            return len(data)


def stdout_is_closed() -> bool:
    """Whether the command was started without a stdout."""
    return isinstance(sys.stdout, _Text) and sys.stdout.closed_at_start


def stdin_is_closed() -> bool:
    """Whether the command was started without a stdin."""
    return sys.stdin is None or sys.stdin.closed


def require_stdout() -> None:
    """Raises UserError if an answer could not be written. To be called before slow work."""
    if stdout_is_closed():
        raise OutputError(_CLOSED)


class _Text(io.TextIOWrapper):
    """A text stream that is used with UTF-8 in every locale."""

    closed_at_start = False


@contextlib.contextmanager
def _standard_streams() -> Iterator[None]:
    """Makes stdout and stderr UTF-8. A closed or full stderr is ignored; a closed or full stdout is an error.

    Closed descriptors are opened on the null device, because the next opened file would otherwise get their number.
    """
    before = sys.stdout, sys.stderr
    closed = {n: _is_closed(n) for n in (0, 1, 2)}
    for descriptor in closed:
        if closed[descriptor]:
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)

    def ignore(_: OSError) -> None:
        pass

    def refuse(e: OSError) -> None:
        if isinstance(e, BrokenPipeError):
            raise e
        raise OutputError(f"standard output cannot be written ({e.strerror})") from None

    for stream in before:
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
    sys.stderr = _Text(
        io.BufferedWriter(_Output(2, ignore)),
        encoding="utf-8",
        errors="backslashreplace",
        line_buffering=True,
        write_through=True,
    )
    out = _Text(
        io.BufferedWriter(_Output(1, refuse, refuses=closed[1])),
        encoding="utf-8",
        errors="surrogateescape",
        line_buffering=os.isatty(1),
    )
    out.closed_at_start = closed[1]
    sys.stdout = out
    if sys.stdin is not None and hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, UserError, ValueError):
                stream.flush()
        sys.stdout, sys.stderr = before


def _is_closed(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return True
    return False


def argument_text(text: str) -> str:
    """Decodes a command-line argument as UTF-8, also in an ASCII locale.

    Bytes that are not UTF-8 stay lone surrogates; `prompt.check_unicode` refuses them.
    """
    if not any("\ud800" <= c <= "\udfff" for c in text):
        return text
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")


# --- Ctrl-C ------------------------------------------------------------------------------------


class _Interrupts:
    """Handles Ctrl-C where a KeyboardInterrupt would be lost.

    In callbacks (JAX has one in the garbage collector) Python drops the exception and calls `sys.unraisablehook`.
    Modules that are being imported may print it or turn it into another error. In both cases the signal is raised again
    shortly afterwards.
    """

    def __init__(self) -> None:
        self.received = False
        self._ignored = False
        self._timer: threading.Timer | None = None

    def __enter__(self) -> _Interrupts:
        self._hook, self._handler = sys.unraisablehook, signal.getsignal(signal.SIGINT)
        sys.unraisablehook = self._on_dropped
        if self._handler is signal.default_int_handler:  # otherwise the signal is ignored or already handled
            signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()
        sys.unraisablehook = self._hook
        if self._handler is signal.default_int_handler:
            # A second Ctrl-C would be a traceback at this point.
            signal.signal(signal.SIGINT, signal.SIG_DFL if self.received else self._handler)

    def ignore(self) -> None:
        """From here on Ctrl-C does nothing."""
        self._ignored = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._ignored:
            return
        self.received = True
        while frame is not None:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                self._raise_again()
                return
            frame = frame.f_back
        raise KeyboardInterrupt

    def _on_dropped(self, dropped: sys.UnraisableHookArgs) -> None:
        if dropped.exc_type is not None and issubclass(dropped.exc_type, KeyboardInterrupt):
            self._raise_again()
        else:
            self._hook(dropped)

    def _raise_again(self) -> None:
        """Raises the signal again after a moment, from another thread: raised right here it would be lost again."""
        self._timer = threading.Timer(0.05, _thread.interrupt_main)
        self._timer.daemon = True
        self._timer.start()
