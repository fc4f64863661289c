"""`python -m xl2jax.bench prefill|decode`: what prefill and decoding cost, on random embeddings.

Every row runs in a process of its own, so that peak memory and compilation are its own.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from xl2jax import memory, prefill, runtime
from xl2jax.api import check_bilevel
from xl2jax.bench_kernels import KernelArgs, kernel_rows
from xl2jax.bilevel import BilevelConfig, GroupTable, MixedSource, PooledKV, group_table, mixed_slots
from xl2jax.cache import KVCache
from xl2jax.config import PRESETS, VideoXL2Config
from xl2jax.errors import UserError
from xl2jax.generate import SamplingConfig
from xl2jax.layout import PrefillConfig, VideoLayout
from xl2jax.model import VideoXL2
from xl2jax.relevance import AttentionScorer
from xl2jax.terminal import run_command

PREFIX, SUFFIX, TIMES = 14, 20, 7
_DECODE_TOKENS = 32


@dataclasses.dataclass(frozen=True)
class PrefillArgs:
    """Times the LLM prefill alone."""

    groups: str = "64,128,256,512"
    modes: str = "chunked,dense"
    preset: str = "bench"
    dtype: Literal["float32", "bfloat16"] = "float32"
    chunk_groups: int = 4
    window_chunks: int = 3
    step_groups: int = 4
    """Groups that go through the layers together."""
    attention: str = "auto"
    json: bool = False


@dataclasses.dataclass(frozen=True)
class DecodeArgs:
    """Times a decode step and the first token of a question, on dense and bi-level caches."""

    groups: str = "64,128,256"
    modes: str = "dense,bilevel"
    preset: str = "bench"
    dtype: Literal["float32", "bfloat16"] = "float32"
    top_chunks: int = 2
    select_chunk_groups: int = 4
    pool: int = 4
    attention: str = "auto"
    json: bool = False


class Setup:
    """Random parameters and a video of random embeddings."""

    def __init__(self, preset: str, dtype: str, groups: int, config: PrefillConfig, step_groups: int, attention: str):
        self.config: VideoXL2Config = PRESETS[preset]
        self.dtype, self.attention, self.groups = dtype, attention, groups

        @jax.jit
        def init(key: jax.Array) -> nnx.State:
            return nnx.state(VideoXL2(self.config, param_dtype=jnp.dtype(dtype), rngs=nnx.Rngs(key)))

        self.params = init(jax.random.key(0))
        self.layout = VideoLayout(PREFIX, (TIMES,) * groups, self.config.visual_tokens)
        self.plan = prefill.make_plan(self.layout, config, step_groups=step_groups)
        rng = np.random.default_rng(0)
        vocab = self.config.llm.vocab
        self.time_ids = rng.integers(0, vocab, (groups, TIMES)).tolist()
        self.ids = np.zeros(32, np.int32)
        self.ids[:SUFFIX] = rng.integers(0, vocab, SUFFIX)
        self.segments = list(prefill.segments(prefill.steps(self.layout, self.plan, self.time_ids), self.plan))
        shape = (self.plan.segment_groups, self.config.visual_tokens, self.config.llm.width)
        self.visual = jax.random.normal(jax.random.key(1), shape, jnp.dtype(dtype)) * 0.02

    def prefill(self, segments: int | None = None) -> KVCache:
        """The whole video, or its first `segments` segments."""
        cache = runtime.new_cache(self.config.llm, self.plan.slots, self.dtype, self.plan.visual_start)
        ids, length = np.zeros(self.plan.prefix_cap, np.int32), np.int32(PREFIX)
        cache = runtime.prefill_prefix(self.config, self.params, cache, ids, length, implementation=self.attention)
        for segment in self.segments[:segments]:
            cache = runtime.prefill_segment(
                self.config, self.params, cache, self.visual, segment, implementation=self.attention
            )
        return cache

    def pool(self, cache: KVCache, config: BilevelConfig) -> tuple[GroupTable, PooledKV]:
        capacity = (self.plan.slots - self.plan.visual_start) // self.plan.visual_tokens
        table = group_table(self.layout, capacity)
        llm, v = self.config.llm, self.plan.visual_tokens
        return table, runtime.pool_cache(llm, cache, table, visual_tokens=v, pool=config.pool)

    def bilevel(self, cache: KVCache, table: GroupTable, pooled: PooledKV, config: BilevelConfig) -> KVCache:
        """Scores every chunk for the question as infer.py does by default, picks the best and mixes."""
        llm, v, size = self.config.llm, self.plan.visual_tokens, config.select_chunk_groups
        groups, top = len(table.time_lengths), config.top(self.layout)

        def mixed(dense: jax.Array, most: int) -> tuple[KVCache, MixedSource]:
            slots = mixed_slots(self.layout, most, config)
            return runtime.mix(llm, cache, pooled, table, dense, visual_tokens=v, pool=config.pool, slots=slots)

        context, source = mixed(jnp.zeros(groups, bool), 0)
        scores = runtime.attention_scores(
            self.config, self.params, context, source, runtime.new_cache(llm, 128, self.dtype), self.ids, np.int32(0),
            np.int32(SUFFIX), scorer=AttentionScorer(), groups=groups, implementation=self.attention,
        )  # fmt: skip
        _, _, dense = runtime.choose(scores, table.groups, select_chunk_groups=size, top=top)
        return mixed(dense, (top + 2) * size)[0]

    def first_token(self, context: KVCache) -> Any:
        """Suffix and first token: the state that decoding goes on from."""
        text = runtime.new_cache(self.config.llm, 256, self.dtype)
        return runtime.ask(
            self.config, self.params, context, text, self.ids, np.int32(SUFFIX), jax.random.key(0), _NEVER,
            sampling=SamplingConfig(), implementation=self.attention,
        )  # fmt: skip

    def decode(self, context: KVCache, state: Any) -> Any:
        return runtime.decode(
            self.config, self.params, context, state, np.int32(_DECODE_TOKENS), _NEVER,
            sampling=SamplingConfig(), size=_DECODE_TOKENS, implementation=self.attention,
        )  # fmt: skip


_NEVER = np.array([-1], np.int32)


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    out = jax.block_until_ready(run())
    return time.perf_counter() - started, out


def prefill_row(args: PrefillArgs, mode: str, groups: int) -> dict[str, Any]:
    window = args.window_chunks if mode == "chunked" else None
    config = PrefillConfig(args.chunk_groups, window)
    setup = Setup(args.preset, args.dtype, groups, config, args.step_groups, args.attention)
    jax.block_until_ready((setup.params, setup.visual))
    before = memory.used_bytes()  # imports, runtime and parameters
    compiling = _timed(lambda: setup.prefill(segments=1))[0]
    seconds, cache = _timed(setup.prefill)
    return {
        "mode": mode,
        "groups": groups,
        "tokens": setup.layout.tokens,
        "seconds": seconds,
        "compile_seconds": compiling,
        "tokens_per_s": setup.layout.tokens / seconds,
        "peak_memory_bytes": memory.peak_bytes() - before,
        "cache_bytes": cache.k.nbytes + cache.v.nbytes,
    }


def decode_row(args: DecodeArgs, mode: str, groups: int) -> dict[str, Any]:
    setup = Setup(args.preset, args.dtype, groups, PrefillConfig(), 4, args.attention)
    jax.block_until_ready((setup.params, setup.visual))
    before = memory.used_bytes()
    setup.prefill(segments=1)
    prefilling, cache = _timed(setup.prefill)
    table, pooled = setup.pool(cache, BilevelConfig(pool=args.pool)) if mode == "bilevel" else (None, None)
    config = BilevelConfig(args.select_chunk_groups, args.pool, args.top_chunks)
    check_bilevel(config, setup.layout)

    def question() -> tuple[KVCache, Any]:
        context = cache if table is None or pooled is None else setup.bilevel(cache, table, pooled, config)
        return context, setup.first_token(context)

    question()  # compiles
    first, (context, state) = _timed(question)
    seconds = []
    for _ in range(4):  # the first compiles
        taken, (state, _, _) = _timed(functools.partial(setup.decode, context, state))
        seconds.append(taken)
    return {
        "mode": mode,
        "groups": groups,
        "tokens": setup.layout.tokens,
        "context_tokens": int(context.length),
        "prefill_seconds": prefilling,
        "question_seconds": first,
        "step_ms": 1e3 * float(np.median(seconds[1:])) / _DECODE_TOKENS,
        "peak_memory_bytes": memory.peak_bytes() - before,
    }


ROWS: dict[str, Callable[..., dict[str, Any]]] = {"prefill": prefill_row, "decode": decode_row}


def _in_own_process(command: str, args: PrefillArgs | DecodeArgs, mode: str, groups: int) -> dict[str, Any]:
    payload = json.dumps([command, dataclasses.asdict(args), mode, groups])
    run = subprocess.run(
        [sys.executable, "-m", "xl2jax.bench", "row", payload], stdout=subprocess.PIPE, text=True, check=False
    )
    if run.returncode:
        raise UserError(f"bench {command} {mode} with {groups} groups failed (status {run.returncode})")
    return json.loads(run.stdout.splitlines()[-1])


def _row(payload: str) -> None:
    command, fields, mode, groups = json.loads(payload)
    args = PrefillArgs(**fields) if command == "prefill" else DecodeArgs(**fields)
    print(json.dumps(ROWS[command](args, mode, groups)))


def _print_table(rows: list[dict[str, Any]]) -> None:
    """Aligned columns, with the ratio of seconds to the first mode's at the same groups."""
    cost = "seconds" if "seconds" in rows[0] else "step_ms"
    table = []
    for row in rows:
        base = next(r for r in rows if r["groups"] == row["groups"])
        shown = {k: v for k, v in row.items() if not k.endswith("bytes")}
        shown |= {k.removesuffix("_bytes") + "_MB": v / 1e6 for k, v in row.items() if k.endswith("bytes")}
        shown[f"x {base['mode']}"] = row[cost] / base[cost]
        table.append({k: f"{v:.2f}" if isinstance(v, float) else str(v) for k, v in shown.items()})
    names = list(table[0])
    widths = [max(len(n), *(len(r[n]) for r in table)) for n in names]
    for line in (dict(zip(names, names, strict=True)), *table):
        print("  ".join(line[n].rjust(w) for n, w in zip(names, widths, strict=True)))


def machine() -> str:
    device = jax.devices()[0]
    versions = ", ".join(f"{p} {version(p)}" for p in ("jax", "flax"))
    return f"{device.platform} {device.device_kind} x{jax.device_count()}, {platform.machine()}, {versions}"


def _print_kernels(args: KernelArgs) -> None:
    if jax.default_backend() != "gpu":
        raise UserError("bench kernels needs a GPU; the tests check the kernel without one")
    rows = kernel_rows(args)
    if args.json:
        print(json.dumps({"machine": machine(), "rows": rows}))
        return
    print(machine())
    for row in rows:
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))


def main() -> None:
    if sys.argv[1:2] == ["row"]:
        _row(sys.argv[2])
        return
    commands: dict[str, Any] = {"prefill": PrefillArgs, "decode": DecodeArgs, "kernels": KernelArgs}
    args: PrefillArgs | DecodeArgs | KernelArgs = tyro.extras.subcommand_cli_from_dict(
        commands, prog="python -m xl2jax.bench"
    )
    if isinstance(args, KernelArgs):
        _print_kernels(args)
        return
    command = "prefill" if isinstance(args, PrefillArgs) else "decode"
    modes, known = args.modes.split(","), {"chunked", "dense"} if command == "prefill" else {"dense", "bilevel"}
    if not set(modes) <= known:
        raise UserError(f"--modes: choose from {', '.join(sorted(known))}")
    if args.preset not in PRESETS:
        raise UserError(f"--preset: choose from {', '.join(PRESETS)}")
    try:
        sizes = [int(g) for g in args.groups.split(",")]
    except ValueError:
        sizes = []
    least = min(getattr(args, n, 1) for n in ("chunk_groups", "step_groups", "select_chunk_groups", "pool"))
    if least < 1 or getattr(args, "window_chunks", 0) < 0:
        raise UserError("chunk, step and selection groups and pool must be 1 or more, window chunks 0 or more")
    if not sizes or min(sizes) < 1:
        raise UserError(f"--groups: whole numbers separated by commas, not {args.groups!r}")
    rows = []
    for groups in sizes:
        for mode in modes:
            print(f"{command} {mode} {groups} groups ...", file=sys.stderr, flush=True)
            rows.append(_in_own_process(command, args, mode, groups))
    if args.json:
        print(json.dumps(rows))
    else:
        print(machine())
        _print_table(rows)


if __name__ == "__main__":
    run_command(main)
