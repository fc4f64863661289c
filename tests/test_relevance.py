from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xl2jax
from xl2jax.inference import compiled, session
from xl2jax.inference.bilevel import mixed_slots
from xl2jax.inference.cache import KVCache
from xl2jax.inference.generate import SuffixIds
from xl2jax.inference.relevance import AttentionScorer, block_scores
from xl2jax.ops.kv import quantize, unpack
from xl2jax.prompt import suffix

SLOW_CASES = [(300, 8, False, 6), (5000, 8, True, 1), (300, 96, False, 2)]


@pytest.mark.parametrize(
    ("slots", "tokens", "int8", "exponent"),
    [
        pytest.param(5000, 8, True, 6, marks=pytest.mark.slow),
        (300, 96, False, 3),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES),
    ],
)
def test_attention_scores_are_attention_mass(
    exponent: float, slots: int, tokens: int, int8: bool, model: xl2jax.Model
) -> None:
    """Scores agree with softmax weights that are written out. 5000 slots take two blocks, and so do 96 tokens."""
    rng = np.random.default_rng(0)
    c = model.config.llm
    length, groups = slots - 40, 7
    shape = (c.layers, c.kv_heads, slots, c.head_width)
    k, v = rng.standard_normal((2, *shape)).astype(np.float32)
    filled = jnp.int32(length), jnp.int32(slots), jnp.int32(0)
    context = KVCache(*((quantize(jnp.asarray(x)) if int8 else jnp.asarray(x)) for x in (k, v)), *filled)
    k, v = (np.asarray(unpack(x)) for x in (context.k, context.v))
    group = rng.integers(-1, groups, slots)
    group[length:] = -1
    ids = rng.integers(0, c.vocab, tokens).astype(np.int32)
    first, last, end = 2, tokens - 4, tokens - 1
    text = compiled.new_cache(c, 128, "float32")
    scorer = AttentionScorer(0.4, 0.7, exponent, question_weight=0.3)
    suffix = SuffixIds(ids, np.int32(first), np.int32(last), np.int32(end))
    where = jnp.asarray(group)
    scores = compiled.attention_scores(model.network, context, where, text, suffix, scorer=scorer, groups=groups)

    llm = model.network.model.llm
    causal = np.tri(len(ids), dtype=bool)
    per_layer = []

    def attend(
        state: None, layer: jax.Array, q: jax.Array, text_k: jax.Array, text_v: jax.Array
    ) -> tuple[None, jax.Array]:
        n = q.shape[1] // c.kv_heads
        keys = jnp.concatenate(
            [jnp.repeat(jnp.asarray(k)[layer, :, :length], n, 0), jnp.repeat(text_k.transpose(1, 0, 2), n, 0)], 1
        )
        values = jnp.concatenate(
            [jnp.repeat(jnp.asarray(v)[layer, :, :length], n, 0), jnp.repeat(text_v.transpose(1, 0, 2), n, 0)], 1
        )
        scores = jnp.einsum("tnh,nsh->nts", q, keys) * c.head_width**-0.5
        mask = jnp.concatenate([jnp.ones((len(ids), length), bool), jnp.asarray(causal)], 1)
        p = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), -1)
        jax.debug.callback(lambda w: per_layer.append(np.asarray(w)), p[..., :length], ordered=True)
        return state, jnp.einsum("nts,nsh->tnh", p, values)

    jax.block_until_ready(llm.forward(llm.embed_tokens(ids), length + jnp.arange(len(ids)), attend, None))
    jax.effects_barrier()
    assert len(per_layer) == c.layers
    by_group = np.stack([[w[:, :, group[:length] == g].sum(-1) for g in range(groups)] for w in per_layer])
    by_group = by_group.astype(np.float64) ** exponent  # [L, G, N, T]
    by_group = (0.3 * by_group[..., first:last].mean(-1) + 0.7 * by_group[..., last:end].mean(-1)).mean(-1)
    a, b = scorer.layers(c.layers)
    assert (a, b) == (1, 2)
    assert np.allclose(scores, by_group[a:b].mean(0) ** (1 / exponent), rtol=1e-4)
    assert np.asarray(scores).max() < 1


def test_a_dense_cache_is_scored_as_a_mixed_one_with_every_group_whole(
    model: xl2jax.Model, watched: xl2jax.WatchedVideo
) -> None:
    """The groups of slots are computed differently for both caches, and give the same scores."""
    c, layout, n = model.config.llm, watched.kv.layout, watched.kv.plan.group_capacity
    pooled = compiled.pool_cache(c, watched.kv.cache, watched.kv.table, visual_tokens=layout.visual_tokens, pool=4)
    mixed, source = compiled.mix(
        c,
        watched.kv.cache,
        pooled,
        watched.kv.table,
        jnp.ones(n, bool),
        visual_tokens=layout.visual_tokens,
        pool=4,
        slots=mixed_slots(layout, layout.groups, xl2jax.BilevelConfig()),
    )
    text = suffix(model.tokenizer, "Which one?")
    ids = session.suffix_ids(text.ids, text.first, text.last)
    group = compiled.slot_groups(watched.kv.table, watched.kv.cache, visual_tokens=layout.visual_tokens)
    assert np.bincount(np.asarray(group) + 1)[1:].tolist() == [t + layout.visual_tokens for t in layout.time_lengths]
    scores = []
    for context, where in ((watched.kv.cache, group), (mixed, jnp.where(source.valid, source.group, -1))):
        result = compiled.attention_scores(
            model.network,
            context,
            where,
            session.new_text(model.network, ids, 0),
            ids,
            scorer=AttentionScorer(),
            groups=n,
        )
        scores.append(np.asarray(result))
    assert np.allclose(*scores, rtol=1e-4, atol=1e-9)
    bilevel = xl2jax.BilevelConfig()
    asked = session.score_groups(model.network, watched.kv, ids, bilevel, AttentionScorer(), pooled)
    assert len(ids.ids) > len(text.ids)  # padding does not count
    assert np.array_equal(asked, scores[0])
    assert scores[0][: layout.groups].min() > 0
    assert not scores[0][layout.groups :].any()


def test_layers_of_a_scorer() -> None:
    assert AttentionScorer().layers(28) == (0, 28)
    assert AttentionScorer(0.25, 0.75).layers(28) == (7, 21)
    assert AttentionScorer(0.9, 0.95).layers(2) == (1, 2)


def test_the_score_of_a_block_is_that_of_its_best_real_group() -> None:
    scores = jnp.array([3.0, 1.0, 5.0, 7.0, 9.0, 100.0])
    assert np.allclose(block_scores(scores, jnp.int32(5), 2), [3.0, 7.0, 9.0])
