"""The table of GPUs, and integer arithmetic."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xl2jax.arithmetic import ceil_div, round_up
from xl2jax.system.cards import DEVICES, matrix_rate


@pytest.mark.parametrize(
    ("device_kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("NVIDIA A100-PCIE-40GB", "a100-40g"),
        ("NVIDIA L40", "l40"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4060 Ti", "rtx4060ti-16g"),
        ("NVIDIA GeForce RTX 4060", "rtx4060"),
        ("NVIDIA L4", "l4"),
    ],
)
def test_the_rate_of_a_device_kind(device_kind: str, name: str) -> None:
    assert matrix_rate(device_kind) == DEVICES[name].matrix_rate


@pytest.mark.parametrize("device_kind", ["cpu", "NVIDIA L40S", "NVIDIA GeForce RTX 3060 Ti", "NVIDIA GH200 480GB"])
def test_other_devices_have_no_known_rate(device_kind: str) -> None:
    """Names that contain the name of a listed GPU are other GPUs."""
    assert matrix_rate(device_kind) is None


@given(st.integers(0, 10**6), st.integers(1, 1000))
def test_rounding_up(n: int, multiple: int) -> None:
    assert (ceil_div(n, multiple) - 1) * multiple < n <= ceil_div(n, multiple) * multiple
    assert round_up(n, multiple) == ceil_div(n, multiple) * multiple
