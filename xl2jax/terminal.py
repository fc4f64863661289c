"""What command lines share: logs and progress on stderr, user errors as one line and status 2."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable

import jax
from tqdm import tqdm

from xl2jax.errors import UserError


def byte_bar(label: str, total: int, show: bool) -> tqdm:
    return tqdm(
        total=total, desc=label, unit="B", unit_scale=True, unit_divisor=1024, disable=not show, file=sys.stderr
    )


def setup_logging() -> None:
    """xl2jax's own messages on stderr; other libraries only when something is wrong."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s", force=True)
    logging.getLogger("xl2jax").setLevel(logging.INFO)
    # Orbax logs warnings about its own deprecations through absl.
    logging.getLogger("absl").setLevel(logging.ERROR)
    # Of a damaged checkpoint it reads the other tensors too, and nobody asks for their errors.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="orbax")


def run_command(main: Callable[[], int | None]) -> None:
    """Runs a command's main function and exits: UserError is one line on stderr and status 2."""
    setup_logging()
    try:
        status = main() or 0
        sys.stdout.flush()
    except UserError as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        status = 2
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        print(f"error: out of memory on the device ({str(e).splitlines()[0]}); use fewer frames", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # the reader of stdout went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    sys.exit(status)
