"""Training records from JSON, JSON lines and YAML: well-formed, malformed and arbitrary files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from training_runs import turns

from xl2jax.errors import UserError
from xl2jax.training.records import Record, read_records


def written(folder: Path, rows: Any, strategy: str = "all") -> Path:
    (folder / "a.json").write_text(json.dumps(rows))
    path = folder / "data.yaml"
    path.write_text(f"datasets:\n  - json_path: a.json\n    sampling_strategy: '{strategy}'\n")
    return path


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
    assert [r.id for r in read_records(path, 0).records] == expected


def test_random_sampling_depends_on_the_seed(tmp_path: Path) -> None:
    path = written(tmp_path, [{"conversations": turns("Hi", "Ho")} for _ in range(100)], "random:10%")
    chosen = [tuple(r.id for r in read_records(path, seed).records) for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(set(chosen[0])) == 10


def test_record_fields(tmp_path: Path) -> None:
    rows = [
        {"id": 7, "video": "v.mp4", "scale": 2, "conversations": turns("<image>\nWhat?", "That.", "And?", "This.")},
        {"image": "sub/i.png", "conversations": turns("<image>Look", "Yes")},
        {"conversations": turns("Hi", "Ho")},
    ]
    one, two, three = read_records(written(tmp_path, rows), 0).records
    assert one == Record(
        "7", "video", tmp_path / "v.mp4",
        (("user", "\nWhat?"), ("assistant", "That."), ("user", "And?"), ("assistant", "This.")), 2.0,
    )  # fmt: skip
    assert (two.id, two.kind, two.pictures, two.turns[0][1]) == ("1", "image", (tmp_path / "sub/i.png",), "Look")
    assert (three.kind, three.media) == ("text", None)
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    again = read_records(tmp_path / "b.jsonl", 0, Path("/elsewhere")).records
    assert len(again) == 3
    assert again[0].media == Path("/elsewhere/v.mp4")


GOOD = {"id": "good", "conversations": turns("Hi", "Ho")}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"video": "a.mp4", "conversations": turns("What?", "That.")}, "does not start with <image>"),
        ({"conversations": turns("<image>What?", "That.")}, "contains <image> but has no video or image"),
        ({"video": "a.mp4", "conversations": turns("<image><image>", "x")}, "contains <image> 2 times"),
        ({"conversations": turns("What?")}, "has no answer"),
        ({"conversations": [{"from": "gpt", "value": "x"}, {"from": "human", "value": "y"}]}, "turn 1 is from gpt"),
        ({"conversations": [*turns("a", "b"), {"from": "gpt", "value": "c"}]}, "turn 3 is from gpt, expected human"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "conversations.0.from: .*'robot'"),
        ({"conversations": [{"from": "human"}]}, "conversations.0.value: is missing"),
        ({"conversations": []}, "conversations: "),
        ({"id": "x"}, "conversations: is missing"),
        ({"video": "a", "image": "b", "conversations": turns("<image>", "x")}, "both a video and an image"),
        ({"image": ["a", "b"], "conversations": turns("<image>", "x")}, "contains <image> 1 times for 2 images"),
        ({"image": "a", "conversations": turns("What?", "x")}, "contains <image> 0 times for 1 images"),
        ({"image": [], "conversations": turns("<image>", "x")}, "has no video or image"),
        ({"video": "a", "scale": -1, "conversations": turns("<image>", "x")}, "scale: .*-1"),
        ({"video": "a", "scale": 1e300, "conversations": turns("<image>", "x")}, "scale: .*1e"),
        ({"video": "a", "scale": True, "conversations": turns("<image>", "x")}, "scale: "),
        ({"video": "", "conversations": turns("<image>", "x")}, "video: should be the name of a file, not ''"),
        ({"image": " ", "conversations": turns("<image>", "x")}, "image.0: should be the name of a file"),
        ({"video": "a\0b", "conversations": turns("<image>", "x")}, "video: should be the name of a file"),
        ("text", "should be an object"),
        (None, "should be an object"),
    ],
)
def test_a_malformed_record_is_skipped_and_reported(tmp_path: Path, row: Any, message: str) -> None:
    """A malformed record is skipped, in JSON and in JSONL. If it is the only one, that is an error."""
    path = written(tmp_path, [GOOD, row])
    (tmp_path / "b.jsonl").write_text(f"{json.dumps(GOOD)}\n{json.dumps(row)}\n")
    for file, name in ((path, "a.json"), (tmp_path / "b.jsonl", "b.jsonl")):
        data = read_records(file, 0)
        assert [r.id for r in data.records] == ["good"]
        (line,) = data.malformed
        assert re.search(f"{name}: record 1(| .id x.): .*{message}", line)
        assert "\n" not in line
    with pytest.raises(UserError, match="the data set is empty .*a.json: record 0"):
        read_records(written(tmp_path, [row]), 0)


@pytest.mark.parametrize(
    "line",
    [
        "{", '{"id": NaN}', "[" * 100_000, '{"id": ' + "9" * 5000 + "}", '{"id": "\\ud800"}', b'{"id": "\xff"}', "\0",
    ],
)  # fmt: skip
def test_a_line_that_is_not_json_is_one_malformed_record(tmp_path: Path, line: str | bytes) -> None:
    data = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "b.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n" + data + b"\n" + json.dumps(GOOD).encode())
    result = read_records(tmp_path / "b.jsonl", 0)
    assert len(result.records) == 2
    assert len(result.malformed) == 1
    assert "b.jsonl: record 1: not JSON" in result.malformed[0]


def test_only_newlines_end_lines(tmp_path: Path) -> None:
    """JSON text may contain U+2028, U+0085 and similar characters, which do not end a line."""
    text = "one\u2028two\u0085three\u2029four\x1c"
    row = json.dumps({"conversations": turns(text, text)}, ensure_ascii=False)
    (tmp_path / "b.jsonl").write_text(f"{row}\r\n\n{row}", encoding="utf-8")
    data = read_records(tmp_path / "b.jsonl", 0)
    assert data.malformed == []
    assert [r.turns for r in data.records] == [(("user", text), ("assistant", text))] * 2


@pytest.mark.parametrize("name", [".", "./", "sub/..", "..", "/", "sub", "sub/deep/"])
def test_a_folder_of_media_is_no_video(tmp_path: Path, name: str) -> None:
    """The media root, its parents and folders of other videos are no videos: images in them are not frames."""
    rows = [
        {"id": "bad", "video": name, "conversations": turns("<image>", "x")},
        {"id": "frames", "video": "sub/frames", "conversations": turns("<image>", "x")},
        {"id": "picture", "image": "sub/frames/1.png", "conversations": turns("<image>", "x")},
        {"id": "talk", "video": "sub/deep/talk.mp4", "conversations": turns("<image>", "x")},
    ]
    data = read_records(written(tmp_path, rows), 0)
    assert [r.id for r in data.records] == ["frames", "picture", "talk"]
    assert "sample bad: " in data.malformed[0]
    assert "is the folder of other media" in data.malformed[0]
    alone = [r.id for r in read_records(written(tmp_path, [rows[0], GOOD]), 0).records]
    assert alone == (["good"] if not name.startswith("sub") or name == "sub/.." else ["bad", "good"])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("d.yaml", "datasets: [", "not YAML"), ("d.yaml", "other: 1", "datasets: is missing"),
        ("d.yaml", "datasets: []", "datasets: "), ("d.yaml", "[1]", "should be an object"),
        ("d.yaml", "datasets: [{path: a}]", "datasets.0.json_path: is missing"),
        ("d.yaml", "datasets: [{json_path: 3}]", "datasets.0.json_path: "),
        ("d.yaml", 'datasets: [{json_path: "a\\0"}]', "datasets.0.json_path: "),
        ("d.yaml", 'datasets: [{json_path: "\\ud800"}]', "d.yaml: "),
        ("d.yaml", "datasets: [{json_path: none.json}]", "none.json: no such file"),
        ("d.yaml", "datasets: [{json_path: .}]", "is a folder, not a regular file"),
        ("d.yaml", f"datasets: [{{json_path: {'a' * 5000}}}]", "cannot be read .File name too long"),
        ("d.yaml", "datasets: [{json_path: a.json, sampling_strategy: 'some:3'}]", "sampling_strategy 'some:3'"),
        ("d.yaml", "datasets: [{json_path: a.json, sampling_strategy: 'first:1e999%'}]", "sampling_strategy 'first:1e"),
        ("d.yaml", f"datasets: [{{json_path: a.json, sampling_strategy: 'first:{'9' * 5000}'}}]", "sampling_strategy"),
        ("d.yaml", "datasets: [{json_path: a.json, weight: 3}]", "datasets.0.weight: "),
        ("d.yaml", "[" * 50_000, "not YAML"),
        ("d.json", "[{]", "not JSON"), ("d.json", "{}", "should be a valid list"), ("d.json", "[]", "empty"),
        ("d.json", "[" * 100_000, "not JSON"), ("d.json", "[1" + "0" * 5000 + "]", "not JSON"),
        ("d.json", "[NaN]", "not JSON"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps([GOOD]))
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as e:
        read_records(tmp_path / name, 0)
    assert len(str(e.value)) < 7000
    with pytest.raises(UserError, match="no such file"):
        read_records(tmp_path / "nowhere.yaml", 0)


# Arbitrary JSON values, and values that resemble a record.
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
near_records = st.fixed_dictionaries(
    {},
    optional={
        "id": json_values,
        "video": json_values | st.sampled_from(["a.mp4", "", ".", "x" * 5000, "a/../.."]),
        "image": json_values | st.just("i.png"),
        "scale": json_values | st.just(2.0),
        "conversations": json_values
        | st.lists(st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "robot"]),
                                          "value": st.sampled_from(["<image>Who?", "Ho", "\ud800"]) | json_values}), max_size=3)
        | st.just(turns("<image>\nWho?", "Ho")) | st.just(turns("Who?", "Ho")),
    },
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(near_records | json_values, max_size=4), st.binary(max_size=20), st.integers(0, 10**6), st.booleans())
def test_any_data_gives_records_or_one_line(
    tmp_path: Path, rows: list[Any], noise: bytes, place: int, lines: bool
) -> None:
    """For any file contents, every record is read or reported, or one UserError says what is wrong."""
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
    data = text.encode()
    place %= len(data) + 1
    data = data[:place] + noise + data[place + len(noise) :]
    path = tmp_path / ("d.jsonl" if lines else "d.json")
    path.write_bytes(data)
    (tmp_path / "d.yaml").write_bytes(b"datasets: [{json_path: " + path.name.encode() + b"}]" + noise)
    for file in (path, tmp_path / "d.yaml"):
        try:
            result = read_records(file, 0)
        except UserError:
            continue
        assert result.records
        assert all("\n" not in x for x in result.malformed)
        for record in result.records:
            assert len(record.turns) >= 2
            assert 0 < record.scale <= 1e6
