"""The comparison of logits in fewer bits, and the error of KV by layer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from xl2jax.bench import command as bench
from xl2jax.checkpoint.convert import torch_to_orbax
from xl2jax.evaluation.kv_rounding import errors
from xl2jax.evaluation.rounding import Reading, compared
from xl2jax.models.layers import rope_tables, rotate


@pytest.mark.slow
def test_command(checkpoint: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    flags = ("check", "--checkpoint", checkpoint, "--frames", 16, "--videos", 1, "--weights", "int8")
    status, out, err = command(bench.main, *flags, "--json")
    assert status == 0, err
    report = json.loads(out)
    rows = {(r["weights"], r["KV"]): r for r in report["rows"]}
    assert list(rows) == [("float32", "int8"), ("int8", "float32"), ("int8", "int8")]
    assert len({r["tokens"] for r in rows.values()}) == 1
    error = {key: r["logits, relative L2"] for key, r in rows.items()}
    # Random matrices: half a step of 8 bits is a 254th of the largest of 100 numbers.
    assert 1e-3 < error["int8", "float32"] < 0.05
    assert 0 < error["float32", "int8"] < 0.05
    assert 0.5 < rows["int8", "float32"]["greedy tokens equal"] <= 1
    assert [r["layer"] for r in report["layers"]] == [0, 1, 2]
    assert all(1e-3 < r["keys"] < 0.02 and 1e-3 < r["values"] < 0.02 for r in report["layers"])


def test_refusals(checkpoint: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    flags = ("check", "--checkpoint", checkpoint)
    assert "is not quantised" in refused(bench.main, *flags, "--stored", checkpoint)
    torch_to_orbax(checkpoint, tmp_path / "int8", None, "int8")
    message = refused(bench.main, "check", "--checkpoint", tmp_path / "int8")
    assert "give the checkpoint that they were made from" in message
    assert "--weights: choose from int8,int4" in refused(bench.main, "check", "--weights", "int2")
    assert "--frames: a multiple of 4" in refused(bench.main, "check", "--frames", 30)


def test_comparison_of_logits() -> None:
    e = np.array([[0.0, 3.0, 1.0], [2.0, 0.0, 0.0]], np.float32)
    same = compared(Reading([], [e], []), Reading([], [e + 5], []))
    assert same["greedy tokens equal"] == 1
    assert same["KL"] == pytest.approx(0, abs=1e-12)
    other = compared(Reading([], [e], []), Reading([], [e[:, ::-1]], []))
    assert other["greedy tokens equal"] == 0.5
    p = np.exp(e) / np.exp(e).sum(1, keepdims=True)
    expected = (p * (e - e[:, ::-1])).sum(1).mean()  # both have the same normaliser
    assert other["KL"] == pytest.approx(expected, rel=1e-6)
    assert other["logits, relative L2"] == pytest.approx(np.linalg.norm(e - e[:, ::-1]) / np.linalg.norm(e), rel=1e-6)


@pytest.mark.slow
def test_a_large_key_bias_shows() -> None:
    """Its scale covers the bias, so that the error grows with it; taking the bias off first makes the error small."""
    rng = np.random.default_rng(0)
    positions, theta = jnp.arange(300), 1e6
    cos, sin = rope_tables(positions, 64, theta)
    varying = jnp.asarray(rng.standard_normal((2, 300, 64)), jnp.float32)
    direction = rng.standard_normal((2, 64))

    def run(norm: float) -> dict[str, float]:
        bias = jnp.asarray(direction / np.linalg.norm(direction, axis=1, keepdims=True) * norm, jnp.float32)
        return errors(rotate(varying + bias[:, None], cos, sin), varying, positions, bias, theta)

    small, large = run(0.0), run(220.0)
    assert large["key bias"] == pytest.approx(220, rel=1e-5)
    # A step is the largest element of the bias (of 64, with a norm of 220) over 127, in place of a normal one's.
    assert large["keys, beside their mean"] > 10 * small["keys, beside their mean"]
    assert large["keys"] < 2 * small["keys"]  # the whole key is large too, which hides the error
    assert large["without bias"] == pytest.approx(small["keys, beside their mean"], rel=0.05)
    # A channel of normal numbers has a step of its own largest one of 64, and a bias only widens its own channels.
    assert small["by channel"] < small["keys, beside their mean"]
    assert large["by channel"] < 0.7 * large["keys, beside their mean"]
    assert large["values"] == small["values"]
