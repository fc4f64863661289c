"""What 8 bits cost on synthetic keys with large biases and outlying channels, and what several cures leave.

python tools/key_bias.py

Prints the table of docs/quantisation.md. The keys of one head, of 128 channels and 4,096 tokens, are a varying part plus a
constant bias, rotated by position. Queries are scaled so that the scores of the varying part spread by 2. Each cell is the
error relative to the un-rotated keys without their mean, and the mean KL divergence of the attention.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from xl2jax.evaluation.kv_rounding import BLOCK
from xl2jax.inference.network import largest_channels
from xl2jax.models.layers import rope_tables, rotate
from xl2jax.ops.kv import quantize, unpack

TOKENS, H, THETA, QUERIES, SEEDS = 4096, 128, 1e6, 256, 3
CASES = ((0, 1), (0, 10), (22, 1), (220, 1), (500, 1))
"""Norm of the bias, and how much larger four channels of the varying part are than the others."""


def by_token(x: jax.Array) -> jax.Array:
    """Through 8 bits with a scale for each token, as KV is stored where no bias is large."""
    return unpack(quantize(x))


def by_channel(x: jax.Array) -> jax.Array:
    """Through 8 bits with a scale for each channel of a block of tokens."""
    blocks = x.reshape(-1, BLOCK, H).swapaxes(1, 2)
    return unpack(quantize(blocks)).swapaxes(1, 2).reshape(x.shape)


def with_exact_channels(x: jax.Array, bias: np.ndarray) -> jax.Array:
    """Through 8 bits, but for the channels in which the bias is largest: as KV of such keys is stored."""
    return unpack(quantize(x[None], largest_channels(bias[None])))[0]


def run(norm: float, outlier: float, seed: int) -> dict[str, tuple[float, float]]:
    """(error, KL divergence) by way of storing."""
    rng = np.random.default_rng(seed)
    size = np.exp(rng.normal(0, 0.5, H))
    size[rng.choice(H, 4, replace=False)] = np.median(size) * outlier
    common = rng.standard_normal((TOKENS, 8)) @ rng.standard_normal((8, H))
    varying = 0.7 * (common + rng.standard_normal((TOKENS, H))) * size
    bias = 0.1 * rng.standard_normal(H)
    bias[rng.choice(H, 3, replace=False)] = rng.choice([-3, 3], 3)  # a few channels hold most of it
    bias *= norm / np.linalg.norm(bias)
    cos, sin = rope_tables(jnp.arange(TOKENS), H, THETA)
    plain = jnp.asarray(varying + bias, jnp.float32)
    keys, rotated = rotate(plain, cos, sin), rotate(jnp.asarray(np.tile(bias, (TOKENS, 1)), jnp.float32), cos, sin)
    q = jnp.asarray(rng.standard_normal((QUERIES, H)) / size, jnp.float32)
    q = rotate(q, *rope_tables(jnp.full(QUERIES, TOKENS), H, THETA))
    q = q * (2 / jnp.std(q @ (keys - rotated).T))
    expected = jax.nn.log_softmax(q @ keys.T, axis=-1)
    spread = jnp.linalg.norm(plain - plain.mean(axis=0))
    half = keys.astype(jnp.bfloat16)
    stored = {
        "all in 8 bits": by_token(half).astype(jnp.float32),
        "16 channels kept": with_exact_channels(half, bias).astype(jnp.float32),
        "bias off": by_token(keys - rotated) + rotated,
        "bias off bfloat16": by_token(half.astype(jnp.float32) - rotated) + rotated,
        "by channel": by_channel(half).astype(jnp.float32),
        "both": by_channel(keys - rotated) + rotated,
        "bfloat16": half.astype(jnp.float32),
    }

    def divergence(x: jax.Array) -> float:
        actual = jax.nn.log_softmax(q @ x.T, axis=-1)
        return float(jnp.mean(jnp.sum(jnp.exp(expected) * (expected - actual), axis=-1)))

    return {name: (float(jnp.linalg.norm(x - keys) / spread), divergence(x)) for name, x in stored.items()}


def main() -> None:
    for norm, outlier in CASES:
        runs = [run(norm, outlier, seed) for seed in range(SEEDS)]
        cells = {n: np.mean([r[n] for r in runs], axis=0) for n in runs[0]}
        print(
            f"bias {norm}, outliers x{outlier}: " + ", ".join(f"{n} {e:.1%} {kl:.0e}" for n, (e, kl) in cells.items())
        )


if __name__ == "__main__":
    main()
