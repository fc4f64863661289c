"""SigLIP vision tower (upstream: llava/model/multimodal_encoder/siglip_encoder.py)."""

from __future__ import annotations

import einops
import jax
from flax import nnx

from xl2jax.config import VisionConfig
from xl2jax.models.layers import scan_layers, stack_layers
from xl2jax.ops.dense import dense_attention
from xl2jax.ops.precision import gelu


class RowLayerNorm(nnx.LayerNorm):
    """nnx.LayerNorm, computed on a matrix of rows by itself.

    XLA then reads every row once, in one kernel, which takes half the time on an H100. With more axes, or when the
    residual sum before it is fused in, XLA reads the rows several times.
    """

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        rows = jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]))
        return super().__call__(rows).reshape(x.shape)


class VisionLayer(nnx.Module):
    """Pre-LayerNorm transformer layer over the patches of one frame."""

    def __init__(self, config: VisionConfig, *, param_dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        width = config.width
        self.heads = config.heads

        def linear(n: int, m: int) -> nnx.Linear:
            return nnx.Linear(n, m, param_dtype=param_dtype, rngs=rngs)

        def norm() -> nnx.LayerNorm:
            return RowLayerNorm(width, epsilon=config.eps, use_fast_variance=False, param_dtype=param_dtype, rngs=rngs)

        self.norm1, self.norm2 = norm(), norm()
        self.q, self.k, self.v, self.out = (linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = linear(width, config.mlp_width), linear(config.mlp_width, width)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[F, P, C] -> [F, P, C]."""
        y = self.norm1(x)
        q, k, v = (einops.rearrange(f(y), "f p (n h) -> f p n h", n=self.heads) for f in (self.q, self.k, self.v))
        x = x + self.out(einops.rearrange(dense_attention(q, k, v), "f p n h -> f p (n h)"))
        return x + self.fc2(gelu(self.fc1(self.norm2(x)), approximate=True))


class VisionTower(nnx.Module):
    """Frames to patch features: all stored layers but the last, and no final LayerNorm."""

    def __init__(self, config: VisionConfig, *, param_dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        self.grid, self.patch = config.patch_grid, config.patch_size
        self.patch_embedding = nnx.Linear(config.patch_size**2 * 3, config.width, param_dtype=param_dtype, rngs=rngs)
        self.position_embedding = nnx.Embed(config.patch_grid**2, config.width, param_dtype=param_dtype, rngs=rngs)
        self.layers = stack_layers(
            lambda rngs: VisionLayer(config, param_dtype=param_dtype, rngs=rngs), config.run_layers, rngs
        )

    def __call__(self, pixels: jax.Array, *, remat: bool = False) -> jax.Array:
        """Pixels [F, H, W, 3] in [-1, 1] -> features [F, P, C], P = patch_grid squared.

        Pixels right of and below the last whole patch are not read (384 = 27 x 14 + 6).
        """
        side = self.grid * self.patch
        patches = einops.rearrange(
            pixels[:, :side, :side],
            "f (y p) (x q) c -> f (y x) (p q c)",
            p=self.patch,
            q=self.patch,
        )
        x = self.patch_embedding(patches.astype(self.patch_embedding.kernel.dtype))
        x = x + self.position_embedding.embedding[...]
        return scan_layers(self.layers, lambda layer, x, _: (layer(x), None), x, remat=remat)[0]
