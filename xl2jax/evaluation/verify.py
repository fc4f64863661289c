"""Compares every stage with tensors dumped from upstream (`xl2jax verify`).

A case folder holds checkpoint/, inputs.safetensors, case.json and expected/ (see tests/goldens). Every tensor of
expected/ becomes one row. The run passes if each relative L2 is within its limit (`LIMITS`) and all generated ids are
equal. An expected tensor that this module does not know is an error.

With `--dtype float64` everything is computed in float64, and goldens that were dumped in float64 agree to 1e-9 on any
machine. float32 rounds differently from machine to machine. Its limits are far above that rounding for every stage but
one: where DTS normalises a single channel a group (vision width 32), a gradient divides by a standard deviation of two
numbers, which magnifies rounding a thousandfold. Gradients of such a case are compared in float64 only.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from xl2jax.arithmetic import ceil_div
from xl2jax.checkpoint.param_names import Entry, entries
from xl2jax.config import FRAMES_PER_GROUP, Weights
from xl2jax.errors import UserError
from xl2jax.evaluation.case import Case, case_pixels
from xl2jax.inference import compiled, session
from xl2jax.inference.bilevel import BilevelConfig
from xl2jax.inference.layout import PrefillConfig, natural_ranges
from xl2jax.inference.network import Network
from xl2jax.models.layers import rope_tables, rotate
from xl2jax.models.param_tree import flatten
from xl2jax.models.video_xl2 import pad_to_groups
from xl2jax.ops.kv import KVArray, unpack
from xl2jax.training.loss import IGNORE, TokenBatch, token_loss


@dataclasses.dataclass(frozen=True)
class Limits:
    """The largest allowed relative L2 of activations and logits, of a training loss, and of gradients."""

    forward: float
    loss: float
    gradients: float


LIMITS = {"float64": Limits(1e-9, 1e-9, 1e-9), "float32": Limits(1e-4, 1e-5, 1e-4)}
INT8_LIMIT = 1e-2
"""The limit of the forward pass with --cache-dtype int8."""
WEIGHTS_LIMITS: dict[Weights, float] = {"int8": 5e-2, "int4": 0.5}
"""The limits of the forward pass with --weights. Greedy ids are reported only: where two tokens are nearly as likely, they
may change."""
SECTIONS = ("dense", "chunked", "bilevel", "train")
STEMS = {"train": "train_grads"}
"""Names of the files of expected/ that differ from the name of their section."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One compared tensor."""

    name: str
    shape: tuple[int, ...]
    relative_l2: float
    max_abs: float
    ok: bool


def _prefill_config(name: str) -> PrefillConfig | None:
    """The prefill settings in a name such as `logits_chunk4_prev3`, or None."""
    parts = name.split("_")
    try:
        return PrefillConfig(int(parts[-2].removeprefix("chunk")), int(parts[-1].removeprefix("prev")))
    except (ValueError, IndexError):
        return None


def dense_outputs(case: Case, wanted: set[str]) -> dict[str, np.ndarray]:
    out: dict[str, np.ndarray] = {k: x for k, x in case.stages.items() if k in wanted}
    if "inputs_embeds" in wanted:
        embed = np.asarray(case.network.model.llm.embed_tokens(jnp.arange(case.config.llm.vocab)))
        parts = [embed[case.prefix]]
        for time_ids, visual in zip(case.time_ids, case.stages["visual_tokens"], strict=True):
            parts += [embed[time_ids], visual]
        out["inputs_embeds"] = np.concatenate([*parts, embed[case.suffix]])
    if {"logits", "generated"} & wanted:
        kv, hidden = case.prefill(PrefillConfig(window_chunks=None))
        reply = case.answer(kv.cache)
        out["logits"], out["generated"] = case.logits(np.concatenate([hidden, reply.hidden])), reply.ids
    return out


def chunked_outputs(case: Case, wanted: set[str]) -> dict[str, np.ndarray]:
    out = {}
    for config in {c for c in map(_prefill_config, wanted) if c is not None}:
        tail = f"chunk{config.chunk_groups}_prev{config.window_chunks}"
        if f"mask_{tail}" in wanted:
            out[f"mask_{tail}"] = _visible(case, config)
        if {f"logits_{tail}", f"generated_{tail}"} & wanted:
            kv, hidden = case.prefill(config)
            reply = case.answer(kv.cache)
            out[f"logits_{tail}"] = case.logits(np.concatenate([hidden, reply.hidden]))
            out[f"generated_{tail}"] = reply.ids
    return out


def _visible(case: Case, config: PrefillConfig) -> np.ndarray:
    """The N x N mask that the ranges of the attention op stand for."""
    start = case.layout.global_tokens + len(case.suffix)
    tokens = natural_ranges(case.layout, len(case.suffix), start, config)
    slots = np.arange(start + case.layout.groups * case.layout.visual_tokens)
    return np.asarray(tokens.ranges.mask(slots))[:, tokens.slot].astype(np.uint8)


def bilevel_outputs(case: Case, wanted: set[str]) -> dict[str, np.ndarray]:
    out = {}
    h, theta = case.config.llm.head_width, case.config.llm.rope_theta
    videos: dict[PrefillConfig, session.VideoKV] = {}
    for i, entry in enumerate(case.case["bilevel"]):
        config = PrefillConfig(**entry["prefill"])
        if config not in videos:
            videos[config] = case.prefill(config)[0]
        bilevel = BilevelConfig(entry["select_chunk_groups"], entry["pool"])
        units = entry["selected_units"]
        context = session.context_of_units(case.network, videos[config], units, bilevel).context
        reply = case.answer(context)
        m, n = int(context.length), len(case.suffix)
        cos, sin = rope_tables(jnp.arange(m + n), h, theta, case.dtype)

        def whole(cached: KVArray, text: np.ndarray, layer: int, m: int = m) -> jax.Array:
            video = case.single_heads(np.asarray(unpack(cached)))
            return jnp.concatenate([video[layer, :, :m], text[layer]], axis=1)

        out[f"bilevel{i}_layer0_keys"] = np.asarray(rotate(whole(context.k, reply.k, 0), cos, -sin))
        out[f"bilevel{i}_layer0_values"] = np.asarray(whole(context.v, reply.v, 0))
        out[f"bilevel{i}_last_keys"] = np.asarray(rotate(whole(context.k, reply.k, -1), cos, -sin))
        out[f"bilevel{i}_last_values"] = np.asarray(whole(context.v, reply.v, -1))
        out[f"bilevel{i}_suffix_logits"] = case.logits(reply.hidden)
        out[f"bilevel{i}_generated"] = reply.ids
    return out


def train_rows(case: Case) -> Iterator[Row]:
    """Compares the loss, the norm of every parameter's gradient, and the gradients that are stored."""
    path = case.folder / "expected" / "train.json"
    try:
        sample = json.loads(path.read_text())
        group_ids, suffix_ids = np.asarray(sample["group_ids"]), sample["suffix_ids"]
        ids = np.concatenate([sample["prefix_ids"], group_ids, suffix_ids]).astype(np.int32)
        frames, answer, pad = int(sample["frames"]), int(sample["answer_tokens"]), case.case["pad_token_id"]
        norms: dict[str, float] = sample["grad_norms"]
        expected_loss, expected_norm = float(sample["loss"]), float(sample["global_grad_norm"])
    except (OSError, KeyError, ValueError, TypeError) as e:
        raise UserError(f"{path}: not a complete training case ({e})") from None
    is_visual = np.zeros(len(ids), bool)
    is_visual[len(sample["prefix_ids"]) :][: len(group_ids)] = group_ids == pad
    visual = np.where(is_visual, np.cumsum(is_visual) - 1, -1)
    if is_visual.sum() != ceil_div(frames, FRAMES_PER_GROUP) * case.config.visual_tokens:
        raise UserError(f"{path}: group_ids hold {is_visual.sum()} visual tokens, not those of {frames} frames")
    labels = np.where(np.arange(len(ids)) >= len(ids) - answer, ids, IGNORE)
    tokens = TokenBatch(*(jnp.asarray(x, jnp.int32)[None] for x in (ids, visual, labels)))
    pixels = pad_to_groups(jnp.asarray(case_pixels(frames, case.config.vision.image_size)))[None]

    @compiled.program
    @jax.value_and_grad
    def loss_of(network: Network, pixels: jax.Array, tokens: TokenBatch) -> jax.Array:
        total, count = token_loss(network.model, pixels, tokens, remat=True)
        return total / count

    loss, gradients = loss_of(case.network, pixels, tokens)
    yield compare("loss", np.array([expected_loss]), np.asarray(loss)[None], None, limit=LIMITS[case.dtype].loss)
    expected = case.expected(STEMS["train"]) or {}
    yield from gradient_rows(case.network, gradients, path, expected_norm, norms, expected)


def gradient_rows(
    network: Network,
    gradients: Network,
    path: Path,
    expected_norm: float,
    norms: Mapping[str, float],
    expected: Mapping[str, np.ndarray],
    prefix: str = "",
) -> Iterator[Row]:
    """Compares gradients: their global norm, norms by parameter, and whole ones, by upstream's names.

    `path` names the file of the norms in messages, and `prefix` begins the names of the rows.
    """
    limits = LIMITS[network.dtype]
    flat = {name: np.asarray(x) for name, x in flatten(gradients.params).items()}
    norm = float(np.sqrt(sum(np.sum(x.astype(np.float64) ** 2) for x in flat.values())))
    # Key biases shift all scores of a softmax equally, so their gradient is 0 and the stored one is rounding error. It
    # is compared relative to the resolution of the whole gradient.
    floor = float(np.finfo(network.dtype).eps) * expected_norm / limits.gradients
    table = {e.torch_name: e for e in entries(network.config)}
    unknown = sorted({*norms, *expected} - set(table))
    if unknown:
        raise UserError(f"{path}: gradients of unknown parameters: {', '.join(unknown)}")
    both = np.array([expected_norm]), np.array([norm])
    yield compare(f"{prefix}global gradient norm", *both, None, limit=limits.gradients)
    for name, value in norms.items():
        both = np.array([value]), np.array([np.linalg.norm(_slice(flat, table[name]).astype(np.float64))])
        yield compare(f"{prefix}|{name}|", *both, None, limit=limits.gradients, floor=floor)
    for name, tensor in expected.items():
        entry = table[name]
        gradient = entry.transform.to_torch(_slice(flat, entry), network.config)
        yield compare(f"{prefix}{name}", tensor, gradient, None, limit=limits.gradients)


def _slice(flat: dict[str, np.ndarray], entry: Entry) -> np.ndarray:
    return flat[entry.param] if entry.layer is None else flat[entry.param][entry.layer]


OUTPUTS = {"dense": dense_outputs, "chunked": chunked_outputs, "bilevel": bilevel_outputs}


def compare(
    name: str, expected: np.ndarray, actual: np.ndarray, slim: int | None, *, limit: float, floor: float = 0.0
) -> Row:
    """Compares a tensor with the expected one.

    Ids and masks must be equal. The difference of other tensors, relative to the norm of the expected tensor or to
    `floor` if that is larger, must be within `limit`. A slim case stores only the first `slim` frames or groups of the
    big stages.
    """
    if slim is not None and len(expected) == slim and actual.ndim == expected.ndim:
        actual = actual[:slim]
    if "generated" in name:
        actual = actual[: len(expected)]  # upstream stops at the end token
    if actual.shape != expected.shape:
        return Row(name, expected.shape, float("inf"), float("inf"), ok=False)
    if not np.issubdtype(expected.dtype, np.floating):
        wrong = float(np.abs(actual.astype(np.int64) - expected.astype(np.int64)).max(initial=0))
        return Row(name, expected.shape, float(wrong > 0), wrong, ok=wrong == 0)
    a, e = actual.astype(np.float64), expected.astype(np.float64)
    norm = max(float(np.linalg.norm(e)), floor) or 1.0
    relative = float(np.linalg.norm(a - e)) / norm
    return Row(name, expected.shape, relative, float(np.abs(a - e).max(initial=0.0)), ok=relative <= limit)


def verify(
    folder: Path,
    sections: tuple[str, ...],
    converted: Path,
    *,
    dtype: str = "float32",
    quantized: bool = False,
    weights: Weights | None = None,
    mesh: Mesh | None = None,
) -> Iterator[Row]:
    """Compares the named sections of a case. Yields a row for each tensor of expected/.

    `mesh`: the devices that the model is split over. The section `train` is for one device.
    """
    case = Case(folder, converted, dtype=dtype, quantized=quantized, weights=weights, mesh=mesh)
    stems = [p.stem for p in sorted((folder / "expected").glob("*.safetensors"))]
    unknown_files = set(stems) - {STEMS.get(s, s) for s in SECTIONS}
    if unknown_files:
        raise UserError(f"{folder}: expected/ holds unknown files: {', '.join(sorted(unknown_files))}")
    for section in sections:
        if section == "train":
            yield from train_rows(case)
            continue
        expected = case.expected(section)
        if expected is None:
            raise UserError(
                f"{folder}: expected/ has no {section}.safetensors (it has {', '.join(stems) or 'nothing'})"
            )
        actual = OUTPUTS[section](case, set(expected))
        unknown = sorted(set(expected) - set(actual))
        if unknown:
            raise UserError(f"{folder}: {section}.safetensors holds unknown tensors: {', '.join(unknown)}")
        for name, tensor in expected.items():
            stored = "float32" if tensor.dtype == np.float32 else dtype  # a float32 golden is only as exact as float32
            limit = INT8_LIMIT if quantized else max(LIMITS[stored].forward, LIMITS[dtype].forward)
            limit = limit if weights is None else max(limit, WEIGHTS_LIMITS[weights])
            row = compare(name, tensor, actual[name], case.case.get("slim"), limit=limit)
            yield dataclasses.replace(row, ok=True) if weights is not None and "generated" in name else row
