"""Trains the LLM to look up by time, on composed videos (`composed_rows`).

Besides the language loss there are auxiliary losses. Linear heads read the hidden states and have to tell what a lookup
needs. The early head reads the middle layer: a visual token tells the time of its group, and the tokens of an answer
tell the time, colour and form in the question. The late head reads the last layer but one: the tokens of an answer that
is a time tell that time. Two heads count: the time tokens behind a group tell, after a third of the layers, whether a
shape began in it, and after two thirds, how many have begun. The heads are not a part of the checkpoint. They replace
what Qwen learnt from text: without them this small LLM finds shapes by content and hardly ever by time.
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
from xl2jax.errors import UserError
from xl2jax.evaluation.scenes import group_frames, make_scene
from xl2jax.models.param_tree import flatten
from xl2jax.models.qwen2 import Qwen2
from xl2jax.models.video_xl2 import VideoXL2, abstract_model, normalise
from xl2jax.ops.dense import dense_attention
from xl2jax.prompt import PromptTokenizer
from xl2jax.recipes.demo.composed_rows import (
    COUNT_CLASSES,
    GROUP_CLASSES,
    NO_TARGET,
    TARGET_CLASSES,
    Phase,
    Rows,
    compose_batch,
)
from xl2jax.system.atomic import replacing_file
from xl2jax.system.process_pool import in_processes
from xl2jax.training.loss import TokenBatch, cross_entropies, embeddings
from xl2jax.training.step import is_decayed

GROUPS_PER_CLASS = 400
_GROUP_SEED = 150_000_000
_AUXILIARY_WEIGHT = 0.2  # of the heads' losses beside the language loss
_LOG_EVERY = 25  # steps


class Metrics(NamedTuple):
    """The language loss of a step, and counts of tokens for each use of a head, [2]: (all targets right, tokens)."""

    loss: jax.Array
    seen: jax.Array
    """Visual tokens, which tell the time of their group."""
    asked: jax.Array
    """Tokens of answers, and the newline before each answer, which tell what the question asks for."""
    answered: jax.Array
    """Tokens of answers that are times, which tell that time."""
    counted: jax.Array
    """Time tokens, which tell how many shapes have begun."""


def _draw_groups(size: int, groups: Sequence[tuple[int, tuple[str, str] | None]]) -> np.ndarray:
    """uint8 [4 * N, size, size, 3]: the frames of N numbered groups that show a colour and a form, or nothing."""
    frames = []
    for number, pair in groups:
        scene = make_scene(2 * (_GROUP_SEED + number), 1, events=int(pair is not None))
        if pair is not None:
            event = dataclasses.replace(scene.events[0], colour=pair[0], shape=pair[1])
            scene = dataclasses.replace(scene, events=(event,))
        frames.append(group_frames(scene, size))
    return np.concatenate(frames)


def encode_groups(
    source: Path, *, groups_per_class: int = GROUPS_PER_CLASS, processes: int, batch: int = 40
) -> np.ndarray:
    """Visual tokens [46 * groups_per_class, V, D] of groups of each of `GROUP_CLASSES`, from the checkpoint `source`.

    `processes` processes draw the groups.
    """
    config, params = load_params(source, "float32")
    graphdef = nnx.graphdef(abstract_model(config, "float32"))

    @jax.jit
    def encode(frames: jax.Array) -> jax.Array:
        model: VideoXL2 = nnx.merge(graphdef, params)
        return model.encode_frames(normalise(frames))

    pairs = [p for p in GROUP_CLASSES for _ in range(groups_per_class)]
    draw = functools.partial(_draw_groups, config.vision.image_size)
    encoded: list[np.ndarray] = []
    with tqdm(total=len(pairs), desc="encode groups", file=sys.stderr) as bar:
        for frames in in_processes(processes, draw, itertools.batched(enumerate(pairs), batch)):
            encoded.append(np.asarray(encode(jnp.asarray(frames))))
            bar.update(len(encoded[-1]))
    return np.concatenate(encoded)


def language_loss(model: VideoXL2, encoded: jax.Array, rows: Rows[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The language loss, and the output of each layer, [L, B, T, D].

    For rows without gaps and weights it is the loss of train.py for the same videos read from frames.

    Args:
      encoded: visual tokens [N, V, D] of the groups that `rows.groups` numbers.
    """
    visual = encoded[rows.groups].reshape(len(rows.ids), -1, encoded.shape[-1])
    x = embeddings(model.llm, visual, TokenBatch(rows.ids, rows.visual, rows.labels))
    layers = weighted_layer_outputs(model.llm, x, rows)
    total, count = cross_entropies(model.llm, model.llm.norm(layers[-1]), rows.labels)
    return total / count, layers


def weighted_layer_outputs(llm: Qwen2, x: jax.Array, rows: Rows[jax.Array]) -> jax.Array:
    """Embeddings [B, T, D] at `rows.positions` -> the output of each layer, [L, B, T, D].

    Attention is causal. The key at t counts exp(rows.weights[:, t]) times in the softmax, and hidden keys do not count
    for blind queries.
    """
    b, t, d = x.shape

    @jax.checkpoint  # otherwise the scores of all layers are kept for the backward pass on CPUs
    def weighted_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        # Two more elements in the product of query and key add the weight to the score, and -100 where a blind query
        # meets a hidden key. The heads become wider by 8 because cuDNN wants a multiple of 8.
        width = q.shape[-1]
        wide = width + 8
        q = jnp.pad(q * (wide / width) ** 0.5, [(0, 0)] * 3 + [(0, 8)])
        q = q.at[..., -8].set(wide**0.5).at[..., -7].set(wide**0.5 * rows.blind[:, :, None].astype(q.dtype))
        k = jnp.pad(k, [(0, 0)] * 3 + [(0, 8)]).at[..., -8].set(rows.weights[:, :, None].astype(k.dtype))
        k = k.at[..., -7].set(-100 * rows.hidden[:, :, None].astype(k.dtype))
        v = jnp.pad(v, [(0, 0)] * 3 + [(0, 8)])
        return dense_attention(q, k, v, causal=True)[..., :width]

    def attend(state: None, layer: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[None, jax.Array]:
        out = weighted_attention(*(y.reshape(b, t, *y.shape[1:]) for y in (q, k, v)))
        return None, out.reshape(b * t, *out.shape[2:])

    # Everything but the attention sees the rows as one axis: on CPUs that makes the backward pass faster.
    layers = llm.layer_outputs(x.reshape(b * t, d), rows.positions.reshape(-1), attend, None)
    return layers.reshape(-1, b, t, d)


def auxiliary_loss(
    head: jax.Array, x: jax.Array, targets: jax.Array, tokens: jax.Array, classes: Sequence[int] = TARGET_CLASSES
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of the predictions of a linear head, and how many tokens it predicts right.

    Args:
      head: [D, C], C the sum of `classes`.
      x: hidden states [B, T, D].
      targets: [B, T, N].
      tokens: bool [B, T], the tokens that count.
      classes: the number of classes of each of the N targets.

    Returns the sum over the targets of the mean cross-entropy where a token has that target; and int32 [2]: the
    tokens whose targets are all predicted right, and the tokens that have a target.
    """
    x = x.astype(jnp.float32)
    logits = (x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)) @ head
    right = has_target = tokens & (targets != NO_TARGET).any(-1)
    loss = jnp.float32(0)
    for i, part in enumerate(jnp.split(logits, np.cumsum(classes)[:-1], axis=-1)):
        counted = tokens & (targets[..., i] != NO_TARGET)
        label = jnp.maximum(targets[..., i], 0).astype(jnp.int32)
        losses = optax.softmax_cross_entropy_with_integer_labels(part, label)
        loss += jnp.sum(jnp.where(counted, losses, 0)) / jnp.maximum(counted.sum(), 1)
        right &= ~counted | (part.argmax(-1) == label)
    return loss, jnp.stack([right.sum(), has_target.sum()])


def train_composed(
    source: Path,
    target: Path,
    phase: Phase,
    run: Path,
    *,
    encoded: np.ndarray,
    previous_run: Path | None,
    processes: int,
) -> None:
    """Trains the LLM of the checkpoint `source` on composed videos and writes the checkpoint `target`.

    An interrupted phase leaves no checkpoint and starts again from its beginning.

    Args:
      run: folder for the loss curve (log.jsonl) and the heads (heads.npz).
      encoded: the result of `encode_groups`, [N, V, D].
      previous_run: `run` of an earlier phase, whose heads are trained further; the optimizer state is new. None: new
        heads.
      processes: number of processes that compose rows.

    Raises:
      UserError: `target` exists, or `previous_run` has no readable heads.npz.
    """
    if target.exists():
        raise UserError(f"{target}: already exists; choose another place or remove it first")
    config, params = load_params(source, "float32")
    tokenizer = PromptTokenizer.load(source, config.llm.vocab)
    graphdef = nnx.graphdef(abstract_model(config, "bfloat16"))
    state = (params["llm"], _load_heads(previous_run, config.llm.width))
    unused = {name: params[name] for name in ("vision", "dts", "projector")}
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, phase.learning_rate, min(30, phase.steps // 10), phase.steps, phase.learning_rate / 10
    )
    decayed = (
        jax.tree.unflatten(jax.tree.structure(state[0]), map(is_decayed, flatten(state[0]))),
        dict.fromkeys(state[1], False),
    )
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.05, mask=decayed))
    depth = config.llm.layers
    early, late = depth // 2, depth - 1

    def loss_of(state: Any, encoded: jax.Array, rows: Rows[jax.Array]) -> tuple[jax.Array, Metrics]:
        llm, heads = state
        to_bfloat16 = functools.partial(jax.tree.map, lambda p: p.astype(jnp.bfloat16))
        model: VideoXL2 = nnx.merge(graphdef, nnx.State({**unused, "llm": to_bfloat16(llm)}))
        loss, layers = language_loss(model, to_bfloat16(encoded), rows)
        is_visual = rows.visual >= 0
        seen_loss, seen = auxiliary_loss(heads["early"], layers[early - 1], rows.early, is_visual)
        asked_loss, asked = auxiliary_loss(heads["early"], layers[early - 1], rows.early, ~is_visual)
        answered_loss, answered = auxiliary_loss(heads["late"], layers[late - 1], rows.late, ~is_visual)
        begun, number = jnp.split(rows.counts, 2, axis=-1)
        begins_loss, _ = auxiliary_loss(heads["begins"], layers[depth // 3 - 1], begun, ~is_visual, COUNT_CLASSES[:1])
        counted_loss, counted = auxiliary_loss(
            heads["counts"], layers[2 * depth // 3 - 1], number, ~is_visual, COUNT_CLASSES[1:]
        )
        auxiliary = seen_loss + asked_loss + answered_loss + begins_loss + counted_loss
        return loss + _AUXILIARY_WEIGHT * auxiliary, Metrics(loss, seen, asked, answered, counted)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(state: Any, opt_state: Any, encoded: jax.Array, rows: Rows[jax.Array]) -> Any:
        grads, metrics = jax.grad(loss_of, has_aux=True)(state, encoded, rows)
        updates, opt_state = tx.update(grads, opt_state, state)
        return optax.apply_updates(state, updates), opt_state, metrics

    make_batch = functools.partial(
        compose_batch, phase, tokenizer, encoded.shape[1], len(encoded) // len(GROUP_CLASSES)
    )
    opt_state, on_device = tx.init(state), jnp.asarray(encoded)
    recent: list[Metrics] = []
    run.mkdir(parents=True, exist_ok=True)
    with (
        (run / "log.jsonl").open("w") as log,
        tqdm(total=phase.steps, desc=phase.name, file=sys.stderr) as bar,
    ):
        for i, batch in enumerate(in_processes(processes, make_batch, range(phase.steps))):
            state, opt_state, metrics = step(state, opt_state, on_device, jax.tree.map(jnp.asarray, batch))
            recent.append(metrics)
            bar.update()
            if (i + 1) % _LOG_EVERY == 0 or i + 1 == phase.steps:
                line = _summary(recent)
                log.write(json.dumps({"step": i + 1, **line}) + "\n")
                log.flush()
                bar.set_postfix(line)
                recent = []
    with replacing_file(run / "heads.npz") as unfinished, open(unfinished, "wb") as f:
        np.savez(f, **jax.tree.map(np.asarray, state[1]))
    write_params(target, config, nnx.State({**params, "llm": state[0]}), companions=source)


def _load_heads(run: Path | None, width: int) -> dict[str, jax.Array]:
    classes = {
        "early": TARGET_CLASSES,
        "late": TARGET_CLASSES,
        "begins": COUNT_CLASSES[:1],
        "counts": COUNT_CLASSES[1:],
    }
    if run is None:
        return {name: jnp.zeros((width, sum(n))) for name, n in classes.items()}
    try:
        with np.load(run / "heads.npz") as stored:
            return {name: jnp.asarray(stored[name]) for name in classes}
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as e:
        raise UserError(
            f"{run / 'heads.npz'}: cannot be read ({e}); remove the result of that phase to run it again"
        ) from None


def _summary(metrics: list[Metrics]) -> dict[str, float | None]:
    """The mean loss over steps, and the share of right tokens over all of their tokens, None where there are none."""
    loss, *counts = (np.asarray(jnp.stack(x)) for x in zip(*metrics, strict=True))
    shares = {
        name: round(float(right / total), 4) if total else None
        for name, (right, total) in zip(Metrics._fields[1:], (c.sum(0) for c in counts), strict=True)
    }
    return {"loss": round(float(loss.mean()), 6), **shares}
