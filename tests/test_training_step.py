"""Gradients, accumulation, packing, adapters and the optimizer, compared with each other and with float64."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xl2jax
from xl2jax.config import VideoXL2Config
from xl2jax.errors import UserError
from xl2jax.models.lora import LoRAConfig
from xl2jax.models.param_tree import flatten
from xl2jax.models.sharding import param_spec
from xl2jax.ops.dense import dense_attention, padded_attention
from xl2jax.training.config import PRESETS, TrainConfig, trained_names
from xl2jax.training.loss import IGNORE, TokenBatch, cross_entropies
from xl2jax.training.sharding import make_mesh
from xl2jax.training.state import abstract_state, merge_adapter, new_state, parameter_shapes
from xl2jax.training.step import Params, StepConfig, Sums, TrainState, gradients, learning_rate, optimizer, update
from xl2jax.training.telemetry import sample_flops
from xl2jax.video.frame_sampling import FrameSampling


def settings(**changes: object) -> TrainConfig:
    base = dataclasses.replace(PRESETS["stage4"], checkpoint="none", data=Path("none"), output=Path("none"))
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def params(model: xl2jax.Model) -> Params:
    return flatten(model.params)


@pytest.fixture(scope="module")
def batch(model: xl2jax.Model) -> tuple[np.ndarray, TokenBatch]:
    """Two samples in rows of 40 tokens: one with 4 frames and 20 tokens of text, one with 12 tokens of text."""
    rng = np.random.default_rng(0)
    v = model.config.visual_tokens
    pixels = rng.integers(0, 256, (2, 4, 70, 70, 3), np.uint8)
    ids = rng.integers(0, 300, (2, 40)).astype(np.int32)
    visual = np.full((2, 40), -1, np.int32)
    visual[0, 3 : 3 + v] = np.arange(v)
    labels = np.where(rng.random((2, 40)) < 0.5, ids, IGNORE).astype(np.int32)
    labels[visual >= 0] = IGNORE
    labels[0, 24:] = labels[1, 12:] = IGNORE
    labels[:, 0] = IGNORE
    lengths = np.array([[24, 0], [12, 0]], np.int32)
    return pixels, TokenBatch(*map(jnp.asarray, (ids, visual, labels, lengths)))


def close(a: Params, b: Params, tolerance: float = 1e-5) -> None:
    whole = math.sqrt(sum(float(np.sum(np.square(x, dtype=np.float64))) for x in a.values()))
    assert whole > 0
    assert a.keys() == b.keys()
    for name in a:
        assert float(np.linalg.norm(np.asarray(a[name]) - np.asarray(b[name]))) <= tolerance * whole, name


FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@pytest.fixture(scope="module")
def micro(model: xl2jax.Model) -> object:
    """The loss sum and the gradients of all parameters."""
    config = StepConfig(model.config, None, "float32", True)
    return jax.jit(lambda params, *batch: gradients(config, params, {}, *batch), compiler_options=FAST_COMPILE)


@pytest.mark.slow
def test_rows_and_packed_rows_add_up_to_the_batch(micro, params, batch) -> None:  # type: ignore[no-untyped-def]
    whole: Sums = micro(params, *batch)
    alone = [jnp.asarray([[True], [False]]), jnp.asarray([[False], [True]])]
    parts = [
        micro(params, batch[0], batch[1]._replace(labels=jnp.where(own, batch[1].labels, IGNORE))) for own in alone
    ]
    added = jax.tree.map(np.add, *parts)
    assert float(whole.loss) == pytest.approx(float(added.loss), rel=1e-6)
    assert float(whole.tokens) == float(added.tokens) == int((np.asarray(batch[1].labels)[:, 1:] != IGNORE).sum())
    close(whole.grads, added.grads)
    ids, visual, labels = (np.asarray(x) for x in batch[1][:3])
    packed = [np.concatenate([x[0, :24], x[1, :12], fill]) for x, fill in zip(
        (ids, visual, labels), ([0] * 4, [-1] * 4, [IGNORE] * 4), strict=True
    )]  # fmt: skip
    # The second row is empty, as the last rows of an epoch may be.
    rows = [np.stack([x, np.full_like(x, fill)]) for x, fill in zip(packed, (0, -1, IGNORE), strict=True)]
    tokens = TokenBatch(*(jnp.asarray(x, jnp.int32) for x in (*rows, [[24, 12], [0, 0]])))
    one: Sums = micro(params, batch[0], tokens)
    assert float(one.loss) == pytest.approx(float(whole.loss), rel=1e-6)
    close(whole.grads, one.grads)
    unseparated: Sums = micro(params, batch[0], tokens._replace(lengths=jnp.asarray([[36, 0], [0, 0]])))
    assert float(unseparated.loss) != pytest.approx(float(whole.loss), rel=1e-4)


@pytest.mark.slow
def test_adapters_start_at_zero_and_merge_exactly(model: xl2jax.Model, params: Params, batch, micro) -> None:  # type: ignore[no-untyped-def]
    lora = LoRAConfig(rank=4, alpha=8.0)
    shapes = parameter_shapes(model.config, lora)
    names = trained_names(settings(lora_rank=4), list(shapes))
    assert len(names) == 14
    assert all(n.endswith(("lora_a", "lora_b")) for n in names)
    rng = np.random.default_rng(1)
    adapters = {n: jnp.asarray(rng.standard_normal(shapes[n].shape) * 0.1, jnp.float32) for n in names}
    zero = {n: jnp.zeros_like(x) if n.endswith("lora_b") else x for n, x in adapters.items()}
    config = StepConfig(model.config, lora, "float32", True)
    run = jax.jit(lambda adapters, *batch: gradients(config, adapters, params, *batch), compiler_options=FAST_COMPILE)
    plain: Sums = micro(params, *batch)
    # Rows with one sample need no lengths. Only the program differs.
    alone = (batch[0], batch[1]._replace(lengths=None))
    start: Sums = run(zero, *alone)
    assert float(start.loss) == pytest.approx(float(plain.loss), rel=1e-5)
    assert set(start.grads) == set(names)
    assert all(float(jnp.abs(g).max()) == 0 for n, g in start.grads.items() if n.endswith("lora_a"))
    # dLoss / dB follows from the kernel's own gradient: alpha / rank * A^T dW.
    for base in ("llm.layers.q", "llm.layers.down"):
        expected = 2.0 * np.einsum("lnr,lnm->lrm", zero[f"{base}.lora_a"], plain.grads[f"{base}.kernel"])
        got = np.asarray(start.grads[f"{base}.lora_b"])
        assert np.linalg.norm(got - expected) < 1e-5 * np.linalg.norm(expected)
    merged = dict(params)
    for name in names[::2]:
        base = name.rpartition(".")[0]
        low = [np.asarray(adapters[f"{base}.{x}"]) for x in ("lora_a", "lora_b")]
        merged[f"{base}.kernel"] = jnp.asarray(merge_adapter(np.asarray(params[f"{base}.kernel"]), *low, lora))
    assert float(run(adapters, *alone).loss) == pytest.approx(float(micro(merged, *batch).loss), rel=1e-5)
    assert float(run(adapters, *alone).loss) != pytest.approx(float(plain.loss), rel=1e-3)


def test_update_agrees_with_adamw_in_float64() -> None:
    """Three steps with clipping, AdamW, rates by parameter, warm-up and cosine, compared with plain NumPy."""
    rng = np.random.default_rng(0)
    shapes = {"vision.a.kernel": (3, 4), "llm.b.kernel": (4,), "llm.b.bias": (5,)}
    config = settings(
        learning_rate=0.1, weight_decay=0.1, warmup=0.25, clip_norm=0.5, rates=("vision.*=0.01",), b2=0.98
    )
    steps = 8
    tx, schedule = optimizer(config, list(shapes), steps), learning_rate(config, steps)
    params = {n: jnp.asarray(rng.standard_normal(s), jnp.float32) for n, s in shapes.items()}
    state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))
    p = {n: np.asarray(x, np.float64) for n, x in params.items()}
    m, v = ({n: np.zeros(s) for n, s in shapes.items()} for _ in range(2))
    for t in range(1, 5):
        sums = Sums(jnp.float32(30.0), jnp.float32(10.0), {
            n: jnp.asarray(rng.standard_normal(s) * 7, jnp.float32) for n, s in shapes.items()
        })  # fmt: skip
        state, metrics = update(tx, schedule, state, sums)
        g = {n: np.asarray(x, np.float64) / 10 for n, x in sums.grads.items()}
        norm = math.sqrt(sum((x**2).sum() for x in g.values()))
        rate = 0.1 * (t - 1) / 2 if t <= 2 else 0.1 * 0.5 * (1 + math.cos(math.pi * (t - 1 - 2) / (steps - 2)))
        assert float(metrics.loss) == 3.0
        assert float(metrics.grad_norm) == pytest.approx(norm, rel=1e-6)
        assert float(metrics.learning_rate) == pytest.approx(rate, rel=1e-6)
        for n in shapes:
            clipped = g[n] * min(1.0, 0.5 / norm)
            m[n] = 0.9 * m[n] + 0.1 * clipped
            v[n] = 0.98 * v[n] + 0.02 * clipped**2
            step = (m[n] / (1 - 0.9**t)) / (np.sqrt(v[n] / (1 - 0.98**t)) + 1e-8)
            decay = 0.1 * p[n] if n.endswith("kernel") else 0.0
            p[n] = p[n] - rate * (0.1 if n.startswith("vision") else 1.0) * (step + decay)
            assert np.allclose(state.params[n], p[n], rtol=1e-5, atol=1e-6), (t, n)
    assert int(state.step) == 4


def moved(model: xl2jax.Model, params: Params, batch: tuple[np.ndarray, TokenBatch], dtype: str) -> np.ndarray:
    """The change of each LLM weight after 200 steps on one batch at the preset's learning rate."""
    steps = 200
    config = settings(warmup=0.0, schedule="constant", compute_dtype=dtype)
    assert config.learning_rate == PRESETS["stage4"].learning_rate == 1e-5
    before = {n: p for n, p in params.items() if n.startswith("llm")}
    frozen = {n: p for n, p in params.items() if n not in before}
    tx, schedule = optimizer(config, list(before), steps), learning_rate(config, steps)
    mesh = make_mesh(None, 1)
    shapes = {n: jax.ShapeDtypeStruct(p.shape, p.dtype) for n, p in before.items()}
    abstract = abstract_state(shapes, tx, mesh)
    assert {x.dtype for x in jax.tree.leaves(abstract)} == {jnp.dtype("float32"), jnp.dtype("int32")}
    step = StepConfig(model.config, None, dtype, False)

    def one(state: TrainState, _: None) -> tuple[TrainState, None]:
        sums = gradients(step, state.params, frozen, *batch)
        assert {g.dtype for g in sums.grads.values()} == {jnp.dtype("float32")}
        return update(tx, schedule, state, sums)[0], None

    run = jax.jit(lambda state: jax.lax.scan(one, state, None, length=steps)[0], compiler_options=FAST_COMPILE)
    after = run(new_state(before, tx, abstract)).params
    return np.concatenate([np.abs(np.asarray(after[n]) - np.asarray(p)).ravel() for n, p in before.items()])


@pytest.mark.slow
def test_bfloat16_compute_moves_weights_as_far_as_float32(model, params, batch) -> None:  # type: ignore[no-untyped-def]
    """Weights stored in bfloat16 would not change: a step of 1e-5 is far below half of their spacing."""
    text = (batch[0][1:], TokenBatch(*(x[1:, :12] for x in batch[1])))
    exact, got = (moved(model, params, text, dtype) for dtype in ("float32", "bfloat16"))
    assert 1e-3 < exact.mean() < 2e-3  # 200 steps of 1e-5, except for embeddings of words that are not in the batch
    assert got.mean() == pytest.approx(exact.mean(), rel=0.05)
    assert (got > 0).mean() == pytest.approx((exact > 0).mean(), abs=0.01)


def test_the_second_moment_reaches_its_value() -> None:
    """After 3,000 steps with gradient g it is (1 - 0.999^3000) g^2; in bfloat16 it would stop at half of that."""
    params = {"llm.a.kernel": jnp.ones((3, 4))}
    config = settings(clip_norm=100.0)
    tx, schedule = optimizer(config, list(params), 3000), learning_rate(config, 3000)
    state = TrainState(jnp.int32(0), params, tx.init(params))
    gradient = {"llm.a.kernel": jnp.linspace(-0.3, 0.7, 12).reshape(3, 4)}
    sums = Sums(jnp.float32(1), jnp.float32(1), gradient)
    state = jax.jit(lambda s: jax.lax.scan(lambda s, _: (update(tx, schedule, s, sums)[0], None), s, None, 3000)[0])(
        state
    )
    (second,) = (x.nu["llm.a.kernel"] for x in state.opt_state if hasattr(x, "nu"))
    assert np.allclose(second, (1 - 0.999**3000) * np.square(gradient["llm.a.kernel"]), rtol=1e-3)


def test_learning_rates_follow_the_schedule() -> None:
    """The rate rises over 3 of 10 steps, then it is constant or a cosine to 0."""
    constant = learning_rate(settings(learning_rate=0.3, warmup=0.25, schedule="constant"), 10)
    assert np.allclose([constant(i) for i in range(10)], [0, 0.1, 0.2, *[0.3] * 7])
    cosine = learning_rate(settings(learning_rate=0.3, warmup=0.25), 10)
    assert np.allclose(
        [cosine(i) for i in range(11)],
        [0, 0.1, 0.2, *(0.15 * (1 + math.cos(math.pi * i / 7)) for i in range(8))], atol=1e-7,
    )  # fmt: skip
    assert float(learning_rate(settings(learning_rate=0.3, warmup=0.0, schedule="constant"), 10)(0)) == np.float32(0.3)


def test_padding_to_even_lengths_changes_nothing() -> None:
    """The padded inputs that cuDNN gets for 729 patches have the values and gradients of plain attention."""
    q, k, v, weight = (jax.random.normal(jax.random.key(i), (2, 7, 3, 8)) for i in range(4))

    def value(attention: Callable[..., jax.Array], *x: jax.Array) -> jax.Array:
        return jnp.sum(attention(*x) * weight)

    def gradient(attention: Callable[..., jax.Array]) -> object:
        both = jax.value_and_grad(functools.partial(value, attention), argnums=(0, 1, 2))
        return jax.jit(both, compiler_options=FAST_COMPILE)(q, k, v)

    plain, padded = gradient(dense_attention), gradient(lambda *x: padded_attention(*x, "xla"))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(padded), strict=True):
        assert np.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_presets_and_patterns(model: xl2jax.Model) -> None:
    names = list(parameter_shapes(model.config, None))

    def parts(config: TrainConfig) -> set[str]:
        return {n.partition(".")[0] for n in trained_names(config, names)}

    assert parts(dataclasses.replace(PRESETS["stage1"])) == {"dts"}
    assert parts(dataclasses.replace(PRESETS["stage2"])) == {"projector"}
    assert parts(PRESETS["stage3"]) == parts(PRESETS["stage4"]) == {"vision", "dts", "projector", "llm"}
    assert settings(frame_times="upstream").sampling() == FrameSampling(1.0, 4, 150, "upstream")
    assert (PRESETS["stage3"].max_frames, PRESETS["stage3"].max_length) == (16, 8192)
    assert (PRESETS["stage4"].max_frames, PRESETS["stage4"].max_length, PRESETS["stage4"].global_batch) == (
        150, 6000, 256,
    )  # fmt: skip
    assert parts(settings(freeze=("vision.*", "llm.*"))) == {"dts", "projector"}
    for bad, message in (
        (settings(train=("nothing.*",)), "matches no parameter"),
        (settings(freeze=("*",)), "nothing is left"),
        (settings(rates=("visoin.*=1",)), "matches no parameter"),
    ):
        with pytest.raises(UserError, match=message):
            trained_names(bad, names)
    both = list(parameter_shapes(model.config, LoRAConfig(2)))
    assert {n.partition(".")[0] for n in trained_names(settings(lora_rank=2, train=("dts.*",)), both)} == {"dts", "llm"}
    with pytest.raises(UserError, match="which --lora-rank freezes"):
        trained_names(settings(lora_rank=2, train=("llm.*",)), both)


def test_parameters_are_split_where_they_should_be() -> None:
    """With the released sizes every large array is split over fsdp and, in the LLM, over tensor."""
    config = xl2jax.PRESETS["video-xl-2"]
    mesh = jax.sharding.AbstractMesh((1, 2, 2), ("data", "fsdp", "tensor"))
    shapes = parameter_shapes(config, LoRAConfig(64))
    whole = split = 0.0
    for name, s in shapes.items():
        spec = param_spec(name, s.shape, mesh)  # type: ignore[arg-type]
        axes = [a for a in spec if a is not None]
        assert len(axes) == len(set(axes))
        assert not (".layers." in name and spec[0] is not None)
        for n, a in zip(s.shape, spec, strict=True):
            assert a is None or n % mesh.shape[a] == 0
        whole += math.prod(s.shape)
        split += math.prod(s.shape) / math.prod(mesh.shape[a] for a in axes)
    assert split < 0.26 * whole
    assert param_spec("llm.layers.q.kernel", (28, 3584, 3584), mesh)[2] == "tensor"  # type: ignore[arg-type]
    assert param_spec("llm.layers.o.kernel", (28, 3584, 3584), mesh)[1] == "tensor"  # type: ignore[arg-type]


def test_mesh_refuses_what_does_not_divide() -> None:
    with pytest.raises(UserError, match="--fsdp 3"):
        make_mesh(3, 1)
    with pytest.raises(UserError, match="--tensor 2"):
        make_mesh(None, 2)


def test_training_operations(model: xl2jax.Model) -> None:
    """If everything trains, a step costs three forward passes. A frozen encoder has no backward pass."""
    config: VideoXL2Config = xl2jax.PRESETS["video-xl-2"]
    names = list(parameter_shapes(config, None))
    of = {part: {n for n in names if n.startswith(part)} for part in ("vision", "dts", "projector", "llm")}
    everything = sample_flops(config, set(names), 10, 1500, 1500)
    llm = sample_flops(config, of["llm"], 10, 1500, 1500) - sample_flops(config, of["llm"], 10, 0, 0)
    assert llm == pytest.approx(3 * 1500 * (13.1e9 + 2 * 3584 * 152064), rel=0.03)
    assert sample_flops(config, of["llm"], 10, 1500, 1500) < sample_flops(
        config, of["projector"] | of["llm"], 10, 1500, 1500
    )
    assert sample_flops(config, of["projector"], 10, 1500, 1500) < everything
    # SigLIP 0.65 TFLOP a frame, DTS 0.165 TFLOP a group (forward).
    vision = sample_flops(config, of["vision"], 1, 0, 0)
    assert vision == pytest.approx(3 * 4 * 0.65e12 + 2 * 0.165e12, rel=0.1)


def test_cross_entropies_of_the_labelled_tokens() -> None:
    """Loss and gradients equal those of all logits at once, in float64: rows with many, few and no labels."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        hidden, kernel = jnp.asarray(rng.standard_normal((3, 700, 8))), jnp.asarray(rng.standard_normal((8, 50)))
        share = np.array([[0.9], [0.01], [0.0]])
        labels = jnp.asarray(np.where(rng.random((3, 700)) < share, rng.integers(0, 50, (3, 700)), IGNORE))

        def at_once(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
            rows = jnp.take_along_axis(
                jax.nn.log_softmax(hidden[:, :-1] @ kernel), jnp.maximum(labels, 0)[:, 1:, None], axis=-1
            )[..., 0]
            return -jnp.sum(jnp.where(labels[:, 1:] == IGNORE, 0.0, rows))

        def in_blocks(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
            llm: Any = SimpleNamespace(unembedding=lambda: kernel)
            total, count = cross_entropies(llm, hidden, labels)
            assert float(count) == np.sum(np.asarray(labels)[:, 1:] != IGNORE) > 600
            return total

        got, expected = (jax.value_and_grad(f, (0, 1))(hidden, kernel) for f in (in_blocks, at_once))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
