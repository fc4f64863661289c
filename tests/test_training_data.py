"""Records, tokens and labels, plans of batches, loading."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import xl2jax
from xl2jax.errors import UserError
from xl2jax.training.batches import Length, plan_epoch, probe_records
from xl2jax.training.loader import Loader, read_ahead
from xl2jax.training.loss import IGNORE
from xl2jax.training.records import Record, read_records
from xl2jax.training.samples import group_times, open_media, tokenise
from xl2jax.video import SampleConfig, open_video


def turns(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": v} for i, v in enumerate(values)]


def written(folder: Path, rows: Any, strategy: str = "all") -> Path:
    (folder / "a.json").write_text(json.dumps(rows))
    path = folder / "data.yaml"
    path.write_text(f"datasets:\n  - json_path: a.json\n    sampling_strategy: '{strategy}'\n")
    return path


# --- records ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("all", list("0123456789")), ("first:3", list("012")), ("end:3", list("789")), ("first:25%", list("012")),
        ("end:10%", ["9"]), ("first:99", list("0123456789")), ("end:0", []),
    ],
)  # fmt: skip
def test_sampling_strategies(tmp_path: Path, strategy: str, expected: list[str]) -> None:
    rows = [{"conversations": turns("Hi", "Ho")} for _ in range(10)]
    path = written(tmp_path, rows, strategy)
    if not expected:
        with pytest.raises(UserError, match="empty"):
            read_records(path, 0)
        return
    assert [r.id for r in read_records(path, 0)] == expected


def test_random_sampling_follows_the_seed(tmp_path: Path) -> None:
    path = written(tmp_path, [{"conversations": turns("Hi", "Ho")} for _ in range(100)], "random:10%")
    chosen = [tuple(r.id for r in read_records(path, seed)) for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(set(chosen[0])) == 10


def test_record_fields(tmp_path: Path) -> None:
    rows = [
        {"id": 7, "video": "v.mp4", "scale": 2, "conversations": turns("<image>\nWhat?", "That.", "And?", "This.")},
        {"image": "sub/i.png", "conversations": turns("<image>Look", "Yes")},
        {"conversations": turns("Hi", "Ho")},
    ]
    one, two, three = read_records(written(tmp_path, rows), 0)
    assert one == Record(
        "7", "video", tmp_path / "v.mp4",
        (("user", "\nWhat?"), ("assistant", "That."), ("user", "And?"), ("assistant", "This.")), 2.0,
    )  # fmt: skip
    assert (two.id, two.kind, two.media, two.turns[0][1]) == ("1", "image", tmp_path / "sub/i.png", "Look")
    assert (three.kind, three.media) == ("text", None)
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert len(read_records(tmp_path / "b.jsonl", 0, Path("/elsewhere"))) == 3
    assert read_records(tmp_path / "b.jsonl", 0, Path("/elsewhere"))[0].media == Path("/elsewhere/v.mp4")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"video": "a.mp4", "conversations": turns("What?", "That.")}, "does not start with <image>"),
        ({"conversations": turns("<image>What?", "That.")}, "<image> without a video"),
        ({"video": "a.mp4", "conversations": turns("<image><image>", "x")}, "2 times <image>"),
        ({"conversations": turns("What?")}, "has no answer"),
        ({"conversations": [{"from": "gpt", "value": "x"}, {"from": "human", "value": "y"}]}, "turn 1 is from gpt"),
        ({"conversations": [*turns("a", "b"), {"from": "gpt", "value": "c"}]}, "turn 3 is from gpt, expected human"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "turn 1 is not"),
        ({"conversations": []}, "no conversations"),
        ({"video": "a", "image": "b", "conversations": turns("<image>", "x")}, "both a video and an image"),
        ({"image": ["a", "b"], "conversations": turns("<image>", "x")}, "several images"),
        ({"video": "a", "scale": -1, "conversations": turns("<image>", "x")}, "scale -1"),
        ("text", "not an object"),
    ],
)
def test_bad_records_are_named(tmp_path: Path, row: Any, message: str) -> None:
    good = {"conversations": turns("Hi", "Ho")}
    with pytest.raises(UserError, match="a.json: record 1.*" + message.replace("<", r"\<")) as e:
        read_records(written(tmp_path, [good, row]), 0)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("d.yaml", "datasets: [", "not YAML"), ("d.yaml", "other: 1", "no list `datasets`"),
        ("d.yaml", "datasets: [{path: a}]", "data set 1: has no json_path"),
        ("d.yaml", "datasets: [{json_path: none.json}]", "none.json: no such file"),
        ("d.yaml", "datasets: [{json_path: a.json, sampling_strategy: 'some:3'}]", "sampling_strategy 'some:3'"),
        ("d.yaml", "datasets: [{json_path: a.json, weight: 3}]", "unknown field weight"),
        ("d.json", "[{]", "not JSON"), ("d.json", "{}", "not a list"), ("d.json", "[]", "empty"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_records(tmp_path / name, 0)
    with pytest.raises(UserError, match="no such file"):
        read_records(tmp_path / "nowhere.yaml", 0)


# --- tokens -----------------------------------------------------------------------------------


def test_tokens_and_labels(model: xl2jax.Model) -> None:
    """The sequence of the specification, written out, with the tokens that the loss counts in brackets."""
    t = model.tokenizer
    got = tokenise(
        [("user", "\nWhich?"), ("assistant", "Red."), ("user", "Sure?"), ("assistant", "Yes.")], [0.0, 12.5], t, 3, 999
    )
    expected: list[tuple[list[int], bool]] = []
    for text, counted in (
        ("<|im_start|>", True), ("system", False), ("\n", False), ("You are a helpful assistant.", False),
        ("<|im_end|>", True), ("\n", True),
        ("<|im_start|>", True), ("user", False), ("\n", False), ("Time 0.0s:", False), (None, False),
        ("Time 12.5s:", False), (None, False), ("\n", False), ("\nWhich?", False), ("<|im_end|>", True), ("\n", True),
        ("<|im_start|>", True), ("assistant", False), ("\n", False), ("Red.", True), ("<|im_end|>", True), ("\n", True),
        ("<|im_start|>", True), ("user", False), ("\n", False), ("Sure?", False), ("<|im_end|>", True), ("\n", True),
        ("<|im_start|>", True), ("assistant", False), ("\n", False), ("Yes.", True), ("<|im_end|>", True), ("\n", True),
    ):  # fmt: skip
        expected.append(([0, 0, 0] if text is None else t.encode(text), counted))
    ids = [i for part, _ in expected for i in part]
    assert got.ids.tolist() == ids
    assert got.labels.tolist() == [i if c else IGNORE for part, c in expected for i in part]
    is_visual = got.visual >= 0
    assert got.visual[is_visual].tolist() == [0, 1, 2, 3, 4, 5]
    assert got.ids[is_visual].tolist() == [0] * 6
    # Two newlines stand between video and question as two tokens, never as one.
    after = int(np.flatnonzero(is_visual)[-1]) + 1
    assert got.ids[after : after + 2].tolist() == t.encode("\n") * 2
    assert not got.cut


def test_cut_at_the_limit(model: xl2jax.Model) -> None:
    conversation = [("user", "Which?"), ("assistant", "A long answer that goes on.")]
    whole = tokenise(conversation, [None], model.tokenizer, 4, 999)
    assert whole.visual.tolist().count(-1) == len(whole.ids) - 4  # a picture has no time text
    part = tokenise(conversation, [None], model.tokenizer, 4, len(whole.ids) - 5)
    assert part.cut
    assert part.ids.tolist() == whole.ids[:-5].tolist()
    assert part.labels.tolist() == whole.labels[:-5].tolist()
    with pytest.raises(UserError, match="hold nothing of an answer"):
        tokenise(conversation, [None], model.tokenizer, 4, 20)


def test_scale_multiplies_times(clip: Path) -> None:
    opened = open_video(clip, SampleConfig(1, 4, 16))
    plain, scaled = group_times(opened, 1.0), group_times(opened, 3.0)
    assert plain == opened.times[::4]
    assert scaled == [round(3 * t, 1) for t in plain]


# --- plans ------------------------------------------------------------------------------------

lengths_of = st.lists(
    st.one_of(st.none(), st.builds(Length, st.integers(0, 40), st.integers(10, 6000))), min_size=1, max_size=200
).filter(any)


@settings(max_examples=150, deadline=None)
@given(lengths_of, st.integers(1, 4), st.integers(1, 4), st.integers(0, 3), st.booleans())
def test_every_sample_once_and_fits(
    lengths: list[Length | None], rows: int, accumulate: int, epoch: int, packed: bool
) -> None:
    pack_to = 6000 if packed else None
    steps = plan_epoch(lengths, rows * accumulate, rows, 0, epoch, pack_to=pack_to)
    seen = Counter(i for step in steps for micro in step for row in micro.rows for i in row)
    assert seen == Counter(i for i, x in enumerate(lengths) if x is not None)
    for step in steps:
        assert 1 <= len(step) <= accumulate
        for micro in step:
            assert len(micro.rows) == rows
            assert any(micro.rows)
            for row in micro.rows:
                members = [x for i in row if (x := lengths[i]) is not None]
                assert sum(x.tokens for x in members) <= micro.tokens
                assert sum(x.groups for x in members) <= micro.groups
                assert packed or len(row) <= 1
                if packed:
                    assert sum(x.tokens for x in members) <= 6000
            longest = max(sum(lengths[i].tokens for i in row) for row in micro.rows)  # type: ignore[union-attr]
            assert micro.tokens <= 1.25 * longest + 64
    assert steps == plan_epoch(lengths, rows * accumulate, rows, 0, epoch, pack_to=pack_to)
    # Other devices, other micro-batches, the same samples in every step.
    whole = plan_epoch(lengths, rows * accumulate, rows * accumulate, 0, epoch, pack_to=pack_to)
    assert [[r for m in s for r in m.rows if r] for s in whole] == [[r for m in s for r in m.rows if r] for s in steps]


def test_epochs_differ_and_lengths_stand_together() -> None:
    rng = np.random.default_rng(0)
    lengths = [Length(int(g), int(g) * 150 + 40) for g in rng.integers(1, 38, 2000)]
    steps = plan_epoch(lengths, 16, 4, 0, 0)
    assert steps != plan_epoch(lengths, 16, 4, 0, 1)
    assert steps != plan_epoch(lengths, 16, 4, 1, 0)
    padded = sum(m.tokens * 4 for s in steps for m in s)
    assert padded < 1.2 * sum(x.tokens for x in lengths)


# --- reading ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory, clip: Path) -> list[Record]:
    folder = tmp_path_factory.mktemp("records")
    Image.fromarray(np.full((40, 60, 3), 200, np.uint8)).save(folder / "i.png")
    (folder / "frames").mkdir()
    for i in range(6):
        Image.fromarray(np.full((30, 40, 3), 40 * i, np.uint8)).save(folder / "frames" / f"{i}.png")
    (folder / "bad.mp4").write_bytes(b"not a video")
    rows = [
        {"id": "clip", "video": str(clip), "conversations": turns("<image>\nWhat?", "Shapes.")},
        {"id": "picture", "image": "i.png", "conversations": turns("<image>\nWhat?", "Grey.")},
        {"id": "folder", "video": "frames", "conversations": turns("<image>\nWhat?", "Darker.")},
        {"id": "text", "conversations": turns("Hi", "Ho")},
        {"id": "bad", "video": "bad.mp4", "conversations": turns("<image>\nWhat?", "Shapes.")},
        {"id": "gone", "video": "gone.mp4", "conversations": turns("<image>\nWhat?", "Shapes.")},
    ]
    return read_records(written(folder, rows), 0)


SAMPLING = SampleConfig(1, 4, 8)


@pytest.mark.parametrize("workers", [0, 1])
def test_probe_names_what_cannot_be_read(records: list[Record], model: xl2jax.Model, workers: int) -> None:
    """Alike in threads and in processes, in the order of the records."""
    v = model.config.visual_tokens
    probe = probe_records(records, SAMPLING, model.tokenizer, v, 999, threads=2, workers=workers, decode_size=70)
    assert [None if x is None else x.groups for x in probe.lengths] == [2, 1, 1, 0, None, None]
    assert "bad.mp4: not a video" in probe.problems[4]
    assert "gone.mp4: no such video" in probe.problems[5]


@pytest.mark.parametrize("workers", [0, 1])
def test_rows_hold_their_samples(records: list[Record], model: xl2jax.Model, workers: int) -> None:
    v = model.config.visual_tokens
    probe = probe_records(records, SAMPLING, model.tokenizer, v, 999, threads=2)
    plan = [m for s in plan_epoch(probe.lengths, 2, 2, 0, 0, pack_to=250) for m in s]
    loader = Loader(records, SAMPLING, model.tokenizer, v, 999, 70)
    got = list(read_ahead(plan, loader, 0, process=0, processes=1, workers=workers, threads=2))
    assert len(got) == len(plan)
    assert sorted(s for part in got for s in part["samples"]) == ["clip", "folder", "picture", "text"]
    for part, micro in zip(got, plan, strict=True):
        for b, row in enumerate(micro.rows):
            t = f = 0
            for number, i in enumerate(row):
                clip = open_media(records[i], SAMPLING)
                frames = np.zeros((0, 70, 70, 3), np.uint8)
                if clip is not None:
                    frames = np.concatenate(list(clip.batches(99, 70)))
                length = probe.lengths[i]
                assert length is not None
                end = t + length.tokens
                assert (part["segment"][b, t:end] == number).all()
                assert np.array_equal(part["pixels"][b, f : f + len(frames)], frames)
                visual = part["visual"][b, t:end]
                assert visual[visual >= 0].tolist() == list(range(f // 4 * v, (f + len(frames)) // 4 * v))
                assert part["labels"][b, t] == IGNORE
                assert (part["labels"][b, t:end] != IGNORE).sum() > 3
                t, f = end, f + len(frames)
            assert (part["segment"][b, t:] == -1).all()
            assert (part["labels"][b, t:] == IGNORE).all()
    later = list(read_ahead(plan, loader, 1, process=0, processes=1, workers=0, threads=2))
    assert [p["samples"] for p in later] == [p["samples"] for p in got[1:]]
    halves = [list(read_ahead(plan, loader, 0, process=p, processes=2, workers=0, threads=1)) for p in (0, 1)]
    for whole, *parts in zip(got, *halves, strict=True):
        assert np.array_equal(whole["ids"], np.concatenate([p["ids"] for p in parts]))


def test_unreadable_when_training_leaves_its_place_empty(records: list[Record], model: xl2jax.Model) -> None:
    plan = plan_epoch([Length(2, 100)] * len(records), 6, 6, 0, 0)[0]
    loader = Loader(records, SAMPLING, model.tokenizer, model.config.visual_tokens, 999, 70)
    part = loader(plan[0])
    assert sorted(x.partition(":")[0] for x in part["failed"]) == ["bad", "gone"]
    for b, row in enumerate(plan[0].rows):
        if records[row[0]].id in ("bad", "gone"):
            assert (part["labels"][b] == IGNORE).all()
            assert not part["pixels"][b].any()
