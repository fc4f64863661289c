"""`python -m xl2jax verify CASE_DIR ...`: compares every stage with tensors dumped from upstream.

A case folder holds checkpoint/, inputs.safetensors, case.json and expected/ (see tests/goldens). Every
tensor of expected/ becomes one row; the run passes if each relative L2 is within its limit (`LIMITS`) and
all generated ids are equal. An expected tensor that has no counterpart here is an error.

With `--dtype float64` everything is computed in float64, and goldens that were dumped in float64 agree to 1e-9 on any
machine. float32 rounds differently from machine to machine. Its limits are far above that rounding for every
stage but one: where DTS normalises a single channel a group (vision width 32), a gradient divides by a standard
deviation of two numbers, which magnifies rounding a thousandfold. Gradients of such a case are compared in
float64 only.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file

from xl2jax.checkpoint.convert import torch_to_orbax
from xl2jax.checkpoint.param_names import Entry, entries
from xl2jax.checkpoint.params import load_params
from xl2jax.config import FRAMES_PER_GROUP, VideoXL2Config
from xl2jax.errors import UserError
from xl2jax.inference.bilevel import (
    BilevelConfig,
    GroupTable,
    blocks_of_units,
    group_table,
    mix,
    mixed_slots,
    mixed_source,
    pool_cache,
)  # fmt: skip
from xl2jax.inference.cache import KVArray, KVCache, empty_cache, unpack
from xl2jax.inference.generate import TokenSampling, decode, extend, first_token
from xl2jax.inference.layout import PrefillConfig, VideoLayout, natural_ranges
from xl2jax.inference.prefill import PrefillPlan, make_plan, prefill_prefix, prefill_segment, segments, steps
from xl2jax.models.dts import NORM_GROUPS, resample
from xl2jax.models.layers import rope_tables, rotate
from xl2jax.models.param_tree import flatten
from xl2jax.models.projector import average_pool
from xl2jax.models.video_xl2 import VideoXL2, abstract_model, pad_to_groups
from xl2jax.system.terminal import run_command
from xl2jax.training.loss import IGNORE, TokenBatch, token_loss


@dataclasses.dataclass(frozen=True)
class Limits:
    """Largest relative L2 of activations and logits, of a training loss, and of gradients and their norms."""

    forward: float
    loss: float
    gradients: float


LIMITS = {"float64": Limits(1e-9, 1e-9, 1e-9), "float32": Limits(1e-4, 1e-5, 1e-4)}
INT8_LIMIT = 1e-2  # of the forward pass with --cache-dtype int8
VIDEO_ID = -200
SECTIONS = ("dense", "chunked", "bilevel", "train")
_STEMS = {"train": "train_grads"}  # files of expected/ that are not named as their section
_FRAMES_AT_ONCE = 16

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Row:
    """One compared tensor."""

    name: str
    shape: tuple[int, ...]
    relative_l2: float
    max_abs: float
    ok: bool


def case_pixels(frames: int, size: int) -> np.ndarray:
    """The inputs of all cases, which are not stored: float32 [F, H, W, 3]."""
    f, y, x, c = np.ogrid[:frames, :size, :size, :3]
    value = np.sin(0.05 * (c + 1) * x + 0.03 * y + 0.4 * f) * np.cos(0.02 * (f + 1) * y - 0.3 * c)
    return value.astype(np.float32)


class Case:
    """A case folder, and the model loaded from its checkpoint through the real converter."""

    def __init__(self, folder: Path, converted: Path, *, dtype: str = "float32", quantized: bool = False):
        self.folder, self.quantized, self.dtype = folder, quantized, dtype
        if not (folder / "case.json").is_file():
            raise UserError(f"{folder}: not a case folder (no case.json)")
        torch_to_orbax(folder / "checkpoint", converted, "float32")
        self.config, params = load_params(converted)
        self.params = jax.tree.map(lambda x: x.astype(dtype), params)
        self.graphdef = nnx.graphdef(abstract_model(self.config, dtype))
        inputs = self._tensors(folder / "inputs.safetensors")
        try:
            self.case: dict[str, Any] = json.loads((folder / "case.json").read_text())
            self.frames, self.new_tokens = int(self.case["frames"]), int(self.case["new_tokens"])
            self.times = tuple(int(n) for n in self.case["time_token_lengths"])
            ids, group_ids = inputs["input_ids"].tolist(), inputs["group_ids"].tolist()
        except (KeyError, ValueError, TypeError) as e:
            raise UserError(f"{folder}: case.json or inputs.safetensors lacks what a case needs ({e})") from None
        if ids.count(VIDEO_ID) != 1:
            raise UserError(f"{folder / 'inputs.safetensors'}: input_ids must hold {VIDEO_ID} once")
        split = ids.index(VIDEO_ID)
        self.prefix, self.suffix = ids[:split], ids[split + 1 :]
        self.time_ids = _time_ids(group_ids, self.times, self.config.visual_tokens, folder)
        self.layout = VideoLayout(len(self.prefix), self.times, self.config.visual_tokens)

    @staticmethod
    def _tensors(path: Path) -> dict[str, np.ndarray]:
        try:
            return load_file(path)
        except (OSError, SafetensorError) as e:
            raise UserError(f"{path}: cannot be read ({e})") from None

    def expected(self, section: str) -> dict[str, np.ndarray] | None:
        path = self.folder / "expected" / f"{section}.safetensors"
        return self._tensors(path) if path.is_file() else None

    @property
    def model(self) -> VideoXL2:
        return nnx.merge(self.graphdef, self.params)

    @functools.cached_property
    def stages(self) -> dict[str, np.ndarray]:
        """Every vision stage in upstream's layout, computed a few frames at a time."""

        @jax.jit
        def encode(params: nnx.State, pixels: jax.Array) -> dict[str, jax.Array]:
            model: VideoXL2 = nnx.merge(self.graphdef, params)
            features = model.vision(pixels)
            interpolated = resample(features, self.config.grid)
            groups = model.dts(interpolated)
            projected = model.projector(groups)
            return {
                "vision_features": features,
                "interpolated": interpolated,
                "dts": groups.transpose(0, 3, 1, 2),
                "projected": projected.reshape(len(projected), -1, projected.shape[-1]),
                "visual_tokens": average_pool(projected, self.config.pool_stride),
                "visual_tokens_e2e": model.encode_frames(pixels),
            }

        pixels = pad_to_groups(jnp.asarray(case_pixels(self.frames, self.config.vision.image_size)))
        parts = [
            jax.device_get(encode(self.params, pixels[i : i + _FRAMES_AT_ONCE]))
            for i in range(0, len(pixels), _FRAMES_AT_ONCE)
        ]
        stages = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
        return {k: x[: self.frames] if k in ("vision_features", "interpolated") else x for k, x in stages.items()}

    def prefill(self, config: PrefillConfig) -> tuple[PrefillPlan, KVCache, np.ndarray]:
        """Cache and hidden states [N without suffix, D] in natural order."""
        plan = make_plan(self.layout, config)
        all_steps = steps(self.layout, plan, self.time_ids)
        visual = self.stages["visual_tokens"]
        v, hidden = plan.visual_tokens, np.zeros((self.layout.tokens, self.config.llm.width), self.dtype)
        prefix_fn, segment_fn = self._jitted_prefill

        ids = np.zeros(plan.prefix_cap, np.int32)
        ids[: len(self.prefix)] = self.prefix
        cache = empty_cache(self.config.llm, plan.slots, self.dtype, plan.visual_start, quantized=self.quantized)
        cache, h = prefix_fn(self.params, cache, jnp.asarray(ids), jnp.int32(len(self.prefix)))
        hidden[: len(self.prefix)] = h[: len(self.prefix)]
        for number, segment in enumerate(segments(all_steps, plan)):
            part = visual[number * plan.segment_groups : (number + 1) * plan.segment_groups]
            part = np.pad(part, ((0, plan.segment_groups - len(part)), (0, 0), (0, 0)))
            cache, h = segment_fn(self.params, cache, jnp.asarray(part), segment)
            h = np.asarray(h)
            for i in range(plan.segment_steps):
                n = int(segment.visuals[i])
                for first, last in ((0, n), (plan.step_groups * v, plan.step_groups * v + int(segment.times[i]))):
                    hidden[segment.position[i, first:last]] = h[i, first:last]
        return plan, cache, hidden

    @functools.cached_property
    def _jitted_prefill(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        @jax.jit
        def prefix(params: nnx.State, cache: KVCache, ids: jax.Array, length: jax.Array) -> Any:
            return prefill_prefix(nnx.merge(self.graphdef, params).llm, cache, ids, length)

        @jax.jit
        def segment(params: nnx.State, cache: KVCache, visual: jax.Array, xs: Any) -> Any:
            return prefill_segment(nnx.merge(self.graphdef, params).llm, cache, visual, xs, keep_hidden=True)

        return prefix, segment

    def answer(self, context: KVCache) -> tuple[KVCache, np.ndarray, np.ndarray]:
        """(text cache after the suffix, suffix hidden states, greedy ids)."""
        limit = self.new_tokens
        greedy = TokenSampling().traced()
        never = jnp.array([-1], jnp.int32)

        @jax.jit
        def run(params: nnx.State, context: KVCache, ids: jax.Array) -> Any:
            llm = nnx.merge(self.graphdef, params).llm
            text = empty_cache(self.config.llm, len(self.suffix) + limit, self.dtype)
            n = jnp.int32(len(self.suffix))
            text, hidden = extend(llm, context, text, ids, n)
            state = first_token(llm, text, hidden, n, jax.random.key(0), never, greedy)
            first = state.token
            _, rest, _ = decode(llm, context, state, jnp.int32(limit - 1), never, greedy, size=limit - 1)
            return text, hidden, jnp.concatenate([first[None], rest])

        text, hidden, ids = run(self.params, context, jnp.asarray(self.suffix, jnp.int32))
        return text, np.asarray(hidden), np.asarray(ids)

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        return np.asarray(jax.jit(lambda p, h: nnx.merge(self.graphdef, p).llm.logits(h))(self.params, hidden))


def _time_ids(group_ids: list[int], times: tuple[int, ...], visual: int, folder: Path) -> list[list[int]]:
    if len(group_ids) != sum(times) + visual * len(times):
        raise UserError(f"{folder}: group_ids do not match time_token_lengths and the model's {visual} tokens a group")
    out, at = [], 0
    for n in times:
        out.append([int(i) for i in group_ids[at : at + n]])
        at += n + visual
    return out


def _mode(name: str) -> PrefillConfig | None:
    """`logits_chunk4_prev3` -> its prefill settings."""
    parts = name.split("_")
    try:
        return PrefillConfig(int(parts[-2].removeprefix("chunk")), int(parts[-1].removeprefix("prev")))
    except (ValueError, IndexError):
        return None


def dense_outputs(case: Case, wanted: set[str]) -> dict[str, np.ndarray]:
    out: dict[str, np.ndarray] = {k: x for k, x in case.stages.items() if k in wanted}
    if "inputs_embeds" in wanted:
        embed = np.asarray(case.params["llm"]["embed"]["embedding"][...])
        parts = [embed[case.prefix]]
        for time_ids, visual in zip(case.time_ids, case.stages["visual_tokens"], strict=True):
            parts += [embed[time_ids], visual]
        out["inputs_embeds"] = np.concatenate([*parts, embed[case.suffix]])
    if {"logits", "generated"} & wanted:
        _, cache, hidden = case.prefill(PrefillConfig(window_chunks=None))
        _, suffix, ids = case.answer(cache)
        out["logits"], out["generated"] = case.logits(np.concatenate([hidden, suffix])), ids
    return out


def chunked_outputs(case: Case, wanted: set[str]) -> dict[str, np.ndarray]:
    out = {}
    for config in {c for c in map(_mode, wanted) if c is not None}:
        tail = f"chunk{config.chunk_groups}_prev{config.window_chunks}"
        if f"mask_{tail}" in wanted:
            out[f"mask_{tail}"] = _visible(case, config)
        if {f"logits_{tail}", f"generated_{tail}"} & wanted:
            _, cache, hidden = case.prefill(config)
            _, suffix, ids = case.answer(cache)
            out[f"logits_{tail}"] = case.logits(np.concatenate([hidden, suffix]))
            out[f"generated_{tail}"] = ids
    return out


def _visible(case: Case, config: PrefillConfig) -> np.ndarray:
    """The N x N mask that the ranges given to the attention op amount to."""
    start = case.layout.global_tokens + len(case.suffix)
    tokens = natural_ranges(case.layout, len(case.suffix), start, config)
    slots = np.arange(start + case.layout.groups * case.layout.visual_tokens)
    return np.asarray(tokens.ranges.mask(slots))[:, tokens.slot].astype(np.uint8)


def bilevel_outputs(case: Case, wanted: set[str]) -> dict[str, np.ndarray]:
    out = {}
    h, theta = case.config.llm.head_width, case.config.llm.rope_theta
    caches: dict[PrefillConfig, tuple[PrefillPlan, KVCache]] = {}
    for i, entry in enumerate(case.case["bilevel"]):
        prefill = PrefillConfig(**entry["prefill"])
        if prefill not in caches:
            caches[prefill] = case.prefill(prefill)[:2]
        plan, cache = caches[prefill]
        config = BilevelConfig(entry["select_chunk_groups"], entry["pool"])
        context = mixed_for_units(case, plan, cache, entry["selected_units"], config)
        text, hidden, ids = case.answer(context)
        m, n = int(context.length), len(case.suffix)
        cos, sin = rope_tables(jnp.arange(m + n), h, theta, case.dtype)

        def whole(a: KVArray, b: KVArray, layer: int, m: int = m, n: int = n) -> jax.Array:
            return jnp.concatenate([unpack(a)[layer, :, :m], unpack(b)[layer, :, :n]], axis=1)

        out[f"bilevel{i}_layer0_keys"] = np.asarray(rotate(whole(context.k, text.k, 0), cos, -sin))
        out[f"bilevel{i}_layer0_values"] = np.asarray(whole(context.v, text.v, 0))
        out[f"bilevel{i}_last_keys"] = np.asarray(rotate(whole(context.k, text.k, -1), cos, -sin))
        out[f"bilevel{i}_last_values"] = np.asarray(whole(context.v, text.v, -1))
        out[f"bilevel{i}_suffix_logits"] = case.logits(hidden)
        out[f"bilevel{i}_generated"] = ids
    return out


def mixed_for_units(case: Case, plan: PrefillPlan, cache: KVCache, units: list[int], config: BilevelConfig) -> KVCache:
    v, theta = plan.visual_tokens, case.config.llm.rope_theta
    table: GroupTable = group_table(case.layout, (plan.slots - plan.visual_start) // v)
    blocks = blocks_of_units(units, case.layout.groups, config.select_chunk_groups)
    dense = np.zeros(table.time_lengths.shape[0], bool)
    dense[: case.layout.groups] = np.repeat(blocks, config.select_chunk_groups)[: case.layout.groups]
    slots = mixed_slots(case.layout, int(dense.sum()), config)

    @jax.jit
    def run(cache: KVCache, table: GroupTable, dense: jax.Array) -> KVCache:
        pooled = pool_cache(cache, table, visual_tokens=v, pool=config.pool, theta=theta)
        source = mixed_source(table, dense, cache.visual_start, visual_tokens=v, pool=config.pool, slots=slots)
        return mix(cache, pooled, source, theta=theta)

    return run(cache, table, jnp.asarray(dense))


def train_rows(case: Case) -> Iterator[Row]:
    """Loss, the norm of every parameter's gradient, and the gradients stored."""
    path = case.folder / "expected" / "train.json"
    try:
        sample = json.loads(path.read_text())
        group_ids, suffix_ids = np.asarray(sample["group_ids"]), sample["suffix_ids"]
        ids = np.concatenate([sample["prefix_ids"], group_ids, suffix_ids]).astype(np.int32)
        frames, answer, pad = int(sample["frames"]), int(sample["answer_tokens"]), case.case["pad_token_id"]
        norms: dict[str, float] = sample["grad_norms"]
        expected_loss, expected_norm = float(sample["loss"]), float(sample["global_grad_norm"])
    except (OSError, KeyError, ValueError, TypeError) as e:
        raise UserError(f"{path}: lacks what a training case needs ({e})") from None
    is_visual = np.zeros(len(ids), bool)
    is_visual[len(sample["prefix_ids"]) :][: len(group_ids)] = group_ids == pad
    visual = np.where(is_visual, np.cumsum(is_visual) - 1, -1)
    if is_visual.sum() != -(-frames // FRAMES_PER_GROUP) * case.config.visual_tokens:
        raise UserError(f"{path}: group_ids hold {is_visual.sum()} visual tokens, not those of {frames} frames")
    labels = np.where(np.arange(len(ids)) >= len(ids) - answer, ids, IGNORE)
    tokens = TokenBatch(*(jnp.asarray(x, jnp.int32)[None] for x in (ids, visual, labels)))
    pixels = pad_to_groups(jnp.asarray(case_pixels(frames, case.config.vision.image_size)))[None]

    @jax.jit
    @jax.value_and_grad
    def loss_of(params: nnx.State, pixels: jax.Array, tokens: TokenBatch) -> jax.Array:
        total, count = token_loss(nnx.merge(case.graphdef, params), pixels, tokens, remat=True)
        return total / count

    loss, grads = loss_of(case.params, pixels, tokens)
    limits = LIMITS[case.dtype]
    yield compare("loss", np.array([expected_loss]), np.asarray(loss)[None], None, limit=limits.loss)
    flat = {name: np.asarray(x) for name, x in flatten(grads).items()}
    norm = float(np.sqrt(sum(np.sum(x.astype(np.float64) ** 2) for x in flat.values())))
    # Key biases move all scores of a softmax alike: their gradient is 0, and what is stored is rounding,
    # which may differ by the dtype's resolution of the whole gradient.
    floor = float(np.finfo(case.dtype).eps) * expected_norm / limits.gradients
    expected = case.expected(_STEMS["train"]) or {}
    table = {e.torch_name: e for e in entries(case.config)}
    unknown = sorted({*norms, *expected} - set(table))
    if unknown:
        raise UserError(f"{path}: gradients of parameters unknown here: {', '.join(unknown)}")
    yield compare("global gradient norm", np.array([expected_norm]), np.array([norm]), None, limit=limits.gradients)
    for name, value in norms.items():
        found = float(np.linalg.norm(_slice(flat, table[name]).astype(np.float64)))
        yield compare(f"|{name}|", np.array([value]), np.array([found]), None, limit=limits.gradients, least=floor)
    for name, tensor in expected.items():
        entry = table[name]
        gradient = entry.transform.to_torch(_slice(flat, entry), case.config)
        yield compare(name, tensor, gradient, None, limit=limits.gradients)


def _slice(flat: dict[str, np.ndarray], entry: Entry) -> np.ndarray:
    return flat[entry.param] if entry.layer is None else flat[entry.param][entry.layer]


OUTPUTS = {"dense": dense_outputs, "chunked": chunked_outputs, "bilevel": bilevel_outputs}


def compare(
    name: str, expected: np.ndarray, actual: np.ndarray, slim: int | None, *, limit: float, least: float = 0.0
) -> Row:  # fmt: skip
    """Ids and masks must be equal; other tensors within the limit, relative to their norm or `least`.

    A slim case stores only the first frames or groups of the big stages.
    """
    if slim is not None and len(expected) == slim and actual.ndim == expected.ndim:
        actual = actual[:slim]
    if "generated" in name:
        actual = actual[: len(expected)]  # upstream's stops at the end token
    if actual.shape != expected.shape:
        return Row(name, expected.shape, float("inf"), float("inf"), ok=False)
    if not np.issubdtype(expected.dtype, np.floating):
        wrong = float(np.abs(actual.astype(np.int64) - expected.astype(np.int64)).max(initial=0))
        return Row(name, expected.shape, float(wrong > 0), wrong, ok=wrong == 0)
    a, e = actual.astype(np.float64), expected.astype(np.float64)
    norm = max(float(np.linalg.norm(e)), least) or 1.0
    relative = float(np.linalg.norm(a - e)) / norm
    return Row(name, expected.shape, relative, float(np.abs(a - e).max(initial=0.0)), ok=relative <= limit)


def verify(
    folder: Path, sections: tuple[str, ...], converted: Path, *, dtype: str = "float32", quantized: bool = False
) -> Iterator[Row]:
    """Compares the named sections of a case; a row for each tensor of expected/."""
    case = Case(folder, converted, dtype=dtype, quantized=quantized)
    found = [p.stem for p in sorted((folder / "expected").glob("*.safetensors"))]
    unknown_files = set(found) - {_STEMS.get(s, s) for s in SECTIONS}
    if unknown_files:
        raise UserError(f"{folder}: expected/ holds files unknown here: {', '.join(sorted(unknown_files))}")
    for section in sections:
        if section == "train":
            yield from train_rows(case)
            continue
        expected = case.expected(section)
        if expected is None:
            raise UserError(
                f"{folder}: expected/ has no {section}.safetensors (it has {', '.join(found) or 'nothing'})"
            )
        actual = OUTPUTS[section](case, set(expected))
        unknown = sorted(set(expected) - set(actual))
        if unknown:
            raise UserError(f"{folder}: {section}.safetensors holds tensors unknown here: {', '.join(unknown)}")
        for name, tensor in expected.items():
            stored = "float32" if tensor.dtype == np.float32 else dtype  # a float32 golden is no better than float32
            limit = INT8_LIMIT if quantized else max(LIMITS[stored].forward, LIMITS[dtype].forward)
            yield compare(name, tensor, actual[name], case.case.get("slim"), limit=limit)


def _as_json(row: Row) -> dict[str, Any]:
    """JSON has no infinity: null."""
    fields = dataclasses.asdict(row)
    return {k: None if isinstance(x, float) and not np.isfinite(x) else x for k, x in fields.items()}


@dataclasses.dataclass(frozen=True)
class Args:
    """Compares the model with tensors dumped from upstream."""

    case_dirs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders with checkpoint/, inputs.safetensors, case.json and expected/."""
    only: str | None = None
    """Sections to check (dense,chunked,bilevel,train); by default all that expected/ holds."""
    dtype: Literal["float32", "float64"] = "float32"
    """What everything is computed in. float64 agrees with float64 goldens to 1e-9."""
    cache_dtype: Literal["int8"] | None = None
    """Of the video's KV, --dtype by default. int8 has a wider limit."""
    json: bool = False
    """Prints one JSON object instead of tables."""


def main() -> int:
    args = tyro.cli(Args, prog="python -m xl2jax verify")
    if not args.case_dirs:
        raise UserError("no case folder is given")
    if args.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    chosen = {folder: _sections(folder, args) for folder in args.case_dirs}
    reports = []
    with jax.default_matmul_precision("highest"):  # float32, not TF32, on GPUs
        for folder, sections in chosen.items():
            if not args.json:
                print(f"{folder}, computed in {args.dtype}")
            rows = _verify_case(folder, sections, args)
            passed = all(r.ok for r in rows) and bool(rows)
            reports.append({"case": str(folder), "passed": passed, "rows": [_as_json(r) for r in rows]})
            if not args.json and not passed:
                print(f"{folder}: {sum(not r.ok for r in rows)} of {len(rows)} tensors differ", file=sys.stderr)
    everything = all(r["passed"] for r in reports)
    if args.json:
        print(json.dumps({"passed": everything, "dtype": args.dtype, "cases": reports}))
    return 0 if everything else 1


def _sections(folder: Path, args: Args) -> tuple[str, ...]:
    """The sections of a case to check. Raises UserError for one that there is not, or that float32 cannot decide."""
    expected = folder / "expected"
    there = tuple(s for s in SECTIONS if (expected / f"{_STEMS.get(s, s)}.safetensors").is_file())
    chosen = there if args.only is None else tuple(args.only.split(","))
    wrong = [s for s in chosen if s not in SECTIONS]
    if wrong:
        raise UserError(f"--only: no section {wrong[0]!r}; choose from {','.join(SECTIONS)}")
    if not (folder / "case.json").is_file():
        raise UserError(f"{folder}: not a case folder (no case.json)")
    width = VideoXL2Config.from_hf(folder / "checkpoint").vision.width
    if "train" in chosen and args.dtype == "float32" and width == NORM_GROUPS:
        reason = f"{folder}: vision width {width} normalises one channel a group, so that float32 decides no gradient"
        if args.only is not None:
            raise UserError(f"{reason}: use --dtype float64")
        logger.info("%s; gradients are compared with --dtype float64 only", reason)
        chosen = tuple(s for s in chosen if s != "train")
    return chosen


def _verify_case(folder: Path, sections: tuple[str, ...], args: Args) -> list[Row]:
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        if not args.json:
            print(f"{'tensor':32} {'shape':>20} {'relative L2':>12} {'max abs':>10}  ok")
        quantized = args.cache_dtype == "int8"
        for row in verify(folder, sections, Path(scratch) / "checkpoint", dtype=args.dtype, quantized=quantized):
            rows.append(row)
            if not args.json:
                shape = "x".join(map(str, row.shape))
                mark = "ok" if row.ok else "WRONG"
                print(f"{row.name:32} {shape:>20} {row.relative_l2:12.2e} {row.max_abs:10.2e}  {mark}", flush=True)
    return rows


if __name__ == "__main__":
    run_command(main)
