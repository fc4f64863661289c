"""Scenes, the questions about them, and the files that show them."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import xl2jax
from xl2jax.commands import demo_clip
from xl2jax.commands.flags import DEFAULT_CHECKPOINT
from xl2jax.config import PRESETS
from xl2jax.evaluation.questions import PICTURE_KINDS, TEMPLATES, Kind, ask, ask_about_picture, ask_which_picture
from xl2jax.evaluation.scenes import (
    COLOURS,
    HELD_OUT,
    MAX_PICTURE_SHAPES,
    PAIRS,
    PICTURE_SIZES,
    SHAPES,
    Event,
    Scene,
    make_picture,
    make_scene,
    scene_clip,
    write_scene,
)
from xl2jax.recipes.demo import datasets
from xl2jax.recipes.demo.picture_accuracy import accuracy
from xl2jax.recipes.demo.vision_training import labelled_groups, train_vision
from xl2jax.testing import make_checkpoint, make_tokenizer
from xl2jax.training.records import read_records
from xl2jax.video.clip import FrameSampling, open_video
from xl2jax.video.writer import write_frames

seeds, lengths = st.integers(0, 10**6), st.integers(1, 60)


@settings(deadline=None, max_examples=60)
@given(seeds, lengths)
def test_scenes(seed: int, groups: int) -> None:
    """Shapes never overlap in time or share colour and form; training scenes never show held-out combinations."""
    scene = make_scene(seed, groups)
    assert scene == make_scene(seed, groups)
    assert 1 <= len(scene.events) <= 9
    spans = [set(range(e.start, e.start + e.groups)) for e in scene.events]
    assert set().union(*spans) <= set(range(groups))
    assert sum(map(len, spans)) == len(set().union(*spans))
    pairs = [(e.colour, e.shape) for e in scene.events]
    assert len(set(pairs)) == len(pairs)
    if seed % 2 == 0:
        assert not HELD_OUT & set(pairs)


@settings(deadline=None, max_examples=60)
@given(seeds, st.integers(2, 60), st.data())
def test_needle_is_alone_in_its_group(seed: int, groups: int, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, groups - 1))
    first, *others = make_scene(seed, groups, events=6, needle_at=at).events
    assert (first.start, first.groups) == (at, 1)
    assert all(not e.start <= at < e.start + e.groups for e in others)


@settings(deadline=None, max_examples=100)
@given(seeds, st.integers(1, 40), st.sampled_from(list(TEMPLATES)), st.sampled_from([0.25, 1.0, 4.0]))
def test_answers_are_true_of_the_scene(seed: int, groups: int, kind: Kind, seconds: float) -> None:
    scene = make_scene(seed, groups)
    question = ask(scene, kind, scene.times(seconds), np.random.default_rng(seed))
    if question is None:
        assert kind in ("first", "colour_of", "shape_of")
        assert kind != "first" or len(scene.events) == 1
        return
    event_at = {g: e for e in scene.events for g in range(e.start, e.start + e.groups)}
    answer = question.answer.rstrip(".").lower()
    if kind in ("colour_of", "shape_of"):
        event = event_at[question.group or 0]
        assert answer == (event.colour if kind == "colour_of" else event.shape)
        asked = event.shape if kind == "colour_of" else event.colour
        assert asked in question.text
        assert [e for e in scene.events if asked in e.name] == [event]
    elif kind in ("colour", "shape"):
        event = event_at[question.group or 0]
        assert answer == (event.colour if kind == "colour" else event.shape)
        assert str(round(float((question.group or 0) * seconds), 1)) in question.text
    elif kind == "time":
        event = event_at[question.group or 0]
        assert event.name in question.text
        assert answer == f"at {round(float(event.start * seconds), 1)} seconds"
    elif kind == "count":
        assert int(answer) == len(scene.events)
    elif kind == "exists":
        named = [e for e in scene.events if e.name in question.text]
        assert answer == ("yes" if named else "no")
    else:
        named = sorted((e for e in scene.events if e.name in question.text), key=lambda e: e.start)
        assert answer == f"the {named[0].name}"


def test_shapes_are_drawn_in_their_colours_and_forms() -> None:
    areas: dict[str, float] = {}
    for colour, shape in PAIRS:
        event = Event(0, 1, colour, shape, 0.5, 0.5, 0.3, 0.0, 0.0)
        image = Scene(1, 2, (event,)).frame(0, 200, 200)
        covered = (image == np.array(COLOURS[colour], np.uint8)).all(-1)
        assert covered[100, 100]
        assert not (Scene(1, 2, (event,)).frame(4, 200, 200) == np.array(COLOURS[colour], np.uint8)).all(-1).any()
        ys, xs = np.nonzero(covered)
        areas.setdefault(shape, covered.sum() / ((np.ptp(xs) + 1) * (np.ptp(ys) + 1)))
    # Shares of the bounding box. Star and cross cover less than half of it.
    assert areas["square"] == pytest.approx(1.0, abs=0.03)
    assert areas["circle"] == pytest.approx(np.pi / 4, abs=0.03)
    assert areas["triangle"] == pytest.approx(0.5, abs=0.05)
    assert len({round(a, 1) for a in areas.values()}) == len(SHAPES)


def test_every_template_asks_in_known_words() -> None:
    """A template that training does not use arranges trained words in another way. No word is split into bytes."""
    tokenizer = make_tokenizer()

    def words(text: str) -> set[str]:
        return set(text.lower().replace("?", "").replace(",", "").split())

    trained = {w for texts in TEMPLATES.values() for t in texts[:-1] for w in words(t)}
    for texts in TEMPLATES.values():
        assert words(texts[-1]) <= trained
        assert len(set(texts)) == len(texts)
    for word in (*COLOURS, *SHAPES):
        assert len(tokenizer.encode(f" {word}", add_special_tokens=False).ids) == 1


def test_files_show_the_scene(tmp_path: Path) -> None:
    scene = make_scene(5, 6)
    write_scene(tmp_path / "a.mp4", scene, width=160, height=120)
    write_scene(tmp_path / "b.mp4", scene, width=160, height=120)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    clip = open_video(tmp_path / "a.mp4", FrameSampling(1.0, None, 24))
    assert clip.times == scene_clip(scene).times
    (read,), (drawn,) = list(clip.batches(24, 112)), list(scene_clip(scene).batches(24, 112))
    assert read.shape == drawn.shape
    assert np.abs(read.astype(float) - drawn).mean() < 6


@pytest.mark.slow
def test_dataset(tmp_path: Path, command: Callable[..., tuple[int, str, str]], refused: Callable[..., str]) -> None:
    folder = tmp_path / "d"
    flags = (folder, "--videos", 3, "--groups", 2, 3, "--records", 2, "--turns", 3, "--processes", 1)
    status, _, err = command(datasets.main, *flags)
    assert status == 0, err
    records = read_records(folder / "train.json", 0).records
    assert len(records) == 6
    assert all(len(r.turns) == 6 and r.media is not None and r.media.is_file() for r in records)
    assert "already exists" in refused(datasets.main, *flags)
    before = (folder / "000000.mp4").stat().st_mtime_ns
    (folder / "train.json").unlink()  # as after an interrupted run
    assert command(datasets.main, *flags)[0] == 0
    assert (folder / "000000.mp4").stat().st_mtime_ns == before
    assert read_records(folder / "train.json", 0).records == records


@settings(deadline=None, max_examples=60)
@given(seeds, st.sampled_from(PICTURE_SIZES))
def test_pictures_show_what_is_asked(seed: int, size: tuple[int, int]) -> None:
    """Every shape is seen whole in its own quarter, and the words name no video."""
    scene, rng = make_picture(seed), np.random.default_rng(seed)
    frame = scene.frame(0, *size)
    assert frame.shape == (size[1], size[0], 3)
    assert len({(e.colour, e.shape) for e in scene.events}) == len(scene.events) <= MAX_PICTURE_SHAPES
    for event in scene.events:
        assert (np.abs(frame.astype(int) - COLOURS[event.colour]).sum(-1) < 30).sum() > 8
        assert seed % 2 or (event.colour, event.shape) not in HELD_OUT
    for kind in PICTURE_KINDS:
        question = ask_about_picture(scene, kind, rng)
        if question is not None:
            assert "video" not in question.text
            assert kind != "count" or question.answer == f"{len(scene.events)}."
    asked = ask_which_picture((scene, make_picture(seed + 2)), rng)
    if asked is not None:
        words = asked[0].removeprefix("Which picture shows the ").partition(",")[0]
        shown = [{e.name for e in make_picture(s).events} for s in (seed, seed + 2)]
        assert [words in names for names in shown] == [asked[1] == "The first.", asked[1] == "The second."]


def test_dataset_of_pictures(tmp_path: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    flags = (tmp_path / "d", "--videos", 0, "--pictures", 6, "--turns", 3, "--processes", 1)
    status, _, err = command(datasets.main, *flags)
    assert status == 0, err
    data = read_records(tmp_path / "d" / "train.json", 0)
    assert (data.malformed, data.cut) == ([], 0)
    single = [r for r in data.records if len(r.pictures) == 1]
    assert len(single) == 6
    assert {len(r.pictures) for r in data.records} == {1, 2}
    assert all(path.is_file() for r in data.records for path in r.pictures)
    assert all(r.places[0] == len(r.pictures) and not any(r.places[1:]) for r in data.records)


@pytest.mark.slow
def test_the_bundled_model_answers_about_pictures() -> None:
    """It was trained on videos only. Guessing is right in less than two thirds of the answers."""
    rows = [row for row in accuracy(xl2jax.load(DEFAULT_CHECKPOINT), 6) if row.kind == "exists"]
    assert sum(row.right for row in rows) > 0.75 * sum(row.asked for row in rows)


@pytest.mark.parametrize(
    ("main", "flags", "message"),
    [
        (demo_clip.main, ("c.mp4", "--seed", -1), "--seed must be 0 or more"),
        (demo_clip.main, ("file/c.mp4",), "file/c.mp4: cannot be written"),
        (demo_clip.main, ("none/c.mp4",), "cannot be written (no such folder)"),
        (demo_clip.main, (".",), "is a folder, not a file"),
        (datasets.main, ("d", "--seed", -1), "--seed must be 0 or more"),
        (datasets.main, ("d", "--processes", 0), "--processes must be 1 or more"),
        (datasets.main, ("d", "--videos", -3), "--videos and --pictures need 1 or more"),
        (datasets.main, ("d", "--groups", 4, -1), "--groups must be"),
        (datasets.main, ("d", "--records", 0), "--records must be"),
        (datasets.main, ("d", "--turns", 0), "--turns must be"),
        (datasets.main, ("file",), "file: cannot be made"),
        (datasets.main, ("file/deep",), "deep: cannot be made"),
    ],
)
def test_impossible_videos_are_refused(
    refused: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    main: Callable[[], None],
    flags: tuple[object, ...],
    message: str,
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    assert message in refused(main, *flags)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("limit", [1000, 8000, 30_000])
def test_a_full_disk_leaves_no_part_of_a_clip(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path, limit: int
) -> None:
    """The clip has 32 kB; the limit ends it at its start, in its middle and near its end."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        status, out, err = command(demo_clip.main, tmp_path / "a.mp4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (status, out) == (2, "")
    assert "a.mp4: cannot be written (File too large)" in err
    assert len(err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_part_of_a_dataset(command: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        status, _, err = command(datasets.main, tmp_path / "new", "--videos", 1, "--processes", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 2
    assert "cannot be written (File too large)" in err
    assert list(tmp_path.iterdir()) == []


def test_a_writer_without_frames_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one frame"):
        write_frames(tmp_path / "a.mp4", [], 1)
    assert list(tmp_path.iterdir()) == []


def test_groups_are_labelled_with_their_shape() -> None:
    """One token of a group has the labels of the shape, and it lies at the centre of the pixels in its colour."""
    frames, colours, forms = labelled_groups(16, 56, 4, 1234)
    assert frames.shape == (64, 56, 56, 3)
    assert colours.shape == forms.shape == (16, 16)
    for i in range(16):
        event = next(iter(make_scene(2 * (1234 + i), 1, events=int(i % 8 > 0)).events), None)
        labelled = np.flatnonzero(colours[i] != len(COLOURS))
        assert np.array_equal(labelled, np.flatnonzero(forms[i] != len(SHAPES)))
        assert len(labelled) == (event is not None)
        if event is not None:
            assert colours[i, labelled[0]] == list(COLOURS).index(event.colour)
            assert forms[i, labelled[0]] == SHAPES.index(event.shape)
            coloured = np.abs(frames[4 * i : 4 * i + 4].astype(int) - COLOURS[event.colour]).sum(-1) < 12
            rows, columns = np.nonzero(coloured.any(0))
            centre = (rows.min() + rows.max() + 1) / 28, (columns.min() + columns.max() + 1) / 28  # in tokens
            assert np.abs(np.subtract(centre, np.add(divmod(labelled[0], 4), 0.5))).max() <= 0.8


@pytest.mark.slow
def test_vision_is_trained_alone(tmp_path: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    make_checkpoint(tmp_path / "a", PRESETS["tiny"], embedding_std=0.3, branch_scale=0.4)
    train_vision(tmp_path / "a", tmp_path / "b", steps=2, batch=8)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert set(before) == set(after)
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    of_the_llm = {n for n in before if n.startswith(("model.layers", "model.embed_tokens", "model.norm", "lm_head"))}
    assert not moved & of_the_llm
    assert {n.split(".")[1] for n in moved} == {"sae", "mm_projector", "vision_tower"}
