"""Adapters on a frozen base in 8 or 4 bits: gradients, whole runs, memory in the plan, and what is refused."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_runs import metrics, write_data

import train
from xl2jax.checkpoint.convert import torch_to_orbax
from xl2jax.checkpoint.params import ParamReader
from xl2jax.config import PRESETS, Weights
from xl2jax.errors import UserError
from xl2jax.models.lora import LoRAConfig
from xl2jax.models.param_tree import is_quantized
from xl2jax.models.sharding import param_spec
from xl2jax.training.config import PRESETS as STAGES
from xl2jax.training.config import trained_names
from xl2jax.training.loss import IGNORE, TokenBatch
from xl2jax.training.report import memory_per_device
from xl2jax.training.sharding import make_mesh
from xl2jax.training.state import parameter_shapes
from xl2jax.training.step import StepConfig, Sums, gradients

SETTINGS = dataclasses.replace(
    STAGES["stage4"], checkpoint="none", data=Path("none"), output=Path("none"), lora_rank=4, compute_dtype="float32"
)
RELEASED = PRESETS["video-xl-2"]


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_gradients_are_those_on_the_unpacked_base(checkpoint: Path, weights: Weights) -> None:
    """Loss and gradients of the adapters, which also pass through every frozen matrix."""
    reader = ParamReader(checkpoint, "float32", weights)
    lora = LoRAConfig(4, 8.0)
    names = [n for n in parameter_shapes(reader.config, lora) if n.endswith(("lora_a", "lora_b"))]
    rng = np.random.default_rng(0)
    shapes = parameter_shapes(reader.config, lora)
    adapters = {n: jnp.asarray(rng.standard_normal(shapes[n].shape) * 0.1, jnp.float32) for n in names}
    quantized = {n: jnp.asarray(x) for n, x in reader.read_all()}
    plain = reader.config.with_weights(None)
    unpacked = {n: jnp.asarray(reader.plain(n)) for n in parameter_shapes(plain, None)}
    ids = rng.integers(0, 300, (1, 20)).astype(np.int32)
    visual = np.where(np.arange(20) < reader.config.visual_tokens, np.arange(20), -1)[None].astype(np.int32)
    labels = np.where(visual < 0, ids, IGNORE).astype(np.int32)
    batch = (rng.integers(0, 256, (1, 4, 70, 70, 3), np.uint8), TokenBatch(*map(jnp.asarray, (ids, visual, labels))))

    def run(config: StepConfig, frozen: dict[str, jax.Array]) -> Sums:
        return jax.jit(lambda adapters: gradients(config, adapters, frozen, *batch))(adapters)

    actual = run(StepConfig(reader.config, lora, "float32", True), quantized)
    expected = run(StepConfig(plain, lora, "float32", True), unpacked)
    assert float(actual.loss) == pytest.approx(float(expected.loss), rel=1e-5)
    whole = np.sqrt(sum(float(jnp.sum(x**2)) for x in expected.grads.values()))
    for n in names:
        assert float(jnp.linalg.norm(actual.grads[n] - expected.grads[n])) < 1e-5 * whole, n


@pytest.mark.slow
def test_a_run_trains_resumes_and_merges(
    checkpoint: Path, tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    """The export holds the unpacked base, which the adapters were trained with, plus the adapters."""
    data, stored, run = write_data(tmp_path), tmp_path / "stored", tmp_path / "run"
    torch_to_orbax(checkpoint, stored, None, "int8")
    flags = (
        "--data", data / "two.json", "--output", run, "--max-frames", 4, "--global-batch", 2, "--epochs", 4,
        "--learning-rate", 1e-2, "--lora-rank", 2, "--save-every", 2, "--keep", 9, "--no-remat", "--export-dtype", "float32",
        "--compute-dtype", "bfloat16", "--schedule", "constant",
    )  # fmt: skip
    status, _, err = command(train.main, "--checkpoint", checkpoint, *flags, "--weights", "int8")
    assert status == 0, err
    shutil.rmtree(run / "checkpoints" / "4")
    out = tmp_path / "out"
    status, _, err = command(train.main, "--checkpoint", checkpoint, *flags, "--weights", "int8", "--export", out)
    assert status == 0, err
    assert "resumed from step 2" in err
    losses = [r["loss"] for r in metrics(run)]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    base, exported = ParamReader(checkpoint, "float32", "int8"), ParamReader(out, "float32")
    for name in ("llm.embed.embedding", "llm.lm_head.kernel", "llm.norm.scale", "vision.layers.q.kernel"):
        assert np.array_equal(exported.read(name), base.plain(name)), name
    down = exported.read("llm.layers.down.kernel") - base.plain("llm.layers.down.kernel")
    for layer in down:  # the adapters have rank 2
        values = np.linalg.svd(layer, compute_uv=False)
        assert values[2] < 1e-4 * values[0]
    # Other weights are another run, and so is the checkpoint that is quantised already.
    for folder, difference in ((checkpoint, "or other --weights"), (stored, "other weights in --checkpoint")):
        status, _, err = command(train.main, "--checkpoint", folder, *flags)
        assert status == 2
        assert difference in err.splitlines()[-1]


def test_refusals(
    checkpoint: Path, tmp_path: Path, refused: Callable[..., str], command: Callable[..., tuple[int, str, str]]
) -> None:
    data, stored = write_data(tmp_path), tmp_path / "stored"
    torch_to_orbax(checkpoint, stored, None, "int8")
    flags = ("--data", data / "two.json", "--output", tmp_path / "o", "--global-batch", 2)
    assert "needs --lora-rank" in refused(train.main, "--checkpoint", checkpoint, *flags, "--weights", "int8")
    message = refused(train.main, "--checkpoint", stored, *flags)
    assert "its weights are int8, which cannot be trained themselves: add --lora-rank" in message
    lora = ("--lora-rank", 2)
    assert "int8 already" in refused(train.main, "--checkpoint", stored, *flags, *lora, "--weights", "int4")
    status, out, err = command(train.main, "--checkpoint", stored, *flags, *lora, "--dry-run")
    assert status == 0, err
    assert "an unpacked layer" in out
    plain = command(train.main, "--checkpoint", checkpoint, *flags, *lora, "--dry-run")[1]
    counts = [next(x for x in text.splitlines() if x.startswith("llm")) for text in (out, plain)]
    assert counts[0] == counts[1]  # a parameter is one, whatever its bits
    names = list(parameter_shapes(PRESETS["tiny"].with_weights("int8"), LoRAConfig(2)))
    with pytest.raises(UserError, match=r"llm.layers.down.codes, which is quantised and so cannot be trained"):
        trained_names(dataclasses.replace(SETTINGS, train=("llm.layers.down.*",)), names)
    assert "projector.fc1.kernel" in trained_names(dataclasses.replace(SETTINGS, train=("projector.*",)), names)


def test_memory_of_a_quantised_base() -> None:
    """The released model: 7.6 billion parameters of 8.1 have one byte in place of two."""
    config = dataclasses.replace(SETTINGS, compute_dtype="bfloat16", lora_rank=64)
    mesh = make_mesh(1, 1)

    def frozen(weights: Weights | None) -> float:
        model = RELEASED.with_weights(weights)
        shapes = parameter_shapes(model, config.lora)
        step = StepConfig(model, config.lora, "bfloat16", True)
        return memory_per_device(config, step, shapes, trained_names(config, list(shapes)), mesh)["frozen parameters"]

    assert frozen(None) == pytest.approx(16.25e9, rel=0.01)
    assert frozen("int8") == pytest.approx(8.64e9, rel=0.01)
    assert frozen("int4") == pytest.approx(5.52e9, rel=0.01)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_every_quantised_part_is_split_where_its_matrix_is(weights: Weights) -> None:
    mesh = jax.sharding.AbstractMesh((1, 2, 2), ("data", "fsdp", "tensor"))
    shapes = parameter_shapes(RELEASED.with_weights(weights), None)
    for name, shape in shapes.items():
        if is_quantized(name) and name.endswith(".codes"):
            spec = param_spec(name, shape.shape, mesh)  # type: ignore[arg-type]
            inward = name.split(".")[-2] in ("o", "down")
            assert spec[len(shape.shape) - (1 if inward else 2)] == "tensor", name
            assert "fsdp" in spec


@pytest.mark.parametrize("weights", [None, "int8", "int4"])
def test_a_layer_is_split_as_the_stacked_layers_are(weights: Weights | None) -> None:
    """Also under the name that `scan_layers` gives to its parameters."""
    mesh: Any = jax.sharding.AbstractMesh((1, 2, 2), ("data", "fsdp", "tensor"))
    shapes = parameter_shapes(RELEASED.with_weights(weights), LoRAConfig())
    layers = {n: s.shape for n, s in shapes.items() if ".layers." in n}
    for name, shape in layers.items():
        own = param_spec("stack.layers." + name.split(".layers.")[1], shape[1:], mesh, layer_axis=False)
        assert (None, *own) == tuple(param_spec(name, shape, mesh)), name
