"""`bench answers`: tokens per second of answers that are decoded together, and one after another."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jax
import numpy as np
import tyro

from xl2jax.bench.setup import Setup, random_params
from xl2jax.commands.flags import DEFAULT_CHECKPOINT, BilevelFlags, require_checkpoint, whole_numbers
from xl2jax.config import PRESETS, Weights
from xl2jax.errors import UserError
from xl2jax.inference import memory
from xl2jax.inference.api import load
from xl2jax.inference.cache import KVCache
from xl2jax.inference.decoding import MOST_TOGETHER, decode_together
from xl2jax.inference.layout import PrefillConfig
from xl2jax.inference.selection import check_bilevel
from xl2jax.ops.attention import check_name


@dataclasses.dataclass(frozen=True)
class AnswersArgs:
    """Times answers that are decoded together, of videos of several lengths, as the server and `ask_many` do it."""

    together: str = "1,2,4,8,16"
    """Comma-separated numbers of answers at once."""
    groups: str = "32,48,40,64"
    """Comma-separated lengths of the videos that the answers read in turn, in groups of 4 frames."""
    tokens: int = 96
    """Tokens of each answer."""
    checkpoint: str = str(DEFAULT_CHECKPOINT)
    """The model: a folder or a hub id."""
    preset: str | None = None
    """Instead of a checkpoint, random weights of these sizes: video-xl-2 is the released one."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """The type of weights and activations; by default that of the checkpoint, or bfloat16 for random weights."""
    weights: Weights | None = None
    """Has the LLM's matrices in 8 or 4 bits."""
    cache_dtype: Literal["int8"] | None = None
    """dtype of the videos' KV; by default --dtype."""
    decode: tyro.conf.OmitArgPrefixes[BilevelFlags] = dataclasses.field(default_factory=BilevelFlags)
    attention: str = "auto"
    """auto (the fastest one for this device and dtype), blockwise, reference, wgmma or mma."""
    repeats: int = 5
    """Runs of each size, of which the fastest counts."""
    json: bool = False
    """Prints the rows as JSON."""

    def counts(self) -> list[int]:
        counts = whole_numbers("--together", self.together)
        if max(counts) > MOST_TOGETHER:
            raise UserError(f"--together: at most {MOST_TOGETHER} answers share a program, not {max(counts)}")
        return counts

    def check(self) -> None:
        """Raises UserError for flags that are out of range or contradict each other."""
        self.counts()
        whole_numbers("--groups", self.groups)
        self.decode.config()  # raises UserError for sizes out of range
        check_name(self.attention)
        if self.tokens < 2 or self.repeats < 1:
            raise UserError("--tokens must be 2 or more, and --repeats 1 or more")
        if self.preset is None:
            require_checkpoint(self.checkpoint)
        elif self.preset not in PRESETS:
            raise UserError(f"--preset: choose from {', '.join(PRESETS)}, not {self.preset!r}")
        elif self.checkpoint != str(DEFAULT_CHECKPOINT):
            raise UserError("--preset has random weights: give either it or --checkpoint")


def answer_rows(args: AnswersArgs) -> Iterator[dict[str, Any]]:
    """Yields a row for each number of answers at once.

    `one_after_another` is the same answers, each decoded alone, in the same run. `bound` is the ratio of the two if
    only the reading of weights and KV took time: the weights are read once for all answers, the KV of each for itself.
    `cpu_bound`, on CPUs, is that ratio with times of reading so many bytes again and again, measured beside the answers: what
    an answer alone reads may stay in the cache.
    """
    setups = _setups(args)
    config, dtype = setups[0].network.config, setups[0].network.dtype
    contexts = [_context(setup, args) for setup in setups]
    weights = memory.weight_bytes_of_a_token(config, dtype)
    channels = setups[0].network.exact_key_channels()
    slot = memory.slot_bytes(
        config,
        dtype,
        quantized=args.cache_dtype is not None,
        key_channels=0 if channels is None else channels.shape[-1],
    )
    for count in args.counts():
        each = list(itertools.islice(itertools.cycle(zip(setups, contexts, strict=True)), count))
        kv = [int(context.length) * slot for _, context in each]
        alone, together, read_alone, read_together = [], [], [], []
        for run in range(args.repeats + 1):
            separate = [decode_seconds([one], args.tokens) for one in each]
            taken = decode_seconds(each, args.tokens)
            if run:  # the first one compiles
                alone.append(sum(separate))
                together.append(taken)
                if jax.default_backend() == "cpu":
                    read_alone.append(sum(_read_seconds(weights + one) for one in kv))
                    read_together.append(_read_seconds(weights + sum(kv)))
        tokens = count * (args.tokens - 1)
        yield {
            "together": count,
            "tokens_per_s": tokens / min(together),
            "one_after_another": tokens / min(alone),
            "ratio": min(alone) / min(together),
            "bound": (count * weights + sum(kv)) / (weights + sum(kv)),
            **({"cpu_bound": min(read_alone) / min(read_together)} if read_alone else {}),
            "step_ms": 1e3 * min(together) / (args.tokens - 1),
            "weight_mb": weights / 1e6,
            "kv_mb": sum(kv) / 1e6,
        }


def decode_seconds(answers: list[tuple[Setup, KVCache]], tokens: int) -> float:
    """The time of all tokens but the first ones."""
    with contextlib.ExitStack() as opened:
        started = [
            opened.enter_context(contextlib.closing(setup.first_token(context, tokens))) for setup, context in answers
        ]
        begin = time.perf_counter()
        while running := [answer for answer in started if not answer.finished]:
            decode_together(answers[0][0].network, running)
        return time.perf_counter() - begin


def _read_seconds(count: int) -> float:
    """Seconds in which all cores together read so many bytes, which they have read before; the best of a few times."""
    cores = len(os.sched_getaffinity(0))
    parts = [np.ones(int(count) // 4 // cores, np.float32) for _ in range(cores)]
    best = math.inf
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(12):
            begin = time.perf_counter()
            list(pool.map(np.max, parts))
            best = min(best, time.perf_counter() - begin)
    return best


def _setups(args: AnswersArgs) -> list[Setup]:
    """A video of each length, all of one network."""
    if args.preset is None:
        model = load(args.checkpoint, dtype=args.dtype, weights=args.weights)
        config, params = model.config, model.params
    else:
        config = PRESETS[args.preset].with_weights(args.weights)
        params = random_params(config, args.dtype or "bfloat16")
    quantized = args.cache_dtype is not None
    setups = [
        Setup(config, params, groups, PrefillConfig(), None, args.attention, quantized=quantized)
        for groups in whole_numbers("--groups", args.groups)
    ]
    for setup in setups:
        setup.network = setups[0].network
    return setups


def _context(setup: Setup, args: AnswersArgs) -> KVCache:
    config = args.decode.config()
    kv = setup.prefill()
    if config is None:
        return kv.cache
    check_bilevel(config, setup.layout)
    return jax.block_until_ready(setup.read(kv, config))
