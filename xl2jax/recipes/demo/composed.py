"""Videos composed of groups that were encoded once: how the bundled model's LLM learns to look up by time.

A group's visual tokens follow from its own four frames, so any sequence of encoded groups is a video, and training on
it costs no frames. Besides the language loss, auxiliary linear heads (thrown away) make hidden states tell what a lookup
is made of: a visual token its group's time; an answer's tokens the time, colour and form that were asked about; and, two
layers on, the time that they have to say. That stands for what Qwen learnt from text: without the heads the small LLM
finds shapes by content and hardly by time.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from xl2jax.checkpoint.params import load_params
from xl2jax.checkpoint.torch_folder import write_params
from xl2jax.config import FRAMES_PER_GROUP
from xl2jax.errors import UserError
from xl2jax.evaluation.scenes import (
    COLOURS,
    HELD_OUT,
    PAIRS,
    SHAPES,
    Kind,
    Question,
    Scene,
    ask,
    group_frames,
    make_scene,
)
from xl2jax.models.layers import rope_tables
from xl2jax.models.param_tree import flatten
from xl2jax.models.video_xl2 import VideoXL2, abstract_model, normalise
from xl2jax.ops.dense import dense_attention
from xl2jax.prompt import IM_START, PromptTokenizer
from xl2jax.recipes.demo.datasets import LONGEST, draw_scale
from xl2jax.system.atomic import replacing_file
from xl2jax.system.process_pool import in_processes
from xl2jax.training.loss import IGNORE, TokenBatch, cross_entropies, embeddings
from xl2jax.training.samples import tokenise
from xl2jax.training.step import is_decayed

# What is encoded: as many groups of each of these, the pairs of colour and form that are trained on, and nothing.
_TRAINED = [p for p in PAIRS if p not in HELD_OUT]
_NOTHING = range(len(_TRAINED), len(_TRAINED) + 10)
OF_EACH = 400
_SEED = 150_000_000

# How often each kind is tried first, of those that can be asked about a shape: what is hard more often.
_SHARES: dict[Kind, float] = {
    "colour_of": 1.5, "shape_of": 1.5, "colour": 2, "shape": 3, "time": 3, "exists": 1,
}  # fmt: skip
_MOST_SHAPES = 12  # in a video

_DIGITS = 5  # of a time: from the tenths of a second up
_CLASSES = (*_DIGITS * (11,), len(COLOURS) + 1, len(SHAPES) + 1)  # of what the heads tell; the last of each: none
NO_TARGET = -1

STANDS_FOR = 1024
"""Groups of the longest video that a row may stand for. A row that stands for one n times as long has its distances,
through gaps in positions (PoSE, arXiv 2309.10400), and of its noise what n times as many groups without a shape make
(but for the first group): less where few of its groups are empty, none where there is no such group."""
_TIME_TOKENS = 10  # of a group, about


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of the training: rows of up to `groups` groups, `batch` rows a step, `steps` steps, the peak rate."""

    name: str
    groups: int
    batch: int
    steps: int
    learning_rate: float
    seed: int

    def tokens(self, visual_tokens: int) -> int:
        """Of a row: its groups, a question about each shape, and two more. What is longer is cut."""
        wanted = 30 + (_TIME_TOKENS + visual_tokens) * self.groups + 17 * (min(self.groups, _MOST_SHAPES) + 2)
        return -(-wanted // 16) * 16


class Rows[A](NamedTuple):
    """B composed videos with their conversations, and what the heads should tell. NumPy's or JAX's arrays, int32 where
    nothing else is said."""

    groups: A
    """[B, G]: which encoded group stands in each place. Behind the last of a shorter video: 0."""
    ids: A
    """[B, T], as `visual` and `labels` those of a TokenBatch."""
    visual: A
    labels: A
    positions: A
    """[B, T]: rising, with gaps."""
    weights: A
    """float32 [B, T]: log of how many times a token counts as key."""
    early: A
    """int8 [B, T, 7]: digits of a time, colour, form; NO_TARGET where nothing is to be told."""
    late: A
    """int8 [B, T, 7], likewise."""


class Metrics(NamedTuple):
    """The language loss, and what the heads told rightly: (tokens that told all of it, tokens) [2]."""

    loss: jax.Array
    seen: jax.Array
    """Visual tokens: their group's time."""
    asked: jax.Array
    """Tokens of answers, the newline before them counted in: what was asked for."""
    answered: jax.Array
    """Tokens of answers that are times: that time."""


def digits(seconds: float) -> list[int]:
    """Of a time in tenths, lowest first; 10 where a number has no such digit."""
    tenths = round(seconds * 10)
    return [tenths // 10**p % 10 if tenths >= 10**p or p < 2 else 10 for p in range(_DIGITS)]


def _draw(size: int, groups: Sequence[tuple[int, tuple[str, str] | None]]) -> np.ndarray:
    """uint8 [4 * N, size, size, 3]: numbered groups that show a pair, or nothing."""
    frames = []
    for number, pair in groups:
        scene = make_scene(2 * (_SEED + number), 1, events=int(pair is not None))
        if pair is not None:
            event = dataclasses.replace(scene.events[0], colour=pair[0], shape=pair[1])
            scene = dataclasses.replace(scene, events=(event,))
        frames.append(group_frames(scene, size))
    return np.concatenate(frames)


def encode_groups(source: Path, *, of_each: int = OF_EACH, processes: int, batch: int = 40) -> np.ndarray:
    """Visual tokens [46 * of_each, V, D]: `of_each` groups of each pair that is trained on, and ten times as many of
    nothing. `processes` draw them."""
    config, params = load_params(source, "float32")
    graphdef = nnx.graphdef(abstract_model(config, "float32"))

    @jax.jit
    def encode(frames: jax.Array) -> jax.Array:
        model: VideoXL2 = nnx.merge(graphdef, params)
        return model.encode_frames(normalise(frames))

    pairs = [p for p in [*_TRAINED, *len(_NOTHING) * [None]] for _ in range(of_each)]
    draw = functools.partial(_draw, config.vision.image_size)
    drawn = in_processes(processes, draw, itertools.batched(enumerate(pairs), batch))
    encoded: list[np.ndarray] = []
    with tqdm(total=len(pairs), desc="encode groups", file=sys.stderr) as bar:
        for frames in drawn:
            encoded.append(np.asarray(encode(jnp.asarray(frames))))
            bar.update(len(encoded[-1]))
    return np.concatenate(encoded)


def compose(seed: int, phase: Phase, tokenizer: PromptTokenizer, visual_tokens: int, of_each: int) -> Rows[np.ndarray]:
    """One row, of NumPy arrays without the first axis.

    A shape is asked about once, and the order of two shapes last: an answer would give the next one away. Every third
    row is a shorter video, every second has a needle, every second starts later in time, and every second stands for a
    longer video, of up to `STANDS_FOR` groups.
    """
    rng = np.random.default_rng([seed, 3])
    count = phase.groups if rng.random() < 2 / 3 else round(float(np.exp(rng.uniform(0, np.log(phase.groups)))))
    needle_at = int(rng.integers(count)) if rng.random() < 0.5 else None
    scene = make_scene(2 * seed, count, most=_MOST_SHAPES, needle_at=needle_at)
    seconds = FRAMES_PER_GROUP * draw_scale(scene.frames, rng)
    later = int(LONGEST / seconds) - count
    start = seconds * int(rng.integers(max(later, 1))) if rng.random() < 0.5 else 0.0
    times = [round(float(start + g * seconds), 1) for g in range(count)]
    classes = rng.choice(_NOTHING, count)
    for event in scene.events:
        classes[event.start : event.start + event.groups] = _TRAINED.index((event.colour, event.shape))

    questions = _questions(scene, seconds, start, rng)
    turns = [turn for q in questions for turn in (("user", q.text), ("assistant", q.answer))]
    length = phase.tokens(visual_tokens)
    row = tokenise(turns, times, tokenizer, visual_tokens, length)
    used = len(row.ids)

    early, late = (np.full((length, len(_CLASSES)), NO_TARGET, np.int8) for _ in range(2))
    is_visual = row.visual >= 0
    early[:used][is_visual, :_DIGITS] = np.array([digits(t) for t in times])[row.visual[is_visual] // visual_tokens]
    (opening,), (assistant,) = tokenizer.encode(IM_START), tokenizer.encode("assistant")
    begins = np.flatnonzero((row.ids[:-2] == opening) & (row.ids[1:-1] == assistant)) + 2
    for begin, question in zip(begins.tolist(), questions, strict=False):  # those that were not cut
        words = question.text.rstrip("?").split()
        answer = slice(begin, begin + 1)
        if question.kind == "time":
            assert question.group is not None
            answer = slice(begin, min(begin + len(tokenizer.encode(question.answer)) - 1, used))
            late[answer, :_DIGITS] = digits(times[question.group])
        if question.kind in ("colour", "shape"):
            assert question.group is not None
            early[answer, :_DIGITS] = digits(times[question.group])
        if question.kind in ("time", "exists", "colour_of", "shape_of"):
            for place, names in ((_DIGITS, tuple(COLOURS)), (_DIGITS + 1, SHAPES)):
                early[answer, place] = next((i for i, name in enumerate(names) if name in words), len(names))

    positions, weights = np.arange(length, dtype=np.int32), np.zeros(length, np.float32)
    if rng.random() < 0.5 and count < STANDS_FOR:
        ends = np.flatnonzero(is_visual & (row.visual % visual_tokens == visual_tokens - 1)) + 1
        times_longer = float(np.exp(rng.uniform(0, np.log(STANDS_FOR / count))))
        gaps = rng.choice(ends, int(rng.integers(1, 4)))
        for gap, share in zip(gaps, rng.dirichlet(np.ones(len(gaps))), strict=True):
            positions[gap:] += int(share * (times_longer - 1) * count * (_TIME_TOKENS + visual_tokens))
        empty = np.repeat(np.isin(classes, _NOTHING)[1:], np.diff(ends))
        weights[ends[0] : ends[-1]][empty] = np.log(times_longer)
    ids, visual, labels = (
        np.pad(x, (0, length - used), constant_values=fill)
        for x, fill in ((row.ids, 0), (row.visual, -1), (row.labels, IGNORE))
    )
    groups = np.zeros(phase.groups, np.int32)
    groups[:count] = classes * of_each + rng.integers(0, of_each, count)
    return Rows(groups, ids, visual, labels, positions, weights, early, late)


def _questions(scene: Scene, seconds: float, start: float, rng: np.random.Generator) -> list[Question]:
    """One about each shape that can be asked about; in half of all cases each, somewhere how many, at the end which
    of two came first (it names shapes that others ask for)."""
    kinds, shares = list(_SHARES), np.array(list(_SHARES.values()))
    questions: list[Question | None] = []
    for i in rng.permutation(len(scene.events)):
        order = rng.choice(len(kinds), len(kinds), replace=False, p=shares / shares.sum())
        asked = (ask(scene, kinds[k], seconds, rng, event=scene.events[int(i)], start=start) for k in order)
        questions.append(next((q for q in asked if q is not None), None))
    if rng.random() < 0.5:
        questions.insert(int(rng.integers(len(questions) + 1)), ask(scene, "count", seconds, rng))
    if rng.random() < 0.5:
        questions.append(ask(scene, "first", seconds, rng))
    return [q for q in questions if q is not None]


def language_loss(model: VideoXL2, encoded: jax.Array, rows: Rows[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The loss, and each layer's output [L, B, T, D].

    Without gaps and weights it is the loss that train.py has for the same videos in frames.
    `encoded`: visual tokens [N, V, D] of the groups that `rows.groups` counts.
    """
    visual = encoded[rows.groups].reshape(len(rows.ids), -1, encoded.shape[-1])
    x = embeddings(model.llm, visual, TokenBatch(rows.ids, rows.visual, rows.labels))
    layers = layer_outputs(model, x, rows.positions, rows.weights)
    total, count = cross_entropies(model.llm, model.llm.norm(layers[-1]), rows.labels)
    return total / count, layers


def layer_outputs(model: VideoXL2, x: jax.Array, positions: jax.Array, weights: jax.Array) -> jax.Array:
    """Embeddings [B, T, D] at positions [B, T] -> what each layer of the LLM gives, [L, B, T, D].

    The numbers of `Qwen2.forward` on a sequence in which the key at t stands exp(weights[:, t]) times. Rows are one
    axis but in attention: the backward pass is faster on CPUs.
    """
    b, t, d = x.shape
    config = model.config.llm
    tables = rope_tables(positions.reshape(-1), config.head_width, config.rope_theta)
    cos, sin = (table[:, None, :] for table in tables)
    graphdef, stacked = nnx.split(model.llm.layers)

    @jax.checkpoint  # on CPUs it would keep all scores
    def weighted_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        wide = config.head_width + 8  # as cuDNN wants it; the first of them adds the weight to the score
        q = jnp.pad(q * (wide / config.head_width) ** 0.5, [(0, 0)] * 3 + [(0, 8)])
        q = q.at[..., -8].set(wide**0.5)
        k = jnp.pad(k, [(0, 0)] * 3 + [(0, 8)]).at[..., -8].set(weights[:, :, None].astype(k.dtype))
        v = jnp.pad(v, [(0, 0)] * 3 + [(0, 8)])
        return dense_attention(q, k, v, causal=True)[..., : config.head_width]

    def attend(state: None, layer: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[None, jax.Array]:
        out = weighted_attention(*(y.reshape(b, t, *y.shape[1:]) for y in (q, k, v)))
        return None, out.reshape(b * t, *out.shape[2:])

    def run(x: jax.Array, xs: tuple[Any, jax.Array]) -> tuple[jax.Array, jax.Array]:
        params, index = xs
        x, _ = nnx.merge(graphdef, params)(x, cos, sin, attend, None, index)
        return x, x.reshape(b, t, d)

    return jax.lax.scan(run, x.reshape(b * t, d), (stacked, jnp.arange(config.layers, dtype=jnp.int32)))[1]


def auxiliary_loss(head: jax.Array, x: jax.Array, targets: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of what `head` [D, C] tells from hidden states [B, T, D], against targets [B, T, 7].

    Over `tokens`, bool [B, T]: the mean of each of the seven where it has a target, added up; and, int32 [2], how
    many tokens tell all their targets, of how many that have one.
    """
    x = x.astype(jnp.float32)
    logits = (x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)) @ head
    right = has_target = tokens & (targets != NO_TARGET).any(-1)
    loss = jnp.float32(0)
    for i, part in enumerate(jnp.split(logits, np.cumsum(_CLASSES)[:-1], axis=-1)):
        there = tokens & (targets[..., i] != NO_TARGET)
        label = jnp.maximum(targets[..., i], 0).astype(jnp.int32)
        losses = optax.softmax_cross_entropy_with_integer_labels(part, label)
        loss += jnp.sum(jnp.where(there, losses, 0)) / jnp.maximum(there.sum(), 1)
        right &= ~there | (part.argmax(-1) == label)
    return loss, jnp.stack([right.sum(), has_target.sum()])


def train_composed(
    source: Path, target: Path, phase: Phase, run: Path, *, encoded: np.ndarray, heads: Path | None, processes: int
) -> None:
    """Trains the LLM of the checkpoint `source` on composed videos and writes the checkpoint `target`.

    Args:
      run: folder for the curve (log.jsonl) and the heads (heads.npz).
      encoded: what `encode_groups` gives, [N, V, D].
      heads: an earlier phase's `run`, to go on with its heads; the optimizer starts anew. None: new heads.
      processes: that compose rows.

    An interrupted phase leaves no checkpoint and starts over.

    Raises:
      UserError: `target` exists, or `heads` has no readable heads.npz.
    """
    if target.exists():
        raise UserError(f"{target}: already exists; choose another place or remove it first")
    config, params = load_params(source, "float32")
    tokenizer = PromptTokenizer.load(source, config.llm.vocab)
    graphdef = nnx.graphdef(abstract_model(config, "bfloat16"))
    state = (params["llm"], _load_heads(heads, config.llm.width))
    rest = {name: params[name] for name in ("vision", "dts", "projector")}  # not read
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, phase.learning_rate, min(30, phase.steps // 10), phase.steps, phase.learning_rate / 10
    )
    decayed = (
        jax.tree.unflatten(jax.tree.structure(state[0]), map(is_decayed, flatten(state[0]))),
        dict.fromkeys(state[1], False),
    )
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.05, mask=decayed))
    early, late = config.llm.layers // 2, config.llm.layers - 1

    def loss_of(state: Any, encoded: jax.Array, rows: Rows[jax.Array]) -> tuple[jax.Array, Metrics]:
        llm, heads = state
        half = functools.partial(jax.tree.map, lambda p: p.astype(jnp.bfloat16))
        model: VideoXL2 = nnx.merge(graphdef, nnx.State({**rest, "llm": half(llm)}))
        loss, layers = language_loss(model, half(encoded), rows)
        is_visual = rows.visual >= 0
        seen_loss, seen = auxiliary_loss(heads["early"], layers[early - 1], rows.early, is_visual)
        asked_loss, asked = auxiliary_loss(heads["early"], layers[early - 1], rows.early, ~is_visual)
        answered_loss, answered = auxiliary_loss(heads["late"], layers[late - 1], rows.late, ~is_visual)
        return loss + 0.2 * (seen_loss + asked_loss + answered_loss), Metrics(loss, seen, asked, answered)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(state: Any, opt_state: Any, encoded: jax.Array, rows: Rows[jax.Array]) -> Any:
        grads, metrics = jax.grad(loss_of, has_aux=True)(state, encoded, rows)
        updates, opt_state = tx.update(grads, opt_state, state)
        return optax.apply_updates(state, updates), opt_state, metrics

    make = functools.partial(
        _compose_batch, phase, tokenizer, encoded.shape[1], len(encoded) // (len(_TRAINED) + len(_NOTHING))
    )
    opt_state, on_device = tx.init(state), jnp.asarray(encoded)
    recent: list[Metrics] = []
    run.mkdir(parents=True, exist_ok=True)
    with (
        (run / "log.jsonl").open("w") as log,
        tqdm(total=phase.steps, desc=phase.name, file=sys.stderr) as bar,
    ):
        for i, batch in enumerate(in_processes(processes, make, range(phase.steps))):
            rows = jax.tree.map(jnp.asarray, batch)
            state, opt_state, metrics = step(state, opt_state, on_device, rows)
            recent.append(metrics)
            bar.update()
            if (i + 1) % 25 == 0 or i + 1 == phase.steps:
                line = _summary(recent)
                log.write(json.dumps({"step": i + 1, **line}) + "\n")
                log.flush()
                bar.set_postfix(line)
                recent = []
    with replacing_file(run / "heads.npz") as beside, open(beside, "wb") as f:
        np.savez(f, early=np.asarray(state[1]["early"]), late=np.asarray(state[1]["late"]))
    write_params(target, config, nnx.State({**params, "llm": state[0]}), companions=source)


def _compose_batch(
    phase: Phase, tokenizer: PromptTokenizer, visual_tokens: int, of_each: int, number: int
) -> Rows[np.ndarray]:
    first = phase.seed * 10_000_000 + number * phase.batch
    rows = [compose(first + i, phase, tokenizer, visual_tokens, of_each) for i in range(phase.batch)]
    return Rows(*map(np.stack, zip(*rows, strict=True)))


def _load_heads(run: Path | None, width: int) -> dict[str, jax.Array]:
    names = ("early", "late")
    if run is None:
        return {name: jnp.zeros((width, sum(_CLASSES))) for name in names}
    try:
        with np.load(run / "heads.npz") as stored:
            return {name: jnp.asarray(stored[name]) for name in names}
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as e:
        raise UserError(
            f"{run / 'heads.npz'}: cannot be read ({e}); remove that phase's result to run it again"
        ) from None


def _summary(metrics: list[Metrics]) -> dict[str, float | None]:
    """Means over steps; shares over all their tokens, None where there were none."""
    loss, *counts = (np.asarray(jnp.stack(x)) for x in zip(*metrics, strict=True))
    shares = {
        name: round(float(right / of), 4) if of else None
        for name, (right, of) in zip(Metrics._fields[1:], (c.sum(0) for c in counts), strict=True)
    }
    return {"loss": round(float(loss.mean()), 6), **shares}
