"""How exact rotary positions are far from the beginning of a video.

python tools/rope_far.py

For the released model's heads (128 channels, theta 1,000,000) it prints the largest error of an angle in float32, and the
error of the product of a query and a key that are 100 positions apart, relative to the product of their norms.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from xl2jax.models.layers import rope_tables, rotate

H, THETA, APART, PAIRS = 128, 1e6, 100, 2000


def main() -> None:
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((PAIRS, H)), jnp.float32) for _ in range(2))
    norms = jnp.linalg.norm(q, axis=1) * jnp.linalg.norm(k, axis=1)
    inverse = 1 / THETA ** (np.arange(0, H, 2) / H)

    def product(at: int) -> jnp.ndarray:
        turned = (rotate(x, *rope_tables(jnp.full(PAIRS, p), H, THETA)) for x, p in ((q, at + APART), (k, at)))
        return jnp.sum(next(turned) * next(turned), axis=1) / norms

    near = product(0)
    print("| position | angle, radians | product, mean | product, largest |")
    print("| --- | --- | --- | --- |")
    for at in (10_000, 100_000, 1_000_000, 10_000_000):
        exact = at * inverse
        angle = np.abs((np.float32(at) * inverse.astype(np.float32)).astype(np.float64) - exact).max()
        off = np.abs(np.asarray(product(at) - near))
        print(f"| {at:,} | {angle:.1e} | {off.mean():.1e} | {off.max():.1e} |")


if __name__ == "__main__":
    main()
