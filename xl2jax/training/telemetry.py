"""Reports a run: progress bar, metrics.jsonl, TensorBoard and wandb. Counts operations for the MFU."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import jax
from tqdm import tqdm

from xl2jax.config import VideoXL2Config
from xl2jax.errors import UserError
from xl2jax.inference import flops
from xl2jax.system.atomic import replacing_file
from xl2jax.system.cards import matrix_rate
from xl2jax.system.schema import Schema, parse_json, read_bytes

logger = logging.getLogger(__name__)


def sample_flops(
    config: VideoXL2Config, trained: set[str], groups: int, tokens: int, labelled: int, tiles: int = 0
) -> float:
    """Operations of the forward and backward pass of one sample, without recomputation.

    The backward pass of a part costs as much as its forward pass for the gradients of activations, and as much again
    for the gradient of its weights. A part that needs neither costs only its forward pass.
    Logits are only needed for `labelled` of the tokens.
    """
    parts = {
        "vision": (4 * groups + tiles) * flops.vision(config),
        "merge": (groups + tiles) * flops.dts_and_projector(config),
        "llm": tokens * flops.llm_linear(config.llm)
        + labelled * 2.0 * config.llm.width * config.llm.vocab
        + flops.attention(config.llm, tokens * (tokens + 1) / 2),
    }
    owner = {"vision": "vision", "dts": "merge", "projector": "merge", "llm": "llm"}
    weights = {owner[n.partition(".")[0]] for n in trained if not n.endswith(("lora_a", "lora_b"))}
    any_trained = {owner[n.partition(".")[0]] for n in trained}
    total, before = 0.0, False
    for part, forward in parts.items():
        passes = 1 + (part in weights) + (before or part in any_trained)
        total, before = total + passes * forward, before or part in any_trained
    return total


@contextlib.contextmanager
def _one_line(output: Path) -> Iterator[None]:
    """Turns an OSError into a one-line UserError."""
    try:
        yield
    except OSError as e:
        raise UserError(f"{output}: the log cannot be written ({e.strerror}); the last checkpoint is unchanged") from e


class _Row(Schema):
    step: int


def _keep_steps(path: Path, last: int) -> None:
    """Removes incomplete rows, and rows of steps after `last`, the checkpoint from which a run resumes."""
    if not path.exists():
        return

    def is_kept(row: bytes) -> bool:
        try:
            return parse_json(row, _Row, path).step <= last
        except UserError:
            return False

    rows = [row for row in read_bytes(path, max_bytes=None).split(b"\n") if is_kept(row)]
    with replacing_file(path) as temporary:
        temporary.write_bytes(b"".join(row + b"\n" for row in rows))


class Telemetry:
    """Shows and logs the steps of a run. Only process 0 does so (`show`).

    Raises:
      UserError: a log cannot be written.
    """

    def __init__(
        self,
        output: Path,
        total: int,
        first: int,
        *,
        show: bool,
        tensorboard: bool,
        wandb: str | None,
        config: dict[str, Any],
    ):
        self._output = output
        rate = matrix_rate(jax.devices()[0].device_kind)
        self._peak = None if rate is None else rate * jax.device_count()
        self.skipped = 0
        self._bar = tqdm(
            total=total, initial=first, desc="train", unit="step", file=sys.stderr, disable=not show, dynamic_ncols=True
        )
        self._file: TextIO | None = None
        self._board: Any = None
        self._wandb: Any = None
        self._times: deque[tuple[float, float, float]] = deque(
            maxlen=20
        )  # (seconds, tokens, operations) of the last steps
        self._last = time.perf_counter()
        if not show:
            return
        path = output / "metrics.jsonl"
        _keep_steps(path, first)
        with _one_line(output):
            self._file = open(path, "a", buffering=1)  # noqa: SIM115 (closed by __exit__)
            if tensorboard:
                from xl2jax.training.board import Board

                self._board = Board(output / "tensorboard", first + 1)
        if wandb is not None:
            try:
                import wandb as module
            except ImportError:
                raise UserError("--wandb: wandb is not installed (pip install wandb)") from None
            self._wandb = module.init(project=wandb, dir=str(output), config=config, resume="allow")

    def step(self, step: int, metrics: dict[str, float], tokens: int, operations: float) -> None:
        """Logs a step. `tokens` is its number of tokens without padding; `operations` is the sum over all devices."""
        now = time.perf_counter()
        self._times.append((now - self._last, tokens, operations))
        self._last = now
        seconds, done, computed = (sum(x) for x in zip(*self._times, strict=True))
        row = {**metrics, "tokens_per_s": done / seconds}
        if self._peak:
            row["mfu"] = computed / seconds / self._peak
        postfix = {"loss": f"{row['loss']:.4f}", "lr": f"{row['learning_rate']:.2e}", "norm": f"{row['grad_norm']:.2f}"}
        postfix["tok/s"] = f"{row['tokens_per_s']:.0f}"
        if "mfu" in row:
            postfix["mfu"] = f"{row['mfu']:.0%}"
        self._bar.set_postfix(postfix, refresh=False)
        self._bar.update(1)
        with _one_line(self._output):
            if self._file is not None:
                self._file.write(json.dumps({"step": step, "seconds": self._times[-1][0], **row}) + "\n")
            if self._board is not None:
                self._board.add(step, row)
        if self._wandb is not None:
            self._wandb.log(row, step=step)

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()
        for log in (self._file, self._board):
            with contextlib.suppress(OSError):  # `step` has already reported a full disk
                if log is not None:
                    log.close()
        if self._wandb is not None:
            self._wandb.finish()
