"""Trains the vision tower, DTS and projector alone, before the LLM.

This takes the place of SigLIP's own pre-training. From random weights the language loss alone learns colours at once
and forms not at all.
"""

from __future__ import annotations

import functools
import sys
from collections import deque
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from xl2jax.checkpoint.params import load_params
from xl2jax.checkpoint.torch_folder import write_params
from xl2jax.config import FRAMES_PER_GROUP, VideoXL2Config
from xl2jax.evaluation.scenes import COLOURS, SHAPES, group_frames, make_scene
from xl2jax.models.video_xl2 import abstract_model, normalise
from xl2jax.system.process_pool import in_processes

_SEED = 100_000_000


def labelled_groups(batch: int, size: int, grid: int, first_seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frames of one group each, uint8 [batch * 4, size, size, 3], and the labels of their visual tokens.

    The labels are int32 [batch, grid * grid]: the colour and the form of the shape whose centre lies in the token's
    part of the frame. The last class means that there is none. Every eighth group shows no shape.
    """
    frames = []
    colours, forms = (np.full((batch, grid, grid), len(x), np.int32) for x in (COLOURS, SHAPES))
    for i in range(batch):
        scene = make_scene(2 * (first_seed + i), 1, events=0 if i % 8 == 0 else 1)
        frames.append(group_frames(scene, size))
        for event in scene.events:
            half = (FRAMES_PER_GROUP - 1) / 2
            centre = (event.y + half * event.dy, event.x + half * event.dx)
            token = (i, *(min(int(c * grid), grid - 1) for c in centre))
            colours[token], forms[token] = list(COLOURS).index(event.colour), SHAPES.index(event.shape)
    return np.concatenate(frames), colours.reshape(batch, -1), forms.reshape(batch, -1)


def train_vision(
    source: Path, target: Path, *, steps: int, processes: int = 1, batch: int = 64, learning_rate: float = 1e-3
) -> None:
    """Trains every visual token to tell the colour and the form at its place in the frame.

    A linear head reads the tokens; it is not a part of the checkpoint. `source` and `target` are checkpoint folders.
    `processes` processes draw the frames.
    """
    config = VideoXL2Config.from_hf(source)
    _, params = load_params(source, "float32")
    graphdef = nnx.graphdef(abstract_model(config, "float32"))
    colour_classes, form_classes = len(COLOURS) + 1, len(SHAPES) + 1
    shape = (config.llm.width, colour_classes + form_classes)
    head = jnp.asarray(np.random.default_rng(0).standard_normal(shape) * config.llm.width**-0.5, jnp.float32)
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 20, steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.05))
    state = ({name: params[name] for name in ("vision", "dts", "projector")}, head)

    def loss_of(state: Any, frames: jax.Array, colours: jax.Array, forms: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graphdef, nnx.State({**params, **state[0]}))
        logits = jnp.split(model.encode_frames(normalise(frames)) @ state[1], [colour_classes], axis=-1)
        losses, right = [], []
        for x, label, none in zip(logits, (colours, forms), (len(COLOURS), len(SHAPES)), strict=True):
            loss = optax.softmax_cross_entropy_with_integer_labels(x, label)
            has_shape = label != none
            # Few tokens have a shape. Separate means give them as much weight as the others.
            losses += [jnp.mean(loss, where=has_shape), jnp.mean(loss, where=~has_shape)]
            right.append(jnp.mean(x.argmax(-1) == label, where=has_shape))
        return jnp.sum(jnp.stack(losses)), jnp.stack(right)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(state: Any, opt_state: Any, *examples: jax.Array) -> Any:
        (loss, right), grads = jax.value_and_grad(loss_of, has_aux=True)(state, *examples)
        updates, opt_state = tx.update(grads, opt_state, state)
        return optax.apply_updates(state, updates), opt_state, loss, right

    opt_state = tx.init(state)
    make_batch = functools.partial(labelled_groups, batch, config.vision.image_size, config.grid // 2)
    recent: deque[Any] = deque(maxlen=50)
    first_seeds = range(_SEED, _SEED + steps * batch, batch)
    with tqdm(total=steps, desc="vision", file=sys.stderr) as bar:
        for examples in in_processes(processes, make_batch, first_seeds):
            state, opt_state, loss, right = step(state, opt_state, *examples)
            recent.append([float(loss), *map(float, right)])
            loss_mean, colour, form = np.mean(recent, axis=0)
            bar.set_postfix(loss=f"{loss_mean:.3f}", colour=f"{colour:.3f}", form=f"{form:.3f}")
            bar.update()
    write_params(target, config, nnx.State({**params, **state[0]}), companions=source)
