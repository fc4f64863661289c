"""Dynamic Token Synthesis: four frames in, one feature map out (upstream: llava/model/sae.py)."""

from __future__ import annotations

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xl2jax.config import FRAMES_PER_GROUP
from xl2jax.ops.dense import dense_attention
from xl2jax.ops.precision import accumulator

MAX_RELATIVE_POSITION = 64
NORM_GROUPS = 32
STAGES = 2


def resample(features: jax.Array, grid: int) -> jax.Array:
    """Patch features [F, P, C] -> [F, C, grid, grid]: bilinear, half-pixel centres, no antialias.

    Computed in float32 (float64 for float64) and returned in the input's dtype.
    """
    x = einops.rearrange(features, "f (y x) c -> f y x c", y=int(features.shape[1] ** 0.5))
    shape = (x.shape[0], grid, grid, x.shape[3])
    x = jax.image.resize(x.astype(accumulator(x.dtype)), shape, "bilinear", antialias=False)
    return einops.rearrange(x, "f y x c -> f c y x").astype(features.dtype)


def group_frames(x: jax.Array) -> jax.Array:
    """[F, C, H, W] -> [G, T, H, W, C], T = 4, in upstream's order.

    Upstream reads the contiguous [F, C, H, W] memory as [G, C, T, H, W]: plane 4c + t of a group is
    frame (4c + t) // C, channel (4c + t) % C. The weights were trained that way.
    """
    f, c, h, w = x.shape
    x = x.reshape(f // FRAMES_PER_GROUP, c, FRAMES_PER_GROUP, h, w)
    return einops.rearrange(x, "g c t h w -> g t h w c")


def _group_norm(width: int, param_dtype: jax.typing.DTypeLike, rngs: nnx.Rngs) -> nnx.GroupNorm:
    return nnx.GroupNorm(width, NORM_GROUPS, epsilon=1e-6, use_fast_variance=False, param_dtype=param_dtype, rngs=rngs)


class SpatialAttention(nnx.Module):
    """One head over the pixels of each frame; norm statistics over the whole group (AttnBlock3D)."""

    def __init__(self, width: int, *, param_dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        self.norm = _group_norm(width, param_dtype, rngs)
        self.q, self.k, self.v, self.proj_out = (
            nnx.Linear(width, width, param_dtype=param_dtype, rngs=rngs) for _ in range(4)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """[G, T, H, W, C] -> the same."""
        g, t, h, w, _ = x.shape
        y = self.norm(x)
        q, k, v = (einops.rearrange(f(y), "g t h w c -> (g t) (h w) 1 c") for f in (self.q, self.k, self.v))
        out = einops.rearrange(dense_attention(q, k, v), "(g t) (h w) 1 c -> g t h w c", g=g, t=t, h=h, w=w)
        return x + self.proj_out(out)


class TemporalAttention(nnx.Module):
    """One head over the T frames of each pixel, with relative positions on keys and values.

    The key term is added transposed, as upstream trained it: w[i, j] += q_j . Rk[j, i].
    """

    def __init__(self, width: int, *, param_dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        self.norm = _group_norm(width, param_dtype, rngs)
        self.qkv = nnx.Linear(width, 3 * width, param_dtype=param_dtype, rngs=rngs)
        self.proj_out = nnx.Linear(width, width, param_dtype=param_dtype, rngs=rngs)
        rows = 2 * MAX_RELATIVE_POSITION + 1
        self.relative_position_k = nnx.Embed(rows, width, param_dtype=param_dtype, rngs=rngs)
        self.relative_position_v = nnx.Embed(rows, width, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[G, T, H, W, C] -> the same."""
        g, t, h, w, c = x.shape
        x = einops.rearrange(x, "g t h w c -> (g h w) t c")
        q, k, v = jnp.split(self.qkv(self.norm(x)), 3, axis=-1)
        q, k = q * c**-0.25, k * c**-0.25
        distance = np.arange(t)[None, :] - np.arange(t)[:, None]  # j - i
        rows = np.clip(distance, -MAX_RELATIVE_POSITION, MAX_RELATIVE_POSITION) + MAX_RELATIVE_POSITION
        # [i, j, C]. A call of nnx.Embed would cast to the dtype that it was built with.
        rk, rv = (e.embedding[...][rows] for e in (self.relative_position_k, self.relative_position_v))
        weights = jnp.einsum("pic,pjc->pij", q, k) + jnp.einsum("pjc,jic->pij", q, rk)
        weights = jax.nn.softmax(weights.astype(accumulator(weights.dtype)), axis=-1).astype(v.dtype)
        out = jnp.einsum("pij,pjc->pic", weights, v) + jnp.einsum("pij,ijc->pic", weights, rv)
        x = x + self.proj_out(out)
        return einops.rearrange(x, "(g h w) t c -> g t h w c", g=g, h=h, w=w)


class TemporalDownsample(nnx.Module):
    """3x3x3 convolution, stride 2 in time, edge padding: one frame before, one pixel around."""

    def __init__(self, width: int, *, param_dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        self.conv = nnx.Conv(
            width, width, (3, 3, 3), strides=(2, 1, 1), padding="VALID", param_dtype=param_dtype, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """[G, T, H, W, C] -> [G, T/2, H, W, C]."""
        x = jnp.pad(x, ((0, 0), (1, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
        return jax.lax.platform_dependent(x, cpu=lambda x: convolve_as_product(x, self.conv), default=self.conv)


def convolve_as_product(x: jax.Array, conv: nnx.Conv) -> jax.Array:
    """The convolution as one matrix product over its 27 taps, for CPUs.

    There XLA takes ten times as long for the gradient of its own convolution as for this one's.

    Args:
      x: padded, [G, T + 1, H + 2, W + 2, C].

    Returns [G, T/2, H, W, C].
    """
    kernel = conv.kernel[...]
    t, h, w = (x.shape[1] - 1) // 2, x.shape[2] - 2, x.shape[3] - 2
    taps = [x[:, i : i + 2 * t - 1 : 2, j : j + h, k : k + w] for i, j, k in np.ndindex(3, 3, 3)]
    assert conv.bias is not None
    return jnp.concatenate(taps, axis=-1) @ kernel.reshape(-1, kernel.shape[-1]) + conv.bias[...]


class DTSStage(nnx.Module):
    """Spatial attention, temporal attention, then half the frames."""

    def __init__(self, width: int, *, param_dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        self.spatial = SpatialAttention(width, param_dtype=param_dtype, rngs=rngs)
        self.temporal = TemporalAttention(width, param_dtype=param_dtype, rngs=rngs)
        self.down = TemporalDownsample(width, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.temporal(self.spatial(x)))


class DTS(nnx.Module):
    """Frames [F, C, H, W], F a multiple of 4 -> groups [G, H, W, C]."""

    def __init__(self, width: int, *, param_dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        self.temporal_encoding = nnx.Param(jnp.zeros((FRAMES_PER_GROUP, width), param_dtype))
        self.stages = nnx.List([DTSStage(width, param_dtype=param_dtype, rngs=rngs) for _ in range(STAGES)])

    def __call__(self, x: jax.Array) -> jax.Array:
        x = group_frames(x) + self.temporal_encoding[...][:, None, None, :]
        for stage in self.stages:
            x = stage(x)
        return x[:, 0]
