from __future__ import annotations

import dataclasses
import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xl2jax
from xl2jax import FrameSampling, PrefillConfig, TokenSampling
from xl2jax.arithmetic import ceil_div
from xl2jax.errors import UserError
from xl2jax.inference import bilevel, compiled, decoding, generate, memory, relevance, session
from xl2jax.inference.answering import Answering, decode
from xl2jax.inference.decoding import answer_tokens
from xl2jax.inference.generate import best, extend, sample
from xl2jax.models.param_tree import flatten, unflatten
from xl2jax.ops.attention import BLOCKWISE
from xl2jax.prompt import PromptTokenizer

QUESTION = "What is shown?"


def test_greedy_takes_the_largest() -> None:
    tiny = TokenSampling(1e-38, 0.5)
    logits = jnp.array([[0.0, 3.0, 1.0], [0.0, 3.0, 2.999]])
    assert drawn(logits, [TokenSampling(), tiny]) == [1, 1]


def drawn(logits: jax.Array, configs: list[TokenSampling], seed: int = 0) -> list[int]:
    """A token from each row of logits."""
    settings = generate.Sampling(*(np.stack(x) for x in zip(*(c.traced() for c in configs), strict=True)))
    keys = jax.random.split(jax.random.key(seed), len(configs))
    return sample(logits, best(logits)[0], keys, settings).tolist()  # type: ignore[no-any-return]


def test_sampling_follows_temperature_and_top_p() -> None:
    p = np.array([0.5, 0.3, 0.15, 0.05])
    logits = jnp.log(jnp.asarray(p, jnp.float32))
    count = 4000

    def frequencies(config: TokenSampling) -> np.ndarray:
        tokens = drawn(jnp.broadcast_to(logits, (count, 4)), [config] * count)
        return np.bincount(tokens, minlength=4) / count

    assert np.allclose(frequencies(TokenSampling(1.0)), p, atol=0.03)
    assert np.allclose(frequencies(TokenSampling(1.0, 0.7)), [0.625, 0.375, 0, 0], atol=0.03)
    assert np.allclose(frequencies(TokenSampling(1.0, 0.01)), [1, 0, 0, 0])
    assert np.allclose(frequencies(TokenSampling(1.0, 1e-46)), [1, 0, 0, 0])
    cold = p**2 / (p**2).sum()
    assert np.allclose(frequencies(TokenSampling(0.5)), cold, atol=0.03)


def test_answer_streams_what_it_returns(model: xl2jax.Model, watched: xl2jax.WatchedVideo) -> None:
    pieces: list[str] = []
    answer = model.ask(watched, "What happens?", max_new_tokens=20, on_text=pieces.append)
    assert "".join(pieces) == answer.text
    assert 1 <= answer.new_tokens <= 20
    assert answer.text == model.ask(watched, "What happens?", max_new_tokens=20).text


@pytest.mark.slow
def test_answers_decoded_together_are_those_decoded_alone(
    model: xl2jax.Model, watched: xl2jax.WatchedVideo, clip: Path
) -> None:
    """Of videos of two lengths, with several limits and samplings. Answers join and leave while others run."""
    with model.watch(clip, FrameSampling(fps=None, max_frames=60)) as short:
        check_together(model, [watched, short, short, watched, watched])


@pytest.mark.slow
def test_many_kinds_of_answers_are_decoded_together(
    model: xl2jax.Model, watched: xl2jax.WatchedVideo, clip: Path
) -> None:
    """Of videos of several lengths, and of KV in 8 bits, which has rows of its own."""
    with (
        model.watch(clip, FrameSampling(fps=None, max_frames=60)) as short,
        model.watch(clip, FrameSampling(fps=None, max_frames=132)) as other,
        model.watch(clip, cache=xl2jax.CacheConfig("int8")) as quantized,
    ):
        check_together(model, [watched, short, other, watched, quantized, quantized, short, other, short, watched])


def check_together(model: xl2jax.Model, videos: list[xl2jax.WatchedVideo]) -> None:
    """Two further answers begin in each round. All texts are those of the same questions asked alone."""
    options: list[dict[str, Any]] = [
        {"max_new_tokens": 1 + 9 * n, "seed": n, "sampling": TokenSampling(0.8, 0.9) if n % 2 else None}
        for n in range(len(videos))
    ]
    cases = list(enumerate(zip(videos, options, strict=True)))
    alone = [model.ask(video, f"What is {n}?", **o) for n, (video, o) in cases]
    texts, waiting, running = [""] * len(cases), cases[::-1], dict[int, Answering]()
    answers, most = {}, 0
    while waiting or running:
        for n, (video, o) in waiting[:2]:
            running[n] = model.start_answer(video, f"What is {n}?", **o)
        del waiting[:2]
        decode(list(running.values()))
        most = max(most, *(answering._decoding.rows.count for answering in running.values()))  # type: ignore[union-attr]
        for n, answering in list(running.items()):
            texts[n] += answering.read()
            if answering.finished:
                answers[n] = running.pop(n)
    assert most > 1  # they did share rows
    for n, answer in enumerate(alone):
        assert answers[n].answer.text == texts[n] == answer.text
        assert (answers[n].new_tokens, answers[n].answer.finish_reason) == (answer.new_tokens, answer.finish_reason)


def test_many_questions_at_once(model: xl2jax.Model, watched: xl2jax.WatchedVideo, clip: Path) -> None:
    """More questions than run at a time get their own answers, in order."""
    with model.watch(clip, FrameSampling(fps=None, max_frames=132)) as other:
        cases = [(video, f"What is {n}?") for n, video in enumerate([watched, other, watched])]
        answers = model.ask_many(iter(cases), together=2, max_new_tokens=12)
        assert [a.text for a in answers] == [model.ask(*case, max_new_tokens=12).text for case in cases]
        assert [a.question for a in answers] == [question for _, question in cases]
    with pytest.raises(UserError, match="together"):
        model.ask_many([], together=0)


@pytest.mark.slow
def test_answers_share_rows_and_leave_nothing_in_them(model: xl2jax.Model, watched: xl2jax.WatchedVideo) -> None:
    """Three long answers share rows. One leaves NaN behind its place, and another one is closed late: neither changes
    the answers that come to their rows."""
    long = "What is " + "shown " * 50 + "?"
    expected = model.ask(watched, QUESTION, max_new_tokens=12).text
    first = [model.start_answer(watched, long, max_new_tokens=24, seed=n) for n in range(3)]
    for a in first:
        a.read()  # the first token, before which nothing is decoded together
    decode(first)
    rows = first[0]._decoding.rows  # type: ignore[union-attr]
    assert {a._decoding.rows for a in first} == {rows}  # type: ignore[union-attr]
    assert rows.count == 4
    rows._state = jax.tree.map(
        lambda x: jnp.full_like(x, jnp.nan) if x.ndim == 4 else x, rows._state
    )  # of all three, which end here
    ended = [a._decoding for a in first]
    for a in first[1:]:
        a.close()
    texts = []
    for _ in range(2):
        late = model.start_answer(watched, QUESTION, max_new_tokens=12)
        late.read()
        rows.admit(late._decoding)  # type: ignore[arg-type]
        ended[1].close()  # type: ignore[union-attr]  # its row has another answer by now
        texts.append(late)
    assert len({a._decoding.row for a in texts}) == 2  # type: ignore[union-attr]
    while running := [a for a in texts if not a.finished]:
        rows.decode([a._decoding for a in running], 8)  # type: ignore[misc]
        for a in running:
            a.read()
    assert [a.answer.text for a in texts] == [expected, expected]


def test_an_answer_goes_on_alone_and_is_joined_again(model: xl2jax.Model, watched: xl2jax.WatchedVideo) -> None:
    """It moves from its context in place to rows of two, of one, and of two again."""
    expected = model.ask(watched, QUESTION, max_new_tokens=40).text
    long, other = (model.start_answer(watched, QUESTION, max_new_tokens=n) for n in (40, 4))
    counts, joined = [], False
    running = [long, other]
    while running:
        decode(running)
        counts.append(running[0]._decoding.rows.count)  # type: ignore[union-attr]
        for a in running:
            a.read()
        running = [a for a in running if not a.finished]
        if counts[-2:] == [1, 1] and not joined:
            joined = True
            running.append(model.start_answer(watched, QUESTION, max_new_tokens=4))
            running[-1].read()
    assert [n for n, before in zip(counts, [0, *counts], strict=False) if n != before] == [1, 2, 1, 2, 1]
    assert long.answer.text == expected


def test_answers_stay_in_their_rows_where_memory_is_short(
    model: xl2jax.Model, watched: xl2jax.WatchedVideo, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = model.ask(watched, QUESTION, max_new_tokens=20).text
    answers = [model.start_answer(watched, QUESTION, max_new_tokens=20) for _ in range(3)]
    for a in answers:
        a.read()
    decode(answers)
    rows = answers[0]._decoding.rows  # type: ignore[union-attr]
    assert {a._decoding.rows for a in answers} == {rows}  # type: ignore[union-attr]
    answers[1].close()
    answers[2].close()
    monkeypatch.setattr(decoding.memory, "available_bytes", lambda *_: 0)
    while not answers[0].finished:
        decode(answers[:1])
        assert answers[0]._decoding.rows is rows  # type: ignore[union-attr]
        answers[0].read()
    assert answers[0].answer.text == expected


def test_answers_that_do_not_fit_together_are_decoded_in_parts(
    model: xl2jax.Model, watched: xl2jax.WatchedVideo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No memory for rows: each answer reads its context where it is."""
    expected = [model.ask(watched, f"What is {n}?", max_new_tokens=12).text for n in range(2)]
    answers = [model.start_answer(watched, f"What is {n}?", max_new_tokens=12) for n in range(2)]
    monkeypatch.setattr(decoding.memory, "available_bytes", lambda *_: 0)
    texts = ["", ""]
    while running := [a for a in answers if not a.finished]:
        decode(running)
        for a in running:
            assert a._decoding is not None
            assert a._decoding.rows.count == 1
            texts[answers.index(a)] += a.read()
    assert texts == expected


@pytest.mark.slow
def test_decoding_equals_one_run_over_all_tokens(model: xl2jax.Model, watched: xl2jax.WatchedVideo) -> None:
    """Decoding token by token equals one run with the answer as a part of the suffix."""
    text = xl2jax.prompt.suffix(model.tokenizer, "Which shape is red?")  # type: ignore[attr-defined]
    limit = 12
    stop, greedy = np.array([-1], np.int32), TokenSampling()
    suffix = session.suffix_ids(text.ids, text.first, text.last)
    network, context = model.network, watched.kv.cache
    state, _ = session.start_answer(network, context, suffix, new_tokens=limit, stop=stop, sampling=greedy)
    *_, answer = answer_tokens(network, context, state, new_tokens=limit, stop=stop, sampling=greedy)
    assert len(answer) == limit
    llm = network.model.llm
    ids = np.array(text.ids + answer[:-1])
    cache = compiled.new_cache(model.config.llm, 128, "float32")
    _, hidden = extend(llm, context, cache, ids, jnp.int32(len(ids)), attention=BLOCKWISE)
    assert np.argmax(llm.logits(hidden[len(text.ids) - 1 :]), -1).tolist() == answer


def test_stops_at_the_end_token(model: xl2jax.Model, watched: xl2jax.WatchedVideo) -> None:
    ids = model.tokenizer.encode("\nWhy?")
    suffix, greedy = session.suffix_ids(ids, 0, len(ids)), TokenSampling()
    network, context = model.network, watched.kv.cache

    def answer(stop: np.ndarray) -> list[int]:
        state, _ = session.start_answer(network, context, suffix, new_tokens=10, stop=stop, sampling=greedy)
        *_, answered = answer_tokens(network, context, state, new_tokens=10, stop=stop, sampling=greedy)
        return answered

    free = answer(np.array([-1], np.int32))
    assert len(free) == 10
    stop = free[4]
    stopped = answer(np.array([stop], np.int32))
    assert stopped == free[: free.index(stop) + 1]


def test_questions_leave_the_video_alone(model: xl2jax.Model, watched: xl2jax.WatchedVideo) -> None:
    before = np.asarray(watched.kv.cache.k).copy()
    a = model.ask(watched, "What happens?", max_new_tokens=6).text
    model.ask(watched, "Something else entirely?", max_new_tokens=6, bilevel=None)
    assert np.array_equal(before, watched.kv.cache.k)
    assert model.ask(watched, "What happens?", max_new_tokens=6).text == a


def count_traces(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """From now on it is an error if a compiled program of a question is traced more than `limit` times."""
    for module, name in (
        (relevance, "attention_scores"),
        (bilevel, "mix"),
        (bilevel, "choose_blocks"),
        (generate, "first_token"),
        (generate, "decode"),
    ):
        monkeypatch.setattr(module, name, chex.assert_max_traces(getattr(module, name), n=limit))


@pytest.mark.slow
def test_other_questions_compile_nothing(
    model: xl2jax.Model, watched: xl2jax.WatchedVideo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Questions may differ in their words, temperature, top-p, seed and length of the answer, once a long one was asked."""
    rng = np.random.default_rng(0)
    for words in ("What happens?", "and what now? " * 4):
        model.ask(watched, words, max_new_tokens=300, sampling=TokenSampling(1.0))
    count_traces(monkeypatch, 0)
    for number in range(20):
        sampling = TokenSampling(float(rng.uniform(0, 2)), float(rng.uniform(0.1, 1)))
        words = "and what now? " * (1 + number % 4)
        model.ask(watched, words, max_new_tokens=int(rng.integers(1, 300)), sampling=sampling, seed=number)


@pytest.mark.slow
def test_a_longer_history_compiles_little(
    model: xl2jax.Model, watched: xl2jax.WatchedVideo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conversation of 20 turns needs few sizes of text. Each program is traced once for each further size."""
    model.ask(watched, "What happens?", max_new_tokens=6)
    count_traces(monkeypatch, 4)
    turn = ("And what happens next?", "Nothing that was not there before.")
    for turns in (0, 1, 3, 7, 11, 20):
        answer = model.ask(watched, "And what happens next?", max_new_tokens=6, history=[turn] * turns)
    assert answer.suffix_tokens > 512


def test_another_size_is_noticed(
    model: xl2jax.Model, watched: xl2jax.WatchedVideo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counter works: a new pool size needs another program."""
    count_traces(monkeypatch, 0)
    with pytest.raises(AssertionError, match="traced"):
        model.ask(watched, "What happens?", max_new_tokens=6, bilevel=xl2jax.BilevelConfig(3, 3))


def test_why_an_answer_ended(
    model: xl2jax.Model, watched: xl2jax.WatchedVideo, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = model.ask(watched, "What happens?", max_new_tokens=3)
    assert (cut.finish_reason, cut.new_tokens) == ("length", 3)
    params = flatten(model.params)
    params["llm.lm_head.kernel"] = jnp.zeros_like(
        params["llm.lm_head.kernel"]
    )  # all logits are equal, so token 0 is chosen
    monkeypatch.setattr(PromptTokenizer, "stop_ids", property(lambda _: [0]))
    ending = xl2jax.Model(model.config, unflatten(params, model.config), model.tokenizer)
    answer = ending.ask(ending.adopt(watched), "What happens?", max_new_tokens=3)
    assert (answer.finish_reason, answer.new_tokens, answer.text) == ("stop", 1, "")


@pytest.mark.parametrize("where", ["llm.layers.down.kernel", "vision.layers.fc1.kernel", "llm.lm_head.kernel"])
def test_numbers_that_are_not_finite_are_an_error(where: str, model: xl2jax.Model, clip: Path) -> None:
    params = flatten(model.params)
    params[where] = params[where].at[..., 0].set(jnp.nan)
    broken = xl2jax.Model(model.config, unflatten(params, model.config), model.tokenizer)
    with pytest.raises(UserError, match="NaN or infinity, computed in float32"):
        broken.ask(broken.watch(clip, FrameSampling(max_frames=16)), "What happens?", max_new_tokens=4)


@pytest.mark.slow
def test_float16_answers_and_says_when_it_overflows(checkpoint: Path, clip: Path) -> None:
    half = xl2jax.load(checkpoint, dtype="float16")
    video = half.watch(clip, FrameSampling(max_frames=16))
    assert {str(x.dtype) for x in (video.kv.cache.k, video.kv.cache.v)} == {"float16"}
    assert half.ask(video, "What happens?", max_new_tokens=4).new_tokens >= 1
    params = flatten(half.params)
    params["llm.layers.down.kernel"] = params["llm.layers.down.kernel"] * 30_000
    large = xl2jax.Model(half.config, unflatten(params, half.config), half.tokenizer)
    with pytest.raises(UserError, match=r"computed in float16: use bfloat16 or float32 \(--dtype\)"):
        large.watch(clip, FrameSampling(max_frames=16))


@pytest.mark.slow
def test_steps_of_eight_rows_and_unrolled_layers_say_the_same(
    model: xl2jax.Model, watched: xl2jax.WatchedVideo
) -> None:
    """Decoding as on a GPU. The answer fills its text cache to the last slot."""
    suffix, network = session.suffix_ids([5, 6, 7], 0, 3), model.network
    stop, greedy, new_tokens = np.array([-1], np.int32), TokenSampling(), 512 - 3
    answers = []
    for platform in ("cpu", "gpu"):
        net = dataclasses.replace(network, platform=platform)
        state, _ = session.start_answer(
            net, watched.kv.cache, suffix, new_tokens=new_tokens, stop=stop, sampling=greedy
        )
        *_, ids = answer_tokens(net, watched.kv.cache, state, new_tokens=new_tokens, stop=stop, sampling=greedy)
        answers.append(ids)
    assert len(answers[0]) == new_tokens
    assert answers[0] == answers[1]


def test_a_video_belongs_to_its_model(model: xl2jax.Model, watched: xl2jax.WatchedVideo) -> None:
    other = xl2jax.Model(model.config, model.params, model.tokenizer)
    with pytest.raises(UserError, match="watched by another model"):
        other.ask(watched, "What happens?")


def test_closing_gives_memory_back(model: xl2jax.Model, clip: Path) -> None:
    with model.watch(clip, FrameSampling(max_frames=16)) as video:
        model.ask(video, "What?", max_new_tokens=1)
        held = [weakref.ref(x) for x in jax.tree.leaves((video.kv.cache, video.kv.pooled))]
        assert video.device_bytes > 0
    gc.collect()
    assert all(x() is None for x in held)
    assert video.device_bytes == 0
    with pytest.raises(UserError, match="was closed"):
        model.ask(video, "What?")
    video.close()  # a second time has no effect


def test_an_answer_cannot_close_its_video(model: xl2jax.Model, clip: Path) -> None:
    with model.watch(clip, FrameSampling(max_frames=16)) as video:
        with pytest.raises(UserError, match="cannot be closed while this thread generates an answer"):
            model.ask(video, "What?", max_new_tokens=8, on_text=lambda _: video.close())
        model.ask(video, "What?", max_new_tokens=1)  # it is still open


def test_closing_waits_for_answers_that_are_being_given(model: xl2jax.Model, clip: Path) -> None:
    video = model.watch(clip, FrameSampling(max_frames=16))
    alone = model.ask(video, "What?", max_new_tokens=8).text
    closer = threading.Thread(target=video.close)
    pieces: list[str] = []

    def on_text(piece: str) -> None:
        if not pieces:
            closer.start()  # in the middle of the answer
        pieces.append(piece)

    assert model.ask(video, "What?", max_new_tokens=8, on_text=on_text).text == alone
    closer.join(timeout=60)
    assert video.closed


def test_one_pool_size_is_kept(model: xl2jax.Model, watched: xl2jax.WatchedVideo) -> None:
    for pool in (1, 2, 4):
        model.ask(watched, "What?", max_new_tokens=1, bilevel=xl2jax.BilevelConfig(pool=pool))
        assert list(watched.kv.pooled) == [pool]


def test_a_refused_video_names_those_that_could_be_closed(
    model: xl2jax.Model, watched: xl2jax.WatchedVideo, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert watched.device_bytes > 0
    monkeypatch.setattr(memory, "available_bytes", lambda *_: 0)
    with pytest.raises(UserError, match=r"other watched videos hold .* GiB: close\(\) them"):
        model.watch(clip)


def test_an_answer_too_long_for_memory(
    model: xl2jax.Model, watched: xl2jax.WatchedVideo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda *_: 10**6)
    with pytest.raises(UserError, match="shorten the question or ask for fewer new tokens"):
        model.ask(watched, "What?", max_new_tokens=100_000)


def test_threads_ask_one_video(model: xl2jax.Model, clip: Path) -> None:
    """Four threads at once get the same answers as one after the other."""
    questions = ["What happens?", "Who is it?", "Which colour?", "And then?"]
    with model.watch(clip, FrameSampling(max_frames=40)) as video:
        alone = [model.ask(video, q, max_new_tokens=8).text for q in questions]
        video.kv.pooled.clear()
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda q: model.ask(video, q, max_new_tokens=8).text, questions))
    assert together == alone


def test_bilevel_with_everything_dense_is_dense(model: xl2jax.Model, watched: xl2jax.WatchedVideo) -> None:
    blocks = ceil_div(watched.kv.layout.groups, 4)
    everything = xl2jax.BilevelConfig(top_chunks=blocks)
    a = model.ask(watched, "What happens?", max_new_tokens=16, bilevel=everything)
    b = model.ask(watched, "What happens?", max_new_tokens=16, bilevel=None)
    assert a.text == b.text
    assert a.context_tokens == b.context_tokens == watched.kv.layout.tokens
    assert all(c.dense for c in a.chunks)
    assert b.chunks == []


def test_chunks_are_reported(model: xl2jax.Model, watched: xl2jax.WatchedVideo) -> None:
    answer = model.ask(watched, "What happens?", max_new_tokens=1)
    blocks = ceil_div(watched.kv.layout.groups, 4)
    assert [c.number for c in answer.chunks] == list(range(1, blocks + 1))
    assert answer.chunks[0].dense
    assert answer.chunks[-1].dense
    assert sum(c.dense for c in answer.chunks) == 4
    middle = answer.chunks[1:-1]
    chosen = {c.number for c in middle if c.dense}
    assert chosen == {c.number for c in sorted(middle, key=lambda c: -(c.score or 0))[:2]}
    assert answer.chunks[1].start == watched.times[16]
    assert answer.chunks[1].end == watched.times[31]
    assert watched.kv.layout.groups == 37
    pooled = 37 - 3 * 4 - 1  # 3 whole blocks and the last one, of one group, are dense
    assert answer.context_tokens == watched.kv.layout.tokens - pooled * 3  # pooling keeps 1 of 4 visual tokens


def test_scorer_none_keeps_the_ends(model: xl2jax.Model, watched: xl2jax.WatchedVideo) -> None:
    answer = model.ask(watched, "What?", max_new_tokens=1, relevance=xl2jax.RelevanceConfig("none"))
    assert [c.number for c in answer.chunks if c.dense] == [1, len(answer.chunks)]
    assert answer.chunks[0].score is None


def test_chunked_and_dense_prefill_differ_and_window_covers(model: xl2jax.Model, clip: object) -> None:
    """A window as long as the video equals dense causal attention, and a shorter window does not."""
    sampling = FrameSampling(max_frames=40)

    def keys(config: PrefillConfig) -> np.ndarray:
        video = model.watch(clip, sampling, config)  # type: ignore[arg-type]
        return np.asarray(video.kv.cache.k[-1])

    dense, covering, narrow = (keys(PrefillConfig(4, w)) for w in (None, 10, 0))
    assert np.allclose(dense, covering, atol=1e-5)
    assert not np.allclose(dense, narrow, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max new tokens"),
        ({"bilevel": xl2jax.BilevelConfig(top_chunks=99)}, "top chunks must be from 0 to 10"),
        ({"bilevel": xl2jax.BilevelConfig(pool=99)}, "pool must be from 1 to 4"),
    ],
)
def test_options_out_of_range(options: dict, message: str, model: xl2jax.Model, watched: xl2jax.WatchedVideo) -> None:
    with pytest.raises(UserError, match=message):
        model.ask(watched, "What?", **options)


def test_settings_may_be_numpy_scalars() -> None:
    assert FrameSampling(np.float32(2), np.int64(4), np.int64(8)).max_frames == 8
    assert TokenSampling(np.float32(0.5)).temperature == 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenSampling(-1.0), "temperature"),
        (lambda: TokenSampling(1.0, 0.0), "top-p"),
        (lambda: TokenSampling("hot"), "temperature must be a number, not 'hot'"),
        (lambda: FrameSampling(fps="1"), "fps must be a number, not '1'"),
        (lambda: FrameSampling(max_fps=1.5), "max fps must be a whole number from 1"),
        (lambda: FrameSampling(max_frames="many"), "max frames must be a whole number from 4"),
        (lambda: xl2jax.BilevelConfig(select_chunk_groups=0), "select chunk groups"),
        (lambda: xl2jax.BilevelConfig(pool=0), "pool must be a whole number from 1"),
        (lambda: xl2jax.BilevelConfig(top_chunks=-1), "top chunks must be a whole number from 0"),
        (lambda: PrefillConfig(window_chunks=-1), "window chunks must be a whole number from 0"),
        (lambda: xl2jax.AttentionScorer(0.5, 0.2), "relevance layers"),
        (lambda: xl2jax.AttentionScorer(exponent=0.5), "exponent of relevance"),
        (lambda: xl2jax.AttentionScorer(question_weight=1.5), "question's weight in relevance"),
        (lambda: xl2jax.RelevanceConfig("file"), "go together"),
    ],
)
def test_settings_are_checked_where_they_are_made(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
