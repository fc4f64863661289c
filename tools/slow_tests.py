"""Runs the slow tests of files, two files at a time and each in a process of its own: `make slow-test` calls it.

python tools/slow_tests.py [tests/test_a.py ...]

Without arguments it takes all files. XLA's compiler has crashed the interpreter after many compilations in one process.
A file whose process a signal ended is therefore run once more, with a line that says so. Its tests must pass then.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

TOGETHER = 2
TEST_LIMIT_S, LIMIT_S = 900, 1800
"""Seconds after which a test fails, and after which the process of a file is stopped."""
NOTHING_TO_RUN = 5
"""pytest's status for a file without slow tests."""

_running: set[subprocess.Popen[bytes]] = set()
_stopping = threading.Event()


def run(file: str) -> tuple[int, str]:
    """The status of a file's tests, negative for the signal that ended them, and what they printed."""
    command = [sys.executable, "-X", "faulthandler", "-m", "pytest", "-m", "slow", f"--timeout={TEST_LIMIT_S}", file]
    # Not a pipe: processes that a test left behind would hold it open.
    with tempfile.TemporaryFile("w+", errors="replace") as printed:
        with subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True) as process:
            _running.add(process)
            try:
                status = process.wait(LIMIT_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                status = 1
                print(f"stopped after {LIMIT_S} s", file=printed)
            finally:
                _running.discard(process)
        printed.seek(0)
        return status, printed.read()


def run_again_if_killed(file: str) -> tuple[int, str]:
    status, printed = run(file)
    if status >= 0 or _stopping.is_set():
        return status, printed
    again, second = run(file)
    return again, f"{printed}\n{file}: signal {-status} ended it: it was run once more\n{second}"


def main() -> None:
    files = sys.argv[1:] or sorted(map(str, Path("tests").glob("test_*.py")))
    failed, started = [], time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="xl2jax-compiled-") as compiled,
        ThreadPoolExecutor(TOGETHER) as pool,
    ):
        # Files that need the same programs compile them once.
        os.environ |= {"JAX_COMPILATION_CACHE_DIR": compiled, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05"}
        running = {pool.submit(run_again_if_killed, file): file for file in files}
        try:
            for future in as_completed(running):
                file, (status, printed) = running[future], future.result()
                if status not in (0, NOTHING_TO_RUN):
                    failed.append(file)
                print(f"--- {file}: status {status}, {time.monotonic() - started:.0f} s after the start", flush=True)
                if status != NOTHING_TO_RUN:
                    print(printed, flush=True)
        except KeyboardInterrupt:
            _stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(_running):
                os.killpg(process.pid, signal.SIGKILL)
            sys.exit(130)
    if failed:
        sys.exit(f"slow tests failed in: {' '.join(sorted(failed))}")
    print(f"the slow tests of {len(files)} files passed in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
