from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import xl2jax
from xl2jax.models.dts import TemporalDownsample, convolve_as_product, group_frames, resample
from xl2jax.models.video_xl2 import pad_to_groups


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_activations_follow_the_parameters(dtype: str, checkpoint: object) -> None:
    """A bfloat16 model computes in bfloat16 throughout; only its logits are float32."""
    model = xl2jax.load(checkpoint, dtype=dtype)  # type: ignore[arg-type]
    net = model.network.model
    seen = []

    def attend(state: None, layer: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[None, jax.Array]:
        seen.extend(str(x.dtype) for x in (q, k, v))
        return state, q

    def stages(pixels: jax.Array) -> list[jax.Array]:
        x = net.llm.embed_tokens(jnp.array([1, 2]))
        hidden, _ = net.llm.forward(x, jnp.arange(2), attend, None)
        features = net.vision(pixels)
        return [net.llm.logits(hidden), x, hidden, features, net.dts(resample(features, 4)), net.encode_frames(pixels)]

    logits, *others = jax.eval_shape(stages, jax.ShapeDtypeStruct((4, 70, 70, 3), jnp.float32))
    assert {*seen, *(str(s.dtype) for s in others)} == {dtype}
    assert logits.dtype == jnp.float32


@pytest.mark.slow
def test_bfloat16_errs_as_much_as_rounding_the_weights(checkpoint: Path, clip: Path) -> None:
    """The yardstick is the change that rounding the weights alone makes to the same cache in float32.

    How far one rounding grows on its way through random layers depends on the weights and the clip; the ratio
    of the two (1.0 to 1.2 here) hardly does.
    """

    def keys(model: xl2jax.Model) -> np.ndarray:
        video = model.watch(clip, xl2jax.FrameSampling(max_frames=32))
        assert video.kv.cache.k.dtype == jnp.dtype(model.dtype)
        return np.asarray(video.kv.cache.k.astype(jnp.float32))

    model, half = (xl2jax.load(checkpoint, dtype=d) for d in ("float32", "bfloat16"))
    exact, actual = keys(model), keys(half)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), half.params)
    rounded = keys(xl2jax.Model(model.config, wide, model.tokenizer))
    for layer in range(len(exact)):
        yardstick = np.linalg.norm(rounded[layer] - exact[layer])
        assert np.linalg.norm(actual[layer] - rounded[layer]) <= 2 * yardstick


def test_groups_reinterpret_memory_as_upstream_does() -> None:
    f, c, h, w = 8, 6, 2, 3
    x = np.arange(f * c * h * w, dtype=np.float32).reshape(f, c, h, w)
    out = np.asarray(group_frames(jnp.asarray(x)))
    for g, t, channel in np.ndindex(2, 4, c):
        plane = 4 * channel + t
        assert np.array_equal(out[g, t, :, :, channel], x[4 * g + plane // c, plane % c])


def test_padding_repeats_the_last_frame() -> None:
    frames = jnp.arange(6.0)[:, None]
    assert pad_to_groups(frames)[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 5, 5]
    assert pad_to_groups(frames[:4]).shape == (4, 1)


def test_each_platform_gets_its_own_convolution() -> None:
    """The platform that a program is lowered for decides, not the one that traces it."""
    down = TemporalDownsample(8, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    traced = jax.jit(down).trace(jnp.zeros((1, 4, 5, 6, 8)))
    cpu, cuda = (traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "cuda"))
    assert "stablehlo.convolution" not in cpu
    assert "stablehlo.convolution" in cuda


def test_the_product_is_the_convolution() -> None:
    """CPUs multiply, other devices convolve: the same numbers and gradients."""
    down = TemporalDownsample(8, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 5, 6, 7, 8))

    def loss(conv: nnx.Conv, x: jax.Array, as_product: bool) -> jax.Array:
        return jnp.sum(jnp.sin(convolve_as_product(x, conv) if as_product else conv(x)))

    assert down.conv(x).shape == (2, 2, 4, 5, 8)
    np.testing.assert_allclose(convolve_as_product(x, down.conv), down.conv(x), rtol=1e-5, atol=1e-5)
    (a, dx), (b, dy) = (nnx.grad(loss, argnums=(0, 1))(down.conv, x, way) for way in (True, False))
    np.testing.assert_allclose(dx, dy, rtol=1e-4, atol=1e-5)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [3, 16])
def test_the_llm_is_padded_to_at_least_so_many_rows(model: xl2jax.Model, tokens: int) -> None:
    """Decoding on a GPU pads to eight rows. Sixteen answers at once are more, and are not cut."""
    llm = model.network.model.llm
    x = llm.embed_tokens(jnp.arange(tokens))

    def own_value(state: None, layer: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[None, jax.Array]:
        return None, jnp.repeat(v, q.shape[-2] // v.shape[-2], axis=-2)

    padded, plain = (llm.forward(x, jnp.arange(tokens), own_value, None, rows=rows)[0] for rows in (8, None))
    assert padded.shape == plain.shape
    np.testing.assert_allclose(padded, plain, rtol=1e-5, atol=1e-6)
