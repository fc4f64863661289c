"""Live videos: equal to a file while everything fits, in memory of a fixed size afterwards."""

from __future__ import annotations

import dataclasses
import itertools
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import xl2jax
from xl2jax.commands.flags import DEFAULT_CHECKPOINT
from xl2jax.errors import UserError
from xl2jax.evaluation.scenes import Scene, make_scene, scene_clip
from xl2jax.inference import compiled, live_programs, session
from xl2jax.inference.live import WAITING_FRAMES, LiveVideo
from xl2jax.inference.live_ledger import Ledger
from xl2jax.inference.live_sizes import LiveMemory
from xl2jax.inference.relevance import AttentionScorer
from xl2jax.inference.selection import RelevanceConfig, choose_context
from xl2jax.inference.video_cache import CacheConfig
from xl2jax.prompt import suffix
from xl2jax.system.backend import program_count

QUESTION = "What is shown?"
BILEVEL = xl2jax.BilevelConfig(2, 4, 2)
PREFILL = xl2jax.PrefillConfig(2, 1)
SCENE = make_scene(7, 17)


def frames(scene: Scene, first: int = 0) -> Iterator[tuple[float, np.ndarray]]:
    """The frames of a scene from group `first` on, one a second, as `scene_clip` has them."""
    for i in range(4 * first, scene.frames):
        yield float(i), scene.frame(i, 112, 112)


def small(**changed: Any) -> LiveMemory:
    """A memory of the fewest dense groups, and 40 groups in all."""
    return dataclasses.replace(LiveMemory(dense_minutes=0.1, minutes=40 * 4 / 60), **changed)


def context(model: xl2jax.Model, video: xl2jax.WatchedVideo | LiveVideo) -> Any:
    text = suffix(model.tokenizer, QUESTION)
    ids = session.suffix_ids(text.ids, text.first, text.last)
    with video.snapshot() as seen:
        return choose_context(model.network, seen, QUESTION, ids, BILEVEL, RelevanceConfig())


def filled(cache: Any) -> Any:
    count = int(cache.length)
    return [np.asarray(x, np.float32)[:, :, :count] for x in jax.tree.leaves((cache.k, cache.v))]


@pytest.fixture(scope="module")
def file(model: xl2jax.Model) -> xl2jax.WatchedVideo:
    return model.watch(scene_clip(SCENE), config=PREFILL, bilevel=BILEVEL)


@pytest.fixture(scope="module")
def roomy(model: xl2jax.Model) -> LiveVideo:
    """All of the scene fits. The groups come in steps whose borders are others than those of the file's."""
    live = model.watch_live(config=PREFILL, bilevel=BILEVEL, memory=small())
    for number, (seconds, frame) in enumerate(frames(SCENE), 1):
        live.add(seconds, frame)
        if number in (5, 22, 41):
            live.flush()
    live.end()
    return live


def test_as_long_as_it_fits_it_equals_the_file(
    model: xl2jax.Model, file: xl2jax.WatchedVideo, roomy: LiveVideo
) -> None:
    (expected, wanted), (got, chunks) = context(model, file), context(model, roomy)
    assert [(c.number, c.start, c.end, c.dense) for c in chunks] == [
        (c.number, c.start, c.end, c.dense) for c in wanted
    ]
    np.testing.assert_allclose([c.score for c in chunks], [c.score for c in wanted], rtol=1e-5)
    assert int(got.length) == int(expected.length)
    for a, b in zip(filled(got), filled(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    answers = [model.ask(v, QUESTION, max_new_tokens=4, bilevel=BILEVEL) for v in (file, roomy)]
    assert answers[0].text == answers[1].text
    assert answers[0].new_tokens == answers[1].new_tokens


# --- what leaves the device ----------------------------------------------------------------------

ALL = dataclasses.replace(BILEVEL, top_chunks=9)
"""Reads all of the first 18 groups densely."""


def mixed(model: xl2jax.Model, live: LiveVideo) -> Any:
    text = suffix(model.tokenizer, QUESTION)
    ids = session.suffix_ids(text.ids, text.first, text.last)
    with live.snapshot() as seen:
        return choose_context(model.network, seen, QUESTION, ids, ALL, RelevanceConfig())


def dense_bits(live: LiveVideo, groups: int) -> list[np.ndarray]:
    """The dense KV of the first groups on the device: [L, K, groups * V, ...] each."""
    cache, v = live._arena.cache, live._plan.visual_tokens
    start = live._plan.visual_start
    return [np.array(x[:, :, start : start + groups * v]) for x in jax.tree.leaves((cache.k, cache.v))]


def pooled_bits(live: LiveVideo, first: int, last: int) -> list[np.ndarray]:
    kept = live._plan.visual_tokens // BILEVEL.pool
    return [np.array(x[:, :, first * kept : last * kept]) for x in jax.tree.leaves(live._arena.pooled)]


def start(model: xl2jax.Model, memory: LiveMemory, groups: int, **settings: Any) -> tuple[LiveVideo, Any]:
    """A live video that has seen `groups` groups, and the frames that follow."""
    live = model.watch_live(config=PREFILL, bilevel=BILEVEL, memory=memory, **settings)
    source = frames(make_scene(7, 200))
    for _ in range(4 * groups):
        live.add(*next(source))
    live.flush()
    return live, source


def feed(live: LiveVideo, source: Any, groups: int) -> None:
    for _ in range(4 * groups):
        live.add(*next(source))
    live.flush()


@pytest.mark.parametrize("renumber", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_what_left_the_device_comes_back_with_its_bits(model: xl2jax.Model, renumber: bool, tmp_path: Path) -> None:
    """The store is the host's memory, or the disk's."""
    to_disk = {"host_gib": 0.0, "disk_gib": 0.1, "folder": tmp_path} if renumber else {}
    live, source = start(model, small(renumber=renumber, **to_disk), 18)
    assert live._arena.ledger.dense_limit == 18
    assert live._arena.ledger.evicted == 0
    v, bits, pooled = live._plan.visual_tokens, dense_bits(live, 18), pooled_bits(live, 0, 18)
    whole = filled(mixed(model, live)[0])
    feed(live, source, 1)
    evicted = live._arena.ledger.evicted
    assert evicted == 8
    for at in range(0, evicted, 2):
        block = live._blocks.get(at // 2)
        assert block is not None
        for x, before in zip(jax.tree.leaves(block), bits, strict=True):
            np.testing.assert_array_equal(x, before[:, :, at * v : (at + 2) * v])
    for x, before in zip(pooled_bits(live, 0, 18), pooled, strict=True):
        np.testing.assert_array_equal(x, before)
    assert (live.host_bytes > 0, live.disk_bytes > 0) == (not renumber, renumber)

    # The question reads the first 18 groups as if nothing had left, whatever their positions are now.
    context, chunks = mixed(model, live)
    assert all(c.dense for c in chunks[:9])
    for x, before in zip(filled(context), whole, strict=True):
        np.testing.assert_allclose(x[:, :, : before.shape[2]], before, atol=2e-5)
    if renumber:  # a damaged file is one pooled chunk, not a wrong one
        path = next(tmp_path.glob(".live*/block-00000001.kv"))
        path.write_bytes(path.read_bytes()[:-40] + bytes(40))
        _, chunks = mixed(model, live)
        assert [c.number for c in chunks if not c.dense] == [2]
    live.close()
    assert list(tmp_path.iterdir()) == []


def test_chunks_are_scored_by_their_dense_kv_wherever_it_is(
    model: xl2jax.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each group's score is that of the pass in which it was dense; what was dropped is scored pooled, in a pass of its own."""
    live, _ = start(model, small(), 38)
    live._arena._piece_groups = 18
    live._blocks._host_limit = live.host_bytes // 2
    live._blocks.settle()
    ledger, passes = live._arena.ledger, list[np.ndarray]()
    mix = compiled.mix

    def counting(config: Any, cache: Any, pooled: Any, table: Any, dense: Any, **sizes: Any) -> Any:
        passes.append(np.asarray(dense))
        return mix(config, cache, pooled, table, dense, **sizes)

    def scored(*_: Any, groups: int, **__: Any) -> Any:
        return jnp.full(groups, float(len(passes)))

    monkeypatch.setattr(compiled, "mix", counting)
    monkeypatch.setattr(compiled, "attention_scores", scored)
    text = suffix(model.tokenizer, QUESTION)
    ids = session.suffix_ids(text.ids, text.first, text.last)

    def scores(keys: Any) -> np.ndarray:
        passes.clear()
        with live.snapshot() as seen:
            pooled = session.pooled_kv(model.network, seen.kv, BILEVEL.pool)
            found = session.score_groups(model.network, seen.kv, ids, BILEVEL, AttentionScorer(keys=keys), pooled)
            return np.asarray(found)[: ledger.groups]

    with live.snapshot() as seen:
        everything = np.arange(seen.kv.group_capacity) < ledger.groups
        held = np.asarray(seen.kv.readable(everything))[: ledger.groups]
    assert 0 < held[: ledger.evicted].sum() < ledger.evicted
    found = scores("auto")
    in_pass = [dense[: ledger.groups] for dense in passes]
    assert [dense.sum() > 0 for dense in in_pass] == [True] * (len(passes) - 1) + [False]
    assert all(dense.sum() <= 18 for dense in in_pass)
    expected = np.full(ledger.groups, len(passes))
    for number, dense in enumerate(in_pass[:-1], 1):
        assert (expected[dense] == len(passes)).all()
        expected[dense] = number
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(found < len(passes), held)
    assert (scores("pooled") == 1).all()
    live.close()


def test_pieces_are_scored_one_after_the_other(model: xl2jax.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory holds the cache of one: it is gathered when the scores of the one before are there."""
    live, _ = start(model, small(), 38)
    live._arena._piece_groups = 2
    gather, score, passes = live_programs.gather_groups, compiled.attention_scores, list[jax.Array]()

    def gathering(*args: Any, **options: Any) -> Any:
        assert all(scores.is_ready() for scores in passes)
        return gather(*args, **options)

    def scoring(*args: Any, **options: Any) -> jax.Array:
        passes.append(score(*args, **options))
        return passes[-1]

    monkeypatch.setattr(live_programs, "gather_groups", gathering)
    monkeypatch.setattr(compiled, "attention_scores", scoring)
    context(model, live)
    assert len(passes) > 10
    live.close()


@pytest.mark.slow
def test_needles_that_have_left_the_device_are_found() -> None:
    """The bundled model finds and reads shapes in parts whose dense KV the host holds. By pooled KV it misses most."""
    model = xl2jax.load(DEFAULT_CHECKPOINT)
    scene = make_scene(77, 300, events=6)
    with model.watch_live(memory=LiveMemory(dense_minutes=1, minutes=20)) as live:
        for seconds, frame in frames(scene):
            live.add(seconds, frame)
        live.end()
        ledger, size = live._arena.ledger, 4
        old = [e for e in scene.events if size <= e.start < ledger.evicted - size]
        assert len(old) >= 4
        for event in old:
            answer = model.ask(live, f"When did the {event.name} appear?", max_new_tokens=16)
            assert answer.chunks[event.start // size].dense
            assert answer.text == f"At {4.0 * event.start} seconds."


@settings(deadline=None, max_examples=200)
@given(
    st.tuples(*(st.integers(low, high) for low, high in ((1, 60), (1, 200), (1, 8), (0, 20), (1, 16)))),
    st.lists(st.integers(1, 16), max_size=80),
)
def test_the_ledger_agrees_with_a_list_of_groups(limits: tuple[int, ...], news: list[int]) -> None:
    dense, remembered, unit, keep, most_new = limits
    ledger = Ledger.of_limits(dense, remembered, unit, keep, most_new)
    pooled: list[int] = []
    on_device: list[int] = []
    number = 0
    for new in (min(n, most_new) for n in news):
        move = ledger.make_room(new)
        assert move.evicted % unit == 0 == move.forgotten % unit
        pooled += on_device[: move.evicted]
        del on_device[: move.evicted], pooled[: move.forgotten]
        assert len(on_device) >= min(keep, number)
        ledger.add(new)
        on_device += range(number, number + new)
        number += new
        assert [*pooled, *on_device] == list(range(ledger.forgotten, number))
        assert (ledger.evicted, ledger.dense) == (len(pooled), len(on_device))
        assert len(on_device) <= ledger.dense_limit
        assert len(pooled) + len(on_device) <= ledger.group_limit


@pytest.mark.slow
def test_nothing_grows_or_compiles_once_the_budget_is_full(model: xl2jax.Model) -> None:
    live, source = start(model, small(host_gib=1e-3), 1)
    programs, held = program_count(), live.device_bytes
    compiled = list[int]()
    for _ in range(16):
        feed(live, source, 10)
        answer = model.ask(live, QUESTION, max_new_tokens=4, bilevel=BILEVEL)
        compiled.append(programs.requested)
        ledger = live._arena.ledger
        assert live.device_bytes == held
        assert len(live._times) == 4 * ledger.groups
        assert live.host_bytes <= 1e-3 * 2**30
        assert answer.chunks[0].number == ledger.forgotten // 2 + 1
        assert answer.chunks[0].start == 4.0 * ledger.forgotten
        assert answer.chunks[-1].end == live.seconds
    assert live._arena.ledger.forgotten >= 100
    assert compiled[5] == compiled[-1]
    live.close()


def test_what_a_live_video_cannot_do_is_one_line(model: xl2jax.Model, roomy: LiveVideo, tmp_path: Path) -> None:
    def refused(message: str, **settings: Any) -> None:
        with pytest.raises(UserError, match=message):
            model.ask(roomy, QUESTION, **settings)

    # A video that is still watched may have fewer chunks than are asked for.
    more = dataclasses.replace(BILEVEL, top_chunks=100)
    assert all(c.dense for c in model.ask(roomy, QUESTION, max_new_tokens=1, bilevel=more).chunks)
    refused("bi-level decoding only", bilevel=None)
    refused("kept for pool 4 and chunks of 2 groups, not for pool 8 and", bilevel=xl2jax.BilevelConfig(2, 8))
    with pytest.raises(UserError, match=r"minutes dense .* GiB are free: keep fewer minutes"):
        model.watch_live(memory=LiveMemory(dense_minutes=1.6e5, minutes=1.6e5))
    with pytest.raises(UserError, match="leave offload out"):
        model.watch_live(cache=CacheConfig(offload=True))
    with pytest.raises(UserError, match=r"minutes \(1\) must not be below dense minutes \(10\)"):
        LiveMemory(minutes=1)
    with pytest.raises(UserError, match="a disk budget and a folder for it go together"):
        LiveMemory(disk_gib=1)
    live = model.watch_live(config=PREFILL, bilevel=BILEVEL, memory=small())
    with pytest.raises(UserError, match="nothing was seen yet"):
        model.ask(live, QUESTION, bilevel=BILEVEL)
    with pytest.raises(UserError, match="not a uint8 array"):
        live.add(0.0, np.zeros((4, 4)))
    live.close()


def test_a_damaged_frame_does_not_cost_its_interval(model: xl2jax.Model) -> None:
    with model.watch_live(config=PREFILL, bilevel=BILEVEL, memory=small()) as live:
        picture = np.zeros((8, 8, 3), np.uint8)
        kept = [
            live.add(t, f) for t, f in ((0, picture), (1, lambda: None), (1.4, picture), (1.6, picture), (2, picture))
        ]
        assert kept == [True, False, True, False, True]


def test_a_pause_ends_a_group(model: xl2jax.Model) -> None:
    """Frames before and after a pause are in groups of their own; the last frame before it is repeated."""
    with model.watch_live(config=PREFILL, bilevel=BILEVEL, memory=small()) as live:
        for seconds in (0.0, 1.0, 100.0, 101.0, 102.0, 103.0, 104.0):
            live.add(seconds, np.zeros((8, 8, 3), np.uint8))
        live.end()
        with live.snapshot() as seen:
            assert seen.times == [0, 1, 1, 1, 100, 101, 102, 103]


def test_kv_that_is_not_finite_is_never_forgotten(model: xl2jax.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first groups are damaged where they are pooled, and leave the device before a question is asked."""
    pool_new, damaged = live_programs.pool_new, list[int]()

    def damage(config: Any, cache: Any, *args: Any, **settings: Any) -> Any:
        if not damaged:
            damaged.append(1)
            cache = cache._replace(v=cache.v * np.nan)
        return pool_new(config, cache, *args, **settings)

    monkeypatch.setattr(live_programs, "pool_new", damage)
    live, _ = start(model, small(), 48)
    assert live._arena.ledger.forgotten
    with pytest.raises(UserError, match="the video's KV holds NaN"):
        model.ask(live, QUESTION, bilevel=BILEVEL)
    live.close()


def test_whole_groups_are_seen_without_a_whole_step(model: xl2jax.Model) -> None:
    """A step has room for 4 groups; two are there."""
    with model.watch_live(config=PREFILL, bilevel=BILEVEL, memory=small()) as live:
        source = frames(SCENE)
        for _ in range(4):
            live.add(*next(source))
        assert live._arena.ledger.groups == 1  # nothing else was to do
        assert live.wait(3, timeout=0)
        jax.block_until_ready(live._previous)
        for _ in range(4):
            live.add(*next(source))
        assert live._arena.ledger.groups == 2
        assert live.wait(7, timeout=0)
        assert (live.seconds, live.frames) == (7.0, 8)
        assert not live.wait(8, timeout=0)
        with live.snapshot() as seen:
            assert seen.times[-1] == live.seconds


def test_close_does_not_wait_for_a_silent_source(model: xl2jax.Model, tmp_path: Path) -> None:
    """Of a pipe into which nobody writes, and of frames that do not come."""
    pipe, silence = tmp_path / "pipe", threading.Event()
    os.mkfifo(pipe)

    def silent() -> Iterator[tuple[float, np.ndarray]]:
        yield from itertools.islice(frames(SCENE), 4)
        silence.wait()

    with open(pipe, "r+b", buffering=0):  # opening it for reading does not block then; reading does
        for source in (pipe, silent()):
            live = model.watch_live(source, config=PREFILL, bilevel=BILEVEL, memory=small())
            live.start()
            assert live.wait(3.0, timeout=0.5 if source is pipe else 60) == (source is not pipe)
            closing = threading.Thread(target=live.close, daemon=True)
            closing.start()
            closing.join(10)
            assert not closing.is_alive()
            assert live.error is None
        silence.set()


def test_a_source_of_frames_waits_for_the_model(model: xl2jax.Model) -> None:
    """More frames than may wait: none is lost. An error of the source is raised behind what it gave."""

    def source() -> Iterator[tuple[float, np.ndarray]]:
        for i in range(WAITING_FRAMES + 12):
            yield float(i), np.zeros((8, 8, 3), np.uint8)
        raise OSError("unplugged")

    with model.watch_live(source(), config=PREFILL, bilevel=BILEVEL, memory=small()) as live:
        with pytest.raises(OSError, match="unplugged"):
            live.run()
        assert (live.frames, live.dropped) == (WAITING_FRAMES + 12, 0)


def test_a_source_that_is_read_for_steps_waits_for_them(model: xl2jax.Model) -> None:
    """Its reader waits for room, gets it from `step`, and ends with the video."""
    frames = [(float(i), np.zeros((8, 8, 3), np.uint8)) for i in range(2 * WAITING_FRAMES)]
    for seen in (len(frames), 16):
        with model.watch_live(iter(frames), config=PREFILL, bilevel=BILEVEL, memory=small()) as live:
            reader = threading.Thread(target=live.read, daemon=True)
            reader.start()
            end = time.monotonic() + 30
            while live.frames < seen and time.monotonic() < end:
                live.step()
            assert live.frames >= seen
            assert live.dropped == 0
        reader.join(10)
        assert not reader.is_alive()


@pytest.mark.parametrize("cache", [xl2jax.CacheConfig(), xl2jax.CacheConfig("int8")])
@pytest.mark.parametrize("pooled", [None, "int8"])
def test_sizes_count_the_arrays(model: xl2jax.Model, cache: xl2jax.CacheConfig, pooled: Any) -> None:
    """They are what the arrays take, so that a server reserves as much as there will be."""
    settings: Any = {"config": PREFILL, "bilevel": BILEVEL, "cache": cache}
    settings["memory"] = dataclasses.replace(small(), pooled_dtype=pooled)
    with model.watch_live(**settings) as live:
        assert model.live_sizes(**settings).kept == live.device_bytes


def test_a_step_that_fails_ends_the_video(model: xl2jax.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was prefilled in part is never asked about."""
    live, source = start(model, small(), 4)

    def broken(*_: Any) -> int:
        raise RuntimeError("out of order")

    monkeypatch.setattr(live._arena, "add", broken)
    with pytest.raises(RuntimeError, match="out of order"):
        feed(live, source, 4)
    for use in (lambda: live.add(*next(source)), lambda: model.ask(live, QUESTION, bilevel=BILEVEL)):
        with pytest.raises(UserError, match=r"watching failed \(out of order\)"):
            use()
    live.close()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, "int8"])
def test_forgetting_changes_no_bit_of_what_stays(model: xl2jax.Model, dtype: Any) -> None:
    live, source = start(model, small(pooled_dtype=dtype), 38, cache=CacheConfig(dtype))
    ledger, unit = live._arena.ledger, live._arena.ledger.unit
    assert ledger.forgotten == 0
    assert ledger.evicted >= 20
    pooled = pooled_bits(live, 20, 38)
    blocks = {n: live._blocks.get(n) for n in range(ledger.evicted // unit)}
    feed(live, source, 4)
    gone = ledger.forgotten
    assert 0 < gone <= 20
    for x, before in zip(pooled_bits(live, 20 - gone, 38 - gone), pooled, strict=True):
        np.testing.assert_array_equal(x, before)
    with live.snapshot() as seen:
        assert (seen.times[0], len(seen.times)) == (4.0 * gone, 4 * (42 - gone))
        kv = seen.kv
        wanted = np.zeros(kv.group_capacity, bool)
        wanted[: ledger.evicted] = True  # the oldest groups that are remembered, none of them on the device
        assert np.asarray(kv.readable(wanted)).sum() == ledger.evicted
        read = kv.with_dense(wanted, ledger.evicted)
    v, at = live._plan.visual_tokens, live._plan.visual_start
    for group in range(0, 20 - gone, unit):
        old = blocks[(group + gone) // unit]
        for x, before in zip(jax.tree.leaves((read.k, read.v)), jax.tree.leaves(old), strict=True):
            got = np.asarray(x)[:, :, at + group * v : at + (group + unit) * v]
            np.testing.assert_array_equal(got, before)
    live.close()
