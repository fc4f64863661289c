"""Four bits that are rounded for given inputs: the solver, and whole checkpoints that are calibrated on a video."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xl2jax
from xl2jax.checkpoint.orbax_folder import read_manifest
from xl2jax.checkpoint.params import ParamReader, load_params
from xl2jax.commands.convert import main
from xl2jax.errors import UserError
from xl2jax.inference import calibration
from xl2jax.inference.calibration import _INPUTS, _embeddings, _layer, calibrate
from xl2jax.ops.gptq import gptq
from xl2jax.ops.weights import dequantize, part_shapes, quantize
from xl2jax.video.clip import FrameSampling, open_video


def on_host(matrix: np.ndarray, moments: np.ndarray) -> np.ndarray:
    return dequantize(jax.tree.map(np.asarray, gptq(jnp.asarray(matrix), jnp.asarray(moments, jnp.float32))))


def test_inputs_that_move_alone_are_rounded_to_nearest() -> None:
    w = np.random.default_rng(0).standard_normal((20, 256)).astype(np.float32)
    q = gptq(jnp.asarray(w), jnp.eye(256))
    assert np.array_equal(on_host(w, np.eye(256)), dequantize(quantize(w, "int4")))
    parts = {f: (x.shape, x.dtype) for f, x in q._asdict().items()}
    assert parts == {f: (s.shape, s.dtype) for f, s in part_shapes(20, 256, "int4").items()}


@pytest.mark.parametrize("n", [64, 256, 320])
def test_products_with_the_inputs_change_less(n: int) -> None:
    """Inputs of very different sizes that move together, as those of a network do; also inputs that are always 0."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((1000, n // 8)) @ rng.standard_normal((n // 8, n)) + 0.3 * rng.standard_normal((1000, n))
    x *= np.exp(rng.normal(0, 1, n))
    x[:, 5] = 0
    w = rng.standard_normal((40, n)).astype(np.float32)

    def error(q: np.ndarray) -> float:
        return float(np.linalg.norm(x @ (q - w).T) / np.linalg.norm(x @ w.T))

    nearest, calibrated = error(dequantize(quantize(w, "int4"))), error(on_host(w, x.T @ x))
    assert calibrated < 0.5 * nearest
    # A smaller share of the same inputs is a smaller matrix of moments, but the same problem.
    assert error(on_host(w, 1e-4 * (x.T @ x))) == pytest.approx(calibrated, rel=0.02)


def test_inputs_that_overflow_are_refused(model: xl2jax.Model, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding by moments that are not finite would give codes without a meaning."""

    def overflowing(network: Any, index: Any, x: jax.Array, tokens: Any) -> Any:
        x, moments = layer(network, index, x, tokens)
        return x, jax.tree.map(lambda m: m.at[0, 0].set(jnp.inf), moments)

    layer = calibration._layer
    monkeypatch.setattr(calibration, "_layer", overflowing)
    with pytest.raises(UserError, match="overflow in float32: calibrate in bfloat16 or float32"):
        calibration.calibrate(model, [open_video(clip, FrameSampling(max_frames=8))])


def test_moments_are_those_of_the_inputs(model: xl2jax.Model, clip: Path) -> None:
    """Padding counts nowhere, and the layers' outputs are those of `layer_outputs`."""
    x, tokens = _embeddings(model, open_video(clip, FrameSampling(max_frames=16)))
    assert tokens < len(x)
    after, moments = _layer(model.network, jnp.int32(0), x, jnp.int32(tokens))
    llm = model.network.model.llm
    scale = np.asarray(model.params["llm"]["layers"]["input_norm"]["scale"][...][0], np.float64)
    real = np.asarray(x[:tokens], np.float64)
    y = real / np.sqrt((real**2).mean(1, keepdims=True) + 1e-6) * scale
    expected = y.T @ y
    assert np.linalg.norm(moments["attention"] - expected) < 1e-5 * np.linalg.norm(expected)
    assert {k: v.shape for k, v in moments.items()} == {
        "attention": (64, 64), "heads": (64, 64), "mlp": (64, 64), "hidden": (96, 96),
    }  # fmt: skip

    def attend(state: None, _: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[None, jax.Array]:
        from xl2jax.ops.dense import dense_attention

        return state, dense_attention(q[None], k[None], v[None], causal=True)[0]

    outputs = llm.layer_outputs(x, jnp.arange(len(x)), attend, None)
    assert float(jnp.linalg.norm((after - outputs[0])[:tokens]) / jnp.linalg.norm(outputs[0][:tokens])) < 1e-5


def test_a_calibrated_checkpoint(
    checkpoint: Path,
    clip: Path,
    tmp_path: Path,
    command: Callable[..., tuple[int, str, str]],
    refused: Callable[..., str],
) -> None:
    """Its matrices are those of `calibrate`; everything else is as without. Its error on the inputs is smaller."""
    flags = ("--weights", "int4", "--calibrate", clip, "--calibrate-frames", 16)
    status, _, err = command(main, checkpoint, tmp_path / "out", *flags)
    assert status == 0, err
    assert read_manifest(tmp_path / "out").weights == "int4"
    config, params = load_params(tmp_path / "out")
    assert config.llm.weights == "int4"
    model = xl2jax.load(checkpoint)
    video = open_video(clip, FrameSampling(max_frames=16))
    matrices = calibrate(model, [video])
    assert set(matrices) == {f"llm.layers.{i}.{name}" for i in range(3) for name in _INPUTS}
    layers = params["llm"]["layers"]
    assert np.array_equal(layers["down"]["codes"][...][2], matrices["llm.layers.2.down"].codes)
    nearest = load_params(checkpoint, None, "int4")[1]
    assert not np.array_equal(layers["down"]["codes"][...], nearest["llm"]["layers"]["down"]["codes"][...])
    assert np.array_equal(params["llm"]["embed"]["codes"][...], nearest["llm"]["embed"]["codes"][...])
    x, tokens = _embeddings(model, video)
    for index in range(3):
        x, moments = _layer(model.network, jnp.int32(index), x, jnp.int32(tokens))
        for name, inputs in _INPUTS.items():
            exact = ParamReader(checkpoint).read(f"llm.layers.{name}.kernel")[index].T
            errors = [
                np.einsum("mi,ij,mj->", e, np.asarray(moments[inputs], np.float64), e)
                for q in (dequantize(matrices[f"llm.layers.{index}.{name}"]), dequantize(quantize(exact, "int4")))
                for e in [(q - exact).astype(np.float64)]
            ]
            assert errors[0] < errors[1], (index, name)
    flags = ("--calibrate", clip)
    assert "--calibrate is for --weights int4" in refused(main, checkpoint, tmp_path / "x", "--weights", "int8", *flags)
    assert "has no effect without --calibrate" in refused(main, checkpoint, tmp_path / "x", "--calibrate-frames", 8)
    assert "no such video" in refused(main, checkpoint, tmp_path / "x", "--weights", "int4", "--calibrate", "none.mp4")
