"""The GPU kernels without a GPU: results and races in the interpreter, and lowering at the released shapes.

The interpreter knows no cp.async: it runs the mma kernel with TMA loads. Only a GPU runs its waits for cp.async
(`xl2jax bench kernels` checks results there).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.experimental.mosaic.gpu.utils as mosaic_utils
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from xl2jax.config import PRESETS
from xl2jax.errors import UserError
from xl2jax.inference import compiled
from xl2jax.inference.layout import PrefillConfig, VideoLayout, natural_ranges
from xl2jax.inference.network import Network
from xl2jax.models.video_xl2 import abstract_model
from xl2jax.ops import attention, mma, tiles, wgmma
from xl2jax.ops.attention import Attention, arena_attention
from xl2jax.ops.kv import Source, quantize
from xl2jax.ops.mma import attend_mma
from xl2jax.ops.mma_decode import attend_decode
from xl2jax.ops.ranges import NEGATIVE, Ranges, merge
from xl2jax.ops.reference import attend_reference
from xl2jax.ops.tiles import KernelConfig, tile_blocks
from xl2jax.ops.wgmma import attend_wgmma

TILE = 128
KERNELS = {"wgmma": attend_wgmma, "mma": attend_mma}
WGMMA_SLOW = [pytest.param(name, marks=[pytest.mark.slow] * (name == "wgmma")) for name in KERNELS]
ALL = KERNELS | {"decode": attend_decode}
type Problem = tuple[jax.Array, Source]


def interpreted(name: str, q: jax.Array, *sources: Source, config: KernelConfig) -> tuple[np.ndarray, np.ndarray]:
    params = plgpu.InterpretGPUParams(detect_races=True)
    out, lse = ALL[name](q, sources, config=config, interpret=params)
    return np.asarray(out, np.float32), np.asarray(lse)


def problem(ranges: Ranges, *, slots: int, heads: int, kv_heads: int, h: int = 64, rows: int = 2) -> Problem:
    """Random bfloat16 arrays for ranges [B, T]. Every batch row reads another row of the arena."""
    rng = np.random.default_rng(0)
    batch, tokens = ranges.g_end.shape
    q = rng.standard_normal((batch, tokens, heads, h))
    k, v = rng.standard_normal((2, rows, kv_heads, slots, h))
    row = (np.arange(batch) + 1) % rows
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
    return q, Source(k, v, jnp.asarray(row, jnp.int32), Ranges(*(jnp.asarray(x, jnp.int32) for x in ranges)))


def reference(q: jax.Array, *sources: Source) -> list[np.ndarray]:
    """In float32, to which quantised sources are unpacked without a rounding."""
    sources = tuple(jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, s) for s in sources)
    return [np.asarray(x, np.float32) for x in merge([attend_reference(q, source) for source in sources])]


def assert_reference(name: str, q: jax.Array, *sources: Source, config: KernelConfig) -> None:
    out, lse = interpreted(name, q, *sources, config=config)
    expected, expected_lse = reference(q, *sources)
    assert np.isfinite(out).all()
    assert np.linalg.norm(out - expected) <= 1e-2 * np.linalg.norm(expected)
    assert np.allclose(lse, expected_lse, atol=1e-4)
    unseen = expected_lse <= NEGATIVE
    assert not out[unseen].any()


def some_ranges(tokens: int, slots: int, seed: int) -> Ranges:
    """Ranges that end inside blocks, and a few queries that see nothing."""
    rng = np.random.default_rng(seed)
    g_end = rng.integers(slots // 8, slots // 3, (1, tokens))
    v_lo = rng.integers(slots // 3, slots // 2, (1, tokens))
    v_hi = v_lo + rng.integers(0, slots // 2, (1, tokens))
    dead = rng.random((1, tokens)) < 0.1
    return Ranges(np.where(dead, 0, g_end), v_lo, np.where(dead, 0, v_hi))


@pytest.mark.parametrize(
    ("name", "tokens", "slots", "heads", "kv_heads", "config"),
    [
        pytest.param("wgmma", 40, 384, 4, 2, KernelConfig(TILE, 64, 2), marks=pytest.mark.slow),
        pytest.param("wgmma", 70, 512, 2, 1, KernelConfig(TILE, 128, 2), marks=pytest.mark.slow),
        ("wgmma", 1, 640, 7, 1, KernelConfig(TILE, 64, 4, splits=(3,))),
        pytest.param("mma", 40, 384, 4, 2, KernelConfig(64, 32, 1), marks=pytest.mark.slow),
        ("mma", 70, 512, 2, 1, KernelConfig(128, 64, 1)),
        ("mma", 1, 640, 7, 1, KernelConfig(64, 64, 1, splits=(3,))),
    ],
)
def test_against_the_reference(
    name: str, tokens: int, slots: int, heads: int, kv_heads: int, config: KernelConfig
) -> None:
    """The cases have one tile or many, masked and unmasked blocks, and split blocks. The interpreter detects races."""
    ranges = some_ranges(tokens, slots, 0)
    assert_reference(name, *problem(ranges, slots=slots, heads=heads, kv_heads=kv_heads), config=config)


@pytest.mark.parametrize("name", WGMMA_SLOW)
def test_padding_queries_poisoned_with_nan(name: str) -> None:
    """Queries that see nothing share tiles, and so unmasked blocks, with others. Their NaN does not spread."""
    rng = np.random.default_rng(1)
    dead = rng.random((1, 40)) < 0.3
    g_end, v_lo, v_hi = (
        rng.integers(130, 200, (1, 40)),
        rng.integers(200, 250, (1, 40)),
        rng.integers(400, 500, (1, 40)),
    )
    ranges = Ranges(np.where(dead, 0, g_end), v_lo, np.where(dead, 0, v_hi))
    one_tile = Ranges(*(jnp.asarray(np.resize(x, (1, TILE)), jnp.int32) for x in ranges))
    blocks = np.asarray(tile_blocks(one_tile, 64, TILE))[0, 0]
    assert blocks[0] > 0
    assert blocks[4] > blocks[3]
    q, source = problem(ranges, slots=512, heads=4, kv_heads=2)
    expected, expected_lse = reference(q, source)
    q = jnp.where(jnp.asarray(dead)[..., None, None], jnp.nan, q)
    out, lse = interpreted(name, q, source, config=KernelConfig(TILE, 64, 1 if name == "mma" else 2))
    assert np.isfinite(out).all()
    assert np.linalg.norm(out - expected) <= 1e-2 * np.linalg.norm(expected)
    assert not out[dead].any()
    assert np.allclose(lse, expected_lse, atol=1e-4)


@pytest.mark.parametrize("name", WGMMA_SLOW)
@pytest.mark.parametrize("splits", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_short_lists_and_batches(name: str, splits: int) -> None:
    """Tiles may have no block, one block, or fewer blocks than splits and stages."""
    g_end = np.array([[0] * 8, [1] * 8])
    v_lo, v_hi = np.array([[0] * 8, [64] * 8]), np.array([[0] * 8, [0] * 8])
    q, source = problem(Ranges(g_end, v_lo, v_hi), slots=256, heads=1, kv_heads=1)
    config = KernelConfig(TILE, 64, 1 if name == "mma" else 2, (splits,))
    assert_reference(name, q, source, config=config)


@pytest.mark.parametrize("name", WGMMA_SLOW)
def test_two_sources_are_merged(name: str) -> None:
    """As in decoding: the video's slots, split over programs, and those of the text. One query sees only the text."""
    q, video = problem(Ranges(*np.array([[[100, 0]], [[128, 0]], [[300, 0]]])), slots=384, heads=7, kv_heads=1, rows=1)
    _, text = problem(Ranges(*np.array([[[9, 10]], [[0, 0]], [[0, 0]]])), slots=128, heads=7, kv_heads=1, rows=1)
    config = KernelConfig(64 if name == "mma" else TILE, 64, 1 if name == "mma" else 2, splits=(2, 1))
    assert_reference(name, q, video, text, config=config)


@pytest.mark.parametrize(
    ("h", "heads", "text", "splits", "kept"),
    [
        pytest.param(64, 6, False, (2,), 0, marks=pytest.mark.slow),
        pytest.param(128, 14, True, (3, 1), 0, marks=pytest.mark.slow),
        pytest.param(64, 18, True, (1, 2), 0, marks=pytest.mark.slow),
        (128, 14, True, (3, 1), 16),
    ],
)
def test_a_quantised_source_is_read_in_place(
    h: int, heads: int, text: bool, splits: tuple[int, ...], kept: int
) -> None:
    """Alone, and beside a text cache of 16 bits that has more slots. Two queries differ in what they see, and one sees
    nothing of the video. The error is that of 16-bit products. `kept` channels of each key have 16 bits."""
    see = np.array([[100, 0], [70, 0]]), np.array([[128, 9], [128, 0]]), np.array([[200, 9], [256, 0]])
    q, video = problem(Ranges(*see), slots=256, heads=heads, kv_heads=2, h=h)
    rng = np.random.default_rng(1)
    channels = np.sort(rng.permuted(np.tile(np.arange(h), (2, 2, 1)), axis=-1)[..., :kept]) if kept else None
    video = video._replace(k=quantize(video.k, channels), v=quantize(video.v))
    sources = [video]
    if text:
        _, other = problem(
            Ranges(*np.array([[[310, 5]] * 2, [[0, 0]] * 2, [[0, 0]] * 2])), slots=320, heads=heads, kv_heads=2, h=h
        )
        sources.append(other)
    assert_reference("decode", q, *sources, config=KernelConfig(16, 64, 1, splits))


def test_8_bits_in_float16_are_unpacked_first() -> None:
    """Most of the softmax goes to one slot: weights times a scale of the values would be too small for float16."""
    ranges = Ranges(*np.array([[[100]], [[128]], [[200]]]))
    q, source = problem(ranges, slots=256, heads=7, kv_heads=1)
    q, source = jax.tree.map(lambda x: x.astype(jnp.float16) if x.dtype == jnp.bfloat16 else x, (q, source))
    k = source.k.at[:, :, 0].set(4 * q.reshape(7, -1)[0])
    source = source._replace(k=quantize(k), v=quantize(source.v * 0.02))
    out, lse = interpreted("mma", q, source, config=KernelConfig(64, 64, 1))
    expected, expected_lse = reference(q.astype(jnp.float32), source)
    # Keys, values, weights and the output are rounded, each by 2**-11 of its size at most. A key's rounding changes the
    # score of the one slot that counts, and so lse, by as large a share: all products of q and this key are positive.
    unit = 2.0**-11
    assert np.linalg.norm(out - expected) <= 4 * unit * np.linalg.norm(expected)
    assert (np.abs(lse - expected_lse) <= unit * expected_lse + 1e-4).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_more_heads_than_a_tile_has_rows(name: str) -> None:
    q, source = problem(Ranges(*np.array([[[100]], [[128]], [[200]]])), slots=256, heads=130, kv_heads=1)
    assert_reference(name, q, source, config=KernelConfig(64 if name == "mma" else TILE, 64, 1 if name == "mma" else 2))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("value", [np.nan, pytest.param(np.inf, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
def test_what_is_not_finite_is_not_hidden(name: str, value: float) -> None:
    """A value that one query sees and the others do not. Without it an overflow in float16 would go unnoticed."""
    ranges = Ranges(np.array([[64, 100]]), np.zeros((1, 2), int), np.zeros((1, 2), int))
    q, source = problem(ranges, slots=128, heads=1, kv_heads=1, rows=1)
    source = source._replace(v=source.v.at[:, :, 80].set(value))
    out, _ = interpreted(
        name, q, source, config=KernelConfig(64 if name == "mma" else TILE, 64, 1 if name == "mma" else 2)
    )
    assert not np.isfinite(out[0, 1]).any()


@pytest.mark.parametrize("name", KERNELS)
def test_a_chunk_of_a_video(name: str) -> None:
    """Visual tokens of a video's last chunk, as prefill has them. Key blocks that they do not see are never loaded."""
    layout = VideoLayout(5, (3,) * 20, 16)
    tokens = natural_ranges(layout, 0, 128, PrefillConfig(2, 1))
    mine = tokens.ranges.select(tokens.slot >= 128 + 18 * 16)
    q, source = problem(mine.batched(), slots=448, heads=2, kv_heads=1)
    seen = mine.mask(np.arange(448)).any(0).reshape(-1, 64).any(1)
    assert seen.tolist() == [True, True, False, False, False, False, True]
    poison = jnp.asarray(np.where(np.repeat(seen, 64), 0.0, np.nan), jnp.bfloat16)[:, None]
    source = source._replace(k=source.k + poison, v=source.v + poison)
    assert_reference(name, q, source, config=KernelConfig(64 if name == "mma" else TILE, 64, 1 if name == "mma" else 2))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from([16, 64, 128]))
def test_tile_blocks(seed: int, block: int) -> None:
    """A tile visits all blocks that its rows see. Its unmasked blocks are seen whole by all rows that see anything."""
    rng = np.random.default_rng(seed)
    slots = 1024
    g_end, v_lo = rng.integers(0, slots // 2, (2, 2 * TILE))
    v_lo = np.maximum(v_lo + slots // 4, 0)
    v_hi = np.minimum(v_lo + rng.integers(-50, slots, 2 * TILE), slots)
    dead = rng.random(2 * TILE) < rng.choice([0, 0.5, 1.0])
    g_end, v_hi = np.where(dead, 0, g_end), np.where(dead, 0, v_hi)
    if rng.random() < 0.5:  # narrow tiles, so that unmasked blocks exist
        g_end = np.where(dead, 0, slots // 2 - rng.integers(0, 20, 2 * TILE))
    blocks = np.asarray(tile_blocks(Ranges(*(jnp.asarray(x, jnp.int32) for x in (g_end, v_lo, v_hi))), block, TILE))
    seen = Ranges(g_end, v_lo, v_hi).mask(np.arange(slots)).reshape(2, TILE, slots // block, block)
    for tile, (a_full, a, b, b_full, c_full, c) in enumerate(blocks):
        assert 0 <= a_full <= a <= b <= b_full <= c_full <= c <= slots // block
        visited = {*range(a), *range(b, c)}
        assert {*np.nonzero(seen[tile].any((0, 2)))[0]} <= visited
        alive = seen[tile].any((1, 2))
        whole = seen[tile][alive].all((0, 2))
        assert all(whole[i] for i in (*range(a_full), *range(b_full, c_full)))


def test_merging_keeps_what_is_not_a_number() -> None:
    out, lse = tiles._merge_parts(jnp.ones((2, 2, 64)), jnp.asarray([[0.0, NEGATIVE], [jnp.nan, NEGATIVE]]))
    assert np.isnan(out[0]).all()
    assert np.isnan(lse[0])
    assert lse[1] == NEGATIVE


def test_few_tiles_are_split() -> None:
    def splits(rows: int, *slots: int) -> tuple[tuple[int, ...], ...]:
        return wgmma.choose_config(rows, 4, slots).splits, mma.choose_config(rows, 4, slots).splits

    assert splits(126 * 128, 60_928) == ((1,), (1,))
    assert splits(7, 60_928) == ((33,), (66,))
    assert splits(7, 256) == ((1,), (1,))
    assert splits(7, 60_928, 512) == ((32, 1), (65, 1))
    odd = wgmma.choose_config(7, 4, (192,))
    assert odd == dataclasses.replace(wgmma.choose_config(7, 4, (256,)), block=64, stages=4)


def test_every_card_has_shared_memory_for_its_programs() -> None:
    """Kilobytes of a multiprocessor, from NVIDIA's programming guide; a program needs one of them for itself."""
    memory = {"8.0": 164, "8.6": 100, "8.9": 100, "9.0": 228, "12.0": 100}
    assert memory.keys() == mma.SIZES.keys() == set(attention.MMA_CARDS)
    width = max(tiles.HEAD_WIDTHS)

    def fit(config: KernelConfig, kilobytes: int) -> int:
        return int(kilobytes // (2 * (config.tile + 2 * config.block) * width / 1024 + 1))

    for capability, kilobytes in memory.items():
        for rows in (7, 1000):
            assert fit(mma.choose_config(rows, 4, (1 << 20,), capability), kilobytes) >= mma.PROGRAMS


LLM = PRESETS["video-xl-2"].llm
SHAPES = [(2304, 60_928, 128, 1), (128, 380_032, 128, 1), (1, 380_032, 128, 1), (1, 192, 128, 1), (256, 1024, 64, 2)]
"""Tokens, slots, head width and batch of prefill, time tokens, decoding, a text cache, and another head width."""

FAST_LOWERINGS = [("wgmma", "9.0", "int8"), ("mma", "8.0", "bfloat16"), ("mma", "12.0", "int8 kept")]


@pytest.mark.parametrize(
    ("name", "capability", "kind"),
    [
        pytest.param(*case, marks=() if case in FAST_LOWERINGS else pytest.mark.slow)
        for case in itertools.product(
            ["wgmma", "mma"], attention.MMA_CARDS, ["bfloat16", "float16", "int8", "int8 kept"]
        )
        if case[0] == "mma" or case[1] in attention.WGMMA_CARDS
    ],
)
def test_lowers_for_cuda_at_the_released_shapes(
    name: str, capability: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the default sizes for each card. float16 and 8 bits are lowered at one shape, with the text of decoding."""
    monkeypatch.setattr(mosaic_utils, "_infer_arch", lambda: tuple(map(int, capability.split("."))))
    shape = jax.ShapeDtypeStruct
    dtype = "float16" if kind == "float16" else "bfloat16"
    channels = shape((LLM.layers, LLM.kv_heads, 16), jnp.int32) if kind == "int8 kept" else None
    for tokens, slots, h, batch in SHAPES if kind == "bfloat16" else SHAPES[2:3]:
        q = shape((batch, tokens, LLM.heads, h), dtype)

        def source(slots: int, quantized: bool, h: int = h, batch: int = batch, tokens: int = tokens) -> Source:
            kv = shape((LLM.layers, LLM.kv_heads, slots, h), dtype)
            k, v = (jax.eval_shape(quantize, kv, channels), jax.eval_shape(quantize, kv)) if quantized else (kv, kv)
            return Source(k, v, shape((batch,), jnp.int32), Ranges(*[shape((batch, tokens), jnp.int32)] * 3))

        sources = [source(slots, "int8" in kind), *([] if kind == "bfloat16" else [source(512, False)])]
        run = jax.jit(functools.partial(arena_attention, attention=Attention(name, capability)))
        lowered = run.trace(q, *sources).lower(lowering_platforms=("cuda",))
        assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize("name", ["wgmma", "mma"])
@pytest.mark.parametrize("quantized", [False, True])
def test_answers_together_are_lowered_with_one_launch_a_layer(
    name: str, quantized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight answers at the released width: all contexts and all texts are read by one kernel."""
    monkeypatch.setattr(mosaic_utils, "_infer_arch", lambda: (9, 0))
    config = dataclasses.replace(PRESETS["video-xl-2"], llm=dataclasses.replace(LLM, layers=2))
    params = jax.eval_shape(lambda: nnx.state(abstract_model(config, jnp.bfloat16)))
    network = Network(config, params, Attention(name), "gpu")
    count, slots, text = 8, 6144, 512
    rows = functools.partial(compiled.empty_rows, config.llm, count, slots, "bfloat16", quantized=quantized)
    contexts = jax.eval_shape(rows)
    state, sampling = jax.eval_shape(lambda: compiled.empty_state(config.llm, count, text, "bfloat16", separate=False))
    limits, stop = (jax.ShapeDtypeStruct((n,), jnp.int32) for n in (count, 1))
    traced = compiled.decode.trace(network, None, contexts, state, limits, stop, sampling, size=8)
    lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("custom_call @mosaic_gpu") == 1  # the layers call one function
    assert lowered.count("call @_attend(") == config.llm.layers


@dataclasses.dataclass
class Card:
    """What `choose_attention` asks of a device."""

    compute_capability: str
    platform: str = "gpu"
    device_kind: str = "a card"
    core_count: int = 84


@pytest.mark.parametrize(
    ("capability", "h", "dtype", "name", "reason"),
    [
        ("9.0", 128, "bfloat16", "wgmma", ""),
        ("8.6", 128, "float16", "mma", ""),
        ("12.0", 64, "bfloat16", "mma", ""),
        ("10.0", 128, "bfloat16", "blockwise", "this card has 10.0"),
        ("7.5", 128, "float16", "blockwise", "this card has 7.5"),
        ("8.0", 128, "float32", "blockwise", "float32 queries"),
        ("9.0", 32, "bfloat16", "blockwise", "head width 32"),
    ],
)
def test_every_card_gets_its_kernel_and_the_log_says_why_not(
    capability: str, h: int, dtype: str, name: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    attention._log_choice.cache_clear()
    with caplog.at_level("INFO", "xl2jax"):
        chosen = attention.choose_attention("auto", Card(capability), h, jnp.dtype(dtype))  # type: ignore[arg-type]
    assert chosen == Attention(name, capability, 84)
    assert f"arena attention: {name} (auto on a card" in caplog.text
    assert reason in caplog.text


@pytest.mark.parametrize(
    ("name", "card", "message"),
    [
        ("wgmma", Card("8.0"), "needs compute capability 9.0, this card has 8.0"),
        ("mma", Card("10.0"), "needs compute capability 8.0 or 8.6 or 8.9 or 9.0 or 12.0, this card has 10.0"),
        ("mma", Card("", "cpu"), "needs an NVIDIA GPU, not cpu"),
    ],
)
def test_a_kernel_that_is_named_never_falls_back(name: str, card: Card, message: str) -> None:
    with pytest.raises(UserError, match=message):
        attention.choose_attention(name, card, 128, jnp.bfloat16)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("h", "dtype", "slots", "message"),
    [
        (32, jnp.bfloat16, 128, "head width 32 is not supported"),
        (64, jnp.float32, 128, "float32 queries"),
        (64, jnp.bfloat16, 100, "100 cache slots"),
    ],
)
def test_what_is_not_served_is_an_error_by_name(h: int, dtype: jax.typing.DTypeLike, slots: int, message: str) -> None:
    q, kv = jnp.zeros((1, 2, 2, h), dtype), jnp.zeros((1, 1, slots, h), dtype)
    ints = jnp.zeros((1, 2), jnp.int32)
    source = Source(kv, kv, jnp.zeros(1, jnp.int32), Ranges(ints, ints, ints))
    for name in KERNELS:
        with pytest.raises(UserError, match=message):
            arena_attention(q, source, attention=Attention(name))
