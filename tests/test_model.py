from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xl2jax
from xl2jax import runtime
from xl2jax.dts import group_frames, resample
from xl2jax.model import pad_to_groups


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_follow_the_parameters(dtype: str, checkpoint: object) -> None:
    """Nothing is promoted on the way: a bfloat16 model computes in bfloat16, logits are float32."""
    model = xl2jax.load(checkpoint, dtype=dtype)  # type: ignore[arg-type]
    net = runtime.merge_model(model.config, model.params)
    seen = []

    def attend(state: None, layer: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[None, jax.Array]:
        seen.extend(str(x.dtype) for x in (q, k, v))
        return state, q

    x = net.llm.embed_tokens(jnp.array([1, 2]))
    hidden, _ = net.llm.forward(x, jnp.arange(2), attend, None)
    pixels = jnp.zeros((4, 70, 70, 3))
    stages = [x, hidden, net.vision(pixels), net.dts(resample(net.vision(pixels), 4)), net.encode_frames(pixels)]
    assert {*seen, *(str(s.dtype) for s in stages)} == {dtype}
    assert net.llm.logits(hidden).dtype == jnp.float32


def test_bfloat16_is_near_float32(checkpoint: object, clip: object) -> None:
    def keys(dtype: str) -> np.ndarray:
        model = xl2jax.load(checkpoint, dtype=dtype)  # type: ignore[arg-type]
        video = model.watch(clip, xl2jax.SampleConfig(max_frames=32))  # type: ignore[arg-type]
        assert str(video.cache.k.dtype) == dtype
        return np.asarray(video.cache.k[-1].astype(jnp.float32))

    expected, half = keys("float32"), keys("bfloat16")
    assert np.linalg.norm(half - expected) <= 3e-2 * np.linalg.norm(expected)


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
