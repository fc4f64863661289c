"""An optimizer step as pure functions of a TrainState: gradients, their accumulation and the update."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from xl2jax.config import VideoXL2Config
from xl2jax.models.lora import LoRAConfig
from xl2jax.models.param_tree import is_quantized, unflatten
from xl2jax.models.sharding import gathered
from xl2jax.models.video_xl2 import VideoXL2, abstract_model, normalise
from xl2jax.system.backend import COMPILER_OPTIONS
from xl2jax.training.config import TrainConfig
from xl2jax.training.loss import TokenBatch, token_loss

MASTER = "float32"
"""dtype of trained parameters, of their gradients and of their optimizer state, for every compute dtype.

At the presets' learning rates a step of Adam is smaller than half of bfloat16's spacing around a weight. With b2 =
0.999 the same holds for its second moment. In bfloat16 both would round to no change.
"""

type Params = dict[str, jax.Array]
"""Parameters by dotted name, with stacked layers."""


class TrainState(NamedTuple):
    """Everything that a step changes. A step draws no random numbers; the data order depends on the seed alone."""

    step: jax.Array
    """int32: number of completed optimizer steps."""
    params: Params
    """The trained parameters, in `MASTER`."""
    opt_state: optax.OptState


class Sums(NamedTuple):
    """Sums over micro-batches."""

    loss: jax.Array
    """Sum of the cross-entropies, float32."""
    tokens: jax.Array
    """Number of labelled tokens, float32."""
    grads: Params
    """Gradient of `loss`, in `MASTER`."""


class Metrics(NamedTuple):
    """Numbers of one step, float32 scalars."""

    loss: jax.Array
    grad_norm: jax.Array
    """Global norm before clipping."""
    learning_rate: jax.Array
    labelled_tokens: jax.Array


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """The static configuration of the step functions."""

    model: VideoXL2Config
    lora: LoRAConfig | None
    compute_dtype: str
    remat: bool


def learning_rate(config: TrainConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then constant or a cosine to 0 at `steps`.

    The cosine is that of transformers' get_cosine_schedule_with_warmup.
    """
    warmup = math.ceil(config.warmup * steps)
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, max(steps, warmup + 1))
    if warmup == 0:
        return optax.constant_schedule(config.learning_rate)
    rise = optax.linear_schedule(0.0, config.learning_rate, warmup)
    return optax.join_schedules([rise, optax.constant_schedule(config.learning_rate)], [warmup])


def is_decayed(name: str) -> bool:
    """Whether weight decay applies to a parameter. It applies to matrices, not to biases and norms."""
    return name.endswith((".kernel", ".embedding", ".lora_a", ".lora_b"))


def optimizer(config: TrainConfig, names: list[str], steps: int) -> optax.GradientTransformation:
    """AdamW with clipping of the global norm, weight decay on matrices, and learning rates by parameter."""
    shares = dict.fromkeys(names, 1.0)
    for pattern, rate in config.part_rates():
        shares |= {n: rate / config.learning_rate for n in names if fnmatch.fnmatchcase(n, pattern)}
    decayed = {n: is_decayed(n) for n in names}
    scaled = optax.stateless(lambda updates, _: {n: u * shares[n] for n, u in updates.items()})
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, decayed),
        scaled,
        optax.scale_by_learning_rate(learning_rate(config, steps)),
    )


def assemble(config: StepConfig, params: Params) -> VideoXL2:
    """The model with the given parameters, trained and frozen ones together."""
    graphdef = nnx.graphdef(abstract_model(config.model, config.compute_dtype, config.lora))
    return nnx.merge(graphdef, unflatten(params, config.model, config.lora))


type Batch = tuple[jax.Array, TokenBatch] | tuple[jax.Array, TokenBatch, jax.Array]
"""A micro-batch: pixels, tokens and, where rows have pictures, their tiles, as `gradients` takes them."""


def gradients(
    config: StepConfig,
    params: Params,
    frozen: Params,
    pixels: jax.Array,
    tokens: TokenBatch,
    tiles: jax.Array | None = None,
) -> Sums:
    """Loss sum and gradients of one micro-batch. Pixels of frames and tiles are uint8 [B, n, H, W, 3]."""

    def loss_of(params: Params) -> tuple[jax.Array, jax.Array]:
        whole = frozen | params
        compute = {n: p if is_quantized(n) else p.astype(config.compute_dtype) for n, p in whole.items()}
        # `scan_layers` gathers a layer at a time. Rows of the embedding are looked up where they are, unless it is also
        # the matrix of the logits.
        apart = (".layers.",) if config.model.llm.tied_embeddings else (".layers.", "llm.embed.")
        outside = {n: p for n, p in compute.items() if not any(part in n for part in apart)}
        compute |= gathered(outside, "")
        shown = None if tiles is None else normalise(tiles)
        return token_loss(assemble(config, compute), normalise(pixels), tokens, shown, remat=config.remat)

    (loss, count), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    return Sums(loss, count, grads)


def update(
    tx: optax.GradientTransformation, schedule: optax.Schedule, state: TrainState, sums: Sums
) -> tuple[TrainState, Metrics]:
    """Updates the state by the gradient of the mean loss over all labelled tokens of the micro-batches in `sums`."""
    count = jnp.maximum(sums.tokens, 1.0)
    grads = {n: g / count for n, g in sums.grads.items()}
    norm = optax.global_norm(grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params: Params = optax.apply_updates(state.params, updates)
    metrics = Metrics(sums.loss / count, norm, jnp.asarray(schedule(state.step), jnp.float32), sums.tokens)
    return TrainState(state.step + 1, params, opt_state), metrics


class Steps:
    """The functions above, jitted for one run on one mesh. States and sums are donated to the calls."""

    def __init__(
        self, config: StepConfig, tx: optax.GradientTransformation, schedule: optax.Schedule, abstract: TrainState
    ):
        shardings = jax.tree.map(lambda s: s.sharding, abstract)
        scalar = shardings.step
        sums = Sums(scalar, scalar, shardings.params)
        jit = functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
        result = (shardings, Metrics(*[scalar] * len(Metrics._fields)))

        def micro(params: Params, frozen: Params, *batch: Any) -> Sums:
            return gradients(config, params, frozen, *batch)

        @functools.partial(jit, donate_argnums=0, out_shardings=result)
        def whole(state: TrainState, frozen: Params, *batch: Any) -> tuple[TrainState, Metrics]:
            return update(tx, schedule, state, micro(state.params, frozen, *batch))

        @functools.partial(jit, donate_argnums=0, out_shardings=sums)
        def accumulate(so_far: Sums, params: Params, frozen: Params, *batch: Any) -> Sums:
            return jax.tree.map(jnp.add, so_far, micro(params, frozen, *batch))

        @functools.partial(jit, donate_argnums=0, out_shardings=result)
        def apply(state: TrainState, so_far: Sums) -> tuple[TrainState, Metrics]:
            return update(tx, schedule, state, so_far)

        @functools.partial(jit, out_shardings=sums)
        def zeros() -> Sums:
            grads = {n: jnp.zeros(p.shape, MASTER) for n, p in abstract.params.items()}
            return Sums(jnp.float32(0), jnp.float32(0), grads)

        self._whole, self._accumulate, self._apply, self._zeros = whole, accumulate, apply, zeros

    def __call__(
        self, state: TrainState, frozen: Params, batches: Iterator[Batch], count: int
    ) -> tuple[TrainState, Metrics]:
        """Runs one optimizer step over the next `count` micro-batches."""
        if count == 1:
            return self._whole(state, frozen, *next(batches))
        so_far = self._zeros()
        for _ in range(count):
            so_far = self._accumulate(so_far, state.params, frozen, *next(batches))
        return self._apply(state, so_far)
