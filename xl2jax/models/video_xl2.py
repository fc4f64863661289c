"""Video-XL-2, composed of its networks."""

from __future__ import annotations

import functools

import einops
import jax
import jax.numpy as jnp
from flax import nnx

from xl2jax.config import FRAMES_PER_GROUP, TILE_POOL, VideoXL2Config
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
        return self._merge_frames(self.vision(pixels, remat=remat), 1, self.config.pool_stride, remat=remat)

    def encode_tiles(self, pixels: jax.Array, *, pool: int = TILE_POOL, remat: bool = False) -> jax.Array:
        """Pixels of the tiles of pictures [F, H, W, 3] in [-1, 1] -> visual tokens [F, tile tokens, D].

        A tile is a group of 4 equal frames, which the tower encodes once. `pool` 1 keeps the tokens of all positions, as
        upstream does with a picture that is given as one view without tiles.
        """
        return self._merge_frames(self.vision(pixels, remat=remat), FRAMES_PER_GROUP, pool, remat=remat)

    def _merge_frames(self, features: jax.Array, times: int, pool: int, *, remat: bool) -> jax.Array:
        """Features [F, P, C], of which each stands for `times` equal frames -> visual tokens of each group."""

        def merge(dts: DTS, projector: Projector, features: jax.Array) -> jax.Array:
            frames = jnp.repeat(resample(features, self.config.grid), times, axis=0)
            return average_pool(projector(dts(frames)), pool)

        return (jax.checkpoint(merge) if remat else merge)(self.dts, self.projector, features)


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
