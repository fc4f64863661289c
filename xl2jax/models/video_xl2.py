"""Video-XL-2, composed of its networks."""

from __future__ import annotations

import functools

import einops
import jax
import jax.numpy as jnp
from flax import nnx

from xl2jax.config import VideoXL2Config
from xl2jax.models.dts import DTS, resample
from xl2jax.models.lora import LoRAConfig
from xl2jax.models.projector import Projector, average_pool
from xl2jax.models.qwen2 import Qwen2
from xl2jax.models.siglip import VisionTower


class VideoXL2(nnx.Module):
    """SigLIP, DTS, projector, Qwen2.5.

    Split it once (`graphdef, params = nnx.split(model)`) and write functions of `params`, for JAX's transformations.
    Activations have the dtype of the parameters. `lora` adds adapters to the LLM's linear layers, for training.
    """

    def __init__(
        self,
        config: VideoXL2Config,
        *,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        lora: LoRAConfig | None = None,
    ):
        self.config = config
        width = config.vision.width
        self.vision = VisionTower(config.vision, param_dtype=param_dtype, rngs=rngs)
        self.dts = DTS(width, param_dtype=param_dtype, rngs=rngs)
        self.projector = Projector(width, config.llm.width, param_dtype=param_dtype, rngs=rngs)
        self.llm = Qwen2(config.llm, param_dtype=param_dtype, rngs=rngs, lora=lora)

    def encode_frames(self, pixels: jax.Array, *, remat: bool = False) -> jax.Array:
        """Pixels [F, H, W, 3] in [-1, 1], F a multiple of 4 -> visual tokens [G, V, D].

        With `remat` the backward pass keeps the inputs of the tower's layers and the features; it recomputes the rest.
        """
        features = self.vision(pixels, remat=remat)

        def merge_frames(dts: DTS, projector: Projector, features: jax.Array) -> jax.Array:
            return average_pool(projector(dts(resample(features, self.config.grid))), self.config.pool_stride)

        if remat:
            merge_frames = jax.checkpoint(merge_frames)
        return merge_frames(self.dts, self.projector, features)


def normalise(frames: jax.Array) -> jax.Array:
    """uint8 frames [F, H, W, 3] -> float32 pixels in [-1, 1]."""
    return frames.astype(jnp.float32) / 127.5 - 1.0


@functools.cache
def abstract_model(
    config: VideoXL2Config, param_dtype: jax.typing.DTypeLike, lora: LoRAConfig | None = None
) -> VideoXL2:
    """The model with `jax.ShapeDtypeStruct` for parameters, which takes no memory. All callers share it: only read it."""
    return nnx.eval_shape(lambda: VideoXL2(config, param_dtype=param_dtype, rngs=nnx.Rngs(0), lora=lora))


def pad_to_groups(frames: jax.Array, multiple: int = 4) -> jax.Array:
    """Repeats the last frame of [F, ...] until F is a multiple of `multiple`."""
    short = -frames.shape[0] % multiple
    return jnp.concatenate([frames, einops.repeat(frames[-1], "... -> n ...", n=short)]) if short else frames
