"""Videos composed of encoded groups, and the training on them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from xl2jax.checkpoint.params import load_params
from xl2jax.commands.flags import DEFAULT_CHECKPOINT
from xl2jax.errors import UserError
from xl2jax.evaluation.scenes import COLOURS, HELD_OUT, PAIRS, SHAPES, make_scene
from xl2jax.models.video_xl2 import VideoXL2, abstract_model, normalise
from xl2jax.prompt import PromptTokenizer
from xl2jax.recipes.demo import composed_training, stages
from xl2jax.recipes.demo.composed_rows import (
    COUNT_CLASSES,
    DIGITS,
    MAX_REPRESENTED_GROUPS,
    NO_TARGET,
    TARGET_CLASSES,
    Phase,
    Rows,
    compose,
    digits,
)
from xl2jax.recipes.demo.composed_training import (
    auxiliary_loss,
    language_loss,
    train_composed,
    weighted_layer_outputs,
)
from xl2jax.training.loss import IGNORE, TokenBatch, token_loss
from xl2jax.training.processes import locked

CHECKPOINT = Path(DEFAULT_CHECKPOINT)
VISUAL = 16
PHASE = Phase("test", groups=6, batch=2, steps=3, learning_rate=1e-3, seed=1)
PER_CLASS = 3
TOKENIZER = PromptTokenizer.load(CHECKPOINT, 443)


@given(st.integers(0, 999_999))
def test_digits_are_the_time(tenths: int) -> None:
    lowest_first = digits(tenths / 10)
    text = "".join(str(d) for d in reversed(lowest_first) if d < 10)
    assert f"{text[:-1]}.{text[-1]}" == str(tenths / 10)


def shown_in(group: int) -> tuple[str, str] | None:
    trained = [p for p in PAIRS if p not in HELD_OUT]
    return trained[group // PER_CLASS] if group < len(trained) * PER_CLASS else None


def names_in(question: str) -> tuple[list[str], list[str]]:
    words = re.findall("[a-z]+", question)
    return [c for c in COLOURS if c in words], [s for s in SHAPES if s in words]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 4, 9, 40]))
def test_targets_and_answers_follow_from_the_row(seed: int, groups: int) -> None:
    """The test derives the answers and all targets of the heads from the row's text and groups alone."""
    phase = dataclasses.replace(PHASE, groups=groups)
    row_groups, ids, visual, labels, positions, weights, hidden, blind, early, late, counts = compose(
        seed, phase, TOKENIZER, VISUAL, PER_CLASS
    )
    assert row_groups.min() >= 0
    assert row_groups.max() < 46 * PER_CLASS
    groups = (int(visual.max()) + 1) // VISUAL
    assert groups <= phase.groups
    shown = [shown_in(int(g)) for g in row_groups[:groups]]
    text = [TOKENIZER.decode([int(i)]) for i in ids]
    expected_early, expected_late, expected_counts = (np.full_like(x, NO_TARGET) for x in (early, late, counts))
    times = []
    spans = [0]
    for group in range(groups):
        (first,) = np.flatnonzero(visual == group * VISUAL)
        assert (visual[first : first + VISUAL] == np.arange(VISUAL) + group * VISUAL).all()
        times.append("".join(text[first - 14 : first]).rpartition("Time ")[2].removesuffix("s:"))
        expected_early[first : first + VISUAL, :DIGITS] = digits(float(times[-1]))
        if group:  # its time tokens tell how many shapes have begun before it
            before = {*shown[: group - 1]} - {None}
            after = {*shown[:group]} - {None}
            expected_counts[spans[-1] : first] = len(after) > len(before), len(after)
        spans.append(int(first) + VISUAL)
    used = int(np.flatnonzero(labels != IGNORE)[-1]) + 1
    subjects = []
    after_video = int(np.flatnonzero(visual >= 0)[-1]) + 1
    answer_starts = [i for i in range(after_video, len(ids)) if "".join(text[i - 1 : i + 1]) == "assistant\n"]
    used = max(
        used, *(answer_start + 1 for answer_start in answer_starts)
    )  # a row may be cut before the first word of an answer
    for answer_start in answer_starts:
        question = "".join(text[after_video:answer_start]).rsplit("user\n", 1)[-1].strip()
        answer = "".join(text[answer_start + 1 : used]).split("\n")[0]
        colours, forms = names_in(question)
        targets = [[*COLOURS].index(colours[0]) if colours else 8, SHAPES.index(forms[0]) if forms else 5]
        about_time = "seconds" in question
        if about_time:
            (time,) = re.findall(r"[\d.]+(?= seconds)", question)
            expected_early[answer_start, :DIGITS] = digits(float(time))
            subject = shown[times.index(time)]
            assert subject is not None
            if answer.endswith("."):
                assert answer.rstrip(".").lower() in subject
                subjects.append(subject)
        elif question.startswith(("When", "At what time")):
            matching = [i for i, s in enumerate(shown) if s == (colours[0], forms[0])]
            if answer.endswith("seconds."):
                assert answer == f"At {times[matching[0]]} seconds."
                subjects.append((colours[0], forms[0]))
            # These targets reach from the newline before the answer to the last digit of the time.
            end = next((i for i in range(answer_start, used) if text[i].strip() == "seconds"), used)
            expected_early[answer_start:end, DIGITS:] = targets
            expected_late[answer_start:end, :DIGITS] = digits(float(times[matching[0]]))
        elif " or " in question:  # the order of two shapes comes last
            assert answer_start == answer_starts[-1]
        elif len(colours) + len(forms) == 1:  # kinds colour_of and shape_of
            (subject,) = {s for s in shown if s is not None and {*colours, *forms} & {*s}}
            if answer.endswith("."):
                assert answer.rstrip(".").lower() in subject
                subjects.append(subject)
            expected_early[answer_start, DIGITS:] = targets
        elif len(colours) == 1:  # kind exists
            if answer.endswith("."):
                assert answer == ("Yes." if (colours[0], forms[0]) in shown else "No.")
                subjects += [(colours[0], forms[0])] * (answer == "Yes.")
            expected_early[answer_start, DIGITS:] = targets
        else:
            assert question.startswith("How many")
            assert answer.rstrip(".") in (str(len({*shown} - {None})), "")
    assert (early == expected_early).all()
    assert (late == expected_late).all()
    assert (counts == expected_counts).all()
    assert (hidden == ((visual >= 0) & (visual < VISUAL * (groups - 1)))).all()
    if blind.any():  # the first question, for the number of shapes, does not see the hidden tokens
        (first, *_, last) = np.flatnonzero(blind)
        assert blind[first : last + 1].all()
        assert first == after_video
        shown_text = "".join(text[first : last + 1])
        assert re.fullmatch(r"\nHow many[^?]*\?\nassistant\n(\d\.\n?)?", shown_text.replace("user\n", "")), shown_text
    assert len(set(subjects)) == len(subjects)
    assert (labels[used:] == IGNORE).all()
    # The row represents a longer video, by its distances and in the softmax.
    steps = np.diff(positions)
    assert (steps >= 1).all()
    assert positions[-1] < 320_000
    assert all(visual[i] % VISUAL == VISUAL - 1 and visual[i] >= 0 for i in np.flatnonzero(steps > 1))
    gaps = int((steps - 1).sum())
    between = np.diff([float(t) for t in times])  # times have the gaps of the positions
    if len(between):
        skipped = np.array([steps[spans[i] - 1] - 1 for i in range(1, groups)]) // (12 + VISUAL)
        np.testing.assert_allclose(between, (1 + skipped) * (between / (1 + skipped)).min(), rtol=1e-6)
    factor = 1 + gaps / (groups * (12 + VISUAL))
    assert factor * groups <= MAX_REPRESENTED_GROUPS * 1.001
    expected = np.zeros(len(ids))
    for i, pair in enumerate(shown):
        if i and pair is None:
            expected[spans[i] : spans[i + 1]] = np.log(factor)
    np.testing.assert_allclose(
        weights, expected, atol=4 / (groups * (12 + VISUAL))
    )  # each of up to 3 gaps is rounded down


def test_shares_of_rows() -> None:
    rows = [compose(seed, PHASE, TOKENIZER, VISUAL, PER_CLASS) for seed in range(400)]
    texts = [TOKENIZER.decode(r.ids[r.labels != IGNORE].tolist()) for r in rows]
    longer = np.mean([r.positions[-1] >= len(r.positions) for r in rows])
    shorter = np.mean([r.visual.max() + 1 < PHASE.groups * VISUAL for r in rows])
    counted = np.mean([re.search(r"\b\d\.\s", text) is not None for text in texts])
    assert 0.4 < longer < 0.6
    assert 0.2 < shorter < 0.4
    assert 0.8 < counted < 0.97
    ordered = np.mean([" or " in TOKENIZER.decode(r.ids.tolist()) for r in rows])
    assert 0.4 < ordered < 0.6  # three quarters of the rows that have two shapes or more
    assert 0.35 < np.mean([r.blind.any() for r in rows]) < 0.55
    assert max(r.positions[-1] for r in rows) > 200_000
    times = [float(t) for r in rows for t in re.findall(r"Time ([\d.]+)s:", TOKENIZER.decode(r.ids.tolist()))]
    assert 0.1 < np.mean(np.array(times) > 10_000) < 0.5
    assert max(times) > 50_000

    def has_needle(row: Rows[np.ndarray]) -> bool:
        """Whether a shape lasts one group and no other shape has its colour or form. Rows without a needle rarely do."""
        shown = [pair for pair in map(shown_in, row.groups.tolist()) if pair is not None]
        return any(
            shown.count(p) == 1 and not any((p[0] == q[0]) != (p[1] == q[1]) for q in shown)
            for p in dict.fromkeys(shown)
        )

    long = dataclasses.replace(PHASE, groups=40)
    rows = [compose(seed, long, TOKENIZER, VISUAL, PER_CLASS) for seed in range(400)]
    many = [r for r in rows if len({shown_in(int(g)) for g in r.groups}) > 7]
    assert 0.35 < np.mean([has_needle(r) for r in many]) < 0.6  # a tenth of them by chance


@pytest.fixture(scope="module")
def model() -> VideoXL2:
    config, params = load_params(CHECKPOINT, "float32")
    network: VideoXL2 = nnx.merge(nnx.graphdef(abstract_model(config, "float32")), params)
    return network


def stack(rows: list[Rows[np.ndarray]]) -> Rows[jax.Array]:
    return Rows(*(jnp.asarray(np.stack(x)) for x in zip(*rows, strict=True)))


@pytest.mark.slow
def test_the_bundled_model_answers_about_10000_frames() -> None:
    """Rows that represent videos of at least 10,000 frames, with their distances, times and noise, and of no training seed."""
    phase = dataclasses.replace(PHASE, groups=64)
    config, params = load_params(CHECKPOINT, "float32")
    model = nnx.merge(nnx.graphdef(abstract_model(config, "float32")), params)
    encoded = composed_training.encode_groups(CHECKPOINT, groups_per_class=2, processes=1)
    drawn = (compose(900_000_000 + i, phase, TOKENIZER, config.visual_tokens, 2) for i in itertools.count())
    long = (row for row in drawn if row.positions[-1] >= 2500 * (12 + config.visual_tokens))
    rows = Rows(*(jnp.asarray(np.stack(x)) for x in zip(*itertools.islice(long, 6), strict=True)))
    loss, _ = language_loss(model, jnp.asarray(encoded), rows)
    assert float(loss) < 0.05  # a checkpoint that was trained on times to 8,192 s only has 1.4


@pytest.mark.slow
def test_loss_equals_that_of_the_same_videos_in_frames(model: VideoXL2) -> None:
    size = model.config.vision.image_size
    scenes = [make_scene(2 * i, 1, events=1) for i in range(5)]
    frames = np.stack([[s.frame(f, size, size) for f in range(4)] for s in scenes])
    encoded = jax.jit(model.encode_frames)(normalise(jnp.asarray(frames.reshape(-1, size, size, 3))))
    candidates = [compose(seed, PHASE, TOKENIZER, VISUAL, PER_CLASS) for seed in range(20)]
    rows = stack([r for r in candidates if r.positions[-1] < len(r.positions)][:3])  # train.py has no position gaps
    rows = rows._replace(groups=rows.groups % len(scenes))
    loss, _ = jax.jit(lambda: language_loss(model, encoded, rows))()
    pixels = normalise(jnp.asarray(frames)[rows.groups].reshape(3, -1, size, size, 3))
    tokens = TokenBatch(rows.ids, rows.visual, rows.labels)
    total, count = jax.jit(lambda: token_loss(model, pixels, tokens))()
    assert float(loss) == pytest.approx(float(total / count), rel=1e-4)


def test_weighted_layers_agree_with_repeated_keys(model: VideoXL2) -> None:
    """Positions have gaps. Weights are log 1, 2 or 3; the reference repeats each key as many times, and leaves out the
    hidden ones for blind queries."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 24, 256)), jnp.float32)
    positions = jnp.asarray(np.cumsum(rng.integers(1, 400, (2, 24)), axis=1), jnp.int32)
    times = rng.integers(1, 4, (2, 24))
    hidden, blind = np.arange(24) < 9, np.arange(24) >= 15
    none = jnp.zeros((2, 24), jnp.int32)
    rows = Rows(
        none, none, none, none, positions, jnp.asarray(np.log(times), jnp.float32),
        jnp.tile(hidden, (2, 1)), jnp.tile(blind, (2, 1)), none, none, none,
    )  # fmt: skip
    layers = weighted_layer_outputs(model.llm, x, rows)
    assert len(layers) == model.config.llm.layers

    for row in range(2):
        repeated = jnp.asarray(np.repeat(np.arange(24), times[row]))

        def attend(
            state: None, layer: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, repeated: jax.Array = repeated
        ) -> tuple[None, jax.Array]:
            sees = (repeated[None, :] <= jnp.arange(24)[:, None]) & ~(blind[:, None] & hidden[repeated][None, :])
            mask = sees[None, None]
            return None, jax.nn.dot_product_attention(q, k[:, repeated], v[:, repeated], mask=mask)

        expected, _ = model.llm.forward(x[row : row + 1], positions[row : row + 1], attend, None)
        np.testing.assert_allclose(model.llm.norm(layers[-1][row : row + 1]), expected, rtol=1e-3, atol=1e-4)


def test_auxiliary_loss_counts_tokens_with_targets() -> None:
    """Two of four tokens count: one predicts all of its targets, the other a wrong colour. The head is the identity."""
    classes = sum(TARGET_CLASSES)
    logits = np.zeros((1, 4, classes))
    targets = np.full((1, 4, len(TARGET_CLASSES)), NO_TARGET)
    targets[0, 0, :DIGITS] = targets[0, 3, :DIGITS] = 7
    targets[0, 1, DIGITS:] = 2, 3
    for first in range(0, 11 * DIGITS, 11):
        logits[0, 0, first + 7] = logits[0, 3, first + 1] = 100.0
    logits[0, 1, [11 * DIGITS + 4, 11 * DIGITS + 9 + 3]] = 100.0
    tokens = np.array([[True, True, True, False]])
    scale = np.sqrt((logits**2).mean(-1, keepdims=True) + 1e-6)  # the loss norms the states
    identity = jnp.eye(classes) * 100
    loss, counts = auxiliary_loss(identity, jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(tokens))
    assert counts.tolist() == [1, 2]
    assert float(loss) == pytest.approx(100 * float(logits[0, 1].max() / scale[0, 1, 0]), rel=1e-3)


def test_the_recipe_refuses(tmp_path: Path) -> None:
    """No process at all, and a folder in which another run trains."""
    with pytest.raises(UserError, match="--processes must be 1 or more, not 0"):
        stages.RecipeArgs(tmp_path, processes=0)
    with locked(tmp_path), pytest.raises(UserError, match="another run uses this folder"):
        stages.run_recipe(stages.RecipeArgs(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]


@pytest.mark.slow
def test_the_recipe_trains_the_llm_alone_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "encode_groups", functools.partial(composed_training.encode_groups, groups_per_class=1))
    still = dataclasses.replace(PHASE, name="still", learning_rate=0.0, steps=1)
    monkeypatch.setattr(stages, "PHASES", (PHASE, still))
    for done in ("random", "vision"):
        (tmp_path / done).symlink_to(CHECKPOINT.absolute())
    stages.run_recipe(stages.RecipeArgs(tmp_path))
    before, after = load_file(CHECKPOINT / "model.safetensors"), load_file(tmp_path / "test" / "model.safetensors")
    assert before.keys() == after.keys()
    same = {name for name in before if np.array_equal(before[name], after[name])}
    assert same == {n for n in before if "vision_tower" in n or ".sae." in n or "mm_projector" in n}
    (line,) = map(json.loads, (tmp_path / "run-test" / "log.jsonl").read_text().splitlines())
    assert line["step"] == 3
    assert 0 < line["loss"] < 1
    assert 0 <= line["seen"] <= 1
    curves = stages.loss_curves(tmp_path)
    assert curves["test"] == [(3, line["loss"])]
    assert (tmp_path / "loss.png").stat().st_size > 1000
    # The second phase starts from the heads of the first one. Its learning rate of 0 leaves them unchanged.
    with np.load(tmp_path / "run-test" / "heads.npz") as a, np.load(tmp_path / "run-still" / "heads.npz") as b:
        assert {name: a[name].shape[1] for name in a} == {
            "early": sum(TARGET_CLASSES), "late": sum(TARGET_CLASSES), "begins": COUNT_CLASSES[0], "counts": COUNT_CLASSES[1],
        }  # fmt: skip
        for name in a:
            assert np.abs(a[name]).max() > 0
            np.testing.assert_array_equal(a[name], b[name])
    # Existing results stay. The error names a missing file.
    monkeypatch.setattr(composed_training, "write_params", None)
    stages.run_recipe(stages.RecipeArgs(tmp_path))
    (tmp_path / "run-test" / "heads.npz").unlink()
    (tmp_path / "still").rename(tmp_path / "away")
    with pytest.raises(UserError, match=r"heads.npz: cannot be read"):
        stages.run_recipe(stages.RecipeArgs(tmp_path))
    encoded = np.zeros((1, VISUAL, 256), np.float32)
    with pytest.raises(UserError, match="already exists"):
        train_composed(
            CHECKPOINT, tmp_path / "away", still, tmp_path / "x", encoded=encoded, previous_run=None, processes=1
        )
