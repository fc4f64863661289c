from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xl2jax.checkpoint import array_checks

FLOATS = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


@pytest.mark.parametrize("dtype", FLOATS)
@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**63), st.integers(1, 2**64 - 1))
def test_any_flipped_bits_change_the_checksum(dtype: type, place: int, mask: int) -> None:
    x = np.random.default_rng(0).standard_normal((7, 33)).astype(dtype)
    before = array_checks.checksum(x)
    assert array_checks.checksum(x.copy()) == before
    bits = x.reshape(-1).view(f"u{x.dtype.itemsize}")
    bits[place % bits.size] ^= bits.dtype.type(mask % 2 ** (8 * x.dtype.itemsize) or 1)
    assert array_checks.checksum(x) != before


def test_a_checksum_depends_on_dtype_shape_and_order(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).integers(-99, 99, 6 << 20, np.int16)  # three pieces
    sums = {array_checks.checksum(a) for a in (x, x.view(np.uint16), x.reshape(2, -1), x[::-1], np.roll(x, 2 << 20))}
    assert len(sums) == 5
    assert array_checks.checksum(x.reshape(3, -1).T) == array_checks.checksum(np.ascontiguousarray(x.reshape(3, -1).T))
    before = array_checks.checksum(x)
    for cores in (1, None, 64):
        monkeypatch.setattr(array_checks.os, "cpu_count", lambda cores=cores: cores)
        assert array_checks.checksum(x) == before
    assert array_checks.checksum(np.zeros((0, 3), np.float32)) != array_checks.checksum(np.zeros((3, 0), np.float32))


@pytest.mark.parametrize("dtype", FLOATS)
def test_is_finite_agrees_with_numpy(dtype: type) -> None:
    size = np.dtype(dtype).itemsize
    if size == 2:
        numbers = np.arange(2**16, dtype=np.uint16).view(dtype)
    else:
        numbers = np.random.default_rng(0).bytes(8 << 10)
        edges = [np.inf, -np.inf, np.nan, -np.nan, np.finfo(dtype).max, np.finfo(dtype).min, 0.0, -0.0]
        numbers = np.concatenate([np.frombuffer(numbers, dtype), np.array(edges, dtype)])
    for x in numbers[:: 1 + numbers.size // 4000]:
        assert array_checks.is_finite(np.array([x])) == np.isfinite(x)
    finite = numbers[np.isfinite(numbers)]
    assert array_checks.is_finite(finite)
    assert array_checks.is_finite(finite[:0])


def test_the_last_element_is_checked() -> None:
    x = np.zeros((3, 200_001), np.float32)
    assert array_checks.is_finite(x)
    x[-1, -1] = -np.inf
    assert not array_checks.is_finite(x)
    assert not array_checks.is_finite(x.T)
